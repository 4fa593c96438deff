"""Curves of each configuration plus terms that all share, for runs that differ in more than size.

L = shared terms + exp(u_H - b_H (ln N - centre_H)). `context` shares E and an offset for each
training length, `tokens` shares E and a power of the training tokens; here lie their points, their
solver and their bootstrap.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from gqa_scaling.config import between, require
from gqa_scaling.study.choices import Bootstrap
from gqa_scaling.study.fit import (
    BOOTSTRAPS,
    MIN_SIZES,
    REFITS,
    Fit,
    Points,
    _influence,
    _scaled,
    converged_draws,
    densities,
    drawn,
)
from gqa_scaling.study.models import (
    _ITERATIONS,
    Curves,
    _descend,
    absorbing,
    bound_of,
    floor_limits,
)
from gqa_scaling.study.noise import Noise, estimate
from gqa_scaling.study.results import Heads, Results, pair
from gqa_scaling.units import quantity

WIDE: tuple[Bootstrap, ...] = ("shared", "residual")
_SLOPES = np.linspace(0.04, 0.7, 12)  # b tried for the start, the same for every configuration
_STARTS = 6
_DETERMINED = 1e-7  # least singular value of the scaled Jacobian that counts, to the largest


@dataclass(frozen=True)
class Cells:
    """Runs averaged over seeds: `points` of a fit, with the training of each point.

    `context` and `tokens` hold one value for each point; tokens are NaN when unknown.
    """

    points: Points
    context: np.ndarray
    tokens: np.ndarray


def cells(results: Results, parameters: int) -> Cells:
    """Average the seeds of each (heads, size, context, tokens) and order the runs for a fit.

    `parameters` counts those of the shared terms. Raises UserError when head sizes are mixed, a
    configuration has fewer than three sizes, or nothing would be left to judge the noise by.
    """
    r = results
    dims = sorted(set(r.head_dim.tolist()))
    require(
        len(dims) == 1,
        f"{r.source}: head sizes {', '.join(map(str, dims))} cannot share a study; fit one of them",
    )
    columns = (r.heads, r.n_params, r.n_layers, r.d_model, r.context_length, r.tokens)
    keys = [tuple(-1.0 if v != v else v for v in key) for key in zip(*columns, strict=True)]
    found: dict[tuple, list[int]] = {}
    for i in sorted(range(len(r)), key=lambda i: keys[i]):
        found.setdefault(keys[i], []).append(i)
    members = list(found.values())
    first = [cell[0] for cell in members]
    heads: tuple[Heads, ...] = tuple(dict.fromkeys(key[0] for key in found))
    curve = np.array([heads.index(key[0]) for key in found])
    short = [
        f"{pair(h)} has {len(np.unique(r.n_params[first][curve == k]))}"
        for k, h in enumerate(heads)
        if len(np.unique(r.n_params[first][curve == k])) < MIN_SIZES
    ]
    missing = f"; not finished: {', '.join(r.missing)}" if r.missing else ""
    require(
        not short,
        f"{r.source}: too few runs to fit: each configuration needs {MIN_SIZES} sizes, but "
        f"{', '.join(short)}{missing}",
    )
    free = 2 * len(heads) + parameters
    require(
        len(members) > free,
        f"{r.source}: too few runs to fit: {len(members)} points leave nothing to judge the noise "
        f"of {free} parameters; add runs{missing}",
    )
    squares = sum(((r.loss[cell] - r.loss[cell].mean()) ** 2).sum() for cell in members)
    dof = len(r) - len(members)
    return Cells(
        points=Points(
            heads=heads,
            curve=curve,
            n=r.n_params[first],
            n_layers=r.n_layers[first],
            d_model=r.d_model[first],
            loss=np.array([r.loss[cell].mean() for cell in members]),
            replicates=np.array([len(cell) for cell in members]),
            name=_names(r, first),
            noise=float(np.sqrt(squares / dof)) if dof else None,
            noise_dof=dof,
            density=densities(r.density[first], curve),
        ),
        context=r.context_length[first],
        tokens=r.tokens[first],
    )


def _names(r: Results, rows: list[int]) -> np.ndarray:
    """The runs' names, with the context and the tokens where runs of one name differ in them."""
    names = r.name[rows].astype(str)
    if len(set(names)) == len(names):
        return names.astype(object)
    context, tokens = r.context_length[rows], r.tokens[rows]
    if len(np.unique(context)) > 1:
        names = [f"{name} T={t:,}" for name, t in zip(names, context, strict=True)]
    if len(set(names)) < len(names):
        names = [f"{name} D={quantity(d)}" for name, d in zip(names, tokens, strict=True)]
    return np.array(names, dtype=object)


# ------------------------------------------------------------------------------------ the model


class Additive:
    """Parameters, one row each: the shared ones with E first, every u, every b.

    A law is a subclass that says what its shared terms are and where a search may start.
    """

    shared: tuple[str, ...]  # names of the shared parameters, E first
    steps: np.ndarray  # the longest step a solver may take in each of them

    def __init__(self, points: Points) -> None:
        self.curve, self.centre = points.curve, points.centre
        self.x = np.log(points.n) - self.centre[self.curve]
        self.group = np.eye(len(self.centre))[self.curve]

    @property
    def names(self) -> tuple[str, ...]:
        k = range(len(self.centre))
        return (*self.shared, *(f"u{i}" for i in k), *(f"b{i}" for i in k))

    def terms(self, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shared part of the losses (rows, points) and its derivatives (.., points, shared)."""
        raise NotImplementedError

    def linear(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Bases (points, columns) of the shared terms, and how coefficients become parameters."""
        raise NotImplementedError

    def limits(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest E for every row of losses."""
        return floor_limits(y)

    def _split(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        m, k = len(self.shared), len(self.centre)
        return rows[:, :m], rows[:, m : m + k], rows[:, m + k :]

    def _excess(self, u: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(np.clip(u[:, self.curve] - b[:, self.curve] * self.x, -40, 10))

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        """Losses (rows, points) in nats."""
        shared, u, b = self._split(parameters)
        return self.terms(shared)[0] + self._excess(u, b)

    def jacobian(self, parameters: np.ndarray) -> np.ndarray:
        """Derivatives of the losses (points, parameters) at one row of parameters."""
        shared, u, b = self._split(parameters[None])
        slopes = np.broadcast_to(self.terms(shared)[1], (1, len(self.x), len(self.shared)))[0]
        each = self._excess(u, b)[0][:, None] * self.group
        return np.hstack([slopes, each, -self.x[:, None] * each])

    def curves(self, parameters: np.ndarray, more: np.ndarray | float = 0.0) -> Curves:
        """The curves with floor E + `more`, of one row of parameters or of many."""
        shared, u, b = self._split(np.atleast_2d(parameters))
        floor = shared[:, 0] + more
        if parameters.ndim == 1:
            return Curves(np.asarray(floor[0]), u[0], b[0], self.centre)
        return Curves(floor, u, b, self.centre)

    def starts(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The best few of a grid over what is not linear, with one b for all configurations."""
        (low,), (high,) = self.limits(y[None])
        root, rows, costs = np.sqrt(w), [], []
        least = max(1e-3 * np.ptp(y), 1e-9)  # losses may all be equal
        for basis, unpack in self.linear():
            for b in _SLOPES:
                columns = np.hstack([basis, self.group * np.exp(-b * self.x)[:, None]])
                found, *_ = np.linalg.lstsq(columns * root[:, None], root * y)
                shared = np.asarray(unpack(found[: basis.shape[1]]), float)
                shared[0] = np.clip(shared[0], low, high)
                scale = np.maximum(found[basis.shape[1] :], least)
                rows.append(np.r_[shared, np.log(scale), np.full(len(scale), b)])
                costs.append((w * (self.predict(rows[-1][None])[0] - y) ** 2).sum())
        return np.array(rows)[np.argsort(costs, kind="stable")[:_STARTS]]

    def solve(
        self, y: np.ndarray, w: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levenberg-Marquardt on every row: (parameters, sum of squares, converged).

        The normal equations are an arrow: a 2 x 2 block for each curve, bordered by what is shared.
        """
        G, x, m = self.group, self.x, len(self.shared)
        every = range(m)

        def grouped(values: np.ndarray, slopes: np.ndarray) -> np.ndarray:
            return np.swapaxes(np.swapaxes(values[..., None] * slopes, 1, 2) @ G, 1, 2)

        def propose(
            rows: np.ndarray, y: np.ndarray, w: np.ndarray, *rest: np.ndarray
        ) -> np.ndarray:
            damping, low, high = rest
            shared, u, b = self._split(rows)
            value, slopes = self.terms(shared)
            f = self._excess(u, b)
            r, wf = y - value - f, w * f
            a11, a12, a22 = (wf * f) @ G, -(wf * f * x) @ G, (wf * f * x * x) @ G
            g1, g2 = (wf * r) @ G, -(wf * r * x) @ G
            h1, h2 = grouped(wf, slopes), -grouped(wf * x, slopes)  # (rows, curves, shared)
            grow = 1 + damping[:, None]
            d11, d22 = a11 * grow + 1e-300, a22 * grow + 1e-300
            det = np.maximum(d11 * d22 - a12 * a12, 1e-300)
            p1, p2 = (d22 * g1 - a12 * g2) / det, (d11 * g2 - a12 * g1) / det
            wide = [v[..., None] for v in (d11, d22, a12, det)]
            q1 = (wide[1] * h1 - wide[2] * h2) / wide[3]
            q2 = (wide[0] * h2 - wide[2] * h1) / wide[3]
            weighted = np.swapaxes(w[..., None] * slopes, 1, 2)  # (rows, shared, points)
            A = weighted @ np.broadcast_to(slopes, (len(rows), len(x), m))
            scale = np.sqrt(np.maximum(np.einsum("bii->bi", A), 1e-300))
            A[:, every, every] *= grow
            A = A - np.swapaxes(h1, 1, 2) @ q1 - np.swapaxes(h2, 1, 2) @ q2
            g = (weighted @ r[..., None])[..., 0]
            g = g - np.einsum("rkm,rk->rm", h1, p1) - np.einsum("rkm,rk->rm", h2, p2)
            A, g = A / (scale[:, :, None] * scale[:, None, :]), g / scale
            A[:, every, every] += 1e-14
            step = np.linalg.solve(A, g[..., None])[..., 0] / scale
            wanted = rows[:, 0] + step[:, 0]
            held = np.clip(wanted, low, high) != wanted
            if held.any():  # E goes to its bound and the others move as is best for it there
                A[held, 0, 1:], A[held, 0, 0] = 0.0, 1.0
                g[held, 0] = ((np.clip(wanted, low, high) - rows[:, 0]) * scale[:, 0])[held]
                step[held] = np.linalg.solve(A[held], g[held][..., None])[..., 0] / scale[held]
            step = np.clip(step, -self.steps, self.steps)
            du = np.clip(p1 - np.einsum("rkm,rm->rk", q1, step), -2, 2)
            db = np.clip(p2 - np.einsum("rkm,rm->rk", q2, step), -1, 1)
            return np.hstack([step, du, db])

        def cost(rows: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
            return (w * (y - self.predict(rows)) ** 2).sum(1)

        return _descend(y, w, start, self.limits(y), cost, propose, _ITERATIONS)

    def best(self, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, bool]:
        """The least-squares parameters, the best of several starts, and whether they converged."""
        starts = self.starts(y, w)
        many = [np.broadcast_to(v, (len(starts), len(y))) for v in (y, w)]
        rows, cost, _ = self.solve(*many, starts)
        root = np.sqrt(w)
        low, high = np.full(rows.shape[1], -np.inf), np.full(rows.shape[1], np.inf)
        (low[0],), (high[0],) = self.limits(y[None])
        found = least_squares(
            lambda p: root * (self.predict(p[None])[0] - y),
            rows[np.argmin(cost)],
            jac=lambda p: root[:, None] * self.jacobian(p),
            bounds=(low, high),
            x_scale="jac",
            ftol=1e-14,
            xtol=1e-14,
            gtol=1e-14,
        )
        return found.x, bool(found.success)


# ------------------------------------------------------------------------------ how sure it is


@dataclass(frozen=True)
class Estimate:
    """The best parameters and bootstrap draws of them, with what `Fit` needs to know.

    `leverage` and `influence` (of leaving the point out on E, nats, linearised) are of the points;
    `rank` counts the parameters that the points determine; `sigma` is in nats, of one run.
    """

    parameters: np.ndarray
    draws: np.ndarray
    predicted: np.ndarray
    leverage: np.ndarray
    influence: np.ndarray
    rank: int
    sigma: float
    common: Noise
    converged: bool
    at_bound: str
    failed: int


def estimated(
    model: Additive,
    points: Points,
    groups: Sequence[np.ndarray],
    law: str,
    bootstrap: Bootstrap = "shared",
    refits: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Fit the model to the points and bootstrap it as `fit` does its curves.

    `groups` are ways to label the points whose errors may be common (a size whatever else, or a
    size in one setting); the one that the residuals speak for most is used. `law` names the runs
    and what is fitted to them. Raises UserError for bootstrap "pairs", as points redrawn may leave a
    shared term without any run, and when most refits fail.
    """
    require(
        bootstrap in BOOTSTRAPS, f"bootstrap={bootstrap!r} must be one of {', '.join(BOOTSTRAPS)}"
    )
    require(
        bootstrap in WIDE,
        f"bootstrap={bootstrap!r} redraws the points of one curve and does not serve runs of "
        f"several training contexts or token budgets; use {' or '.join(WIDE)}",
    )
    between("refits", refits, *REFITS)
    p, w = points, points.replicates.astype(float)
    best, converged = model.best(p.loss, w)
    at_bound = bound_of(float(best[0]), model.limits(p.loss[None]))
    jacobian, predicted = model.jacobian(best), model.predict(best[None])[0]
    moving, none = absorbing(jacobian, at_bound), np.zeros(len(best))
    residual = p.loss - predicted
    leverage, influence = _influence(moving, w, residual, none)
    pure = p.noise_dof * (p.noise or 0.0) ** 2
    dof = max(len(p.n) - leverage.sum(), 1.0) + p.noise_dof
    sigma = float(np.sqrt(((w * residual**2).sum() + pure) / dof))
    found = [estimate(residual, moving, w, g, pure, p.noise_dof, seed) for g in groups]
    common = min(found, key=lambda noise: 1.0 if noise.p_value is None else noise.p_value)
    rng = np.random.default_rng(seed)
    if bootstrap == "shared":
        noise = common.draw(refits, rng)
    else:
        pool = np.sqrt(w) * residual / np.sqrt(np.maximum(1 - leverage, 1e-3))
        pool = (pool - pool.mean()) / max(pool.std(), 1e-300)
        sigmas = sigma * np.sqrt(dof / rng.chisquare(dof, (refits, 1)))
        noise = sigmas * rng.choice(pool, (refits, len(pool))) / np.sqrt(w)
    y = drawn(predicted, noise, p.loss)
    rows, _, done = model.solve(y, np.broadcast_to(w, y.shape), np.repeat(best[None], refits, 0))
    draws = converged_draws(rows, done, law, "add runs, of more sizes or with several seeds")
    whole, _ = _scaled(jacobian, w, none)
    return Estimate(
        parameters=best,
        draws=draws,
        predicted=predicted,
        leverage=leverage,
        influence=influence,
        rank=int(np.linalg.matrix_rank(whole, tol=_DETERMINED * np.linalg.norm(whole, 2))),
        sigma=sigma,
        common=common,
        converged=converged,
        at_bound=at_bound,
        failed=refits - len(draws),
    )


def as_fit(
    results: Results,
    points: Points,
    model: Additive,
    found: Estimate,
    *,
    context_length: int | None,
    offset: np.ndarray,
    more: tuple[np.ndarray | float, np.ndarray | float],
    bootstrap: Bootstrap,
    refits: int,
    seed: int,
) -> Fit:
    """The curves in one setting as a `Fit`, every point brought there by taking `offset` away.

    `more` is what the setting adds to E, for the best parameters and for each draw, in nats.
    """
    loss, predicted = points.loss - offset, found.predicted - offset
    w = points.replicates.astype(float)

    def r2(mine: np.ndarray) -> float:
        total = (w * (loss - np.average(loss[mine], weights=w[mine])) ** 2)[mine].sum()
        left = (w * (loss - predicted) ** 2)[mine].sum()
        return float(1 - left / total) if total > 0 else float("nan")

    every = np.ones(len(loss), bool)
    return Fit(
        source=results.source,
        count=results.count,
        points=replace(points, loss=loss),
        context_length=context_length,
        law="separate",
        curves=model.curves(found.parameters, more[0]),
        draws=model.curves(found.draws, more[1]),
        names=model.names,
        parameters=found.parameters,
        parameter_draws=found.draws,
        predicted=predicted,
        leverage=found.leverage,
        influence=found.influence,
        sigma=found.sigma,
        r2=r2(every),
        r2_by_curve=np.array([r2(points.curve == k) for k in range(len(points.heads))]),
        spoiled=(),
        rank=found.rank,
        converged=found.converged,
        at_bound=found.at_bound,
        shared=found.common,
        robust=False,
        bootstrap=bootstrap,
        refits=refits,
        refits_failed=found.failed,
        seed=seed,
    )
