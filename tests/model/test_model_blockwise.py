import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_attention import assert_equals_masked, both, masked, operands

from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.model.attention import attend as attention
from gqa_scaling.model.attention import blockwise, turns

attend = jax.jit(attention, static_argnames=("implementation", "interpret", "patterns"))


def assert_dense(shape, K, implementation="blockwise", seed=0):
    """For (B, T, G, H) of `shape`."""

    def dense(layer, *qkv):
        return attention(*qkv, implementation=implementation)

    assert_equals_masked(dense, shape, (None,) * K, seed=seed)


@pytest.mark.parametrize(
    ("shape", "K"),
    [((1, 1, 1, 8), 1), ((3, 9, 3, 8), 2), ((2, 16, 2, 16), 2), ((2, 33, 1, 8), 3)],
    ids=str,
)
def test_blockwise_equals_the_masked_reference(shape, K, monkeypatch):
    """One query, less than a tile, a whole tile, more than two."""
    monkeypatch.setattr(blockwise, "_block", lambda T, *_: min(T, 16))
    assert_dense(shape, K)


TURNS = {  # scores of a turn: the sequences and KV heads that it takes, of 8 and 6
    1: (1, 1),
    3 * 512: (1, 3),
    5 * 512: (1, 3),
    3 * 6 * 512: (2, 6),  # three do not divide eight
    24 * 512: (8, 6),  # all of it is no more than two tiles
}


@pytest.mark.parametrize("scores", TURNS)
def test_one_core_takes_sequences_and_heads_by_turns(scores, monkeypatch):
    """With the same output and gradients, and tiles that are no larger than they may be."""
    B, T, K, G, H = 8, 33, 6, 2, 8
    seen, forward = [], blockwise.forward
    monkeypatch.setattr(blockwise, "forward", lambda *a, **k: seen.append(a[1]) or forward(*a, **k))
    monkeypatch.setattr(blockwise, "_block", lambda T, *_: min(T, 16))
    monkeypatch.setattr(turns, "cores", lambda: [0])
    monkeypatch.setattr(turns, "SCORES", scores)
    assert_dense((B, T, G, H), K)
    b, k = TURNS[scores]
    assert {x.q_BTKGH.shape for x in seen} == {(b, T, k, G, H)}


def test_one_core_holds_less_at_once(monkeypatch):
    """What a forward and backward pass need beside their operands, in bytes."""
    *qkv, do = operands(8, 256, 4, 1, 16)
    needed = []
    for cores in ([0, 1], [0]):
        monkeypatch.setattr(turns, "cores", lambda cores=cores: cores)
        passes = jax.jit(lambda *xs: both(attention, *xs))  # traced anew
        memory = passes.lower(*qkv, do).compile().memory_analysis()
        needed.append(memory.temp_size_in_bytes)
    assert needed[1] < 0.6 * needed[0]


@pytest.mark.parametrize(("T", "G"), [(128, 8), (1024, 1), (1100, 1), (4096, 2), (4096, 8)])
def test_tiles_of_one_core_are_as_large_as_stay_in_its_cache(T, G):
    side = blockwise._block(T, G, turns.SCORES)
    assert side == 128 or G * side**2 <= turns.SCORES < G * (2 * side) ** 2
    assert (side > 128) == (T > 1024 and G <= 2)


def test_blockwise_with_its_own_block_size():
    assert_dense((1, blockwise._block(999) + 5, 2, 16), 1, seed=1)


def test_the_reference_equals_the_masked_reference():
    assert_dense((2, 33, 2, 8), 2, "reference")


def test_large_scores_stay_finite():
    q, k, v, _ = operands(1, 40, 1, 2, 8)
    for implementation in ("reference", "blockwise"):
        assert jnp.isfinite(attend(100 * q, 100 * k, v, implementation=implementation)).all()


def test_bfloat16_stays_close():
    q, k, v, _ = operands(2, 40, 2, 2, 16)
    want = masked(q, k, v, (None, None))
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    for implementation in ("reference", "blockwise"):
        got = attend(*low, implementation=implementation)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


@pytest.mark.parametrize("implementation", ["splash", "triton"])
def test_the_kernels_know_the_layers_of_a_stack(implementation):
    """Dense and sparse layers whose stripes lie elsewhere, chosen by a traced number."""
    patterns = ContextSharding(16, 1, stride=3, dense_layers="1").layers(3, 2)

    def stack(layer, *qkv):
        return attention(*qkv, patterns, layer, implementation=implementation, interpret=True)

    assert_equals_masked(stack, (1, 80, 2, 16), *patterns)


def test_what_does_not_fit():
    q, k, v, _ = operands(1, 8, 2, 1, 24)
    kernel = {"implementation": "triton", "interpret": True}
    stripes = ContextSharding(4, 1, stride=2**29 - 1).layers(1, 2)
    for operation, words in [
        (lambda: attend(q, k, v, implementation="flash"), "one of reference, blockwise, splash, "),
        (
            lambda: attend(q, k[:, :4], v),
            r"keys .* and values .* must both be \(1, 8, KV heads, 24",
        ),
        (lambda: attend(q, k, v.astype(jnp.bfloat16)), "bfloat16, float32: they must all be"),
        (lambda: attend(q, k, v, ((None,),)), "1 heads for 2 KV heads, queries for 2"),
        (lambda: attend(q, k, v, **kernel), "'triton' needs a head_dim of 16, .* not 24"),
        (lambda: attend(q, k, v, stripes, implementation="splash"), "a stride that fits 31 bits"),
        (lambda: attend(q, k, v, implementation="cudnn"), "'cudnn' needs dtype=bfloat16"),
    ]:
        with pytest.raises(ValueError, match=words):
            operation()
