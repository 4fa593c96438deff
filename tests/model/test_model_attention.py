import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.model.attention import attend as attention
from gqa_scaling.model.attention import blockwise


def operands(shape, dtype=jnp.float32, seed=0):
    B, T, K, G, H = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)]
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def assert_blockwise_equals_reference(shape, seed):
    def both(q, k, v, weight):
        def run(implementation):
            attend = functools.partial(attention.attend, implementation=implementation)
            o, pull_back = jax.vjp(attend, q, k, v)
            return o, pull_back(weight)

        return run("reference"), run("blockwise")

    (o, gradients), (o2, gradients2) = jax.jit(both)(*operands(shape, seed=seed))
    np.testing.assert_allclose(o2, o, rtol=0, atol=2e-6)
    for g2, g in zip(gradients2, gradients, strict=True):
        np.testing.assert_allclose(g2, g, rtol=0, atol=2e-5)


SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.just(8)
)


@settings(max_examples=5, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31))
def test_blockwise_equals_reference(shape, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "_block", lambda T: min(T, 16))
        assert_blockwise_equals_reference(shape, seed)


@pytest.mark.parametrize("T", [16, 33], ids="T={}".format)
def test_blockwise_at_the_edges_of_its_blocks(T, monkeypatch):
    monkeypatch.setattr(blockwise, "_block", lambda T: min(T, 16))
    assert_blockwise_equals_reference((2, T, 2, 2, 16), 0)


def test_blockwise_with_its_own_block_size():
    assert_blockwise_equals_reference((1, blockwise._block(999) + 5, 1, 2, 16), 1)


attend = jax.jit(attention.attend, static_argnames="implementation")


def test_large_scores_stay_finite():
    q, k, v, _ = operands((1, 40, 1, 2, 8))
    for implementation in ("reference", "blockwise"):
        assert jnp.isfinite(attend(100 * q, 100 * k, v, implementation=implementation)).all()


def test_heads_read_their_own_kv_head():
    q, k, v, _ = operands((1, 12, 3, 2, 8))
    o = attend(q, k, v)
    for head in range(3):
        one = slice(head, head + 1)
        alone = attend(q[:, :, one], k[:, :, one], v[:, :, one])
        np.testing.assert_allclose(o[:, :, one], alone, atol=1e-6)


def test_bfloat16_stays_close():
    args = operands((2, 40, 2, 2, 16))[:3]
    want = attend(*args, implementation="reference")
    for implementation in ("reference", "blockwise"):
        got = attend(*(x.astype(jnp.bfloat16) for x in args), implementation=implementation)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


@pytest.mark.parametrize("implementation", ["splash", "triton"])
def test_the_kernels_know_the_layers_of_a_stack(implementation):
    """Dense and sparse layers whose stripes lie elsewhere, chosen by a traced number."""
    patterns = ContextSharding(16, 1, stride=3, dense_layers="1").layers(3, 2)
    *qkv, weight = operands((1, 80, 2, 2, 16))

    def run(layer, how):
        o, pull_back = jax.vjp(lambda *x: attention.attend(*x, patterns, layer, **how), *qkv)
        return o, *pull_back(weight)

    found = jax.jit(lambda layer: run(layer, {"implementation": implementation, "interpret": True}))
    wanted = jax.jit(lambda layer: run(layer, {"implementation": "reference"}))
    for layer in range(3):
        for got, want in zip(found(layer), wanted(layer), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_unknown_implementation():
    q, k, v, _ = operands((1, 4, 1, 1, 8))
    with pytest.raises(
        ValueError, match="must be one of reference, blockwise, splash, triton, cudnn"
    ):
        attention.attend(q, k, v, implementation="flash")


@pytest.fixture(scope="module")
def over_context():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    script = [sys.executable, "-W", "error", str(Path(__file__).with_name("mesh_attention.py"))]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["reference", "n_kv 1", "n_kv 2", "odd parts", "small tiles"])
def test_a_context_axis_changes_neither_output_nor_gradients(over_context, case):
    assert over_context[case] < 2e-5


def test_a_context_axis_in_bfloat16(over_context):
    assert over_context["bfloat16"] < 0.05


def test_zigzag_shards_walk_over_as_many_tiles(over_context):
    """64 rows of tiles, walked up to the diagonal forward and backward."""
    blocks = np.array(over_context["blocks"])
    assert blocks.sum() == 2 * 64 * 65 / 2
    assert blocks.max() / blocks.mean() <= 1.1
