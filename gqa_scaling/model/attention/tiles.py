"""What is common to attention by tiles: rows of queries, and softmax over one tile after another."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gqa_scaling.model.attention.shard import MASKED, padded


def rows_of(x_BTKG: jax.Array, row: int, window: int) -> jax.Array:
    """Queries as rows of several windows: (T / row, B, K, row / window, G window, ...), 0 past T.

    In a window the positions of each query head of a group lie side by side.
    """
    B, T, K, G, *rest = x_BTKG.shape
    n = -(-T // row)
    x = padded(x_BTKG, 1, after=n * row - T).reshape(B, n, row // window, window, K, G, *rest)
    x = x.transpose(1, 0, 4, 2, 5, 3, *range(6, x.ndim))
    return x.reshape(n, B, K, row // window, G * window, *rest)


def natural(rows: jax.Array, T: int, G: int) -> jax.Array:
    """The inverse of `rows_of`: (B, T, K, G, ...)."""
    n, B, K, windows, size, *rest = rows.shape
    x = rows.reshape(n, B, K, windows, G, size // G, *rest)
    x = x.transpose(1, 0, 3, 5, 2, 4, *range(6, x.ndim))
    return x.reshape(B, -1, K, G, *rest)[:, :T]


class Softmax(NamedTuple):
    """Softmax over the keys met so far (Dao et al. 2022, arXiv 2205.14135, algorithm 1)."""

    top: jax.Array  # the largest score of each query
    total: jax.Array  # the sum of exp(score - top)
    o: jax.Array  # the values weighted by exp(score - top), with an axis H

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Softmax":
        """Before any key, for queries of this shape, whose last axis is H."""
        top, zero = jnp.full(shape[:-1], MASKED, jnp.float32), jnp.zeros(shape[:-1], jnp.float32)
        return cls(top, zero, jnp.zeros(shape, jnp.float32))

    def over(self, scores: jax.Array, weigh: Callable, exp: Callable = jnp.exp) -> "Softmax":
        """With one more tile of keys along the last axis of `scores`; `weigh` takes their weights
        to the sum of their values."""
        top = jnp.maximum(self.top, scores.max(-1))
        p, fade = exp(scores - top[..., None]), exp(self.top - top)
        o = self.o * fade[..., None] + weigh(p)
        return Softmax(top, self.total * fade + p.sum(-1), o)

    def result(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """The output in `dtype` and the log-sum-exp of the scores."""
        return (self.o / self.total[..., None]).astype(dtype), self.top + jnp.log(self.total)
