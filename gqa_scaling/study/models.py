"""The loss laws as things that can be fitted: parameters, losses, derivatives, where to search.

Every law has the form L = E + offsets + exp(u - b x), where x is the logarithm of a size, and u and
b of each configuration are linear in the parameters. Laws differ in which parameters u and b are
made of, and two of them add a term: see `Sum` here and `tokens.OverTokens`.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.costs import n_formula
from gqa_scaling.study.choices import Law
from gqa_scaling.study.laws import Backbone, Curves, backbone_of
from gqa_scaling.study.points import Points

LAWS: tuple[Law, ...] = get_args(Law)
MIN_SPREAD = 0.1  # of log2 density over the configurations, for a law to tell what density does
_SLOPES = np.r_[-0.3, np.linspace(0.04, 0.8, 14)]  # b tried for a start, alike for all curves
_STARTS = 2  # the best of these


def formula(law: Law, names: Sequence[str]) -> str:
    """The law in symbols, with what its parameters of these names say of patterns."""
    rate = " + r log2(1/density)" if "r" in names else ""
    return {
        "separate": "(a/N)^b + E, E shared",
        "product": f"E + exp(u - b ln(N_b/N_0) - p log2 n_h - q log2 n_kv{rate}), N_b = 8 L d^2",
        "sum": f"E + exp(u - b ln(N_b/N_0){rate}) (1 - c (1 - n_h^-g)/g - e (1 - n_kv^-g)/g), "
        "N_b = 8 L d^2",
        "pooled": f"product{rate.replace('+', 'with')}, with an offset of u for each (n_h, n_kv) "
        "shrunk towards 0",
    }[law]


class Model:
    """A law over the points of a study. A row of parameters begins with E, in nats.

    `added` (points, parameters) holds what the losses are linear in: E and, in some laws, offsets
    in nats. `level` and `slope` (configurations, parameters) say how u and b of each configuration
    are made of the parameters. `ridge` is the weight of each parameter's square in what is
    minimised. `constants` names the parameters of all configurations that are printed.
    """

    constants: tuple[str, ...]

    def __init__(
        self,
        names: tuple[str, ...],
        added: np.ndarray,
        level: np.ndarray,
        slope: np.ndarray,
        curve: np.ndarray,
        x: np.ndarray,
        centre: np.ndarray,
        backbone: Backbone | None = None,
    ) -> None:
        """`curve` indexes the configuration of each point, `x` is the centred log of its size."""
        self.names, self.added, self.level, self.slope = names, added, level, slope
        self.curve, self.x, self.centre, self.backbone = curve, x, centre, backbone
        self.design = level[curve] - x[:, None] * slope[curve]
        self.ridge = np.zeros(len(names))

    @property
    def longest_step(self) -> np.ndarray:
        """The longest step of a search: none for what is added in nats, 1 inside an exponent."""
        return np.where(self.added.any(0), np.inf, 1.0)

    # ---- losses and derivatives, for many rows of parameters at once

    def exponents(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The exponents of the law's exponentials, and their derivatives.

        Shapes are (rows, points) and (rows or 1, points, parameters).
        """
        yield rows @ self.design.T, self.design[None]

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Losses in nats (rows, points)."""
        return rows @ self.added.T + sum(_exp(each) for each, _ in self.exponents(rows))

    def jacobian(self, rows: np.ndarray) -> np.ndarray:
        """Derivatives of the losses (rows, points, parameters)."""
        out = np.repeat(self.added[None], len(rows), 0)
        for value, slopes in self.exponents(rows):
            out += _exp(value)[..., None] * slopes
        return out

    def curves(self, parameters: np.ndarray, more: np.ndarray | float = 0.0) -> Curves:
        """The curves with floor E + `more`, of one row of parameters or of many."""
        u, b = parameters @ self.level.T, parameters @ self.slope.T
        floor = np.asarray(parameters[..., 0] + more)
        return Curves(floor, u, b, self.centre, self.backbone)

    # ---- where a search lies and begins

    def floor_limits(self, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest E for every row of losses y with weights w.

        E lies between 0 and just below the least loss of the points that it alone is added to, and
        that have a weight. Just below is a thousandth of the range of the losses. Where the least
        loss is smaller than that, half of the least loss: the upper limit is above 0 for all losses
        above 0.
        """
        alone = np.count_nonzero(self.added, axis=1) == 1
        y, seen = y[:, alone], w[:, alone] > 0
        least = np.where(seen, y, np.inf).min(1)
        most = np.where(seen, y, -np.inf).max(1)
        below = least - 1e-3 * (most - least) - 1e-9
        return np.zeros(len(y)), np.maximum(below, 0.5 * least)

    def shared_terms(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What is tried for the terms that all curves share: see `starts`.

        Yields columns (points, terms) that the losses are linear in, and a row of parameters. Their
        coefficients become the parameters in the order of the columns.
        """
        count = int(self.added.any(0).sum())
        yield self.added[:, :count], np.zeros(len(self.names))

    def set_shared_terms(self, row: np.ndarray, terms: np.ndarray) -> None:
        """Write the coefficients of the shared terms into a row of parameters."""
        row[: len(terms)] = terms

    def rows_with_scales(
        self, row: np.ndarray, scale: np.ndarray, weight: np.ndarray
    ) -> Iterator[np.ndarray]:
        """The row with u such that exp(u) is about the scale of each configuration's curve."""
        free = self.level.any(0) & (self.ridge == 0)
        root = np.sqrt(weight)
        found, *_ = np.linalg.lstsq(root[:, None] * self.level[:, free], root * np.log(scale))
        row[free] = found
        yield row

    def starts(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Rows of parameters to search from, the best first.

        For a b alike for all curves, and whatever else the law is not linear in, the shared terms
        and a scale of each curve follow by linear least squares.
        """
        (low,), (high,) = self.floor_limits(y[None], w[None])
        group = np.eye(len(self.level))[self.curve]
        root, weight = np.sqrt(w), w @ group
        least = max(1e-3 * np.ptp(y[w > 0]), 1e-9)  # losses may all be equal
        rows = []
        for terms, begin in self.shared_terms():
            for b in _SLOPES:
                columns = np.hstack([terms, group * np.exp(-b * self.x)[:, None]])
                found, *_ = np.linalg.lstsq(columns * root[:, None], root * y)
                row = begin + b * self.slope.any(0)
                self.set_shared_terms(row, found[: terms.shape[1]])
                row[0] = np.clip(row[0], low, high)
                scale = np.maximum(found[terms.shape[1] :], least)
                rows += list(self.rows_with_scales(row, scale, weight))
        cost = (w * (self.predict(np.array(rows)) - y) ** 2).sum(1)
        return np.array(rows)[np.argsort(cost, kind="stable")[:_STARTS]]


def _exp(exponent: np.ndarray) -> np.ndarray:
    return np.exp(np.clip(exponent, -40, 10))


# ------------------------------------------------------------- a curve for each configuration


class SeparateCurves(Model):
    """u and b of each configuration are its own; E is shared, and whatever else a law adds.

    Parameters: the shared ones with E first, then every u, every b.
    """

    def __init__(
        self,
        p: Points,
        offsets: dict[str, np.ndarray] | None = None,
        others: tuple[str, ...] = (),
    ) -> None:
        """`offsets` are parameters in nats and the points that each is added to; `others` are
        shared parameters that a subclass makes a term of."""
        columns = {"E": np.ones(len(p.n)), **(offsets or {})}
        shared, k = (*columns, *others), len(p.heads)
        names = (*shared, *(f"u{i}" for i in range(k)), *(f"b{i}" for i in range(k)))
        added = np.zeros((len(p.n), len(names)))
        added[:, : len(columns)] = np.stack(list(columns.values()), 1)
        each = np.eye(len(names))
        level, slope = each[len(shared) : len(shared) + k], each[len(shared) + k :]
        x = np.log(p.n) - p.centre[p.curve]
        super().__init__(names, added, level, slope, p.curve, x, p.centre)
        self.constants = ("E", *others)


# ---------------------------------------------------------------------------------- joint laws


class Joint(Model):
    """One law for all configurations on N_b = 8 L d^2: "product" or "pooled".

    Parameters: E, u, b, then p and q where query heads and KV heads differ, and r where densities
    do: each halving of the density of attention at the training context multiplies the excess loss
    over E by exp(r). "pooled" adds an offset of u for each configuration, which `ridge` holds near
    0.
    """

    own: tuple[str, ...] = ()  # parameters after b that u is not linear in
    linear: tuple[str, ...] = ("p", "q", "r")  # those that u may be linear in

    def __init__(self, p: Points, head_dim: int, strength: float | None = None) -> None:
        """`strength` is that of the ridge of "pooled"; without one there are no offsets."""
        self.heads = np.array([h[:2] for h in p.heads], float)  # of the configurations
        log_backbone = np.log(n_formula(p.n_layers, p.d_model, 0, 0))
        centre = float(log_backbone.mean())
        columns = dict(zip("pqr", [*-np.log2(self.heads).T, -np.log2(p.density)], strict=True))
        columns = {
            k: v
            for k, v in columns.items()
            if k in self.linear and np.ptp(v) > (k == "r") * MIN_SPREAD
        }
        k = len(p.heads)
        self.constants = ("E", "u", "b", *self.own, *columns)
        offsets = () if strength is None else tuple(f"offset{i}" for i in range(k))
        names = (*self.constants, *offsets)
        level, slope = np.zeros((2, k, len(names)))
        level[:, 1], slope[:, 2] = 1.0, 1.0
        for name, column in columns.items():
            level[:, names.index(name)] = column
        added = np.zeros((len(p.n), len(names)))
        added[:, 0] = 1.0
        if strength is not None:
            level[:, -k:] = np.eye(k)
        x, centres = log_backbone - centre, np.full(k, centre)
        super().__init__(names, added, level, slope, p.curve, x, centres, backbone_of(p, head_dim))
        if strength is not None:
            self.ridge[-k:] = strength


_POWERS = (-0.3, 0.0, 0.3, 0.7, 1.5)  # g tried for the start of the sum
_RATES = (0.0, 0.03, 0.1, 0.3)  # and r


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


def heads_factor(rows: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the law "sum" for each of `heads` (heads, 2), trained or not, and its derivatives.

    Of rows of that law's parameters; the derivatives in c, e and g are (.., heads, 3).
    """
    c, e, g = (rows[..., i : i + 1] for i in (3, 4, 5))
    (gain_h, slope_h), (gain_kv, slope_kv) = (_gain(n, g) for n in heads.T)
    slopes = np.stack([-gain_h, -gain_kv, -c * slope_h - e * slope_kv], -1)
    return np.maximum(1 - c * gain_h - e * gain_kv, 1e-6), slopes


class Sum(Joint):
    """The joint law "sum": the excess loss is a sum of c n_h^-g and e n_kv^-g, 1 at one head.

    It is written as 1 - c (1 - n_h^-g)/g - e (1 - n_kv^-g)/g, so that g may pass through 0.
    """

    own = ("c", "e", "g")
    linear = ("r",)

    def _factor(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return heads_factor(rows, self.heads)

    def exponents(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        factor, by_factor = self._factor(rows)
        slopes = np.repeat(self.design[None], len(rows), 0)
        slopes[..., 3:6] = (by_factor / factor[..., None])[:, self.curve]
        yield rows @ self.design.T + np.log(factor)[:, self.curve], slopes

    def curves(self, parameters: np.ndarray, more: np.ndarray | float = 0.0) -> Curves:
        found = super().curves(parameters, more)
        u = found.u + np.log(self._factor(parameters)[0])
        return Curves(found.floor, u, found.b, found.centre, found.backbone)

    def rows_with_scales(
        self, row: np.ndarray, scale: np.ndarray, weight: np.ndarray
    ) -> Iterator[np.ndarray]:
        root = np.sqrt(weight)
        for rate in _RATES if "r" in self.names else _RATES[:1]:
            dense = scale * np.exp(-rate * self.level[:, -1]) if "r" in self.names else scale
            for g in _POWERS:
                gains = [_gain(n, np.array(g))[0] for n in self.heads.T]
                columns = np.stack([np.ones_like(dense), *gains], 1)
                found, *_ = np.linalg.lstsq(columns * root[:, None], root * dense)
                one = max(found[0], 1e-3)
                new = row.copy()
                new[1], new[3:6] = np.log(one), (-found[1] / one, -found[2] / one, g)
                new[6:] = rate
                yield new


def joint(law: Law, p: Points, head_dim: int, strength: float) -> Joint:
    """The joint law of this name over these points; `strength` is that of the ridge of "pooled".

    Raises UserError when shapes are unknown or configurations too few.
    """
    require(
        bool(p.n_layers.all()),
        f"law={law!r} is one of N_b = 8 L d^2: the data needs columns n_layers and d_model",
    )
    need = 2 if law == "product" else 3
    there = len({h[:2] for h in p.heads}) if law == "sum" else len(p.heads)
    require(there >= need, f"law={law!r} needs {need} head configurations, there are {there}")
    if law == "sum":
        return Sum(p, head_dim)
    return Joint(p, head_dim, strength if law == "pooled" else None)
