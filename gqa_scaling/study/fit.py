"""A fit: the loss curves L(N; H) of all configurations, how sure they are, and what to beware of.

This is step 2 of Chen et al. 2025, section 4.1: (a/N)^b + E for each configuration, or one law for
all of them. `models` holds the laws, `solver` the least squares, `uncertainty` and `noise` what the
intervals rest on.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import between, require
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.study import laws
from gqa_scaling.study.laws import Curves
from gqa_scaling.study.models import (
    LAWS,
    MIN_SPREAD,
    Law,
    Model,
    SeparateCurves,
    formula,
    joint,
)
from gqa_scaling.study.noise import Noise, estimate
from gqa_scaling.study.points import Interval, Points, points
from gqa_scaling.study.results import Heads, Results, flags, heads_columns, pair, pattern_of
from gqa_scaling.study.solver import refit, solve_point
from gqa_scaling.study.uncertainty import (
    BOOTSTRAPS,
    LEVEL,
    REFITS,
    Bootstrap,
    clipped,
    influence,
    interval,
    pair_counts,
    rank,
    residual_noise,
    trust,
)

SUSPICIOUS = 0.05  # p-value below which errors are said to be shared
_MANY_FAILED = 0.05  # a larger share of failed refits is said to spoil the intervals
_SPOILED = 0.05  # weight below which a robust fit takes a run for spoiled
_ROUNDS = 8  # of a robust fit, each with the weights that the one before gave
_STRENGTHS = tuple(np.geomspace(1e-3, 1e5, 25))  # of the ridge of law "pooled"


@dataclass(frozen=True)
class Fit:
    """Curves with one shared E, how sure they are, and what must be known before using them.

    Losses, residuals, E and `sigma` are in nats, N in parameters counted as `count` says.
    `influence` is the change of E, in nats, that leaving the point out would make (linearised).
    `sigma` is the standard deviation of one run around its curve, replicates pooled in. Intervals
    are the central 90% of the `refits` bootstrap draws of the named kind that converged.
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
    spoiled: tuple[str, ...]
    rank: int
    converged: bool
    at_bound: str
    shared: Noise
    robust: bool
    bootstrap: Bootstrap
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

    @property
    def residual(self) -> np.ndarray:
        """Loss minus curve, nats, for each point."""
        return self.points.loss - self.predicted

    @property
    def r2(self) -> float:
        """Share of the variance of the losses that the curves explain."""
        return _r2(self, np.ones(len(self.points.n), bool))

    @property
    def r2_by_curve(self) -> np.ndarray:
        """The same for the points of each configuration."""
        return np.array([_r2(self, self.points.curve == k) for k in range(len(self.heads))])

    @property
    def formula(self) -> str:
        """The law in symbols, with what it says of patterns."""
        return formula(self.law, self.names)

    @property
    def n_parameters(self) -> int:
        return len(self.names)

    @property
    def scale(self) -> np.ndarray:
        """a of (a/N)^b in parameters, for each configuration."""
        return laws.scale(self.curves.u, self.curves.b, self.curves.centre)

    @property
    def constants(self) -> dict[str, tuple[float, Interval]]:
        """The parameters of `constant_names`, which all configurations share, with intervals."""
        return {
            name: (float(self.parameters[i]), interval(self.parameter_draws[:, i]))
            for i, name in enumerate(self.names)
            if name in self.constant_names
        }

    @property
    def how(self) -> str:
        """What the intervals are, in words."""
        kind = f"{'robust ' if self.robust else ''}{self.bootstrap}"
        return f"{LEVEL:.0%} percentile {kind} bootstrap, {self.refits} refits, seed {self.seed}"

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
        """Everything but the draws themselves, ready for JSON; units in the names."""
        a, (a_low, a_high) = (
            self.scale,
            interval(laws.scale(self.draws.u, self.draws.b, self.draws.centre)),
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
                "robust": self.robust,
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


# ------------------------------------------------------------------------------------ fitting


def fit(
    results: Results,
    *,
    context_length: int | None = None,
    law: Law = "separate",
    bootstrap: Bootstrap = "shared",
    robust: bool = False,
    refits: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit a curve for each head configuration with a shared E, and bootstrap it.

    `law` is "separate" (u and b of each configuration free) or one law for all configurations:
    "product", "sum", or "pooled" (see `models.formula`); joint laws also fit what sparsity costs
    where configurations differ in density. `context_length` names the training length when the runs
    span several. For `bootstrap` and `robust` see `fit_model`. Raises UserError when the runs are
    too few or cannot be compared, or when most refits fail.
    """
    _require_options(bootstrap, refits)
    require(law in LAWS, f"law={law!r} must be one of {', '.join(LAWS)}")
    p = points(results, context_length)
    fitted = fit_model(
        results,
        p,
        make_model(law, p, results.head_dim[0]),
        (p.size,),
        law=law,
        title=f"law {law!r}",
        remedy="add sizes, or fit a law with fewer parameters",
        context_length=context_length,
        bootstrap=bootstrap,
        robust=robust,
        refits=refits,
        seed=seed,
    )
    return flagged(fitted, (*flags(results), *_budget_flag(results)))


def fit_model(
    results: Results,
    p: Points,
    model: Model,
    groups: Sequence[np.ndarray],
    *,
    title: str,
    remedy: str = "add runs, of more sizes or with several seeds",
    law: Law = "separate",
    context_length: int | None = None,
    bootstrap: Bootstrap = "shared",
    robust: bool = False,
    refits: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit the model to the points and bootstrap it; the flags of the `Fit` are yet to be set.

    `groups` are ways to label the points whose errors may be common (a size whatever else, or a
    size in one setting); the one that the residuals speak for most is used. `title` names what is
    fitted, and `remedy` says what to do where it cannot be.

    bootstrap "shared" draws independent errors and errors common to a group, each as large as the
    runs allow; "residual" redraws the residuals, scaled for the freedom the fit took; "pairs"
    redraws the points of each curve. `robust` weighs runs far off their curve down (Tukey's
    biweight, scaled by the median absolute residual). Raises UserError when half of the refits or
    more fail: the others are then a selection, and no interval comes from none.
    """
    _require_options(bootstrap, refits)
    w, ridge = p.replicates.astype(float), model.ridge
    best, trusted = solve_point(model, p.loss, w), np.ones(len(p.n))
    leverage, _ = influence(best.absorbing, w, p.loss, ridge)
    lean = 1 / np.sqrt(np.maximum(1 - leverage, 0.05))  # a curve follows a run it rests on
    for _ in range(_ROUNDS if robust else 0):
        away = p.loss - model.predict(best.parameters[None])
        trusted = trust(lean * away, w)[0]
        best = solve_point(model, p.loss, w * trusted, best.parameters)
    predicted = model.predict(best.parameters[None])[0]
    residual, spoiled = p.loss - predicted, trusted < _SPOILED
    noise_residual = residual
    if robust:
        noise_residual = np.where(spoiled, 0, clipped(residual, w, len(model.names)))
    leverage, change = influence(best.absorbing, w * trusted, residual, ridge)
    seeds = p.noise_dof * (p.noise or 0.0) ** 2
    dof = max(len(p.n) - spoiled.sum() - leverage.sum(), 1.0) + p.noise_dof
    sigma = float(np.sqrt(((w * noise_residual**2).sum() + seeds) / dof))
    ways = [
        estimate(noise_residual, best.absorbing, w, group, seeds, p.noise_dof, seed)
        for group in groups
    ]
    common = min(ways, key=lambda noise: 1.0 if noise.p_value is None else noise.p_value)
    rng = np.random.default_rng(seed)
    y, weights = np.tile(p.loss, (refits, 1)), np.tile(w, (refits, 1))
    if bootstrap == "pairs":
        weights = w * pair_counts(p.curve, refits, rng)
    else:
        if bootstrap == "shared":
            noise = common.draw(refits, rng)
        else:
            noise = residual_noise(noise_residual, w, leverage, sigma, dof, refits, rng)
        y = np.maximum(predicted + noise, 1e-3 * p.loss)  # losses are above 0
    rows, _, done = refit(model, y, weights, np.tile(best.parameters, (refits, 1)))
    for _ in range(_ROUNDS if robust else 0):
        again = weights * trust(lean * (y - model.predict(rows)), weights)
        rows, _, done = refit(model, y, again, rows)
    failed = int((~done).sum())
    require(
        2 * failed < refits,
        f"{results.source}: {title}: {failed} of {refits} refits did not converge: these runs do "
        f"not determine it; {remedy}",
    )
    return Fit(
        source=results.source,
        count=results.count,
        points=p,
        context_length=context_length,
        law=law,
        curves=model.curves(best.parameters),
        draws=model.curves(rows[done]),
        names=model.names,
        constant_names=model.constants,
        parameters=best.parameters,
        parameter_draws=rows[done],
        predicted=predicted,
        leverage=leverage,
        influence=change,
        sigma=sigma,
        spoiled=tuple(p.name[spoiled].tolist()),
        rank=rank(best.jacobian, w * trusted, ridge),
        converged=best.converged,
        at_bound=best.at_bound,
        shared=common,
        robust=robust,
        bootstrap=bootstrap,
        refits=refits,
        refits_failed=failed,
        seed=seed,
    )


def _require_options(bootstrap: Bootstrap, refits: int) -> None:
    require(
        bootstrap in BOOTSTRAPS, f"bootstrap={bootstrap!r} must be one of {', '.join(BOOTSTRAPS)}"
    )
    between("refits", refits, *REFITS)


def require_no_pairs(bootstrap: Bootstrap) -> None:
    """Refuse to redraw points for a law with terms that curves share besides E.

    Points redrawn may leave such a term without any run.
    """
    require(
        bootstrap != "pairs",
        f"bootstrap={bootstrap!r} redraws the points of one curve and does not serve runs of "
        "several training contexts or token budgets; use shared or residual",
    )


def make_model(law: Law, p: Points, head_dim: int, seen: np.ndarray | None = None) -> Model:
    """The model of a law for these points; UserError when it needs shapes or configurations.

    The strength of the ridge of "pooled" is the one that predicts left-out points best (their
    error by leverage, not by refitting), of the points that `seen` marks, or of all without it.
    """
    if law == "separate":
        return SeparateCurves(p)
    model = joint(law, p, head_dim, _STRENGTHS[0])
    if law != "pooled":
        return model
    w = p.replicates * (np.ones(len(p.n)) if seen is None else seen)
    begin, errors = solve_point(model, p.loss, w).parameters, []
    for strength in _STRENGTHS:
        trial = joint(law, p, head_dim, strength)
        found = solve_point(trial, p.loss, w, begin)
        residual = p.loss - trial.predict(found.parameters[None])[0]
        leverage, _ = influence(found.absorbing, w, residual, trial.ridge)
        errors.append(float((w * (residual / np.maximum(1 - leverage, 1e-3)) ** 2).sum()))
    return joint(law, p, head_dim, _STRENGTHS[int(np.argmin(errors))])


def brought(
    fitted: Fit,
    model: Model,
    offset: np.ndarray,
    more: tuple[np.ndarray | float, np.ndarray | float] = (0.0, 0.0),
) -> Fit:
    """The fit in one setting: its curves there, and every point brought there.

    `offset` is taken from each point; `more` is what the setting adds to E, for the best parameters
    and for each draw; all in nats.
    """
    return dataclasses.replace(
        fitted,
        points=dataclasses.replace(fitted.points, loss=fitted.points.loss - offset),
        predicted=fitted.predicted - offset,
        curves=model.curves(fitted.parameters, more[0]),
        draws=model.curves(fitted.parameter_draws, more[1]),
    )


# ------------------------------------------------------------------- what a reader must know


def _budget_flag(results: Results) -> list[str]:
    """A warning when neither tokens nor tokens per parameter are the same for all runs."""
    tokens = np.asarray(results.tokens, float)
    known = np.isfinite(tokens)
    if not known.any():
        return []
    for budget in (tokens[known], tokens[known] / results.n_params[known]):
        if budget.max() <= 1.1 * budget.min():
            return []
    return [
        "neither tokens nor tokens per parameter are the same for all runs: the curves mix what size "
        "does with what data does"
    ]


def flagged(fitted: Fit, known: Sequence[str]) -> Fit:
    """The fit with everything a reader must know, in words."""
    out = list(known)
    if not fitted.converged:
        out.append("the fit did not converge: do not use it")
    if fitted.at_bound:
        bound = "0" if fitted.at_bound == "lower" else "the least loss"
        pairs = (
            "; the pairs bootstrap cannot show how unsure" if fitted.bootstrap == "pairs" else ""
        )
        out.append(f"E is at its bound ({bound}): not identified by these runs{pairs}")
    if fitted.spoiled:
        out.append(f"left aside as spoiled by the robust fit: {', '.join(fitted.spoiled)}")
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
        remedy = "" if fitted.bootstrap == "shared" else '; use bootstrap "shared"'
        out.append(
            f"runs of one size err together by {1e3 * shared:.1f} millinats "
            f"(p = {p_value:.3f}), as one learning rate per size makes them{remedy}"
        )
    if p.noise is None:
        out.append("no replicate seeds: the noise is judged from the residuals alone")
    return dataclasses.replace(fitted, flags=tuple(out))
