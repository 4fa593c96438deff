"""The forward and backward functions of a kernel module, held to the masked reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from masked_attention import TOLERANCES, masked, operands
from masked_attention import differences as between

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.kernel_limits import DENSE
from gqa_scaling.devices.layout import zigzag
from gqa_scaling.model.attention.shard import Operands, Upstream


def both(kernels, kind, q, k, v, do, offset_K, starts, interpret=True):
    """Output and gradients of what one device holds; those of k and v are of its queries alone."""
    x = Operands(q, k, v, offset_K, starts)
    o, lse = kernels.forward(kind or DENSE, x, interpret=interpret)
    assert o.dtype == q.dtype
    assert lse.shape == q.shape[:-1]
    upstream = Upstream(o, lse, do)
    return o, *kernels.backward(kind or DENSE, x, upstream, interpret=interpret)


def in_turn(kernels, kind, context, q, k, v, do, offset_K):
    """Output and gradients in natural order: the devices of a context axis one after the other."""
    if context == 1:
        return both(kernels, kind, q, k, v, do, offset_K, jnp.array([0]))
    T = q.shape[1] // context
    order = zigzag(np.arange(q.shape[1]), context)

    def parts(x):
        x = x[:, order]
        return jnp.moveaxis(x.reshape(x.shape[0], context, T, *x.shape[2:]), 1, 0)

    def device(x):
        i, q, do = x
        starts = jnp.array([i, 2 * context - 1 - i]) * (T // 2)
        return both(kernels, kind, q, k, v, do, offset_K, starts)

    o, dq, dk, dv = jax.lax.map(device, (jnp.arange(context), parts(q), parts(do)))
    whole = (jnp.moveaxis(x, 0, 1).reshape(q.shape)[:, np.argsort(order)] for x in (o, dq))
    return *whole, dk.sum(0), dv.sum(0)


def differences(kernels, kind, offsets, shape, context=1, seed=0, dtype="float32"):
    """Largest differences of output and gradients to the masked reference, for (B, T, G, H) of
    `shape`; the offsets are traced."""
    B, T, G, H = shape
    xs = operands(B, T, len(offsets), G, H, seed, dtype)
    got = jax.jit(lambda *xs: in_turn(kernels, kind, context, *xs))(*xs, jnp.array(offsets))
    assert [x.dtype for x in got] == [*[xs[0].dtype] * 2, *[jnp.float32] * 2]
    heads = [kind and dataclasses.replace(kind, offset=offset) for offset in offsets]
    *qkv, do = xs
    return between(got, masked(*qkv, heads, do))


def assert_equals_masked(*case):
    np.testing.assert_array_less(differences(*case), TOLERANCES)


@st.composite
def kinds_and_offsets(draw, blocks):
    """A kind of head, dense ones too, and the offsets of one to three of them."""
    K = draw(st.integers(1, 3))
    if draw(st.integers(0, 7)) == 0:
        return None, (0,) * K
    stride = draw(st.none() | st.integers(1, 9))
    kind = HeadPattern(draw(blocks), draw(st.integers(1, 6)), stride, sinks=draw(st.integers(0, 4)))
    offset = st.integers(0, stride - 1) if stride else st.just(0)
    return kind, tuple(draw(st.lists(offset, min_size=K, max_size=K)))
