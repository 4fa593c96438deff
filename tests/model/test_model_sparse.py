import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked_attention import assert_equals_masked, both, masked, operands

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.model.attention import attend, sparse, turns


def check(shape, *patterns, seed=0, implementation="blockwise"):
    """Each of the layers' patterns, of which a traced number says the one that holds."""

    def layers(layer, *qkv):
        return attend(*qkv, patterns, layer, implementation=implementation)

    assert_equals_masked(layers, shape, *patterns, seed=seed)


def small_rows(patch, row):
    """Rows and tiles so small that T = 60 needs many, and that blocks of 8 have several windows."""

    def tiling(x, kind, most):
        t = real(x, kind, most)
        blocks = max(1, 8 // kind.block)
        side = min(t.far, blocks * kind.block)
        far = -(-t.far // max(1, side)) * side
        window = max(1, 4 // kind.block) * kind.block if kind.block < 8 else 4
        near = (kind.local - 1) * kind.block + max(kind.block, window)
        return sparse._Tiling(window, max(1, row // 4) * window, near, far, side)

    real = sparse._tiling
    patch.setattr(sparse, "_tiling", tiling)


P = HeadPattern
CASES = {  # length of a row, (B, T, G, H) and the heads of each layer
    "heads of all kinds": (
        16,
        (2, 53, 2, 8),
        (P(4, 2, 3, 1, 1), None, P(4, 1)),
        (P(4, 1, 4), P(4, 2, sinks=2), P(4, 3, 1)),
    ),
    "dense layers and offsets": (
        16,
        (1, 60, 4, 8),
        (P(3, 2, 5, 0, 2), P(3, 2, 5, 3, 2)),
        (None, None),
        (P(3, 2, 5, 4, 2), P(3, 2, 5, 2, 2)),
    ),
    "one row": (64, (1, 59, 2, 8), (P(2, 3, 6, 1, 3), P(2, 3, 6, 4, 3), P(2, 1))),
    "blocks of one token": (64, (1, 37, 1, 8), (P(1, 3, 4, 2),)),
    "blocks of several windows": (
        12,
        (2, 61, 2, 8),
        (P(8, 2, 3, 1, 1), P(8, 1, 2, 0)),
        (P(8, 1), P(8, 3, sinks=1)),
    ),
    "shorter than a block": (16, (2, 5, 1, 8), (P(8, 1, 2, 1, 1), P(2, 1, 2, 1, 1))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_masked_reference(case, monkeypatch):
    small_rows(monkeypatch, case[0])
    check(*case[1:])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_core_takes_heads_by_turns(case, monkeypatch):
    """Each with the offset of its own stripes."""
    small_rows(monkeypatch, case[0])
    taken, forward = [], sparse.forward
    monkeypatch.setattr(sparse, "forward", lambda *a, **k: taken.append(a[1]) or forward(*a, **k))
    monkeypatch.setattr(turns, "cores", lambda: [0])
    monkeypatch.setattr(turns, "SCORES", 1)
    check(*case[1:])
    assert {x.q_BTKGH.shape[0] * x.q_BTKGH.shape[2] for x in taken} == {1}


@st.composite
def heads(draw, block):
    if draw(st.integers(0, 4)) == 0:
        return None
    stride = draw(st.none() | st.integers(1, 6))
    offset = draw(st.integers(0, stride - 1)) if stride else 0
    return P(block, draw(st.integers(1, 4)), stride, offset, draw(st.integers(0, 3)))


@st.composite
def cases(draw):
    """Layers of any mixtures of heads, or what a model has: dense layers and such whose heads differ
    in their offsets."""
    K, G = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (3, 2), (4, 1)]))
    block = draw(st.sampled_from([1, 2, 3, 4, 8]))
    T = draw(st.integers(1, 60))
    stride, sinks, local = draw(st.integers(2, 6)), draw(st.integers(0, 2)), draw(st.integers(1, 3))
    mixed, patterns = draw(st.booleans()), []
    for _ in range(draw(st.integers(1, 3))):
        if mixed:
            patterns.append(tuple(draw(heads(block)) for _ in range(K)))
        elif draw(st.integers(0, 3)) == 0:
            patterns.append((None,) * K)
        else:
            offsets = draw(st.lists(st.integers(0, stride - 1), min_size=K, max_size=K))
            patterns.append(tuple(P(block, local, stride, o, sinks) for o in offsets))
    return ((draw(st.integers(1, 2)), T, G, 8), *patterns)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), row=st.sampled_from([16, 64]), seed=st.integers(0, 2**31))
def test_many_mixtures_equal_the_masked_reference(case, row, seed):
    with pytest.MonkeyPatch.context() as patch:
        small_rows(patch, row)
        check(*case, seed=seed)


def test_with_its_own_tiling_and_a_ragged_end():
    check((1, 16 * 41 + 5, 4, 8), tuple(P(16, 2, 4, offset) for offset in (0, 2)))


def test_large_blocks_with_their_own_tiling():
    check((1, 256 * 3 + 5, 2, 8), tuple(P(256, local, 2, 0) for local in (1, 2)))


def test_the_memory_of_large_blocks_grows_with_the_block_and_not_with_its_square():
    def temporary(block):
        """Bytes, forward and backward, with 8 query heads and a window of 2048 keys."""
        heads = (P(block, 2048 // block, 2 * 2048 // block),)
        x = [jax.ShapeDtypeStruct((1, 4096, 1, *rest), "float32") for rest in ((8, 16), (16,))]
        f = jax.jit(lambda *x: both(lambda *qkv: attend(*qkv, (heads,)), *x))
        compiled = f.lower(x[0], x[1], x[1], x[0]).compile({"xla_backend_optimization_level": 0})
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2048) < 2 * temporary(128)


def test_a_stripe_inside_the_window_counts_once():
    check((1, 48, 1, 8), (P(4, 4, 2, 0, sinks=5),))


def test_sinks_alone_that_fill_no_whole_tile():
    check((1, 16 * 40, 1, 8), (P(16, 2, sinks=17),))


def test_the_reference_implementation_knows_patterns():
    layers = (None, None), (P(4, 2, 3, 1, 1), None), (None, P(4, 1))
    check((1, 41, 2, 8), *layers, implementation="reference")


def test_dense_heads_are_the_dense_attention():
    """Also those whose pattern hides nothing."""
    q, k, v, _ = operands(1, 40, 2, 2, 8)
    dense = jax.jit(attend)(q, k, v)
    for heads in ((None, None), (P(16, 3), P(4, 1, 1))):
        np.testing.assert_array_equal(jax.jit(lambda *x, h=heads: attend(*x, (h,)))(q, k, v), dense)


def test_large_scores_stay_finite():
    q, k, v, do = operands(1, 64, 1, 2, 8)
    f = jax.jit(
        lambda *x: both(lambda q, k, v: attend(100 * q, 100 * k, v, ((P(4, 2, 4, 1),),)), *x)
    )
    assert all(jnp.isfinite(x).all() for x in f(q, k, v, do))


def test_bfloat16_stays_close():
    xs = operands(1, 96, 2, 2, 16, dtype="bfloat16")
    heads = P(8, 2, 3, 0), P(8, 2, 3, 1)
    got = jax.jit(lambda *xs: both(lambda *x: attend(*x, (heads,)), *xs))(*xs)
    *qkv, do = xs
    for x, y in zip(got, masked(*qkv, heads, do), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.02 * np.abs(y).max())


def test_memory_grows_with_the_context_not_its_square():
    def temporaries(T):
        q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, T, 1, 2, 16), (1, T, 1, 16)])
        f = jax.grad(lambda *x: attend(*x, ((P(16, 4, 16),),)).sum(), (0, 1, 2))
        return jax.jit(f).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2**14), temporaries(2**16)
    assert long < 4.5 * short
