"""The loss laws as things that can be fitted: parameters, losses, derivatives, where to search.

Every law has the form L = E + offsets + exp(u - b x), where x is the logarithm of a size. u and b
are each configuration's own, or linear in parameters that all share. One law adds a second
exponential, see `tokens.OverTokens`.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.costs import n_formula
from gqa_scaling.study.choices import Law
from gqa_scaling.study.curves import Backbone, Curves, backbone_of
from gqa_scaling.study.points import Points

LAWS: tuple[Law, ...] = get_args(Law)
MIN_SPREAD = 0.1  # of log2 density over the configurations, for a law to tell what density does
_SLOPES = np.r_[-0.3, np.linspace(0.04, 0.8, 14)]  # b tried for a start, alike for all curves
_POWERS = (-0.3, 0.0, 0.3, 0.7, 1.5)  # and g
_STARTS = 2  # the best of these


def formula(law: Law, names: Sequence[str]) -> str:
    """The law in symbols, with what its parameters of these names say of patterns."""
    if law == "separate":
        return "(a/N)^b + E, E shared"
    rate = " + r log2(1/density)" if "r" in names else ""
    if "g" not in names:
        return f"E + exp(u - b ln(N_b/N_0) - p log2 n_h - q log2 n_kv{rate}), N_b = 8 L d^2"
    return (
        f"E + exp(u - b ln(N_b/N_0) - p G(n_h) - q G(n_kv){rate}), N_b = 8 L d^2, "
        "G(n) = log2 m (1 - n^-g)/(1 - m^-g), m the most heads"
    )


class Model:
    """A law over the points of a study. A row of parameters begins with E, in nats.

    The parameters that all curves share come first; after them may come `own` ones: every u, then
    every b. `added` (points, shared) holds what the losses are linear in: E and, in some laws,
    offsets in nats. `designs` (points, shared) are what the shared parameters do to the exponents;
    own u and b enter the first of these. `level` and `slope` (configurations, parameters) say how u
    and b of each configuration are made of all parameters. `constants` names the shared parameters
    that are printed.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        constants: tuple[str, ...],
        added: np.ndarray,
        designs: tuple[np.ndarray, ...],
        level: np.ndarray,
        slope: np.ndarray,
        curve: np.ndarray,
        x: np.ndarray,
        centre: np.ndarray,
        backbone: Backbone | None = None,
    ) -> None:
        """`curve` indexes the configuration of each point, in ascending order; `x` is the centred
        log of its size."""
        self.names, self.constants, self.added, self.designs = names, constants, added, designs
        self.level, self.slope, self.curve, self.x = level, slope, curve, x
        self.centre, self.backbone = centre, backbone
        self.shared = added.shape[1]
        self.own = len(names) > self.shared  # whether each curve has a u and a b of its own

    @property
    def longest_step(self) -> np.ndarray:
        """The longest step of a search: none for what is added in nats, 1 inside an exponent."""
        longest = np.ones(len(self.names))
        longest[: self.shared][self.added.any(0)] = np.inf
        return longest

    # ---- losses and derivatives, for many rows of parameters at once

    def exponents(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The exponents of the law's exponentials (rows, points), and their derivatives by the
        shared parameters (rows or 1, points, shared)."""
        out = [(rows[:, : self.shared] @ design.T, design[None]) for design in self.designs]
        if self.own:
            k = (len(self.names) - self.shared) // 2
            u, b = rows[:, self.shared : self.shared + k], rows[:, self.shared + k :]
            out[0] = out[0][0] + u[:, self.curve] - b[:, self.curve] * self.x, out[0][1]
        return out

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Losses in nats (rows, points)."""
        each = (_exp(exponent) for exponent, _ in self.exponents(rows))
        return np.asarray(rows[:, : self.shared] @ self.added.T + sum(each))

    def derivatives(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses (rows, points), their derivatives by the shared parameters (rows, points, shared),
        and those by the u of each point's own curve (rows, points), which by b are -x times that.
        """
        loss, shared = rows[:, : self.shared] @ self.added.T, self.added[None]
        values = []
        for exponent, slopes in self.exponents(rows):
            values.append(_exp(exponent))
            loss, shared = loss + values[-1], shared + values[-1][..., None] * slopes
        return loss, shared, values[0]

    def jacobian(self, rows: np.ndarray) -> np.ndarray:
        """Derivatives of the losses by all parameters (rows, points, parameters)."""
        _, shared, by_u = self.derivatives(rows)
        if not self.own:
            return shared
        member = np.eye(len(self.level))[self.curve]
        own = by_u[..., None] * member
        return np.concatenate([shared, own, -self.x[:, None] * own], -1)

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
        self, row: np.ndarray, logs: np.ndarray, weight: np.ndarray
    ) -> Iterator[np.ndarray]:
        """The row with u of each configuration that has points near the log of its curve's scale."""
        free, root = np.flatnonzero(self.level.any(0)), np.sqrt(weight)
        if self.own:
            row[free] = logs
        else:
            level = self.level[np.unique(self.curve)]  # of configurations with points
            row[free], *_ = np.linalg.lstsq(root[:, None] * level[:, free], root * logs)
        yield row

    def starts(self, y: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Rows of parameters to search from, the best first.

        For a b alike for all curves, and whatever else the law is not linear in, the shared terms
        and a scale of each curve follow by linear least squares, and the u or what they are made of
        from these scales.
        """
        (low,), (high,) = self.floor_limits(y[None], w[None])
        first = np.flatnonzero(np.r_[True, np.diff(self.curve) > 0])
        weight = np.add.reduceat(w, first)
        least = max(1e-3 * np.ptp(y[w > 0]), 1e-9)  # losses may all be equal
        rows = []
        for terms, begin in self.shared_terms():
            for b in _SLOPES:
                fall = np.exp(-b * self.x)
                found, scale = _scales(terms, fall, y, w, first)
                row = begin + b * self.slope.any(0)
                self.set_shared_terms(row, found)
                row[0] = np.clip(row[0], low, high)
                logs = np.log(np.maximum(scale, least))
                rows += list(self.rows_with_scales(row, logs, weight))
        cost = (w * (self.predict(np.array(rows)) - y) ** 2).sum(1)
        return np.array(rows)[np.argsort(cost, kind="stable")[:_STARTS]]


def _exp(exponent: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(np.clip(exponent, -40, 10)))


def _scales(
    terms: np.ndarray, fall: np.ndarray, y: np.ndarray, w: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of the terms, and the scale of each curve of the shape `fall`, for losses y.

    Weighted linear least squares: each curve's scale is solved for before the terms. `first` are
    the first points of the curves.
    """
    sizes = np.diff(np.r_[first, len(y)])
    square = np.maximum(np.add.reduceat(w * fall**2, first), 1e-300)
    both = np.column_stack([terms, y])
    along = np.add.reduceat((w * fall)[:, None] * both, first) / square[:, None]
    left = np.sqrt(w)[:, None] * (both - fall[:, None] * np.repeat(along, sizes, 0))
    found, *_ = np.linalg.lstsq(left[:, :-1], left[:, -1])
    return found, along[:, -1] - along[:, :-1] @ found


class SeparateCurves(Model):
    """u and b of each configuration are its own; E is shared, and whatever else a law adds."""

    def __init__(
        self,
        p: Points,
        offsets: dict[str, np.ndarray] | None = None,
        others: dict[str, np.ndarray] | None = None,
    ) -> None:
        """`offsets` are parameters in nats and the points that each is added to; `others` are
        parameters of a second exponential, and what each does to its exponent."""
        columns, others = {"E": np.ones(len(p.n)), **(offsets or {})}, others or {}
        shared, k = (*columns, *others), len(p.heads)
        names = (*shared, *(f"u{i}" for i in range(k)), *(f"b{i}" for i in range(k)))
        added, second = np.zeros((2, len(p.n), len(shared)))
        added[:, : len(columns)] = np.stack(list(columns.values()), 1)
        for name, column in others.items():
            second[:, shared.index(name)] = column
        designs = (np.zeros_like(added), *([second] if others else []))
        each = np.eye(len(names))
        level, slope = each[len(shared) : len(shared) + k], each[len(shared) + k :]
        x, constants = np.log(p.n) - p.centre[p.curve], ("E", *others)
        super().__init__(names, constants, added, designs, level, slope, p.curve, x, p.centre)


class Joint(Model):
    """The joint law "product", on N_b = 8 L d^2.

    Parameters: E, u, b, then p and q where query heads and KV heads differ, and r where densities
    do: each halving of the density of attention at the training context multiplies the excess loss
    over E by exp(r). Configurations without points may follow those with points: they are predicted.
    """

    own_terms: tuple[str, ...] = ()  # parameters after the others that u is not linear in

    def __init__(self, p: Points, head_dim: int, trained: np.ndarray) -> None:
        """`trained` are the indices of the configurations that say which parameters there are."""
        log_backbone = np.log(n_formula(p.n_layers, p.d_model, 0, 0))
        centre, k = float(log_backbone.mean()), len(p.heads)
        self.heads = np.array([h[:2] for h in p.heads], float)
        self.most = self.heads[trained].max(0)
        columns = dict(zip("pqr", [*-np.log2(self.heads).T, -np.log2(p.density)], strict=True))
        columns = {
            name: column
            for name, column in columns.items()
            if np.ptp(column[trained]) > (name == "r") * MIN_SPREAD
        }
        names = ("E", "u", "b", *columns, *self.own_terms)
        level, slope = np.zeros((2, k, len(names)))
        level[:, 1], slope[:, 2] = 1.0, 1.0
        for name, column in columns.items():
            level[:, names.index(name)] = column
        added = np.zeros((len(p.n), len(names)))
        added[:, 0] = 1.0
        x, centres = log_backbone - centre, np.full(k, centre)
        design = level[p.curve] - x[:, None] * slope[p.curve]
        super().__init__(
            names,
            names,
            added,
            (design,),
            level,
            slope,
            p.curve,
            x,
            centres,
            backbone_of(p, head_dim),
        )


class Fading(Joint):
    """The joint law "fading": the product law with gains of more heads that fade.

    log2 n, what n heads of a kind gain, becomes G(n) = log2 m (1 - n^-g)/(1 - m^-g), m being the
    most heads of that kind among the trained: with g = 0 it is log2 n, and with larger g each
    doubling gains 2^-g of the one before. Chen et al. 2025, section 5, fit such powers to losses
    against query heads.
    """

    own_terms = ("g",)

    def _bends(self, g: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """For p and q: its place, G - log2 n of the configurations, and its derivative in g.

        g is (rows, 1), what is returned (rows, configurations).
        """
        out = []
        for name, n, most in zip("pq", self.heads.T, self.most, strict=True):
            if name in self.names:
                (top, rise), (own, slope) = _gain(most, g), _gain(n, g)
                log = np.log2(most)
                derivative = (slope * top - own * rise) / top**2
                out.append((self.names.index(name), log * own / top - np.log2(n), log * derivative))
        return out

    def exponents(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        ((exponent, slopes),) = super().exponents(rows)
        slopes = np.repeat(slopes, len(rows), 0)
        for i, more, by_g in self._bends(rows[:, -1:]):
            exponent = exponent - rows[:, i : i + 1] * more[:, self.curve]
            slopes[..., i] -= more[:, self.curve]
            slopes[..., -1] -= rows[:, i : i + 1] * by_g[:, self.curve]
        return [(exponent, slopes)]

    def curves(self, parameters: np.ndarray, more: np.ndarray | float = 0.0) -> Curves:
        found, u = super().curves(parameters, more), 0.0
        for i, bend, _ in self._bends(parameters[..., -1:]):
            u = u - parameters[..., i : i + 1] * bend
        return Curves(found.floor, found.u + u, found.b, found.centre, found.backbone)

    def rows_with_scales(
        self, row: np.ndarray, logs: np.ndarray, weight: np.ndarray
    ) -> Iterator[np.ndarray]:
        root, free = np.sqrt(weight), np.flatnonzero(self.level.any(0))
        for g in _POWERS:
            level = self.level.copy()
            for i, bend, _ in self._bends(np.array([[g]])):
                level[:, i] -= bend[0]
            level, new = level[np.unique(self.curve)], row.copy()
            new[free], *_ = np.linalg.lstsq(root[:, None] * level[:, free], root * logs)
            new[-1] = g
            yield new


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


def joint(law: Law, p: Points, head_dim: int, seen: np.ndarray | None = None) -> Joint:
    """The joint law of this name over these points, to be fitted to those that `seen` marks."""
    require(
        bool(p.n_layers.all()),
        f"law={law!r} is one of N_b = 8 L d^2: the data needs columns n_layers and d_model",
    )
    trained = np.unique(p.curve if seen is None else p.curve[seen])
    there = len(trained)
    require(there >= 2, f"law={law!r} needs 2 head configurations, there are {there}")
    # two numbers of heads do not tell whether gains fade
    numbers = max(len({p.heads[k][kind] for k in trained}) for kind in (0, 1))
    kind = Fading if law == "fading" and numbers > 2 else Joint
    return kind(p, head_dim, trained)
