import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_attention import assert_equals_masked, masked, operands, visible

from gqa_scaling.context_sharding import HeadPattern, strided
from gqa_scaling.model import pallas_attention
from gqa_scaling.model.pallas_attention import pallas_attend

attend = functools.partial(pallas_attend, interpret=True)


def heads(blocks):
    return st.builds(
        lambda block, local, stride, turn, sinks: HeadPattern(
            block, local, stride, turn % stride if stride else 0, sinks
        ),
        st.sampled_from(blocks),
        st.integers(1, 5),
        st.none() | st.integers(1, 7),
        st.integers(0, 6),
        st.integers(0, 3),
    )


PATTERNS = st.lists(st.none() | heads((16, 32, 48)), min_size=1, max_size=3).map(tuple)


@settings(max_examples=3)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 400), st.integers(1, 4), st.just(16)),
    pattern=PATTERNS,
    seed=st.integers(0, 2**31),
)
def test_equals_the_masked_reference(shape, pattern, seed):
    assert_equals_masked(lambda *x: attend(*x, pattern), shape, pattern, seed)


CASES = {
    "dense": ((2, 200, 2, 32), (None,)),
    "blocks of two tiles": (
        (1, 700, 3, 16),
        (HeadPattern(128, 2, 3, 1, sinks=1), HeadPattern(64, 3)),
    ),
    "kinds of heads": ((1, 333, 4, 64), (HeadPattern(64, 1, 2), HeadPattern(32, 4), None)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_masked_reference_in(case):
    shape, pattern = case
    assert_equals_masked(lambda *x: attend(*x, pattern), shape, pattern)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 900), st.integers(1, 4), st.sampled_from([16, 64, 128])
    ),
    pattern=st.lists(st.none() | heads((16, 64, 80, 128)), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
)
def test_equals_the_masked_reference_everywhere(shape, pattern, seed):
    assert_equals_masked(lambda *x: attend(*x, pattern), shape, pattern, seed)


@settings(max_examples=40)
@given(head=st.none() | heads((16, 32, 48)), tiles=st.integers(1, 40))
def test_loops_visit_exactly_the_visible_tiles(head, tiles):
    """And the runs of queries in the gradient of keys are the same visits, seen from the keys."""
    size, i = 16, jnp.arange(40)
    numbers = pallas_attention._numbers(head, size)
    live = visible(head, 40 * size).reshape(40, size, 40, size).any(axis=(1, 3))
    start, count, distant = pallas_attention._keys_seen(i, numbers)
    nth = np.asarray(distant(i))
    for n in range(40):
        visited = [*nth[: int(count[n])], *range(int(start[n]), n + 1)]
        assert visited == list(np.flatnonzero(live[n]))
    seen_by = live[:tiles, :tiles]
    end = np.asarray(pallas_attention._queries_end(i, tiles, numbers))[:tiles]
    n = np.arange(tiles)[:, None]
    np.testing.assert_array_equal((n >= n.T) & (n < end), seen_by)


def test_bfloat16_stays_close():
    pattern = (HeadPattern(32, 2, 3), None)
    q, k, v, _ = operands(1, 150, 2, 2, 16)
    got = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), pattern)
    assert got.dtype == jnp.bfloat16
    want = masked(q, k, v, np.stack([visible(head, 150) for head in pattern]))
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


@pytest.mark.parametrize("H", [64, 128])
def test_lowers_for_cuda(H):
    pattern = (*strided().layer(0, 1, 1), None)

    def both(q, k, v, weight):
        o, pull_back = jax.vjp(lambda *x: pallas_attend(*x, pattern), q, k, v)
        return o, *pull_back(weight)

    q = jax.ShapeDtypeStruct((1, 8192, 2, 4, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 8192, 2, H), jnp.bfloat16)
    lowered = jax.jit(both).trace(q, k, k, q).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__gpu$xla.gpu.triton") == 3
    assert "8192x8192" not in lowered


def test_what_does_not_fit_is_told():
    q, k, v, _ = operands(1, 32, 1, 1, 24)
    with pytest.raises(ValueError, match="head_dim=24 must be one of 16, 32, 64, 128"):
        attend(q, k, v, (None,))
    q, k, v, _ = operands(1, 32, 1, 1, 16)
    with pytest.raises(ValueError, match="block=24 must be a multiple of 16"):
        attend(q, k, v, (HeadPattern(24, 2),))
    with pytest.raises(ValueError, match="a pattern of 2 heads"):
        attend(q, k, v, (None, None))
