"""The loss curves L(N) that a fit ends in, and the N at which they reach a loss.

Losses are mean next-token cross-entropies in nats. N counts parameters without embeddings.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.ladder import MOST_PARAMETERS
from gqa_scaling.study.points import Points
from gqa_scaling.study.shapes import shapes

Number = Any  # a Python number or a NumPy array of them


def centred(n: Number, u: Number, b: Number, floor: Number, centre: Number) -> Number:
    """The curve (a/N)^b + E of Chen et al. 2025, section 4.1, as E + exp(u - b (ln N - centre)).

    u is the logarithm of the excess loss in the middle of the data. u and b are nearly uncorrelated
    when `centre` is the mean of ln N, so this form is fitted; `scale_of` gives a.
    """
    with np.errstate(over="ignore"):
        return floor + np.exp(u - b * (np.log(n) - centre))


def centred_inverse(loss: Number, u: Number, b: Number, floor: Number, centre: Number) -> Number:
    """The N at which `centred` equals `loss`; infinite where it never does, or b <= 0."""
    excess = np.subtract(loss, floor)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = np.exp(centre + (u - np.log(np.maximum(excess, 0.0))) / np.asarray(b, float))
    return np.where((excess > 0) & (np.asarray(b) > 0), n, np.inf)


def scale_of(u: Number, b: Number, centre: Number) -> Number:
    """a of (a/N)^b, in parameters, from the centred form; overflows to inf for a flat curve."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.exp(centre + np.divide(u, b))


@dataclass(frozen=True)
class Backbone:
    """N of each configuration against its head-independent part N_b, both as logarithms."""

    log_backbone: np.ndarray  # (grid,)
    log_n: np.ndarray  # (heads, grid)

    def to_backbone(self, k: int, n: np.ndarray) -> np.ndarray:
        """N_b of models of configuration k with N parameters."""
        return np.exp(np.interp(np.log(n), self.log_n[k], self.log_backbone))

    def to_n(self, k: int, backbone: np.ndarray) -> np.ndarray:
        """N of models of configuration k with this N_b; inf beyond the largest of the grid."""
        finite = np.isfinite(backbone)
        at = np.log(np.where(finite, np.maximum(backbone, 1e-300), 1.0))
        at = np.clip(at, self.log_backbone[0], None)
        n = np.exp(np.interp(at, self.log_backbone, self.log_n[k]))
        return np.where(finite & (at < self.log_backbone[-1]), n, np.inf)


def backbone_of(p: Points, head_dim: int) -> Backbone:
    """N against N_b = 8 L d^2 along the study's own ladder of sizes, for each configuration.

    The grid reaches as far as any size that a study may answer with.
    """
    ladder = sorted(set(zip(p.n_layers.tolist(), p.d_model.tolist(), strict=True)))
    at = np.log(n_formula(p.n_layers, p.d_model, 0, 0))
    grid = np.linspace(at.min() - 12, at.max() + 12, 600)
    small = at.min() - np.linspace(16, 12, 40)
    large = np.linspace(grid[-1], np.log(MOST_PARAMETERS), 40)
    grid = np.unique(np.r_[small, grid, large[large > grid[-1]], at])
    layers, width = shapes(np.exp(grid), (0, 0), head_dim, ladder)
    counts = np.array([heads[:2] for heads in p.heads], float)
    queries, values = counts[p.curve].T
    # What is counted beyond the formula, as where N is counted exactly: no head enters it.
    rest = p.n - n_formula(p.n_layers, p.d_model, queries, values, head_dim)
    log_n = []
    for k, (n_heads, n_kv_heads) in enumerate(counts):
        mine = p.curve == k
        mine = mine if mine.any() else np.ones(len(p.n), bool)  # without runs: as all others
        formula = n_formula(p.n_layers[mine], p.d_model[mine], n_heads, n_kv_heads, head_dim)
        order = np.argsort(formula)
        counted = np.log1p(rest[mine] / formula)[order]
        whole = np.log(n_formula(layers, width, n_heads, n_kv_heads, head_dim))
        log_n.append(whole + np.interp(whole, np.log(formula[order]), counted))
    return Backbone(grid, np.array(log_n))


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
        return centred(n, u, b, floor, self.centre[k])

    def loss_by_row(self, k: int, n: np.ndarray) -> np.ndarray:
        """Loss in nats (rows,) of configuration k, each row of parameters at its own N (rows,)."""
        n = self.backbone.to_backbone(k, n) if self.backbone else n
        return centred(n, self.u[:, k], self.b[:, k], self.floor, self.centre[k])

    def then(self, others: "Curves") -> "Curves":
        """The rows of these parameters, or their one row, and then those of the others."""
        floor = np.r_[self.floor, others.floor]
        u, b = np.vstack([self.u, others.u]), np.vstack([self.b, others.b])
        return replace(self, floor=floor, u=u, b=b)

    def n_star(self, loss: float | np.ndarray) -> np.ndarray:
        """N*(H) for a target loss, or one for each of the leading axes, which come first, heads last."""
        n = centred_inverse(
            np.asarray(loss)[..., None], self.u, self.b, self.floor[..., None], self.centre
        )
        if self.backbone is None:
            return n
        return np.stack([self.backbone.to_n(k, n[..., k]) for k in range(n.shape[-1])], -1)
