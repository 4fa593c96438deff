"""What one device computes of attention: KV heads of one kind, for the queries that it holds.

`blockwise`, `sparse`, `splash` and `triton` each have the same two functions, called on shards:

    forward(kind, x: Operands) -> o_BTKGH in the dtype of q, and lse_BTKG
    backward(kind, x: Operands, y: Upstream) -> dq_BTKGH in the dtype of q, dk_BSKH and dv_BSKH

`kind` (static) is the pattern of all these heads but for their offsets; `DENSE` sees all keys. lse
is the natural logarithm of the sum of exponentials of a query's scores, float32. dk and dv, in
float32, are what these queries contribute to the gradients of all S keys. Scores are scaled by
1/sqrt(H), softmax is in float32, memory is O(S), and T need not be a multiple of any tile. The two
kernels also take `interpret`, which runs them on any platform, slowly; the other two `most`, as many
scores as a tile should have (`turns`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gqa_scaling.context_sharding import HeadPattern, is_distant
from gqa_scaling.devices.kernel_limits import most_distant

MASKED = (
    -1e30
)  # the score of a key that is not seen; finite, so that exp(masked - masked) is no NaN


class Operands(NamedTuple):
    """The queries, keys and values of some KV heads that one device works on.

    The T queries are one or two equal runs of positions: all S = T of the sequence, or the two
    parts that a device holds in zig-zag order (`layout.zigzag`). Keys and values are all S of the
    sequence, in natural order. Everything but the shapes may be traced.
    """

    q_BTKGH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    offset_K: jax.Array  # where each head's stripes begin, in blocks, int32
    starts: jax.Array  # where each run of queries begins, ascending multiples of its length, int32

    def residue_K(self, kind: HeadPattern) -> jax.Array:
        """How many blocks after the sinks a head's first stripe lies; 0 for a pattern without any."""
        return -(self.offset_K + kind.sinks) % kind.stride if kind.stride else 0 * self.offset_K


class Upstream(NamedTuple):
    """What the backward pass is given beside the operands."""

    o_BTKGH: jax.Array
    lse_BTKG: jax.Array
    do_BTKGH: jax.Array

    def delta_BTKG(self) -> jax.Array:
        """The sum of o do over H, in float32, for kernels."""
        o, do = self.o_BTKGH.astype(jnp.float32), self.do_BTKGH.astype(jnp.float32)
        return jnp.sum(do * o, axis=-1)


def positions(starts: jax.Array, n: int, step: int = 1) -> jax.Array:
    """Every `step`-th position of the runs that begin at `starts`, n in all, int32."""
    return (starts[:, None] + step * jnp.arange(n // len(starts))).reshape(-1)


def sees(kind: HeadPattern, offset: Any, t: Any, s: Any) -> Any:
    """Whether the query at position t sees the key at position s <= t; arrays broadcast."""
    i, j = t // kind.block, s // kind.block
    return (i - j < kind.local) | is_distant(j, kind.stride, offset, kind.sinks)


def padded(x: jax.Array, axis: int, before: int = 0, after: int = 0) -> jax.Array:
    """`x` with so many zeros along an axis."""
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def distant_of(x_NSH: jax.Array, kind: HeadPattern, residue: Any) -> jax.Array:
    """The keys of one head that queries see beyond their window: sinks, then stripes.

    The first stripe lies `residue` blocks after the sinks; the last one may be filled with 0.
    """
    (N, S, H), block, stride = x_NSH.shape, kind.block, kind.stride or 1
    sinks, stripes = most_distant(kind, S)
    first, end = sinks * block, (sinks + stripes * stride) * block
    if not stripes:
        return x_NSH[:, :first]
    x = padded(x_NSH, 1, after=max(0, end - S))[:, first:end]
    x = x.reshape(N, stripes, stride, block, H)
    stripe = lax.dynamic_index_in_dim(x, residue, axis=2, keepdims=False)
    return jnp.concatenate([x_NSH[:, :first], stripe.reshape(N, stripes * block, H)], axis=1)
