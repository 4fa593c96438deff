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
from gqa_scaling.model.cache import append, attend_one, create, prefill

B, G, H = 2, 2, 8


def tokens(K: int, T: int, dtype="float32") -> list[jax.Array]:
    """q, k and v."""
    return operands(B, T, K, G, H, dtype=dtype)[:3]


@jax.jit
def decode(cache, q_BTKGH, k_BSKH, v_BSKH, start=0):
    """Append and attend, token after token, the first at position `start`; o_BTKGH."""

    def step(cache, x):
        position, q, k, v = x
        cache = append(cache, k, v, position)
        return cache, attend_one(cache, q, position)

    steps = [jnp.moveaxis(x, 1, 0) for x in (q_BTKGH, k_BSKH, v_BSKH)]
    _, o = jax.lax.scan(step, cache, (start + jnp.arange(len(steps[0])), *steps))
    return jnp.moveaxis(o, 0, 1)


MIXED = (
    HeadPattern(4, 3, 4, 1),
    None,
    HeadPattern(4, 3, 4, 2),
    HeadPattern(4, 2, sinks=1),
    HeadPattern(8, 1, 3, 2, 2),
    HeadPattern(4, 2),
)


@pytest.mark.parametrize(
    ("pattern", "T"),
    [
        (MIXED, 150),
        ((HeadPattern(4, 3, 4, 3), HeadPattern(4, 3, 4, 0)), 151),
        ((HeadPattern(4, 2, 4, 3, sinks=9),), 26),  # not all sinks come to be distant
        ((HeadPattern(8, 4, 2), None), 30),  # nothing leaves the ring
    ],
)
def test_every_step_is_masked_full_attention(pattern, T):
    q, k, v = tokens(len(pattern), T)
    o = decode(create(pattern, B, T, H, "float32"), q, k, v)
    np.testing.assert_allclose(o, masked(q, k, v, pattern), atol=2e-6)


@pytest.mark.slow
def test_2000_steps_are_masked_full_attention():
    T = 2000
    layers = ContextSharding(16, 4, 8, sinks=1, dense_kv_heads=1).layers(3, 3)
    q, k, v = tokens(3, T)
    for pattern in layers:
        o = decode(create(pattern, B, T, H, "float32"), q, k, v)
        np.testing.assert_allclose(o, masked(q, k, v, pattern), atol=2e-6)


def test_bfloat16():
    q, k, v = tokens(2, 60, "bfloat16")
    pattern = HeadPattern(4, 3, 4, 1), None
    o = decode(create(pattern, B, 60, H, "bfloat16"), q, k, v)
    assert o.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(o, np.float32), masked(q, k, v, pattern), atol=0.03)


@pytest.mark.parametrize("start", [1, 12, 33])
def test_a_prompt_may_come_at_once(start):
    T = start + 20
    q, k, v = tokens(len(MIXED), T)
    cache = create(MIXED, B, 53, H, "float32")
    cache = jax.jit(prefill)(cache, k[:, :start], v[:, :start])
    o = decode(cache, q[:, start:], k[:, start:], v[:, start:], start)
    np.testing.assert_allclose(o, masked(q, k, v, MIXED)[:, start:], atol=2e-6)


def bytes_of(pattern, T, dtype="bfloat16") -> int:
    """Bytes of keys and values, none of them allocated."""
    cache = jax.eval_shape(lambda: create(pattern, B, T, 64, dtype))
    arrays = [x for part in cache for x in (part.k_BKSH, part.v_BKSH)]
    return sum(x.size * x.dtype.itemsize for x in arrays)


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
    assert bytes_of(MIXED, T, "float32") == 4 * B * kv_cache_values([MIXED], T, 64)


def test_layers_that_differ_in_offsets_can_be_stacked():
    q, k, v = tokens(2, 100)
    layers = ContextSharding(4, 2, 8).layers(3, 2)
    assert len(set(layers)) == 3
    caches = [create(pattern, B, 100, H, "float32") for pattern in layers]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *caches)
    _, o = jax.lax.scan(lambda _, cache: (None, decode(cache, q, k, v)), None, stack)
    for own, pattern in zip(o, layers, strict=True):
        np.testing.assert_allclose(own, masked(q, k, v, pattern), atol=2e-6)


def test_what_may_never_be_seen_again_is_forgotten():
    p = HeadPattern(4, 2, 4, 1)
    _, k, v = tokens(1, 44)
    j = np.arange(44) // 4
    lost = ~is_distant(j, p.stride, p.offset, p.sinks) & (j + p.local <= 10)
    v = jnp.where(lost[:, None, None], jnp.nan, v)

    @jax.jit
    def fill(cache):
        return jax.lax.fori_loop(0, 44, lambda t, c: append(c, k[:, t], v[:, t], t), cache)

    (part,) = fill(create((p,), B, 44, H, "float32"))
    assert np.isnan(v).sum() == 28 * B * H
    assert not np.isnan(part.v_BKSH).any()
    for kept in np.flatnonzero(~lost):
        assert (np.asarray(part.v_BKSH) == np.asarray(v)[:, kept, :, None]).all(-1).any(-1).all()


def test_a_donated_cache_is_written_in_place():
    _, k, v = tokens(2, 1)
    cache = create((HeadPattern(4, 2, 4), None), B, 40, H, "float32")
    step = jax.jit(append, donate_argnums=0)
    for position in (0, 1):
        old, cache = cache, step(cache, k[:, 0], v[:, 0], position)
        assert all(part.k_BKSH.is_deleted() and part.v_BKSH.is_deleted() for part in old)


def test_refusals():
    with pytest.raises(UserError, match="max_length=0 must be greater than 0"):
        create((None,), 1, 0, 8, "float32")
    _, k, v = tokens(1, 9)
    with pytest.raises(UserError, match="a prompt of 9 tokens needs 9 slots of a cache of 8"):
        prefill(create((None,), B, 8, H, "float32"), k, v)
