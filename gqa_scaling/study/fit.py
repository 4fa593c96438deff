"""Estimation and uncertainty: loss curves L(N; H) = (a/N)^b + E with one E for all heads H.

The curves are fitted as E + exp(u - b (ln N - centre)), u and b of each configuration H and E
shared (Chen et al. 2025, section 4.1, step 2). E is first profiled on a grid, where every other
parameter has a log-linear start, so that the fit converges whatever the data. The bootstrap
refits thousands of such problems at once with the same equations in plain NumPy.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares

from gqa_scaling.config import require
from gqa_scaling.study import laws
from gqa_scaling.study.results import Heads, Results, flags

Bootstrap = Literal["residual", "pairs"]
BOOTSTRAPS: tuple[Bootstrap, ...] = ("residual", "pairs")
LEVEL = 0.90  # of every interval that is printed
MIN_SIZES = 3
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
    short = [f"({h},{kv}) has {sizes[h, kv]}" for h, kv in heads if sizes[h, kv] < MIN_SIZES]
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
    deviations = [r.loss[cell] - r.loss[cell].mean() for cell in cells.values()]
    dof = len(r) - len(cells)
    noise = float(np.sqrt(sum((d**2).sum() for d in deviations) / dof)) if dof else None
    return Points(
        heads=heads,
        curve=np.array([heads.index(key[0]) for key in cells]),
        n=np.array([key[1] for key in cells]),
        n_layers=np.array([key[2] for key in cells]),
        d_model=np.array([key[3] for key in cells]),
        loss=np.array([r.loss[cell].mean() for cell in cells.values()]),
        replicates=np.array([len(cell) for cell in cells.values()]),
        name=np.array([r.name[cell[0]] for cell in cells.values()], dtype=object),
        noise=noise,
        noise_dof=dof,
    )


# ---------------------------------------------------------------------------- many fits at once


@dataclass(frozen=True)
class Curves:
    """The parameters of every curve, with any leading axes (none, or bootstrap draws first).

    `floor` has the leading shape alone: E is shared. `u` and `b` end in the axis of heads.
    """

    floor: np.ndarray
    u: np.ndarray
    b: np.ndarray
    centre: np.ndarray

    def loss(self, k: int, n: np.ndarray | float) -> np.ndarray:
        """Loss in nats of configuration k at N, leading axes first."""
        n = np.asarray(n, float)
        lead = (..., *(None,) * n.ndim)
        u, b, floor = self.u[..., k][lead], self.b[..., k][lead], self.floor[lead]
        return laws.centred(n, u, b, floor, self.centre[k])

    def n_star(self, loss: float) -> np.ndarray:
        """N*(H) for a target loss, leading axes first, heads last; inf where never reached."""
        return laws.centred_inverse(loss, self.u, self.b, self.floor[..., None], self.centre)


class _Design:
    """Fixed parts of the batched problem: rows are data sets, columns points, groups curves."""

    def __init__(self, curve: np.ndarray, x: np.ndarray) -> None:
        self.curve, self.x = curve, x
        self.group = np.eye(curve.max() + 1)[curve]  # sums over a curve are one product

    def excess(self, u: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(np.clip(u[:, self.curve] - b[:, self.curve] * self.x, -40, 10))

    def log_linear(self, y: np.ndarray, w: np.ndarray, floor: np.ndarray) -> tuple:
        """u and b of a straight line through ln(y - E), the start for a given E."""
        excess = np.maximum(y - floor[:, None], 1e-9)
        z, w = np.log(excess), w * excess**2
        s, sx, sz = w @ self.group, (w * self.x) @ self.group, (w * z) @ self.group
        sxx, sxz = (w * self.x**2) @ self.group, (w * self.x * z) @ self.group
        b = -(s * sxz - sx * sz) / np.maximum(s * sxx - sx**2, 1e-300)
        return (sz + b * sx) / s, b

    def solve(
        self,
        y: np.ndarray,
        w: np.ndarray,
        start: tuple[np.ndarray, np.ndarray, np.ndarray],
        limits: tuple[np.ndarray, np.ndarray],
        free: bool = True,
        iterations: int = 200,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Levenberg-Marquardt on every row: (E, u, b, sum of squares, converged).

        The normal equations are an arrow: a 2 x 2 block for each curve, bordered by E.
        """
        floor, u, b = start
        low, high = limits
        floor = np.clip(floor, low, high)
        G, x = self.group, self.x
        f = self.excess(u, b)
        r = y - floor[:, None] - f
        cost = (w * r * r).sum(1)
        damping, done = np.full(len(y), 1e-6), np.zeros(len(y), bool)
        for _ in range(iterations):
            wf = w * f
            a11, a12, a22 = (wf * f) @ G, -(wf * f * x) @ G, (wf * f * x * x) @ G
            g1, g2, g0 = (wf * r) @ G, -(wf * r * x) @ G, (w * r).sum(1)
            h1, h2, h0 = wf @ G, -(wf * x) @ G, w.sum(1)
            grow = 1 + damping[:, None]
            d11, d22 = a11 * grow + 1e-300, a22 * grow + 1e-300
            det = np.maximum(d11 * d22 - a12 * a12, 1e-300)
            p1, p2 = (d22 * g1 - a12 * g2) / det, (d11 * g2 - a12 * g1) / det
            q1, q2 = (d22 * h1 - a12 * h2) / det, (d11 * h2 - a12 * h1) / det
            border = h0 * (1 + damping) - (h1 * q1 + h2 * q2).sum(1)
            step = (g0 - (h1 * p1 + h2 * p2).sum(1)) / np.maximum(border, 1e-300)
            new = np.clip(floor + step, low, high) if free else floor
            step = new - floor
            du = np.clip(p1 - q1 * step[:, None], -2, 2)
            db = np.clip(p2 - q2 * step[:, None], -1, 1)
            f_new = self.excess(u + du, b + db)
            r_new = y - new[:, None] - f_new
            cost_new = (w * r_new * r_new).sum(1)
            better = (cost_new <= cost) & ~done
            small = np.abs(step) + np.abs(du).max(1) + np.abs(db).max(1) < 1e-10
            flat = cost - cost_new <= 1e-13 * cost
            row = better[:, None]
            floor, u, b = np.where(better, new, floor), u + du * row, b + db * row
            f, r = np.where(row, f_new, f), np.where(row, r_new, r)
            done |= (better & small & flat) | (~better & (damping > 1e8))
            cost = np.where(better, cost_new, cost)
            damping = np.clip(np.where(better, damping * 0.1, damping * 10), 1e-15, 1e12)
            if done.all():
                break
        return floor, u, b, cost, done


def _limits(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E lies between 0 and just below the least loss."""
    least = y.min(1)
    return np.zeros(len(y)), least - 1e-3 * (y.max(1) - least) - 1e-9


def _profile(design: _Design, y: np.ndarray, w: np.ndarray, grid: int = 25) -> tuple:
    """The best start over a grid of E: for each, the other parameters have a log-linear start."""
    (low,), (high,) = _limits(y[None])
    floor = high - (high - low) * np.linspace(0, 1, grid) ** 2
    many, weights = np.broadcast_to(y, (grid, len(y))), np.broadcast_to(w, (grid, len(y)))
    u, b = design.log_linear(many, weights, floor)
    found = design.solve(many, weights, (floor, u, b), (floor, floor), free=False, iterations=6)
    k = int(np.argmin(found[3]))
    return tuple(v[k : k + 1] for v in found[:3])


# --------------------------------------------------------------------------------- the point fit


@dataclass(frozen=True)
class _Solution:
    floor: float
    u: np.ndarray
    b: np.ndarray
    jacobian: np.ndarray
    converged: bool


def _fit_point(design: _Design, y: np.ndarray, w: np.ndarray) -> _Solution:
    """scipy's least squares with the analytic Jacobian, from the profiled start."""
    k = design.group.shape[1]
    root, limits = np.sqrt(w), _limits(y[None])
    start = _profile(design, y, w)
    floor, u, b, _, _ = design.solve(y[None], w[None], start, limits)

    def residuals(p: np.ndarray) -> np.ndarray:
        return root * (p[0] + design.excess(p[None, 1 : k + 1], p[None, k + 1 :])[0] - y)

    def jacobian(p: np.ndarray) -> np.ndarray:
        f = design.excess(p[None, 1 : k + 1], p[None, k + 1 :])[0]
        per_curve = f[:, None] * design.group
        whole = np.hstack([np.ones((len(y), 1)), per_curve, -design.x[:, None] * per_curve])
        return root[:, None] * whole

    low, high = np.full(2 * k + 1, -np.inf), np.full(2 * k + 1, np.inf)
    low[0], high[0] = limits[0][0], limits[1][0]
    best = least_squares(
        residuals,
        np.concatenate([floor, u[0], b[0]]),
        jac=jacobian,
        bounds=(low, high),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
    )
    p = best.x
    return _Solution(
        float(p[0]), p[1 : k + 1], p[k + 1 :], best.jac / root[:, None], bool(best.success)
    )


# ------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class Fit:
    """Curves with one shared E, how sure they are, and what must be known before using them.

    Losses, residuals, E and `sigma` are in nats, N in parameters counted as `count` says.
    `influence` is the change of E, in nats, that leaving the point out would make (linearised).
    `sigma` is the standard deviation of one run around its curve, replicates pooled in. Intervals are the central 90% of
    `refits` bootstrap draws of the named kind.
    """

    source: str
    count: str
    points: Points
    curves: Curves
    draws: Curves
    predicted: np.ndarray
    leverage: np.ndarray
    influence: np.ndarray
    sigma: float
    r2: float
    r2_by_curve: np.ndarray
    rank: int
    converged: bool
    at_bound: str
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
    def n_parameters(self) -> int:
        return 1 + 2 * len(self.heads)

    @property
    def scale(self) -> np.ndarray:
        """a of (a/N)^b in parameters, for each configuration."""
        return laws.scale(self.curves.u, self.curves.b, self.curves.centre)

    @property
    def how(self) -> str:
        """What the intervals are, in words."""
        return f"{LEVEL:.0%} percentile {self.bootstrap} bootstrap, {self.refits} refits, seed {self.seed}"

    def index(self, heads: Heads) -> int:
        require(
            heads in self.heads,
            f"configuration {heads} is not in this study; there are "
            f"{', '.join(str(h).replace(' ', '') for h in self.heads)}",
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
                "law": "(a/N)^b + E, E shared",
                "n_count": self.count,
                "E_nats": self.floor,
                "E_interval_nats": self.floor_interval,
                "r2": self.r2,
                "sigma_nats": self.sigma,
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
                        "n_heads": h,
                        "n_kv_heads": kv,
                        "a_parameters": a[k],
                        "a_interval_parameters": (a_low[k], a_high[k]),
                        "b": self.curves.b[k],
                        "b_interval": (b_low[k], b_high[k]),
                        "r2": self.r2_by_curve[k],
                        "n_range": p.range_n(k),
                        "sizes": int((p.curve == k).sum()),
                    }
                    for k, (h, kv) in enumerate(self.heads)
                ],
                "points": [
                    {
                        "name": p.name[i],
                        "n_heads": self.heads[p.curve[i]][0],
                        "n_kv_heads": self.heads[p.curve[i]][1],
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
    bootstrap: Bootstrap = "residual",
    refits: int = 1000,
    seed: int = 0,
) -> Fit:
    """Fit one curve for each head configuration with a shared E, and bootstrap it.

    `context_length` names the training length when the runs span several. bootstrap "residual"
    redraws the residuals, scaled for the freedom the fit took; "pairs" redraws the points of each
    curve. Raises UserError when the runs are too few or cannot be compared.
    """
    require(
        bootstrap in BOOTSTRAPS, f"bootstrap={bootstrap!r} must be one of {', '.join(BOOTSTRAPS)}"
    )
    require(refits >= 100, f"refits={refits} must be at least 100 for an interval")
    p = points(results, context_length)
    centre = p.centre
    design = _Design(p.curve, np.log(p.n) - centre[p.curve])
    weights = p.replicates.astype(float)
    best = _fit_point(design, p.loss, weights)
    predicted = best.floor + design.excess(best.u[None], best.b[None])[0]
    residual = p.loss - predicted
    squares = (weights * residual**2).sum() + p.noise_dof * (p.noise or 0.0) ** 2
    noise_dof = len(p.n) - best.jacobian.shape[1] + p.noise_dof
    sigma = float(np.sqrt(squares / noise_dof))
    leverage, influence, rank = _influence(best.jacobian, weights, residual)
    rng = np.random.default_rng(seed)
    if bootstrap == "residual":
        y = predicted + _noise(residual, weights, leverage, sigma, noise_dof, refits, rng)
        w = np.broadcast_to(weights, y.shape)
    else:
        y = np.broadcast_to(p.loss, (refits, len(p.loss)))
        w = weights * _pairs(p.curve, refits, rng)
    limits = _limits(np.where(w > 0, y, y.max()))
    start = tuple(np.repeat(v[None], refits, 0) for v in (np.array(best.floor), best.u, best.b))
    floor, u, b, _, done = design.solve(y, w, start, limits)
    (low,), (high,) = _limits(p.loss[None])
    span = high - low
    at_bound = "lower" if best.floor < low + 1e-6 * span else ""
    at_bound = "upper" if best.floor > high - 1e-6 * span else at_bound
    fitted = Fit(
        source=results.source,
        count=results.count,
        points=p,
        curves=Curves(np.array(best.floor), best.u, best.b, centre),
        draws=Curves(floor[done], u[done], b[done], centre),
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
        rank=rank,
        converged=best.converged,
        at_bound=at_bound,
        bootstrap=bootstrap,
        refits=refits,
        refits_failed=int((~done).sum()),
        seed=seed,
    )
    return _flagged(fitted, flags(results))


def _noise(
    residual: np.ndarray,
    w: np.ndarray,
    leverage: np.ndarray,
    sigma: float,
    dof: int,
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


def _influence(jacobian: np.ndarray, w: np.ndarray, residual: np.ndarray) -> tuple:
    """Leverage of each point, the change of E without it (nats, linearised), the rank."""
    root = np.sqrt(w)[:, None] * jacobian
    norms = np.linalg.norm(root, axis=0)
    scaled = root / np.where(norms > 0, norms, 1)
    inverse = np.linalg.pinv(scaled)
    leverage = np.clip((scaled * inverse.T).sum(1), 0, 1)
    change = -inverse[0] * np.sqrt(w) * residual / np.maximum(1 - leverage, 1e-9)
    return leverage, change / max(norms[0], 1e-300), int(np.linalg.matrix_rank(scaled))


def _r2(y: np.ndarray, predicted: np.ndarray, w: np.ndarray) -> float:
    total = (w * (y - np.average(y, weights=w)) ** 2).sum()
    return float(1 - (w * (y - predicted) ** 2).sum() / total) if total > 0 else float("nan")


def _flagged(fitted: Fit, known: Sequence[str]) -> Fit:
    """The fit with everything a reader must know, in words."""
    out = list(known)
    if not fitted.converged:
        out.append("the fit did not converge: do not use it")
    if fitted.at_bound:
        bound = "0" if fitted.at_bound == "lower" else "the least loss"
        out.append(f"E is at its bound ({bound}): not identified by these runs")
    if fitted.rank < fitted.n_parameters:
        out.append(f"only {fitted.rank} of {fitted.n_parameters} parameters are determined")
    rising = [
        str(h).replace(" ", "")
        for h, b in zip(fitted.heads, fitted.curves.b, strict=True)
        if b <= 0
    ]
    if rising:
        out.append(f"loss does not fall with N for {', '.join(rising)}")
    if fitted.refits_failed:
        out.append(f"{fitted.refits_failed} of {fitted.refits} refits did not converge, left out")
    p = fitted.points
    if p.noise is None:
        out.append("no replicate seeds: the noise is judged from the residuals alone")
    return dataclasses.replace(fitted, flags=tuple(out))
