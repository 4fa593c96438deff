import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.model.attention import attend
from gqa_scaling.model.attention import sparse as sparse_attention


def visible(pattern, T):
    """Token by token, (K, T, T), of the words of the paper and nothing else."""
    out = np.tri(T, dtype=bool)[None].repeat(len(pattern), 0)
    for h, head in enumerate(pattern):
        for t in range(T) if head else ():
            for s in range(t + 1):
                i, j = t // head.block, s // head.block
                striped = head.stride is not None and (j + head.offset) % head.stride == 0
                out[h, t, s] = i - j < head.local or j < head.sinks or striped
    return out


def reference(q, k, v, visible_KTS):
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k) / math.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible_KTS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v)


def operands(shape, seed=0):
    B, T, K, G, H = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def assert_equals_reference(shape, *patterns, seed=0):
    """Each of the layers' patterns, of which a traced number says the one that holds."""

    def run(f, weight, *qkv):
        o, pull_back = jax.vjp(f, *qkv)
        return o, *pull_back(weight)

    @jax.jit
    def wanted(pattern_KTT, weight, *qkv):
        return run(lambda *x: reference(*x, pattern_KTT), weight, *qkv)

    @jax.jit
    def found(layer, weight, *qkv):
        return run(lambda *x: attend(*x, patterns, layer), weight, *qkv)

    *qkv, weight = operands(shape, seed)
    for layer, pattern in enumerate(patterns):
        want = wanted(visible(pattern, shape[1]), weight, *qkv)
        got = found(layer, weight, *qkv)
        np.testing.assert_allclose(got[0], want[0], rtol=0, atol=2e-6)
        for g2, g in zip(got[1:], want[1:], strict=True):
            np.testing.assert_allclose(g2, g, rtol=0, atol=2e-5)


@st.composite
def heads(draw, block):
    if draw(st.integers(0, 4)) == 0:
        return None
    stride = draw(st.none() | st.integers(1, 6))
    offset = draw(st.integers(0, stride - 1)) if stride else 0
    return HeadPattern(block, draw(st.integers(1, 4)), stride, offset, draw(st.integers(0, 3)))


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
            patterns.append(tuple(HeadPattern(block, local, stride, o, sinks) for o in offsets))
    return ((draw(st.integers(1, 2)), T, K, G, 8), *patterns)


@pytest.fixture(params=[16, 64], ids="row of {}".format)
def small_rows(request, monkeypatch):
    """Rows and tiles so small that T = 60 needs many."""

    def tiling(q_BTKGH, head):
        t = real(q_BTKGH, head)
        blocks = max(1, 8 // head.block)
        side = min(t.far, blocks * head.block)
        far = -(-t.far // max(1, side)) * side
        window = max(1, 4 // head.block) * head.block
        near = (head.local - 1) * head.block + window
        row = max(1, request.param // 4) * window
        return sparse_attention._Tiling(window, row, near, far, side)

    real = sparse_attention._tiling
    monkeypatch.setattr(sparse_attention, "_tiling", tiling)


def mixtures(examples):
    unhurried = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=unhurried)


@mixtures(4)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_mixture_equals_the_masked_reference(small_rows, case, seed):
    assert_equals_reference(*case, seed=seed)


@pytest.mark.slow
@mixtures(100)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_many_mixtures_equal_the_masked_reference(small_rows, case, seed):
    assert_equals_reference(*case, seed=seed)


def test_with_its_own_tiling_and_a_ragged_end():
    heads = tuple(HeadPattern(16, 2, 4, offset) for offset in (0, 2))
    assert_equals_reference((1, 16 * 41 + 5, 2, 4, 8), heads)


def test_a_stripe_inside_the_window_counts_once():
    assert_equals_reference((1, 48, 1, 1, 8), (HeadPattern(4, 4, 2, 0, sinks=5),))


def test_sinks_alone_that_fill_no_whole_tile():
    assert_equals_reference((1, 16 * 40, 1, 1, 8), (HeadPattern(16, 2, sinks=17),))


def test_dense_heads_are_the_dense_attention():
    q, k, v, _ = operands((1, 40, 2, 2, 8))
    np.testing.assert_array_equal(attend(q, k, v, ((None, None),)), attend(q, k, v))


def test_large_scores_stay_finite():
    q, k, v, _ = operands((1, 64, 1, 2, 8))
    pattern = (HeadPattern(4, 2, 4, 1),)
    f = lambda q, k, v: attend(100 * q, 100 * k, v, (pattern,)).sum()  # noqa: E731
    assert all(jnp.isfinite(g).all() for g in jax.grad(f, (0, 1, 2))(q, k, v))


def test_bfloat16_stays_close():
    q, k, v, weight = operands((1, 96, 2, 2, 16))
    pattern = (HeadPattern(8, 2, 3, 0), HeadPattern(8, 2, 3, 1))

    def both(dtype):
        o, back = jax.vjp(lambda *x: attend(*x, (pattern,)), *(x.astype(dtype) for x in qkv))
        return o, *back(weight.astype(dtype))

    qkv = q, k, v
    want, got = both(jnp.float32), both(jnp.bfloat16)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.02 * float(jnp.abs(y).max()))


def test_memory_grows_with_the_context_not_its_square():
    pattern = (HeadPattern(16, 4, 16),)

    def temporaries(T):
        q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(1, T, 1, 2, 16), (1, T, 1, 16)])
        f = jax.grad(lambda *x: attend(*x, (pattern,)).sum(), (0, 1, 2))
        return jax.jit(f).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(2**14), temporaries(2**16)
    assert long < 4.5 * short


def test_what_does_not_fit():
    q, k, v, _ = operands((1, 8, 2, 1, 8))
    with pytest.raises(ValueError, match="1 heads for 2 KV heads, queries for 2"):
        attend(q, k, v, ((None,),))


def test_the_reference_implementation_knows_patterns():
    q, k, v, _ = operands((1, 41, 2, 2, 8))
    layers = (None, None), (HeadPattern(4, 2, 3, 1, 1), None), (None, HeadPattern(4, 1))
    for layer, pattern in enumerate(layers):
        got = attend(q, k, v, layers, layer, implementation="reference")
        np.testing.assert_allclose(got, reference(q, k, v, visible(pattern, 41)), atol=2e-6)


@pytest.fixture(scope="module")
def over_a_mesh():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    path = Path(__file__).with_name("mesh_sparse_attention.py")
    script = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


CASES = ["context 4", "context 2, tensor 2", "dense heads too", "repeated heads", "sinks"]


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_neither_output_nor_gradients(over_a_mesh, case):
    assert over_a_mesh[case] < 2e-5


def test_what_does_not_fit_a_mesh(over_a_mesh):
    assert "multiple of the pattern's block=8" in over_a_mesh["odd parts"]
    assert "tensor=2 cuts 2 KV heads into parts that differ" in over_a_mesh["odd heads"]
