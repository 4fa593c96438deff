import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from masked_attention import masked, operands

from gqa_scaling.config import UserError
from gqa_scaling.context_sharding import (
    ContextSharding,
    HeadPattern,
    effective_context,
    is_distant,
    kv_cache_values,
)
from gqa_scaling.inference.cache import append, attend, empty, grouped

B, G, H = 2, 2, 8


def tokens(K: int, T: int, dtype="float32") -> list[jax.Array]:
    """q, k and v."""
    return operands(B, T, K, G, H, dtype=dtype)[:3]


@functools.partial(jax.jit, static_argnums=0)
def take(groups, cache, q, k, v, length_B, count_B):
    """Attend and append."""
    return attend(cache, groups, q, k, v, length_B), append(cache, groups, k, v, length_B, count_B)


def decode(pattern, qkv, *, ends=None, max_length=None, dtype="float32"):
    """o_BTKGH of tokens taken in turns that end at these positions; by default one by one."""
    T = qkv[0].shape[1]
    groups = grouped(pattern, max_length or T)
    cache = empty(groups, B, max_length or T, H, dtype)
    outputs = []
    for start, end in itertools.pairwise([0, *(ends or range(1, T + 1))]):
        lengths, counts = np.full(B, start, np.int32), np.full(B, end - start, np.int32)
        o, cache = take(groups, cache, *(x[:, start:end] for x in qkv), lengths, counts)
        outputs.append(o)
    return jnp.concatenate(outputs, axis=1)


MIXED = (
    HeadPattern(4, 3, 4, 1),
    None,
    HeadPattern(4, 3, 4, 2),
    HeadPattern(4, 2, sinks=1),
    HeadPattern(8, 1, 3, 2, 2),
    HeadPattern(4, 2),
)
PATTERNS = [
    (MIXED, 150),
    ((HeadPattern(4, 3, 4, 3), HeadPattern(4, 3, 4, 0)), 151),
    ((HeadPattern(4, 2, 4, 3, sinks=9),), 26),  # not all sinks come to be distant
    ((HeadPattern(8, 4, 2), None), 30),  # nothing leaves the ring
]


@pytest.mark.parametrize(("pattern", "T"), PATTERNS)
def test_every_step_is_masked_full_attention(pattern, T):
    qkv = tokens(len(pattern), T)
    np.testing.assert_allclose(decode(pattern, qkv), masked(*qkv, pattern), atol=2e-6)


@pytest.mark.parametrize("ends", [(150,), (50, 100, 150)])
def test_tokens_may_come_several_at_a_time(ends, monkeypatch):
    monkeypatch.setattr("gqa_scaling.inference.cache.TILE", 16)  # several, the last one partial
    qkv = tokens(len(MIXED), 150)
    o = decode(MIXED, qkv, ends=ends)
    np.testing.assert_allclose(o, masked(*qkv, MIXED), atol=2e-6)


def test_a_cache_may_be_longer_than_what_it_holds():
    qkv = tokens(len(MIXED), 60)
    o = decode(MIXED, qkv, ends=(20, 40, *range(41, 61)), max_length=97)
    np.testing.assert_allclose(o, masked(*qkv, MIXED), atol=2e-6)


@pytest.mark.slow
def test_2000_steps_are_masked_full_attention():
    T = 2000
    layers = ContextSharding(16, 4, 8, sinks=1, dense_kv_heads=1).layers(3, 3)
    qkv = tokens(3, T)
    for pattern in layers:
        np.testing.assert_allclose(decode(pattern, qkv), masked(*qkv, pattern), atol=2e-6)


@pytest.mark.parametrize(("dtype", "of_values", "tolerance"), [
    ("bfloat16", "bfloat16", 0.03),
    ("bfloat16", "float32", 0.02),
    ("int8", "float32", 0.02),
])  # fmt: skip
def test_caches_of_fewer_bits_are_near(dtype, of_values, tolerance):
    pattern = HeadPattern(4, 3, 4, 1), None
    qkv = tokens(2, 40, of_values)
    o = decode(pattern, qkv, ends=(20, *range(21, 41)), dtype=dtype)
    assert o.dtype == of_values
    error = np.abs(np.asarray(o, np.float32) - masked(*qkv, pattern))
    assert 1e-4 < error.max() < tolerance


def bytes_of(pattern, T, dtype="bfloat16") -> int:
    """Bytes of a cache, none of them allocated."""
    groups = grouped(pattern, T)
    cache = jax.eval_shape(lambda: empty(groups, B, T, 64, dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("n_kv", [1, 2, 4, 8])
def test_bytes_at_32k_are_the_formula_and_a_tenth_of_dense(n_kv):
    T, n_layers = 32768, 4
    layers = ContextSharding(64, 16, stride=16).layers(n_layers, n_kv)
    held = sum(bytes_of(pattern, T) for pattern in layers)
    assert effective_context(layers, T) == 3008
    assert held == B * 2 * 2 * 3008 * n_layers * 64 * n_kv  # 2 bytes; 2 T_eff L d_h n_kv values
    assert held == 2 * B * kv_cache_values(layers, T, 64)
    dense = sum(bytes_of((None,) * n_kv, T) for _ in layers)
    assert dense == B * 2 * 2 * T * n_layers * 64 * n_kv
    assert dense / held == pytest.approx(10.89, abs=0.01)


@pytest.mark.parametrize("T", [1, 5, 11, 12, 13, 150, 151])
def test_bytes_are_those_of_the_slots(T):
    values = B * kv_cache_values([MIXED], T, 64)
    assert bytes_of(MIXED, T, "float32") == 4 * values
    assert bytes_of(MIXED, T, "int8") == values + 4 * values // 64  # and a scale for each 64


def test_what_may_never_be_seen_again_is_forgotten():
    p = HeadPattern(4, 2, 4, 1)
    q, k, v = tokens(1, 44)
    j = np.arange(44) // 4
    lost = ~is_distant(j, p.stride, p.offset, p.sinks) & (j + p.local <= 10)
    v = jnp.where(lost[:, None, None], jnp.nan, v)
    assert np.isnan(v).sum() == 28 * B * H
    groups = grouped((p,), 44)
    part, zero = empty(groups, B, 44, H, "float32"), np.zeros(B, np.int32)
    for start, end in ((0, 30), (30, 31), (31, 44)):
        more = (x[:, start:end] for x in (q, k, v))
        _, part = take(groups, part, *more, zero + start, zero + end - start)
    ((_, v_BKSH, *_),) = part
    assert not np.isnan(v_BKSH).any()
    for kept in np.flatnonzero(~lost):
        assert (np.asarray(v_BKSH) == np.asarray(v)[:, kept, :, None]).all(-1).any(-1).all()


def test_a_donated_cache_is_written_in_place_and_nothing_else_is_copied():
    """Only a program that does not read it as well does so on a CPU."""
    _, k, v = tokens(2, 1)
    groups, length = grouped((HeadPattern(4, 2, 4), None), 4000), np.zeros(B, np.int32)
    step = jax.jit(append, static_argnums=1, donate_argnums=0)
    cache = empty(groups, B, 4000, H, "float32")
    size = sum(x.nbytes for x in jax.tree.leaves(cache))
    memory = step.lower(cache, groups, k, v, length, length + 1).compile().memory_analysis()
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 100
    for position in (0, 1):
        old, cache = cache, step(cache, groups, k, v, length + position, length + 1)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))


def test_refusals():
    with pytest.raises(UserError, match="max_length=0 must be greater than 0"):
        empty(grouped((None,), 8), 1, 0, 8, "float32")
    with pytest.raises(ValueError, match="tensor=2 cuts 2 KV heads into parts that differ"):
        grouped((None, HeadPattern(4, 2)), 100, 2)
    # at a length where the window hides nothing, both are dense
    assert len(grouped((None, HeadPattern(4, 2)), 8, 2)) == 1
