"""A fitted law: curves, intervals, what each point does to them, and what to beware of."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.study.choices import Law
from gqa_scaling.study.curves import Curves, scale_of
from gqa_scaling.study.misfit import ROUNDED, SUSPICIOUS, Misfit
from gqa_scaling.study.models import MIN_SPREAD, formula
from gqa_scaling.study.noise import Noise
from gqa_scaling.study.points import Interval, Points
from gqa_scaling.study.results import Heads, Results, heads_columns, pair, pattern_of
from gqa_scaling.study.uncertainty import LEVEL, interval

_MANY_FAILED = 0.05  # a larger share of failed refits is said to spoil the intervals


@dataclass(frozen=True)
class Fit:
    """Curves with one shared E, how sure they are, and what must be known before using them.

    Losses, residuals, E and `sigma` are in nats, N in parameters counted as `count` says.
    `influence` is the change of E, in nats, that leaving the point out would make (linearised).
    `sigma` is the standard deviation of one run around its curve, replicates pooled in. Intervals
    are the central 90% of those of `refits` bootstrap draws that converged: losses with fresh errors
    of the runs and of sizes, as large as `shared` allows, fitted again. `strange` names a point that is
    too far off its curve for chance; "" for none.
    """

    source: str
    count: str
    points: Points
    context_length: int | None
    law: Law
    curves: Curves
    draws: Curves
    names: tuple[str, ...]
    constant_names: tuple[str, ...]
    parameters: np.ndarray
    parameter_draws: np.ndarray
    predicted: np.ndarray
    leverage: np.ndarray
    influence: np.ndarray
    sigma: float
    strange: str
    rank: int
    converged: bool
    at_bound: str
    shared: Noise
    misfit: Misfit
    refits: int
    refits_failed: int
    seed: int
    flags: tuple[str, ...] = ()

    @property
    def heads(self) -> tuple[Heads, ...]:
        return self.points.heads

    @property
    def floor(self) -> float:
        """E in nats."""
        return float(self.curves.floor)

    @property
    def floor_interval(self) -> Interval:
        return interval(self.draws.floor)

    def trained_at(self, results: Results) -> int:
        """The context length, in tokens, that the runs were trained at; of several the longest."""
        return int(self.context_length or results.context_length.max())

    @property
    def residual(self) -> np.ndarray:
        return self.points.loss - self.predicted

    @property
    def r2(self) -> float:
        """Share of the variance of the losses that the curves explain."""
        return _r2(self, np.ones(len(self.points.n), bool))

    @property
    def r2_by_curve(self) -> np.ndarray:
        return np.array([_r2(self, self.points.curve == k) for k in range(len(self.heads))])

    @property
    def formula(self) -> str:
        return formula(self.law, self.names)

    @property
    def n_parameters(self) -> int:
        return len(self.names)

    @property
    def scale(self) -> np.ndarray:
        """a of (a/N)^b in parameters, for each configuration."""
        return scale_of(self.curves.u, self.curves.b, self.curves.centre)

    @property
    def constants(self) -> dict[str, tuple[float, Interval]]:
        """The parameters of `constant_names`, which all configurations share, with intervals.

        In the product law "p - q" is how much more a doubling of query heads gains than one of KV
        heads, in each refit: whether the intervals of p and q overlap does not tell it.
        """
        found = {
            name: (float(self.parameters[i]), interval(self.parameter_draws[:, i]))
            for i, name in enumerate(self.names)
            if name in self.constant_names
        }
        if self.law == "product" and {"p", "q"} <= found.keys():
            p, q = map(self.names.index, "pq")
            draws = self.parameter_draws[:, p] - self.parameter_draws[:, q]
            found["p - q"] = float(self.parameters[p] - self.parameters[q]), interval(draws)
        return found

    @property
    def how(self) -> str:
        """What the intervals are, in words."""
        return f"{LEVEL:.0%} percentile bootstrap, {self.refits} refits, seed {self.seed}"

    @property
    def left_out(self) -> str:
        """What failed refits mean for the intervals, in words; "" where none failed."""
        if not self.refits_failed:
            return ""
        many = self.refits_failed > _MANY_FAILED * self.refits
        return f"{self.refits_failed} of {self.refits} refits did not converge, left out" + (
            ": the intervals are too short" if many else ""
        )

    def index(self, heads: Heads) -> int:
        require(
            heads in self.heads,
            f"configuration {pair(heads)} is not in this study; there are "
            f"{', '.join(map(pair, self.heads))}",
        )
        return self.heads.index(heads)

    def to_dict(self) -> dict[str, Any]:
        a, (a_low, a_high) = (
            self.scale,
            interval(scale_of(self.draws.u, self.draws.b, self.draws.centre)),
        )
        b_low, b_high = interval(self.draws.b)
        p = self.points
        return plain(
            {
                "source": self.source,
                "law": self.law,
                "formula": self.formula,
                "constants": self.constants,
                "n_count": self.count,
                "E_nats": self.floor,
                "E_interval_nats": self.floor_interval,
                "r2": self.r2,
                "sigma_nats": self.sigma,
                "misfit": self.misfit.to_dict(),
                "strange": self.strange,
                "shared_sigma_nats": self.shared.shared,
                "shared_p_value": self.shared.p_value,
                "replicate_sigma_nats": p.noise,
                "replicate_dof": p.noise_dof,
                "intervals": self.how,
                "refits_failed": self.refits_failed,
                "converged": self.converged,
                "at_bound": self.at_bound,
                "jacobian_rank": self.rank,
                "parameters": self.n_parameters,
                "flags": list(self.flags),
                "curves": [
                    {
                        **heads_columns(heads),
                        "a_parameters": a[k],
                        "a_interval_parameters": (a_low[k], a_high[k]),
                        "b": self.curves.b[k],
                        "b_interval": (b_low[k], b_high[k]),
                        "r2": self.r2_by_curve[k],
                        "n_range": p.range_n(k),
                        "sizes": int((p.curve == k).sum()),
                        **({"density": p.density[k]} if pattern_of(heads) else {}),
                    }
                    for k, heads in enumerate(self.heads)
                ],
                "points": [
                    {
                        "name": p.name[i],
                        **heads_columns(self.heads[p.curve[i]]),
                        "n": p.n[i],
                        "replicates": p.replicates[i],
                        "loss_nats": p.loss[i],
                        "predicted_nats": self.predicted[i],
                        "residual_nats": self.residual[i],
                        "leverage": self.leverage[i],
                        "influence_on_E_nats": self.influence[i],
                    }
                    for i in range(len(p.n))
                ],
            }
        )


def plain(value: Any) -> Any:
    """JSON's own types: NumPy scalars and arrays as numbers and lists, NaN and inf as None."""
    if isinstance(value, ContextSharding):
        return plain(value.to_dict())
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _r2(fit: Fit, mine: np.ndarray) -> float:
    y, w = fit.points.loss[mine], fit.points.replicates[mine]
    total = (w * (y - np.average(y, weights=w)) ** 2).sum()
    return float(1 - (w * fit.residual[mine] ** 2).sum() / total) if total > 0 else float("nan")


def flagged(fitted: Fit, known: Sequence[str]) -> Fit:
    """The fit with everything a reader must know, in words."""
    out = list(known)
    if not fitted.converged:
        out.append("the fit did not converge: do not use it")
    if fitted.at_bound:
        bound = "0" if fitted.at_bound == "lower" else "the least loss"
        out.append(f"E is at its bound ({bound}): not identified by these runs")
    if fitted.strange:
        out.append(
            f"too far off its curve for chance: {fitted.strange}; see what hangs on it by a fit "
            "without it"
        )
    if fitted.rank < fitted.n_parameters:
        out.append(f"only {fitted.rank} of {fitted.n_parameters} parameters are determined")
    rising = [pair(h) for h, b in zip(fitted.heads, fitted.curves.b, strict=True) if b <= 0]
    if rising:
        out.append(f"loss does not fall with N for {', '.join(rising)}")
    if fitted.refits_failed:
        out.append(fitted.left_out)
    p = fitted.points
    told_apart = 1 + int((np.diff(np.sort(np.log2(p.density))) > MIN_SPREAD).sum())
    if fitted.law != "separate" and any(map(pattern_of, p.heads)):
        if "r" not in fitted.names:
            out.append("all runs have one density: what sparsity costs in loss is not fitted")
        elif told_apart < 3:
            out.append("two densities: that the loss follows a power of density is not tested")
    shared, p_value = fitted.shared.shared, fitted.shared.p_value
    if p_value is None and len(p.heads) > 1:
        out.append(
            "errors shared by a size cannot be told from others, intervals assume none: give "
            "columns n_layers and d_model, and run the same sizes for every configuration"
        )
    if shared is not None and p_value is not None and p_value < SUSPICIOUS:
        out.append(
            f"runs of one size err together by {1e3 * shared:.1f} millinats (p = {p_value:.3f}), as "
            "one learning rate per size makes them, or curves that bend otherwise than the law"
        )
    if fitted.misfit.flag:
        out.append(fitted.misfit.flag)
    if p.noise is None:
        out.append("no replicate seeds: the noise is judged from the residuals alone")
    elif p.noise <= ROUNDED:
        out.append(
            "replicate seeds end in identical losses, as they do where a seed is never used: they say "
            "nothing of the noise"
        )
    return dataclasses.replace(fitted, flags=tuple(out))
