"""The laws as things that can be fitted: their parameters, start, Jacobian and curves.

Every model holds its parameters as one row, E first, and solves many data sets at once; the point
fit is scipy's least squares from a start that is good whatever the data, because E and the other
nonlinear parameters are first profiled on a grid.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import least_squares

from gqa_scaling.study import laws
from gqa_scaling.study.choices import Law

LAWS: tuple[Law, ...] = ("separate", "product", "sum", "pooled")
FORMULAS: dict[Law, str] = {
    "separate": "(a/N)^b + E, E shared",
    "product": "E + exp(u - b ln(N_b/N_0) - p log2 n_h - q log2 n_kv), N_b = 8 L d^2",
    "sum": "E + exp(u - b ln(N_b/N_0)) (1 - c (1 - n_h^-g)/g - e (1 - n_kv^-g)/g), N_b = 8 L d^2",
    "pooled": "product, with an offset of u for each (n_h, n_kv) shrunk towards 0",
}
MIN_SPREAD = 0.1  # of log2 density over the configurations, for a law to tell what density does
_ITERATIONS = 5000  # most need ten; a few follow a long bent valley, and may not be left out
_HOPELESS = 500  # after which half of the rows under way show that the data determines no optimum


def formula(law: Law, names: Sequence[str]) -> str:
    """The law in symbols, with what its parameters of these names say of patterns."""
    known = FORMULAS[law]
    if "r" in names:
        for end in ("log2 n_kv)", "exp(u - b ln(N_b/N_0))"):
            known = known.replace(end, f"{end[:-1]} + r log2(1/density))")
        known = known.replace("product,", "product with r log2(1/density),")
    return known


@dataclass(frozen=True)
class Backbone:
    """N of each configuration against its head-independent part N_b, both as logarithms."""

    log_backbone: np.ndarray  # (grid,)
    log_n: np.ndarray  # (heads, grid)

    def to_backbone(self, k: int, n: np.ndarray) -> np.ndarray:
        return np.exp(np.interp(np.log(n), self.log_n[k], self.log_backbone))

    def to_n(self, k: int, backbone: np.ndarray) -> np.ndarray:
        finite = np.isfinite(backbone)
        at = np.log(np.where(finite, np.maximum(backbone, 1e-300), 1.0))
        at = np.clip(at, self.log_backbone[0], None)
        n = np.exp(np.interp(at, self.log_backbone, self.log_n[k]))
        return np.where(finite & (at < self.log_backbone[-1]), n, np.inf)


@dataclass(frozen=True)
class Curves:
    """The parameters of every curve, with any leading axes (none, or bootstrap draws first).

    Loss is floor + exp(u - b (ln N - centre)). `floor`, E, has the leading shape alone; `u` and
    `b` end in the axis of heads. With a `backbone` the law is one of N_b instead of N.
    """

    floor: np.ndarray
    u: np.ndarray
    b: np.ndarray
    centre: np.ndarray
    backbone: Backbone | None = None

    def loss(self, k: int, n: np.ndarray | float) -> np.ndarray:
        """Loss in nats of configuration k at N, leading axes first."""
        n = np.asarray(n, float)
        if self.backbone:
            n = self.backbone.to_backbone(k, n)
        lead = (..., *(None,) * n.ndim)
        u, b, floor = self.u[..., k][lead], self.b[..., k][lead], self.floor[lead]
        return laws.centred(n, u, b, floor, self.centre[k])

    def n_star(self, loss: float) -> np.ndarray:
        """N*(H) for a target loss, leading axes first, heads last; inf where never reached."""
        n = laws.centred_inverse(loss, self.u, self.b, self.floor[..., None], self.centre)
        if self.backbone is None:
            return n
        return np.stack([self.backbone.to_n(k, n[..., k]) for k in range(n.shape[-1])], -1)


@dataclass(frozen=True)
class Solution:
    """Parameters of a point fit, the Jacobian of the predictions there, and whether it converged.

    `at_bound` is `bound_of` the fitted E.
    """

    parameters: np.ndarray
    jacobian: np.ndarray
    converged: bool
    at_bound: str


class Model(Protocol):
    """What `fit` needs of a law: parameters are rows with E first."""

    names: tuple[str, ...]

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        """Losses (rows, points)."""

    def jacobian(self, parameters: np.ndarray) -> np.ndarray:
        """Derivatives of the losses (points, parameters) at one row of parameters."""

    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """A row of parameters that a local search improves to the best."""

    def solve(
        self,
        y: np.ndarray,
        w: np.ndarray,
        start: np.ndarray,
        limits: tuple[np.ndarray, np.ndarray],
        iterations: int = _ITERATIONS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Least squares for every row of y: (parameters, sum of squares, converged)."""

    def curves(self, parameters: np.ndarray) -> Curves: ...


def floor_limits(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E lies between 0 and just below the least loss, for every row of y.

    Just below is a thousandth of the range of the losses. Where the least loss is smaller than
    that, half of the least loss: the upper limit is above 0 for all losses above 0.
    """
    least = y.min(1)
    below = least - 1e-3 * (y.max(1) - least) - 1e-9
    return np.zeros(len(y)), np.maximum(below, 0.5 * least)


def bound_of(floor: float, limits: tuple[np.ndarray, np.ndarray]) -> str:
    """Which of its limits a fitted E lies at: "lower", "upper", or "" for neither."""
    (low,), (high,) = limits
    near = 1e-6 * (high - low)
    return "lower" if floor < low + near else "upper" if floor > high - near else ""


def absorbing(jacobian: np.ndarray, at_bound: str) -> np.ndarray:
    """The Jacobian of what the fit could turn to follow the losses: without E at a bound.

    An E that its bound holds has taken nothing from the residuals. The sum of squares then holds
    what a free E would have removed, and has one degree of freedom more: exactly one where the
    true E lies at the bound, as the excluded part is then half of a normal distribution, whose
    mean square is that of the whole, and a little less where it lies inside. Counted as if E were
    free, the noise comes out too large. `benchmarks/study.py bound` measures both.
    """
    if not at_bound:
        return jacobian
    return np.hstack([np.zeros_like(jacobian[:, :1]), jacobian[:, 1:]])


def solve_point(
    model: Model,
    y: np.ndarray,
    w: np.ndarray,
    ridge: np.ndarray,
    begin: np.ndarray | None = None,
) -> Solution:
    """scipy's least squares with the analytic Jacobian, from `begin`, else the model's own start."""
    limits = floor_limits(y[None])
    begin = model.start(y, w) if begin is None else begin
    start, _, _ = model.solve(y[None], w[None], begin[None], limits)
    root, held = np.sqrt(w), np.flatnonzero(ridge)
    pull = np.zeros((len(held), len(ridge)))
    pull[np.arange(len(held)), held] = np.sqrt(ridge[held])

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.r_[root * (model.predict(p[None])[0] - y), pull @ p]

    def jacobian(p: np.ndarray) -> np.ndarray:
        return np.vstack([root[:, None] * model.jacobian(p), pull])

    low, high = np.full(len(ridge), -np.inf), np.full(len(ridge), np.inf)
    low[0], high[0] = limits[0][0], limits[1][0]
    best = least_squares(
        residuals,
        start[0],
        jac=jacobian,
        bounds=(low, high),
        x_scale="jac",
        ftol=1e-14,
        xtol=1e-14,
        gtol=1e-14,
    )
    jacobian_there, at_bound = model.jacobian(best.x), bound_of(float(best.x[0]), limits)
    return Solution(best.x, jacobian_there, bool(best.success), at_bound)


def _descend(
    y: np.ndarray,
    w: np.ndarray,
    start: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
    cost_of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    propose: Callable[..., np.ndarray],
    iterations: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levenberg-Marquardt on every row of y at once: (parameters, sum of squares, converged).

    Rows that are done are set aside, so that the slow ones do not hold up the rest. A row whose sum
    of squares is not finite never counts as converged.
    """
    rows = start.copy()
    low, high = (np.broadcast_to(v, len(y)) for v in limits)
    rows[:, 0] = np.clip(rows[:, 0], low, high)
    final, final_cost, converged = rows, cost_of(rows, y, w), np.zeros(len(y), bool)
    active, cost, damping = np.arange(len(y)), final_cost.copy(), np.full(len(y), 1e-6)
    for i in range(iterations):
        step = propose(rows, y, w, damping, low, high)
        new = rows + step
        new[:, 0] = np.clip(new[:, 0], low, high)
        cost_new = cost_of(new, y, w)
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


# ----------------------------------------------------------------------------- separate curves


class Separate:
    """u and b for each curve, E shared: parameters are E, every u, every b."""

    def __init__(self, curve: np.ndarray, x: np.ndarray, centre: np.ndarray) -> None:
        """`curve` indexes the configuration of each point, `x` is ln N minus its centre."""
        self.curve, self.x, self.centre = curve, x, centre
        self.group = np.eye(len(centre))[curve]  # sums over a curve are one product
        k = range(len(centre))
        self.names = ("E", *(f"u{i}" for i in k), *(f"b{i}" for i in k))

    def _split(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        k = len(self.centre)
        return parameters[:, 0], parameters[:, 1 : k + 1], parameters[:, k + 1 :]

    def _excess(self, u: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(np.clip(u[:, self.curve] - b[:, self.curve] * self.x, -40, 10))

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        floor, u, b = self._split(parameters)
        return floor[:, None] + self._excess(u, b)

    def jacobian(self, parameters: np.ndarray) -> np.ndarray:
        _, u, b = self._split(parameters[None])
        each = self._excess(u, b)[0][:, None] * self.group
        return np.hstack([np.ones((len(self.x), 1)), each, -self.x[:, None] * each])

    def curves(self, parameters: np.ndarray) -> Curves:
        floor, u, b = self._split(np.atleast_2d(parameters))
        if parameters.ndim == 1:
            floor, u, b = floor[0], u[0], b[0]
        return Curves(np.asarray(floor), u, b, self.centre)

    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The best of a grid over E: given E, the other parameters have a log-linear start."""
        (low,), (high,) = floor_limits(y[None])
        floor = high - (high - low) * np.linspace(0, 1, 25) ** 2
        many, weights = (np.broadcast_to(v, (len(floor), len(y))) for v in (y, w))
        u, b = self._log_linear(many, weights, floor)
        rows = np.hstack([floor[:, None], u, b])
        rows, cost, _ = self.solve(many, weights, rows, (floor, floor), iterations=6)
        return rows[np.argmin(cost)]

    def _log_linear(self, y: np.ndarray, w: np.ndarray, floor: np.ndarray) -> tuple:
        """u and b of a straight line through ln(y - E)."""
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
        start: np.ndarray,
        limits: tuple[np.ndarray, np.ndarray],
        iterations: int = _ITERATIONS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levenberg-Marquardt on every row.

        The normal equations are an arrow: a 2 x 2 block for each curve, bordered by E.
        """
        G, x = self.group, self.x

        def propose(
            rows: np.ndarray, y: np.ndarray, w: np.ndarray, *rest: np.ndarray
        ) -> np.ndarray:
            damping, low, high = rest
            floor, u, b = self._split(rows)
            f = self._excess(u, b)
            r, wf = y - floor[:, None] - f, w * f
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
            step = np.clip(floor + step, low, high) - floor
            du = np.clip(p1 - q1 * step[:, None], -2, 2)
            db = np.clip(p2 - q2 * step[:, None], -1, 1)
            return np.hstack([step[:, None], du, db])

        return _descend(y, w, start, limits, self._cost, propose, iterations)

    def _cost(self, rows: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        return (w * (y - self.predict(rows)) ** 2).sum(1)


# ---------------------------------------------------------------------------------- joint laws


_SPARSE = ([0.0], [0.03], [0.1], [0.3])  # r tried for the start of the sum


def _gain(n: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1 - n^-g) / g and its derivative in g; ln n and -ln^2 n / 2 at g = 0."""
    x, small = np.log(n), np.abs(g) < 1e-4
    safe = np.where(small, 1.0, g)
    fall = -np.expm1(-np.clip(safe * x, -50, 50))
    slope = (safe * x * (1 - fall) - fall) / safe**2
    return (
        np.where(small, x - g * x**2 / 2, fall / safe),
        np.where(small, -(x**2) / 2 + g * x**3 / 3, slope),
    )


class Joint:
    """One law for all configurations on N_b = 8 L d^2: "product", "sum" or "pooled".

    Parameters: E, u, b, then p, q (product), c, e, g (sum), or p, q and an offset for each
    configuration (pooled), which `ridge` holds near 0. p and q are there where query heads and KV
    heads differ, and after them r where densities do: each halving of the density of attention at
    the training context multiplies the excess loss over E by exp(r).
    """

    def __init__(
        self,
        law: Law,
        heads: Sequence[tuple[int, int]],
        density: np.ndarray,
        curve: np.ndarray,
        log_backbone: np.ndarray,
        backbone: Backbone | None,
        strength: float = 0.0,
    ) -> None:
        """`heads` and `density` are of the configurations, `curve` indexes them for each point."""
        self.law, self.curve, self.backbone = law, curve, backbone
        self.centre = float(log_backbone.mean())
        self.x = log_backbone - self.centre
        self.table = np.array(heads, float)  # of the configurations
        self.heads = self.table[curve]  # of the points
        logs = dict(zip("pqr", [*-np.log2(self.table).T, -np.log2(density)], strict=True))
        known = "r" if law == "sum" else "pqr"
        self.linear = {  # what u is linear in, for each configuration
            k: v for k, v in logs.items() if k in known and np.ptp(v) > (k == "r") * MIN_SPREAD
        }
        own = ("c", "e", "g") if law == "sum" else ()
        offsets = tuple(f"offset{i}" for i in range(len(heads))) if law == "pooled" else ()
        self.names = ("E", "u", "b", *own, *self.linear, *offsets)
        self.first = 3 + len(own)  # of the parameters of `linear`
        self.ridge = np.array([strength if n.startswith("offset") else 0.0 for n in self.names])

    def _heads_factor(self, rows: np.ndarray, heads: np.ndarray) -> np.ndarray:
        """A sum of c n_h^-g and e n_kv^-g, 1 at one head, written so that g may pass through 0."""
        c, e, g = (rows[:, i : i + 1] for i in (3, 4, 5))
        fall = c * _gain(heads[:, 0], g)[0] + e * _gain(heads[:, 1], g)[0]
        return np.maximum(1 - fall, 1e-6)

    def _level(self, rows: np.ndarray, heads: np.ndarray, own: np.ndarray | slice) -> np.ndarray:
        """u of every point or configuration, as the heads make it."""
        u = rows[:, 1:2]
        if self.law == "sum":
            u = u + np.log(self._heads_factor(rows, heads))
        for i, column in enumerate(self.linear.values(), self.first):
            u = u + rows[:, i : i + 1] * column[own]
        return u + rows[:, -len(self.table) :][:, own] if self.law == "pooled" else u

    def _excess(self, rows: np.ndarray) -> np.ndarray:
        u = self._level(rows, self.heads, self.curve)
        return np.exp(np.clip(u - rows[:, 2:3] * self.x, -40, 10))

    def predict(self, parameters: np.ndarray) -> np.ndarray:
        return parameters[:, :1] + self._excess(parameters)

    def _jacobians(self, rows: np.ndarray, f: np.ndarray) -> np.ndarray:
        columns = [np.ones_like(f), f, -self.x * f]
        if self.law == "sum":
            c, e, g = (rows[:, i : i + 1] for i in (3, 4, 5))
            each, (h, kv) = f / self._heads_factor(rows, self.heads), self.heads.T
            (gh, slope_h), (gkv, slope_kv) = _gain(h, g), _gain(kv, g)
            columns += [-each * gh, -each * gkv, -each * (c * slope_h + e * slope_kv)]
        columns += [column[self.curve] * f for column in self.linear.values()]
        if self.law == "pooled":
            columns += [f * (self.curve == k) for k in range(len(self.table))]
        return np.stack(columns, -1)

    def jacobian(self, parameters: np.ndarray) -> np.ndarray:
        return self._jacobians(parameters[None], self._excess(parameters[None]))[0]

    def curves(self, parameters: np.ndarray) -> Curves:
        rows = np.atleast_2d(parameters)
        u = self._level(rows, self.table, slice(None))
        b = np.broadcast_to(rows[:, 2:3], u.shape)
        centre = np.full(len(self.table), self.centre)
        if parameters.ndim == 1:
            return Curves(np.asarray(rows[0, 0]), u[0], b[0], centre, self.backbone)
        return Curves(rows[:, 0], u, b, centre, self.backbone)

    def start(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """The best of a grid over what is not linear: E, or b, g and r."""
        (low,), (high,) = floor_limits(y[None])
        root, one = np.sqrt(w), np.ones_like(y)
        best, least = None, np.inf
        if self.law == "sum":
            sparse = [column[self.curve] for column in self.linear.values()]
            for b, r in itertools.product(np.linspace(0.05, 0.6, 12), _SPARSE if sparse else [[]]):
                f = np.exp(sum(np.multiply(r, sparse), -b * self.x))
                for g in (-0.3, 0.0, 0.3, 0.7, 1.5):
                    gain = _gain(self.heads, np.array(g))[0]
                    columns = np.stack([one, f, *(f[:, None] * gain).T], 1)
                    (floor, scale, c, e), *_ = np.linalg.lstsq(columns * root[:, None], root * y)
                    scale = max(scale, 1e-3)
                    row = np.array([floor, np.log(scale), b, -c / scale, -e / scale, g, *r])
                    row[0] = np.clip(floor, low, high)
                    cost = float((w * (self.predict(row[None])[0] - y) ** 2).sum())
                    best, least = (row, cost) if cost < least else (best, least)
            return best
        columns = [column[self.curve] for column in self.linear.values()]
        columns = np.stack([one, -self.x, *columns], 1)
        for floor in high - (high - low) * np.linspace(0, 1, 40) ** 2:
            excess = np.maximum(y - floor, 1e-9)
            by = root * excess
            found, *_ = np.linalg.lstsq(columns * by[:, None], by * np.log(excess))
            row = np.r_[floor, found, np.zeros(len(self.names) - 1 - len(found))]
            cost = float((w * (self.predict(row[None])[0] - y) ** 2).sum())
            best, least = (row, cost) if cost < least else (best, least)
        return best

    def solve(
        self,
        y: np.ndarray,
        w: np.ndarray,
        start: np.ndarray,
        limits: tuple[np.ndarray, np.ndarray],
        iterations: int = _ITERATIONS,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Levenberg-Marquardt on every row, with dense normal equations."""
        every = range(start.shape[1])

        def propose(
            rows: np.ndarray, y: np.ndarray, w: np.ndarray, *rest: np.ndarray
        ) -> np.ndarray:
            damping, low, high = rest
            f = self._excess(rows)
            J = self._jacobians(rows, f)
            weighted = (J * w[..., None]).transpose(0, 2, 1)
            A = weighted @ J
            A[:, every, every] += self.ridge
            g = (weighted @ (y - rows[:, :1] - f)[..., None])[..., 0] - self.ridge * rows
            scale = np.sqrt(np.maximum(np.einsum("bii->bi", A), 1e-300))
            A = A / (scale[:, :, None] * scale[:, None, :])
            A[:, every, every] += damping[:, None] + 1e-14
            g = g / scale
            step = np.linalg.solve(A, g[..., None])[..., 0] / scale
            wanted = rows[:, 0] + step[:, 0]
            held = np.clip(wanted, low, high) != wanted
            if held.any():  # E goes to its bound and the others move as is best for it there
                A[held, 0, 1:], A[held, 0, 0] = 0.0, 1.0
                pinned = np.clip(wanted, low, high) - rows[:, 0]
                g[held, 0] = (pinned * scale[:, 0])[held]
                step[held] = np.linalg.solve(A[held], g[held][..., None])[..., 0] / scale[held]
            step[:, 1:] = np.clip(step[:, 1:], -1, 1)
            return step

        return _descend(y, w, start, limits, self._cost, propose, iterations)

    def _cost(self, rows: np.ndarray, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        return (w * (y - self.predict(rows)) ** 2).sum(1) + (self.ridge * rows * rows).sum(1)
