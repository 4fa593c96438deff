"""Weighted least squares for every law, for many data sets at once."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.study.models import Model

ITERATIONS = 5000  # most need ten; a few follow a long bent valley, and may not be left out
_HOPELESS = 500  # after which half of the rows under way show that the data determines no optimum
_FLOORS, _ROUGHLY = 25, 30  # values of E tried for a start, and iterations at each
_STARTS = 3  # searches from the best of them
_CHUNK = 2**19  # numbers of a Jacobian that are held at once: 4 MiB
_MANY = 6  # chunks: seconds of work, of which a terminal shows how far it is


def refit(
    model: Model,
    y: np.ndarray,
    w: np.ndarray,
    start: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray] | None = None,
    iterations: int = ITERATIONS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares for every row of losses y, in nats, with weights w: each (rows, points).

    `start` holds a row of parameters for each, and `limits` the least and the largest E, by default
    those of the model. Returns the parameters (rows, parameters), what was minimised (rows,), and
    which rows converged. Rows are taken in chunks, so that memory stays bounded.
    """
    size = max(1, _CHUNK // (model.added.size + len(model.curve)))
    every = range(0, len(y), size)
    low, high = model.floor_limits(y, w) if limits is None else limits
    parts = []
    for i in _watched(every):
        at = slice(i, i + size)
        given = (y[at], w[at], start[at], low[at], high[at], iterations)
        parts.append(_levenberg_marquardt(model, *given))
    rows, cost, converged = (np.concatenate(each) for each in zip(*parts, strict=True))
    return rows, cost, converged


def _watched(chunks: range) -> Iterable[int]:
    """The chunks, with a progress bar where there are many and stderr is a terminal."""
    if len(chunks) < _MANY or not sys.stderr.isatty():
        return chunks
    from rich.console import Console
    from rich.progress import track

    return track(chunks, "Refitting", console=Console(stderr=True), transient=True)


def _levenberg_marquardt(
    model: Model,
    y: np.ndarray,
    w: np.ndarray,
    start: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    iterations: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`refit` for one chunk of rows, with Marquardt's scaling of the damping.

    Rows that are done are set aside, so that the slow ones do not hold up the rest. A row whose sum
    of squares is not finite never counts as converged.
    """

    def cost_of(rows: np.ndarray) -> np.ndarray:
        return (w * (y - model.predict(rows)) ** 2).sum(1)

    rows = start.copy()
    rows[:, 0] = np.clip(rows[:, 0], low, high)
    cost, damping = cost_of(rows), np.full(len(y), 1e-6)
    final, final_cost, converged = rows, cost, np.zeros(len(y), bool)
    active = np.arange(len(y))
    for i in range(iterations):
        step = _step(model, rows, y, w, damping, low, high)
        new = rows + step
        new[:, 0] = np.clip(new[:, 0], low, high)
        cost_new = cost_of(new)
        better = cost_new <= cost
        flat = cost - cost_new <= 1e-13 * cost
        # along what the data does not tell, steps stay large though nothing is gained
        steady = (np.abs(step).max(1) < 1e-10) | (damping < 1e-5)
        done = (better & steady & flat) | (~better & (damping > 1e8))
        rows, cost = np.where(better[:, None], new, rows), np.where(better, cost_new, cost)
        damping = np.clip(np.where(better, damping * 0.1, damping * 10), 1e-15, 1e12)
        final[active], final_cost[active] = rows, cost
        if done.any():
            converged[active[done]] = np.isfinite(cost[done])
            active, y, w, rows, cost, damping, low, high = (
                v[~done] for v in (active, y, w, rows, cost, damping, low, high)
            )
            if not len(active):
                break
        if i >= _HOPELESS and 2 * len(active) >= len(final):  # such refits are refused (`fit`)
            break
    return final, final_cost, converged


def _step(
    model: Model,
    rows: np.ndarray,
    y: np.ndarray,
    w: np.ndarray,
    damping: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """The damped Gauss-Newton step of every row.

    The curves' own u and b are eliminated first, two by two, as no two curves share a point beyond
    the shared parameters. E is eliminated last: the others move as is best for any step of E, so
    that E may go no further than its limits, and its curvature is not drowned by that of the others
    in a long flat valley.
    """
    root = np.sqrt(w)
    loss, shared, by_u = model.derivatives(rows)
    m, diagonal = model.shared, range(model.shared)
    columns = np.concatenate([shared, (y - loss)[..., None]], -1)
    columns *= root[..., None]  # the shared derivatives and the residuals
    across = columns[..., :m].transpose(0, 2, 1)
    products = across @ columns
    scale = _lengths(products[:, diagonal, diagonal])
    products[..., :m] /= scale[:, None, :]
    products /= scale[:, :, None]
    products[:, diagonal, diagonal] += damping[:, None]
    own = _Own.of(model, by_u * root, columns, scale, damping[:, None]) if model.own else None
    if own:
        products -= own.absorbed
    normal, gradient = products[..., :m], products[..., m]
    # some laws have parameters that nothing determines
    normal[:, diagonal[1:], diagonal[1:]] += 1e-14
    others, border = normal[:, 1:, 1:], normal[:, 1:, 0]
    alone, per_floor = np.moveaxis(
        np.linalg.solve(others, np.stack([gradient[:, 1:], border], -1)), -1, 0
    )
    curvature = normal[:, 0, 0] - (border * per_floor).sum(1)
    floor = gradient[:, 0] - (border * alone).sum(1)
    floor /= np.maximum(curvature, 1e-300) * scale[:, 0]
    floor = np.clip(rows[:, 0] + floor, low, high) - rows[:, 0]
    scaled = np.hstack([(floor * scale[:, 0])[:, None], alone])
    scaled[:, 1:] -= per_floor * scaled[:, :1]
    step = scaled / scale
    if own:
        step = np.hstack([step, own.step(scaled)])
    return np.clip(step, -model.longest_step, model.longest_step)


def _lengths(squares: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(squares, 1e-300))


@dataclass(frozen=True)
class _Own:
    """What the curves' own u and b take of the normal equations, in columns scaled to length 1.

    `moves` are the steps of u and of b, each (rows, curves, shared + 1), that each shared derivative
    and the residual ask for; `absorbed` (rows, shared, shared + 1) is what they leave nothing of.
    """

    scale_u: np.ndarray
    scale_b: np.ndarray
    moves: tuple[np.ndarray, np.ndarray]
    absorbed: np.ndarray

    @classmethod
    def of(
        cls, model: Model, by_u: np.ndarray, columns: np.ndarray, scale: np.ndarray, damping: Any
    ) -> "_Own":
        first = np.flatnonzero(np.r_[True, np.diff(model.curve) > 0])

        def total(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, first, axis=1)

        by_b, m = -model.x * by_u, model.shared
        uu, bb = total(by_u**2), total(by_b**2)
        scale_u, scale_b = _lengths(uu), _lengths(bb)
        ub = total(by_u * by_b) / (scale_u * scale_b)
        uu, bb = uu / scale_u**2 + damping + 1e-14, bb / scale_b**2 + damping + 1e-14
        along = []
        for derivative, length in ((by_u, scale_u), (by_b, scale_b)):
            each = total(derivative[..., None] * columns) / length[..., None]
            each[..., :m] /= scale[:, None, :]
            along.append(each)
        (u, b), determinant = along, (uu * bb - ub**2)[..., None]
        move_u = (bb[..., None] * u - ub[..., None] * b) / determinant
        move_b = (uu[..., None] * b - ub[..., None] * u) / determinant
        absorbed = sum(
            each[..., :m].transpose(0, 2, 1) @ move for each, move in ((u, move_u), (b, move_b))
        )
        return cls(scale_u, scale_b, (move_u, move_b), absorbed)

    def step(self, shared: np.ndarray) -> np.ndarray:
        """The steps of every u, then of every b, after this scaled step of the shared parameters."""
        u, b = (move[..., -1] - (move[..., :-1] @ shared[..., None])[..., 0] for move in self.moves)
        return np.hstack([u / self.scale_u, b / self.scale_b])


@dataclass(frozen=True)
class Solution:
    """Parameters of a point fit, the Jacobian of the predictions there, and whether it converged.

    `at_bound` says which of its limits the fitted E lies at: "lower", "upper", or "" for neither.
    """

    parameters: np.ndarray
    jacobian: np.ndarray
    converged: bool
    at_bound: str

    @property
    def absorbing(self) -> np.ndarray:
        """The Jacobian of what the fit could turn to follow the losses: without E at a bound.

        An E that its bound holds has taken nothing from the residuals. The sum of squares then
        holds what a free E would have removed, and has one degree of freedom more: exactly one
        where the true E lies at the bound, as the excluded part is then half of a normal
        distribution, whose mean square is that of the whole, and a little less where it lies
        inside. Counted as if E were free, the noise comes out too large: `benchmarks/study.py
        bound` measures both.
        """
        if not self.at_bound:
            return self.jacobian
        return np.hstack([np.zeros_like(self.jacobian[:, :1]), self.jacobian[:, 1:]])


def solve_point(model: Model, y: np.ndarray, w: np.ndarray) -> Solution:
    """The least-squares parameters for losses y with weights w, each (points,).

    The law's own starts, each at many values of E, are improved by `refit`, and the best of them is
    taken. Parameters that no point with a weight moves stay at their start.
    """
    limits = model.floor_limits(y[None], w[None])
    starts = _profiled(model, y, w, limits)
    rows, cost, done = refit(model, *_repeated(y, w, len(starts)), starts)
    best = int(np.argmin(cost))
    row, ((low,), (high,)) = _polished(model, rows[best], y, w, limits), limits
    near = 1e-6 * (high - low)
    at_bound = "lower" if row[0] < low + near else "upper" if row[0] > high - near else ""
    return Solution(row, model.jacobian(row[None])[0], bool(done[best]), at_bound)


def _polished(
    model: Model,
    row: np.ndarray,
    y: np.ndarray,
    w: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The end of a search brought to the optimum itself.

    A search ends where the sum of squares no longer falls by more than its rounding, which leaves E
    off by 1e-9 or so. Undamped steps follow the gradient, which still shows the way. A long one is
    not taken: it goes along what the data does not tell.
    """
    low, high = limits
    for _ in range(3):
        step = _step(model, row[None], y[None], w[None], np.full(1, 1e-14), low, high)[0]
        if not np.abs(step).max() < 1e-6:
            break
        row = row + step
        row[0] = np.clip(row[0], low[0], high[0])
    return row


def _profiled(
    model: Model, y: np.ndarray, w: np.ndarray, limits: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """The best of the law's starts over a grid of E, the others fitted roughly to each E.

    A start with E free may creep along a flat valley and never reach the limit that is best.
    """
    starts, (low, high) = model.starts(y, w), limits
    floors = np.tile(high - (high - low) * np.linspace(0, 1, _FLOORS) ** 2, len(starts))
    rows = np.repeat(starts, _FLOORS, 0)
    rows, cost, _ = refit(model, *_repeated(y, w, len(rows)), rows, (floors, floors), _ROUGHLY)
    return rows[np.argsort(cost, kind="stable")[:_STARTS]]


def _repeated(y: np.ndarray, w: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tile(y, (rows, 1)), np.tile(w, (rows, 1))
