from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import assert_equals_masked, both, differences, kinds_and_offsets
from masked_attention import visible

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.kernel_limits import DENSE
from gqa_scaling.model.attention import triton
from gqa_scaling.model.attention.shard import Operands

DEFAULT = HeadPattern(64, 16, 16)
BLOCKS = st.sampled_from((16, 32, 48))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    heads=kinds_and_offsets(st.sampled_from((16, 48, 64, 80, 128))),
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 900), st.integers(1, 4), st.sampled_from([16, 64, 128])
    ),
    context=st.sampled_from((1, 1, 2, 3, 4)),
    seed=st.integers(0, 2**31),
)
def test_equals_the_masked_reference_everywhere(heads, shape, context, seed):
    B, T, *rest = shape
    if context > 1:  # a run of several must be whole tiles
        T = -(-T // (32 * context)) * 32 * context
    assert_equals_masked(triton, *heads, (B, T, *rest), context, seed)


CASES = {
    "dense": (None, (0,), (2, 200, 2, 32), 1),
    "dense, context 2": (None, (0, 0), (1, 128, 3, 16), 2),
    "blocks of two tiles": (HeadPattern(128, 2, 3, sinks=1), (1, 2), (1, 700, 3, 16), 1),
    "a wide head": (HeadPattern(64, 1, 2), (1, 0), (1, 333, 4, 64), 1),
    "sinks alone": (HeadPattern(16, 3, sinks=4), (0, 0, 0), (2, 177, 1, 16), 1),
    "context 3": (HeadPattern(48, 2, 3, sinks=2), (1, 2), (1, 672, 2, 16), 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_masked_reference_in(case):
    assert_equals_masked(triton, *case)


@given(
    heads=kinds_and_offsets(BLOCKS),
    run=st.integers(1, 12),
    context=st.integers(1, 4),
    device=st.integers(0, 3),
)
def test_loops_visit_exactly_the_visible_tiles(heads, run, context, device):
    """And the runs of queries in the gradient of keys are the same visits, seen from the keys."""
    (kind, offsets), parts, size = heads, 1 if context == 1 else 2, 16
    total, here = parts * context * run, np.arange(parts * run)
    starts = np.array([device % context, 2 * context - 1 - device % context])[:parts] * run * size
    q = jax.ShapeDtypeStruct((1, parts * run * size, len(offsets), 1, 16), jnp.float32)
    x = Operands(q, None, None, np.array(offsets), starts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.math, "gcd", lambda *_: size)
        patch.setattr(triton, "jnp", np)  # which has the same calls and compiles nothing
        patch.setattr(triton, "lax", SimpleNamespace(div=np.floor_divide, rem=np.mod))
        t = triton._tiling(x, kind or DENSE)
        numbers = triton._numbers(x, kind or DENSE, t)[0]
        held = triton._place(here, numbers, t)
        start, count, distant = triton._keys_seen(held, numbers, t)
        nth, j = distant(np.arange(total)), np.arange(total)
        ends = (j, j + 1, triton._queries_end(j, numbers, t))
        first, past, end = (triton._held_before(x, numbers, t) for x in ends)

    head = kind and replace(kind, offset=offsets[0])
    live = visible(head, total * size).reshape(total, size, total, size).any(axis=(1, 3))[held]
    for row, begin, n, last in zip(live, start, count, held, strict=True):
        assert [*nth[:n], *range(begin, last + 1)] == list(np.flatnonzero(row))
    m = here[:, None]
    np.testing.assert_array_equal((m >= first) & (m < end), live)
    np.testing.assert_array_equal((m >= first) & (m < past), held[:, None] == j)


def test_bfloat16_stays_close():
    """To float64 on the same operands: outputs are up to 2, with an RMS of 0.2, gradients twice."""
    case = HeadPattern(32, 2, 3), (0, 2), (1, 150, 2, 16)
    found = differences(triton, *case, dtype="bfloat16")
    np.testing.assert_array_less(found, [0.01, 0.03, 0.03, 0.03])


@pytest.mark.parametrize("kind", [DEFAULT, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("H", [64, 128])
def test_lowers_for_cuda(H, kind):
    def step(*xs):
        return both(triton, kind, *xs, interpret=False)

    q = jax.ShapeDtypeStruct((1, 8192, 2, 4, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 32768, 2, H), jnp.bfloat16)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(step).trace(q, k, k, q, two, two)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__gpu$xla.gpu.triton") == 3
    assert "8192x32768" not in lowered
