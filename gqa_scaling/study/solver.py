"""Weighted least squares for every law: many data sets at once, and one of them to the last digit."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from gqa_scaling.study.models import Model

ITERATIONS = 5000  # most need ten; a few follow a long bent valley, and may not be left out
_HOPELESS = 500  # after which half of the rows under way show that the data determines no optimum
_CHUNK = 2**21  # numbers of a Jacobian that are held at once: 16 MiB


def refit(
    model: Model, y: np.ndarray, w: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least squares for every row of losses y, in nats, with weights w: each (rows, points).

    `start` holds a row of parameters for each. Returns the parameters (rows, parameters), what was
    minimised (rows,), and which rows converged. Rows are taken in chunks, so that memory stays
    bounded.
    """
    size = max(1, _CHUNK // model.added.size)
    every = [slice(i, i + size) for i in range(0, len(y), size)]
    parts = [_levenberg_marquardt(model, y[at], w[at], start[at]) for at in every]
    rows, cost, converged = (np.concatenate(each) for each in zip(*parts, strict=True))
    return rows, cost, converged


def _levenberg_marquardt(
    model: Model, y: np.ndarray, w: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`refit` for one chunk of rows, with Marquardt's scaling of the damping.

    Rows that are done are set aside, so that the slow ones do not hold up the rest. A row whose sum
    of squares is not finite never counts as converged.
    """

    def cost_of(rows: np.ndarray) -> np.ndarray:
        return (w * (y - model.predict(rows)) ** 2).sum(1) + (model.ridge * rows**2).sum(1)

    low, high = model.floor_limits(y, w)
    rows = start.copy()
    rows[:, 0] = np.clip(rows[:, 0], low, high)
    cost, damping = cost_of(rows), np.full(len(y), 1e-6)
    final, final_cost, converged = rows, cost, np.zeros(len(y), bool)
    active = np.arange(len(y))
    for i in range(ITERATIONS):
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

    Where it would leave the limits of E, E goes to its limit and the other parameters move as is
    best for it there.
    """
    every = range(rows.shape[1])
    root = np.sqrt(w)
    residual = root * (y - model.predict(rows))
    jacobian = model.jacobian(rows)
    jacobian *= root[..., None]
    across = jacobian.transpose(0, 2, 1)
    normal = across @ jacobian
    normal[:, every, every] += model.ridge
    gradient = (across @ residual[..., None])[..., 0] - model.ridge * rows
    scale = np.sqrt(np.maximum(normal[:, every, every], 1e-300))
    normal /= scale[:, :, None] * scale[:, None, :]
    normal[:, every, every] += damping[:, None] + 1e-14
    gradient /= scale
    step = np.linalg.solve(normal, gradient[..., None])[..., 0] / scale
    wanted = rows[:, 0] + step[:, 0]
    limited = np.clip(wanted, low, high)
    held = limited != wanted
    if held.any():
        normal[held, 0, 1:], normal[held, 0, 0] = 0.0, 1.0
        gradient[held, 0] = ((limited - rows[:, 0]) * scale[:, 0])[held]
        step[held] = np.linalg.solve(normal[held], gradient[held][..., None])[..., 0] / scale[held]
    return np.clip(step, -model.longest_step, model.longest_step)


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


def solve_point(
    model: Model, y: np.ndarray, w: np.ndarray, begin: np.ndarray | None = None
) -> Solution:
    """The least-squares parameters for losses y with weights w, each (points,).

    The best of the law's own starts, or `begin`, is improved by `refit` and then by SciPy's
    least squares.
    """
    starts = model.starts(y, w) if begin is None else begin[None]
    rows, cost, _ = refit(model, *(np.tile(v, (len(starts), 1)) for v in (y, w)), starts)
    root, ridge = np.sqrt(w), np.diag(np.sqrt(model.ridge))[model.ridge > 0]
    low, high = np.full(rows.shape[1], -np.inf), np.full(rows.shape[1], np.inf)
    (low[0],), (high[0],) = model.floor_limits(y[None], w[None])
    found = least_squares(
        lambda p: np.r_[root * (model.predict(p[None])[0] - y), ridge @ p],
        rows[np.argmin(cost)],
        jac=lambda p: np.vstack([root[:, None] * model.jacobian(p[None])[0], ridge]),
        bounds=(low, high),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
    )
    floor, near = found.x[0], 1e-6 * (high[0] - low[0])
    at_bound = "lower" if floor < low[0] + near else "upper" if floor > high[0] - near else ""
    return Solution(found.x, model.jacobian(found.x[None])[0], bool(found.success), at_bound)
