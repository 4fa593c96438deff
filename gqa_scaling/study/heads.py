"""Loss against the number of query heads at fixed N: L = a n_h^b + c (Chen et al. 2025, section 5).

The losses are those of the fitted curves at one N, with n_kv fixed, or tied to n_h; dense
configurations alone.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.study.fitted import Fit, plain
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import pattern_of
from gqa_scaling.study.uncertainty import interval

MIN_HEADS = 4  # one more than the parameters
_POWERS = np.r_[-np.geomspace(4.0, 0.01, 400), np.geomspace(0.01, 4.0, 100)]


@dataclass(frozen=True)
class HeadLaw:
    """a n_h^b + c at `n` parameters: a and c in nats, R² over the configurations.

    `n_kv_heads` is the fixed number of KV heads, or None when n_kv = n_h.
    """

    n: float
    n_kv_heads: int | None
    n_heads: tuple[int, ...]
    a: float
    b: float
    b_interval: Interval
    c: float
    r2: float

    def loss(self, n_heads: np.ndarray | float) -> np.ndarray:
        return self.a * np.asarray(n_heads, float) ** self.b + self.c

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self))


def solve_heads(n_heads: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, ...]:
    """Least-squares (a, b, c, sum of squares) for every row of losses, b on a fine grid.

    Given b the law is linear in a and c, so the grid is all there is to search.
    """
    loss = np.atleast_2d(loss)
    powers = np.asarray(n_heads, float)[None] ** _POWERS[:, None]
    centred = powers - powers.mean(1, keepdims=True)
    slopes = loss @ centred.T / (centred**2).sum(1)
    left = ((loss - loss.mean(1, keepdims=True)) ** 2).sum(1)[:, None]
    squares = left - slopes**2 * (centred**2).sum(1)
    k, rows = squares.argmin(1), np.arange(len(loss))
    a = slopes[rows, k]
    return a, _POWERS[k], loss.mean(1) - a * powers.mean(1)[k], np.maximum(squares[rows, k], 0)


def common_n(fit: Fit) -> float:
    """The middle, geometrically, of the N that every configuration's sizes cover."""
    ranges = np.array([fit.points.range_n(k) for k in range(len(fit.heads))])
    return float(np.sqrt(ranges[:, 0].max() * ranges[:, 1].min()))


def head_laws(fit: Fit, n: float | None = None) -> tuple[HeadLaw, ...]:
    """The law for every fixed n_kv, and for n_kv tied to n_h, with enough configurations."""
    n = n or common_n(fit)
    out, dense = [], [(k, *h) for k, h in enumerate(fit.heads) if pattern_of(h) is None]
    for kv in (*sorted({kv for *_, kv in dense}), None):
        mine = [k for k, h, v in dense if v == (h if kv is None else kv)]
        if len(mine) < MIN_HEADS:
            continue
        heads = np.array([fit.heads[k][0] for k in mine])
        loss = np.array([float(fit.curves.loss(k, n)) for k in mine])
        draws = np.stack([fit.draws.loss(k, n) for k in mine], 1)
        (a,), (b,), (c,), (squares,) = solve_heads(heads, loss)
        total = ((loss - loss.mean()) ** 2).sum()
        out.append(
            HeadLaw(
                n=n,
                n_kv_heads=kv,
                n_heads=tuple(heads.tolist()),
                a=float(a),
                b=float(b),
                b_interval=interval(solve_heads(heads, draws)[1]),
                c=float(c),
                r2=float(1 - squares / total),
            )
        )
    return tuple(out)
