from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import (
    MESHES,
    assert_equals_masked,
    attention,
    both,
    differences,
    kinds_and_offsets,
    masks,
    mesh_errors,
)
from masked_attention import operands

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.model.attention import triton as pallas_attention

DEFAULT = HeadPattern(64, 16, 16)
BLOCKS = st.sampled_from((16, 32, 48))


def check(heads, shape, context, seed):
    """`shape` is (B, T, G, H); a run of several must be whole tiles."""
    B, T, *rest = shape
    if context > 1:
        T = -(-T // (32 * context)) * 32 * context
    assert_equals_masked(pallas_attention, *heads, (B, T, *rest), context, seed)


@settings(max_examples=3)
@given(
    heads=kinds_and_offsets(BLOCKS),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 400), st.integers(1, 4), st.just(16)),
    context=st.sampled_from((1, 2, 4)),
    seed=st.integers(0, 2**31),
)
def test_equals_the_masked_reference(heads, shape, context, seed):
    check(heads, shape, context, seed)


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
    check(heads, shape, context, seed)


CASES = {
    "dense": (None, (0,), (2, 200, 2, 32), 1),
    "blocks of two tiles": (HeadPattern(128, 2, 3, sinks=1), (1, 2), (1, 700, 3, 16), 1),
    "a wide head": (HeadPattern(64, 1, 2), (1, 0), (1, 333, 4, 64), 1),
    "context 3": (HeadPattern(48, 2, 3, sinks=2), (1, 2), (1, 672, 2, 16), 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_masked_reference_in(case):
    assert_equals_masked(pallas_attention, *case)


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_attention.math, "gcd", lambda *_: size)
        patch.setattr(pallas_attention, "jnp", np)  # which has the same calls and compiles nothing
        patch.setattr(pallas_attention, "lax", SimpleNamespace(div=np.floor_divide, rem=np.mod))
        t = pallas_attention._tiling(q, kind, starts)
        numbers = pallas_attention._numbers(kind, np.array(offsets), starts, t, len(offsets))[0]
        held = pallas_attention._place(here, numbers, t)
        start, count, distant = pallas_attention._keys_seen(held, numbers, t)
        nth, j = distant(np.arange(total)), np.arange(total)
        ends = (j, j + 1, pallas_attention._queries_end(j, numbers, t))
        first, past, end = (pallas_attention._held_before(x, numbers, t) for x in ends)

    live = masks(kind, offsets[:1], total * size)[0]
    live = live.reshape(total, size, total, size).any(axis=(1, 3))[held]
    for row, begin, n, last in zip(live, start, count, held, strict=True):
        assert [*nth[:n], *range(begin, last + 1)] == list(np.flatnonzero(row))
    m = here[:, None]
    np.testing.assert_array_equal((m >= first) & (m < end), live)
    np.testing.assert_array_equal((m >= first) & (m < past), held[:, None] == j)


def test_bfloat16_stays_close():
    """To float32 on the same operands: outputs are up to 2, with an RMS of 0.2, gradients twice."""
    case = HeadPattern(32, 2, 3), (0, 2), (1, 150, 2, 16)
    found = differences(pallas_attention, *case, dtype="bfloat16")
    np.testing.assert_array_less(found, [0.01, 0.03, 0.03, 0.03])


def test_equals_over_a_mesh():
    case = {"context": 2, "tensor": 2, "T": 256}
    assert mesh_errors("pallas_attention", {"both axes": case})["both axes"] < 2e-5


@pytest.mark.slow
def test_equals_over_every_mesh():
    assert max(mesh_errors("pallas_attention", MESHES).values()) < 2e-5


@pytest.mark.parametrize("kind", [DEFAULT, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("H", [64, 128])
def test_lowers_for_cuda(H, kind):
    def step(q, k, v, weight, offset_K, starts):
        attend = attention(pallas_attention, kind, starts, interpret=False)
        return both(attend, q, k, v, weight, offset_K)

    q = jax.ShapeDtypeStruct((1, 8192, 2, 4, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 32768, 2, H), jnp.bfloat16)
    two = jax.ShapeDtypeStruct((2,), jnp.int32)
    traced = jax.jit(step).trace(q, k, k, q, two, two)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__gpu$xla.gpu.triton") == 3
    assert "8192x32768" not in lowered


def test_what_does_not_fit_is_told():
    offset, start, two = jnp.zeros(1, int), jnp.zeros(1, int), jnp.array([0, 24])
    q, k, v, _ = operands(1, 32, 1, 1, 24)
    with pytest.raises(ValueError, match="needs a head_dim of 16, 32, 64 or 128, not 24"):
        pallas_attention.forward(q, k, v, None, offset, start)
    q, k, v, _ = operands(1, 48, 1, 1, 16)
    with pytest.raises(ValueError, match=r"pattern\.block that is a multiple of 16, not 24"):
        pallas_attention.forward(q, k, v, HeadPattern(24, 2), offset, start)
    with pytest.raises(ValueError, match=r"parts of a multiple of 16 positions, and .* makes 24"):
        pallas_attention.forward(q, k, v, None, offset, two)
    with pytest.raises(ValueError, match="48 queries of 48 positions cannot lie in 3 equal runs"):
        pallas_attention.forward(q, k, v, None, offset, jnp.arange(3) * 16)
