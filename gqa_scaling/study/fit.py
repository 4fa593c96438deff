"""Estimation and uncertainty: loss curves L(N; H) = (a/N)^b + E with one E for all heads H.

This is step 2 of Chen et al. 2025, section 4.1; `models` holds the laws and their solvers. Around
the fit stand a bootstrap, the noise behind it, and whatever must be known before using the curves.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gqa_scaling.config import between, require
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.ladder import MOST_PARAMETERS
from gqa_scaling.study import laws
from gqa_scaling.study.choices import Bootstrap, Law
from gqa_scaling.study.models import (
    LAWS,
    MIN_SPREAD,
    Backbone,
    Curves,
    Joint,
    Model,
    Separate,
    absorbing,
    floor_limits,
    formula,
    solve_point,
)
from gqa_scaling.study.noise import Noise, estimate
from gqa_scaling.study.results import Heads, Results, flags, heads_columns, pair, pattern_of
from gqa_scaling.study.shapes import shapes

BOOTSTRAPS: tuple[Bootstrap, ...] = ("shared", "residual", "pairs")
LEVEL = 0.90  # of every interval that is printed
REFITS = (100, 10_000)  # fewer give no interval, more narrow none and take memory
MIN_SIZES = 3
SUSPICIOUS = 0.05  # p-value below which errors are said to be shared
MANY_FAILED = 0.05  # a larger share of failed refits is said to spoil the intervals
_SPOILED = 0.05  # weight below which a robust fit takes a run for spoiled
_BISQUARE, _CLIP, _CLIPPED_VARIANCE, _ROUNDS = 4.685, 2.0, 0.9205, 8
Interval = tuple[float, float]


def interval(draws: np.ndarray, axis: int = 0) -> Any:
    """The central 90% of bootstrap draws (percentile interval)."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, (tail, 100 - tail), axis=axis, method="inverted_cdf")
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


# -------------------------------------------------------------------------------------- points


@dataclass(frozen=True)
class Points:
    """What is fitted: the mean loss of each (heads, size), sorted by heads and then by N.

    `replicates` counts the seeds behind each mean. `noise` is the standard deviation of one run
    around its cell's mean, in nats, from `noise_dof` degrees of freedom; None without replicates.
    `density` is that of each configuration's attention at the training context (share of the causal
    query-key pairs that are computed; 1 when dense), a geometric mean over its sizes.
    """

    heads: tuple[Heads, ...]
    curve: np.ndarray  # index into heads
    n: np.ndarray
    n_layers: np.ndarray
    d_model: np.ndarray
    loss: np.ndarray
    replicates: np.ndarray
    name: np.ndarray
    noise: float | None
    noise_dof: int
    density: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Mean ln N of each curve."""
        x = np.log(self.n)
        return np.array([x[self.curve == k].mean() for k in range(len(self.heads))])

    def range_n(self, k: int) -> Interval:
        n = self.n[self.curve == k]
        return float(n.min()), float(n.max())


def points(results: Results, context_length: int | None = None) -> Points:
    """Average replicate seeds and order the runs for a fit at one context length.

    Raises UserError when the runs span several context lengths and none is named, when a curve
    has fewer than three sizes, or when nothing would be left to judge the noise by.
    """
    r = results
    lengths = sorted(set(r.context_length.tolist()))
    if context_length is not None:
        require(
            context_length in lengths,
            f"{r.source}: no runs at context length {context_length}; there are "
            f"{', '.join(map(str, lengths))}",
        )
        r = r.select(r.context_length == context_length)
    else:
        require(
            len(lengths) == 1,
            f"{r.source}: runs at context lengths {', '.join(map(str, lengths))} cannot share a "
            "curve; name one of them",
        )
    require(
        len(np.unique(r.head_dim)) == 1,
        f"{r.source}: head sizes {', '.join(map(str, np.unique(r.head_dim)))} cannot share a study; "
        "fit one of them",
    )
    shape = list(zip(r.heads, r.n_params, r.n_layers, r.d_model, strict=True))
    cells: dict[tuple, list[int]] = {}
    for i in sorted(range(len(r)), key=lambda i: shape[i]):
        cells.setdefault(shape[i], []).append(i)
    for cell in cells.values():
        budgets = sorted({float(t) for t in r.tokens[cell] if t == t})
        require(
            len(budgets) < 2,
            f"{r.source}: {r.name[cell[0]]} was trained on {', '.join(f'{b:,.0f}' for b in budgets)} "
            "tokens; a curve needs one token budget for each size",
        )
    heads = tuple(dict.fromkeys(key[0] for key in cells))
    sizes = {h: sum(key[0] == h for key in cells) for h in heads}
    short = [f"{pair(h)} has {sizes[h]}" for h in heads if sizes[h] < MIN_SIZES]
    missing = f"; not finished: {', '.join(r.missing)}" if r.missing else ""
    require(
        not short,
        f"{r.source}: too few runs to fit: each configuration needs {MIN_SIZES} sizes, but "
        f"{', '.join(short)}{missing}",
    )
    require(
        len(cells) > 2 * len(heads) + 1,
        f"{r.source}: too few runs to fit: {len(cells)} points leave nothing to judge the noise of "
        f"{2 * len(heads) + 1} parameters; add a size or a configuration{missing}",
    )
    curve = np.array([heads.index(key[0]) for key in cells])
    deviations = [r.loss[cell] - r.loss[cell].mean() for cell in cells.values()]
    dof = len(r) - len(cells)
    noise = float(np.sqrt(sum((d**2).sum() for d in deviations) / dof)) if dof else None
    return Points(
        heads=heads,
        curve=curve,
        n=np.array([key[1] for key in cells]),
        n_layers=np.array([key[2] for key in cells]),
        d_model=np.array([key[3] for key in cells]),
        loss=np.array([r.loss[cell].mean() for cell in cells.values()]),
        replicates=np.array([len(cell) for cell in cells.values()]),
        name=np.array([r.name[cell[0]] for cell in cells.values()], dtype=object),
        noise=noise,
        noise_dof=dof,
        density=densities(r.density[[cell[0] for cell in cells.values()]], curve),
    )


def densities(density: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The geometric mean over the points of each configuration."""
    return np.exp(np.bincount(curve, np.log(density)) / np.bincount(curve))


def labels(*columns: np.ndarray) -> np.ndarray:
    """One label for every combination of these columns that occurs."""
    whole = np.stack([np.asarray(c, float) for c in columns])
    return np.unique(whole, axis=1, return_inverse=True)[1].ravel()


def size_labels(
    curve: np.ndarray, n: np.ndarray, n_layers: np.ndarray, d_model: np.ndarray
) -> np.ndarray:
    """A label for the size of each point or run: its (L, d), else the rank of its N on its curve.

    Sizes are counted in this one way wherever errors of a size, or a size at several context
    lengths, are looked at. Without shapes, ranks say which sizes belong together only where every
    curve has equally many; elsewhere each size of each curve stands for itself.
    """
    if n_layers.all():
        return labels(n_layers, d_model)
    ranks = np.zeros(len(n), int)
    for k in range(curve.max() + 1):
        ranks[curve == k] = np.unique(n[curve == k], return_inverse=True)[1]
    most = [ranks[curve == k].max() for k in range(curve.max() + 1)]
    return labels(curve, n) if np.ptp(most) else ranks


def sizes(p: Points) -> np.ndarray:
    """`size_labels` of the points of a fit."""
    return size_labels(p.curve, p.n, p.n_layers, p.d_model)


# ------------------------------------------------------------------------------------- the fit


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
    parameters: np.ndarray
    parameter_draws: np.ndarray
    predicted: np.ndarray
    leverage: np.ndarray
    influence: np.ndarray
    sigma: float
    r2: float
    r2_by_curve: np.ndarray
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
    flags: tuple[str, ...] = field(default=())

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
        """The parameters that all configurations share, each with its interval."""
        shared = [i for i, name in enumerate(self.names) if not name[-1].isdigit()]
        return {
            self.names[i]: (float(self.parameters[i]), interval(self.parameter_draws[:, i]))
            for i in shared
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
        many = self.refits_failed > MANY_FAILED * self.refits
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
    "product", "sum", or "pooled" (see `models.FORMULAS`); joint laws also fit what sparsity costs
    where configurations differ in density.

    `context_length` names the training length when the runs span several. bootstrap "shared"
    draws independent errors and errors common to all models of a size, each as large as the runs
    allow; "residual" redraws the residuals, scaled for the freedom the fit took; "pairs" redraws
    the points of each curve. `robust` weighs runs far off their curve down (Tukey's biweight,
    scaled by the median absolute residual). Raises UserError when the runs are too few or cannot
    be compared, or when most refits fail.
    """
    require(
        bootstrap in BOOTSTRAPS, f"bootstrap={bootstrap!r} must be one of {', '.join(BOOTSTRAPS)}"
    )
    between("refits", refits, *REFITS)
    require(law in LAWS, f"law={law!r} must be one of {', '.join(LAWS)}")
    p = points(results, context_length)
    weights = p.replicates.astype(float)
    model, ridge = make_model(law, p, results.head_dim[0])
    best, trust = solve_point(model, p.loss, weights, ridge), np.ones(len(p.n))
    moving = absorbing(best.jacobian, best.at_bound)
    leverage, _ = _influence(moving, weights, p.loss, ridge)
    lean = 1 / np.sqrt(np.maximum(1 - leverage, 0.05))  # a curve follows a run it rests on
    for _ in range(_ROUNDS if robust else 0):
        at = model.predict(best.parameters[None])
        trust = _trust(lean * (p.loss[None] - at), weights)[0]
        best = solve_point(model, p.loss, weights * trust, ridge)
    predicted = model.predict(best.parameters[None])[0]
    residual = p.loss - predicted
    spoiled = trust < _SPOILED
    noise_residual = residual
    if robust:
        noise_residual = np.where(spoiled, 0, _clipped(residual, weights, len(model.names)))
    squares, pure = (weights * noise_residual**2).sum(), p.noise_dof * (p.noise or 0.0) ** 2
    moving = absorbing(best.jacobian, best.at_bound)
    leverage, influence = _influence(moving, weights * trust, residual, ridge)
    noise_dof = max(len(p.n) - spoiled.sum() - leverage.sum(), 1.0) + p.noise_dof
    sigma = float(np.sqrt((squares + pure) / noise_dof))
    common = estimate(noise_residual, moving, weights, sizes(p), pure, p.noise_dof, seed)
    rng = np.random.default_rng(seed)
    if bootstrap == "pairs":
        y = np.broadcast_to(p.loss, (refits, len(p.loss)))
        w = weights * _pairs(p.curve, refits, rng)
    else:
        if bootstrap == "shared":
            noise = common.draw(refits, rng)
        else:
            noise = _noise(noise_residual, weights, leverage, sigma, noise_dof, refits, rng)
        y = drawn(predicted, noise, p.loss)
        w = np.broadcast_to(weights, noise.shape)
    limits = floor_limits(np.where(w > 0, y, y.max()))
    rows, _, done = model.solve(y, w, np.repeat(best.parameters[None], refits, 0), limits)
    for _ in range(_ROUNDS if robust else 0):
        trusted = w * _trust(lean * (y - model.predict(rows)), w)
        rows, _, done = model.solve(y, trusted, rows, limits)
    rows = converged_draws(
        rows,
        done,
        f"{results.source}: law {law!r}",
        "add sizes, or fit a law with fewer parameters",
    )
    fitted = Fit(
        source=results.source,
        count=results.count,
        points=p,
        context_length=context_length,
        law=law,
        curves=model.curves(best.parameters),
        draws=model.curves(rows),
        names=model.names,
        parameters=best.parameters,
        parameter_draws=rows,
        predicted=predicted,
        leverage=leverage,
        influence=influence,
        sigma=sigma,
        r2=_r2(p.loss, predicted, weights),
        r2_by_curve=np.array(
            [
                _r2(p.loss[p.curve == k], predicted[p.curve == k], weights[p.curve == k])
                for k in range(len(p.heads))
            ]
        ),
        spoiled=tuple(p.name[spoiled].tolist()),
        rank=_rank(best.jacobian, weights * trust, ridge),
        converged=best.converged,
        at_bound=best.at_bound,
        shared=common,
        robust=robust,
        bootstrap=bootstrap,
        refits=refits,
        refits_failed=refits - len(rows),
        seed=seed,
    )
    return _flagged(fitted, (*flags(results), *_budget_flag(results)))


def drawn(predicted: np.ndarray, noise: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """The losses of every refit: the curves with fresh noise, kept above 0 as losses are."""
    return np.maximum(predicted + noise, 1e-3 * loss)


def converged_draws(rows: np.ndarray, done: np.ndarray, law: str, remedy: str) -> np.ndarray:
    """The refits that converged, for intervals. Every engine takes its draws through here.

    `law` names the runs and what was fitted to them. Raises UserError where half of the refits or
    more failed: the others are then a selection, and no interval comes from none.
    """
    failed = int((~done).sum())
    require(
        2 * failed < len(done),
        f"{law}: {failed} of {len(done)} refits did not converge: these runs do not determine it; "
        f"{remedy}",
    )
    return rows[done]


_STRENGTHS = tuple(np.geomspace(1e-3, 1e5, 25))


def make_model(
    law: Law, p: Points, head_dim: int, seen: np.ndarray | None = None
) -> tuple[Model, np.ndarray]:
    """The model of a law for these points, and its ridge; UserError when shapes are needed.

    The strength of a ridge is chosen on the points that `seen` marks, on all without it.
    """
    if law == "separate":
        model = Separate(p.curve, np.log(p.n) - p.centre[p.curve], p.centre)
        return model, np.zeros(len(model.names))
    require(
        bool(p.n_layers.all()),
        f"law={law!r} is one of N_b = 8 L d^2: the data needs columns n_layers and d_model",
    )
    need = {"product": 2, "sum": 3, "pooled": 3}[law]
    pairs = [heads[:2] for heads in p.heads]
    there = len(set(pairs)) if law == "sum" else len(pairs)
    require(there >= need, f"law={law!r} needs {need} head configurations, there are {there}")
    log_backbone = np.log(n_formula(p.n_layers, p.d_model, 0, 0))
    backbone = _backbone(p, head_dim)
    shared = (law, pairs, p.density, p.curve, log_backbone, backbone)
    model = Joint(*shared)
    if law == "pooled":  # the strength that predicts left-out runs best
        keep = np.ones(len(p.n), bool) if seen is None else seen
        w, y = p.replicates * keep.astype(float), np.where(keep, p.loss, p.loss[keep].max())
        begin = model.start(y, w)  # no strength enters it

        def left_out(strength: float) -> float:
            trial = Joint(*shared, strength)
            found = solve_point(trial, y, w, trial.ridge, begin)
            residual = y - trial.predict(found.parameters[None])[0]
            moving = absorbing(found.jacobian, found.at_bound)
            leverage, _ = _influence(moving, w, residual, trial.ridge)
            return float((w * (residual / np.maximum(1 - leverage, 1e-3)) ** 2).sum())

        model = Joint(*shared, min(_STRENGTHS, key=left_out))
    return model, model.ridge


def _backbone(p: Points, head_dim: int) -> Backbone:
    """N against N_b along the study's own ladder, for each configuration."""
    ladder = sorted(set(zip(p.n_layers.tolist(), p.d_model.tolist(), strict=True)))
    at = np.log(n_formula(p.n_layers, p.d_model, 0, 0))
    grid = np.linspace(at.min() - 12, at.max() + 12, 600)
    # as far as any size that a study may answer with, so that no curve ends before
    small, large = (
        at.min() - np.linspace(16, 12, 40),
        np.linspace(grid[-1], np.log(MOST_PARAMETERS), 40),
    )
    grid = np.unique(np.r_[small, grid, large[large > grid[-1]], at])
    layers, width = shapes(np.exp(grid), (0, 0), head_dim, ladder)
    log_n = []
    for k, heads in enumerate(p.heads):
        mine = p.curve == k
        formula = n_formula(p.n_layers[mine], p.d_model[mine], *heads[:2], head_dim)
        order = np.argsort(formula)
        counted = np.log(p.n[mine] / formula)[order]  # 0 unless N is counted exactly
        whole = np.log(n_formula(layers, width, *heads[:2], head_dim))
        log_n.append(whole + np.interp(whole, np.log(formula[order]), counted))
    return Backbone(grid, np.array(log_n))


def _scale_of(residual: np.ndarray, w: np.ndarray, parameters: int) -> np.ndarray:
    """Standard deviation from the median absolute residual, of one run, last axis kept."""
    n = residual.shape[-1]
    middle = np.median(np.abs(np.sqrt(w) * residual), axis=-1, keepdims=True)
    return np.maximum(1.4826 * middle * np.sqrt(n / (n - parameters)), 1e-12)


def _trust(residual: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Tukey's weights: 1 on the curve, 0 for a run so far off that it must be spoiled."""
    distance = np.abs(np.sqrt(w) * residual) / (_BISQUARE * _scale_of(residual, w, 0))
    return np.maximum(1 - np.minimum(distance, 1) ** 2, 1e-4) ** 2


def _clipped(residual: np.ndarray, w: np.ndarray, parameters: int) -> np.ndarray:
    """Residuals with those of spoiled runs cut back, their variance kept for good ones."""
    most = _CLIP * _scale_of(residual, w, parameters) / np.sqrt(w)
    return np.clip(residual, -most, most) / np.sqrt(_CLIPPED_VARIANCE)


def _noise(
    residual: np.ndarray,
    w: np.ndarray,
    leverage: np.ndarray,
    sigma: float,
    dof: float,
    refits: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fresh noise for every refit: residuals redrawn, scaled to `sigma`, itself uncertain.

    With few runs sigma may be well off; drawing it from its scaled inverse chi-squared makes the
    intervals as wide as Student's.
    """
    pool = np.sqrt(w) * residual / np.sqrt(np.maximum(1 - leverage, 1e-3))
    pool = pool - pool.mean()
    pool = pool / max(pool.std(), 1e-300)
    sigmas = sigma * np.sqrt(dof / rng.chisquare(dof, (refits, 1)))
    return sigmas * rng.choice(pool, (refits, len(pool))) / np.sqrt(w)


def _pairs(curve: np.ndarray, refits: int, rng: np.random.Generator) -> np.ndarray:
    """How often each point is drawn, curve by curve; a curve keeps at least two of its sizes."""
    counts = np.zeros((refits, len(curve)))
    for k in range(curve.max() + 1):
        index = np.flatnonzero(curve == k)
        todo = np.arange(refits)
        while len(todo):
            drawn = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), len(todo))
            counts[np.ix_(todo, index)] = drawn
            todo = todo[(drawn > 0).sum(1) < 2]
    return counts


def _scaled(jacobian: np.ndarray, w: np.ndarray, ridge: np.ndarray) -> tuple:
    """The weighted Jacobian and the ridge's rows below it, columns of length 1; their lengths."""
    root = np.vstack([np.sqrt(w)[:, None] * jacobian, np.diag(np.sqrt(ridge))[ridge > 0]])
    norms = np.linalg.norm(root, axis=0)
    return root / np.where(norms > 0, norms, 1), norms


def _rank(jacobian: np.ndarray, w: np.ndarray, ridge: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(_scaled(jacobian, w, ridge)[0]))


def _influence(
    jacobian: np.ndarray, w: np.ndarray, residual: np.ndarray, ridge: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leverage of each point, and the change of E without it (nats, linearised)."""
    n = len(w)
    whole, norms = _scaled(jacobian, w, ridge)
    inverse = np.linalg.pinv(whole)[:, :n]
    leverage = np.clip((whole[:n] * inverse.T).sum(1), 0, 1)
    change = -inverse[0] * np.sqrt(w) * residual / np.maximum(1 - leverage, 1e-9)
    return leverage, change / norms[0] if norms[0] > 0 else np.zeros(n)  # E at a bound stays there


def _r2(y: np.ndarray, predicted: np.ndarray, w: np.ndarray) -> float:
    total = (w * (y - np.average(y, weights=w)) ** 2).sum()
    return float(1 - (w * (y - predicted) ** 2).sum() / total) if total > 0 else float("nan")


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


def _flagged(fitted: Fit, known: Sequence[str]) -> Fit:
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
    if fitted.shared.p_value is None and len(p.heads) > 1:
        out.append(
            "errors shared by a size cannot be told from others, intervals assume none: give "
            "columns n_layers and d_model, and run the same sizes for every configuration"
        )
    if fitted.shared.p_value is not None and fitted.shared.p_value < SUSPICIOUS:
        remedy = "" if fitted.bootstrap == "shared" else '; use bootstrap "shared"'
        out.append(
            f"runs of one size err together by {1e3 * fitted.shared.shared:.1f} millinats "
            f"(p = {fitted.shared.p_value:.3f}), as one learning rate per size makes them{remedy}"
        )
    if p.noise is None:
        out.append("no replicate seeds: the noise is judged from the residuals alone")
    return dataclasses.replace(fitted, flags=tuple(out))
