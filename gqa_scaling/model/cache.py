"""Decoding with a cache of what each head may still see, one token at a time.

A head with a window of w blocks keeps a ring of w blocks of keys and values. A token that the ring
is about to overwrite moves to a buffer behind it when its block is a sink or a stripe, and is
forgotten otherwise, so that a head holds `HeadPattern.slots` tokens instead of T; a dense head
holds all T. B batch, K KV heads, G query heads per KV head, S slots or positions, H head size.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from gqa_scaling.config import require
from gqa_scaling.context_sharding import (
    HeadPattern,
    LayerPattern,
    distant_before,
    distant_block,
    is_distant,
)
from gqa_scaling.devices.kernel_limits import DENSE
from gqa_scaling.model.attention.shard import MASKED, sees
from gqa_scaling.model.einsum import einsum_f32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("k_BKSH", "v_BKSH", "offset_K"),
    meta_fields=("pattern", "heads"),
)
@dataclass(frozen=True)
class HeadsCache:
    """Keys and values of those KV heads of a layer whose patterns differ in `offset` alone.

    `pattern` is theirs with offset 0, `DENSE` for dense ones, and `heads` says which they are.
    Offsets are data, not structure: the caches of layers whose stripes lie elsewhere have one
    structure and can be stacked and scanned over.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    offset_K: jax.Array
    pattern: HeadPattern
    heads: tuple[int, ...]


Cache = tuple[HeadsCache, ...]  # of one layer


def create(
    pattern: LayerPattern, batch: int, max_length: int, head_dim: int, dtype: str | jnp.dtype
) -> Cache:
    """An empty cache of one layer for sequences of up to `max_length` tokens.

    Its keys and values are `context_sharding.kv_cache_values` values for each sequence of the batch.
    """
    for name, value in (("batch", batch), ("max_length", max_length), ("head_dim", head_dim)):
        require(value > 0, f"{name}={value} must be greater than 0")
    kinds: dict[HeadPattern, list[int]] = {}
    for head, own in enumerate(pattern):
        kind = DENSE if own is None else dataclasses.replace(own, offset=0)
        kinds.setdefault(kind, []).append(head)
    all_offsets = [own.offset if own else 0 for own in pattern]
    caches = []
    for kind, heads in kinds.items():
        slots = kind.slots(max_length)
        # Two arrays, as one buffer cannot be donated twice.
        k, v = (jnp.zeros((batch, len(heads), slots, head_dim), dtype) for _ in "kv")
        offset_K = jnp.array([all_offsets[head] for head in heads], jnp.int32)
        caches.append(HeadsCache(k, v, offset_K, kind, tuple(heads)))
    return tuple(caches)


def append(cache: Cache, k_BKH: jax.Array, v_BKH: jax.Array, position: jax.Array) -> Cache:
    """The cache with the keys and values of the token at `position`, a traced int32 scalar.

    Positions are those of all sequences of the batch, 0 first, each one after the last, and less
    than `max_length`: a traced position cannot be refused. Jit it with the cache donated, or every
    step copies all of it.
    """
    return tuple(_append(part, k_BKH, v_BKH, jnp.asarray(position)) for part in cache)


def _append(
    cache: HeadsCache, k_BKH: jax.Array, v_BKH: jax.Array, position: jax.Array
) -> HeadsCache:
    (K, slots), ring, heads = cache.k_BKSH.shape[1:3], _ring(cache), np.array(cache.heads)
    slot, moves = position % ring, slots > ring
    to_nK = jnp.full((1, K), slot)
    if moves:  # the token that is overwritten goes behind the ring, or past the end: nowhere
        p, leaving = cache.pattern, position - ring
        block, within = leaving // p.block, leaving % p.block
        kept_K = is_distant(block, p.stride, cache.offset_K, p.sinks) & (leaving >= 0)
        before_K = distant_before(block, p.stride, cache.offset_K, p.sinks)
        target_K = jnp.where(kept_K, ring + before_K * p.block + within, slots)
        to_nK = jnp.concatenate([to_nK, jnp.broadcast_to(target_K, (1, K))])

    def put(x_BKSH: jax.Array, new_BKH: jax.Array) -> jax.Array:
        new = [new_BKH[:, heads].astype(x_BKSH.dtype)]
        if moves:
            new.append(jax.lax.dynamic_index_in_dim(x_BKSH, slot, 2, keepdims=False))
        # One scatter: XLA for CPUs repeats a dynamic_update_slice, and copies the cache, for every
        # use of its result.
        return x_BKSH.at[:, np.arange(K), to_nK].set(jnp.stack(new, axis=1), mode="drop")

    return dataclasses.replace(
        cache, k_BKSH=put(cache.k_BKSH, k_BKH), v_BKSH=put(cache.v_BKSH, v_BKH)
    )


def prefill(cache: Cache, k_BSKH: jax.Array, v_BSKH: jax.Array) -> Cache:
    """The cache after a prompt at positions 0 to S - 1, whose tokens need not be appended singly.

    What `cache` held is forgotten. Raises `UserError` where the prompt does not fit.
    """
    length = k_BSKH.shape[1]
    for part in cache:
        needed = part.pattern.slots(length)
        require(
            0 < needed <= part.k_BKSH.shape[2],
            f"a prompt of {length} tokens needs {needed} slots of a cache of "
            f"{part.k_BKSH.shape[2]}: create it with a larger max_length",
        )

    def fill(part: HeadsCache, x_BSKH: jax.Array) -> jax.Array:
        held_KS = _held(part, jnp.asarray(length - 1))
        x_BKSH = x_BSKH[:, :, np.array(part.heads)].swapaxes(1, 2)
        found = jnp.take_along_axis(x_BKSH, jnp.maximum(held_KS, 0)[None, :, :, None], axis=2)
        return jnp.where(held_KS[..., None] >= 0, found, 0).astype(part.k_BKSH.dtype)

    return tuple(
        dataclasses.replace(part, k_BKSH=fill(part, k_BSKH), v_BKSH=fill(part, v_BSKH))
        for part in cache
    )


def attend_one(cache: Cache, q_BKGH: jax.Array, position: jax.Array) -> jax.Array:
    """Attention of the token at `position`, the last one appended; o_BKGH in q's dtype.

    Softmax in float32, scores scaled by 1/sqrt(H).
    """
    parts = [_attend(part, q_BKGH, jnp.asarray(position)) for part in cache]
    order = np.argsort([head for part in cache for head in part.heads])
    return jnp.concatenate(parts, axis=1)[:, order]


def _attend(cache: HeadsCache, q_BKGH: jax.Array, position: jax.Array) -> jax.Array:
    q_BKGH = q_BKGH[:, np.array(cache.heads)]
    held_KS = _held(cache, position)
    # The ring still holds the rest of the block that this one is overwriting.
    visible_KS = (held_KS >= 0) & sees(
        cache.pattern, cache.offset_K[:, None], position, jnp.maximum(held_KS, 0)
    )
    scores_BKGS = einsum_f32("BKGH,BKSH->BKGS", q_BKGH, cache.k_BKSH) / math.sqrt(q_BKGH.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible_KS[:, None], scores_BKGS, MASKED), axis=-1)
    o_BKGH = einsum_f32("BKGS,BKSH->BKGH", weights.astype(cache.v_BKSH.dtype), cache.v_BKSH)
    return o_BKGH.astype(q_BKGH.dtype)


def _ring(cache: HeadsCache) -> int:
    """Slots, the first ones, that hold the latest tokens in turn."""
    return min(cache.k_BKSH.shape[2], cache.pattern.window)


def _held(cache: HeadsCache, position: jax.Array) -> jax.Array:
    """Position of the token in each slot, (K, S), once that at `position` is in; -1: none."""
    ring, (K, slots) = _ring(cache), cache.k_BKSH.shape[1:3]
    latest_S = position - (position - jnp.arange(ring)) % ring
    held = [jnp.broadcast_to(jnp.maximum(latest_S, -1), (K, ring))]
    if slots > ring:
        p, behind_S = cache.pattern, jnp.arange(slots - ring)
        offset_K1 = cache.offset_K[:, None]
        block_KS = distant_block(behind_S // p.block, p.stride, offset_K1, p.sinks)
        moved_KS = block_KS * p.block + behind_S % p.block
        moved_KS = jnp.where(moved_KS <= position - ring, moved_KS, -1)
        held.append(jnp.broadcast_to(moved_KS, (K, slots - ring)))
    return jnp.concatenate(held, axis=1)
