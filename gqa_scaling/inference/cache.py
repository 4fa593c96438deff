"""What each head may still see of the tokens so far: a cache of keys and values for decoding.

A head with a window of w blocks keeps a ring of the latest w blocks. Tokens of sinks and stripes go
to a buffer behind it as well, which is read for them once they have left the ring; all others are
then forgotten, so that a head holds `HeadPattern.slots` tokens instead of T. A dense head holds all
T. Every sequence of a batch has its own length: its first token is at position 0, without padding.

Array names end in their axes: B batch, T new tokens, K KV heads, G query heads per KV head, H head
size, S slots. Keys have their positions last, where a CPU reads them faster (19 against 13 GB/s).
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqa_scaling.config import require
from gqa_scaling.context_sharding import (
    HeadPattern,
    LayerPattern,
    distant_before,
    distant_block,
    is_distant,
)
from gqa_scaling.devices.kernel_limits import DENSE
from gqa_scaling.devices.mesh import axis_index, constrain
from gqa_scaling.files.timings import CacheName
from gqa_scaling.model.attention.shard import MASKED, sees
from gqa_scaling.model.attention.tiles import Softmax
from gqa_scaling.model.einsum import einsum_f32

TILE = 512  # slots that several new tokens read at a time
SPLIT = ("batch", "kv_heads")  # how each array of a cache is split over a mesh


class Heads(NamedTuple):
    """KV heads of a layer that are computed together: their patterns differ in offsets alone."""

    kind: HeadPattern  # with offset 0; `DENSE` for heads that see all
    heads: tuple[int, ...]  # which of those that a device holds
    offsets: tuple[tuple[int, ...], ...]  # of those heads, on each device along `tensor`

    def offset_K1(self) -> jax.Array:
        """On shards: their offsets, (K, 1)."""
        return jnp.array(self.offsets, jnp.int32)[axis_index("tensor")][:, None]


class HeadsCache(NamedTuple):
    """Keys and values of such heads; of int8, what each token's are multiples of."""

    k_BKHS: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


LayerCache = tuple[HeadsCache, ...]


@functools.cache
def grouped(pattern: LayerPattern, max_length: int, parts: int = 1) -> tuple[Heads, ...]:
    """The heads of a layer, those of one kind together, for `parts` devices along `tensor`.

    Raises `ValueError` where these would hold heads of other kinds.
    """

    def kind(head: HeadPattern | None) -> HeadPattern:
        return DENSE if head is None or not head.hides(max_length) else replace(head, offset=0)

    kinds, n = tuple(map(kind, pattern)), len(pattern) // parts
    if kinds[:n] * parts != kinds:
        raise ValueError(
            f"tensor={parts} cuts {len(pattern)} KV heads into parts that differ in the kinds of "
            "their heads: all must have the same, in the same order"
        )
    groups = []
    for each in dict.fromkeys(kinds[:n]):
        heads = tuple(h for h in range(n) if kinds[h] == each)
        own = [[pattern[part * n + h] for h in heads] for part in range(parts)]
        offsets = tuple(tuple(head.offset if head else 0 for head in row) for row in own)
        groups.append(Heads(each, heads, offsets))
    return tuple(groups)


def empty(
    groups: tuple[Heads, ...], batch: int, max_length: int, head_dim: int, dtype: CacheName
) -> LayerCache:
    """An empty cache of one layer for sequences of up to `max_length` tokens.

    For each sequence it holds as many values as `context_sharding.kv_cache_values` says, and in
    int8 a scale in float32 for each of its keys and values. Raises `UserError` for no sizes.
    """
    for name, value in (("batch", batch), ("max_length", max_length), ("head_dim", head_dim)):
        require(value > 0, f"{name}={value} must be greater than 0")

    def zeros(group: Heads, *shape: int, dtype: str = dtype) -> jax.Array:
        heads = len(group.heads) * len(group.offsets)
        return constrain(jnp.zeros((batch, heads, *shape), dtype), *SPLIT, *(None for _ in shape))

    layer = []
    for group in groups:
        slots = group.kind.slots(max_length)
        kv = zeros(group, head_dim, slots), zeros(group, slots, head_dim)
        scales = [zeros(group, slots, dtype="float32") for _ in kv] if dtype == "int8" else []
        layer.append(HeadsCache(*kv, *scales))
    return tuple(layer)


# What is read and what is written are two programs: XLA for CPUs copies a cache that one program both
# reads and changes, three times over, also a donated one (217 ms a step against 12).


def append(
    cache: LayerCache,
    groups: tuple[Heads, ...],
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    length_B: jax.Array,
    count_B: jax.Array,
) -> LayerCache:
    """On shards: the cache with the keys and values of T new tokens in it.

    Sequence b holds `length_B[b]` tokens, and of its new ones the first `count_B[b]` count. Lengths are
    not checked: what goes beyond those that the cache was made for is lost. Jit it with the cache
    donated, or every step copies all of it.
    """
    layer = []
    for part, group in zip(cache, groups, strict=True):
        k, v = (_of(x, group.heads) for x in (k_BTKH, v_BTKH))
        new = _quantised(k, v) if part.k_scale_BKS is not None else (k, v)
        to_BKT, twice = _targets(group, part.v_BKSH.shape[2], k.shape[1], length_B, count_B)
        layer.append(_put(part, new, to_BKT, twice))
    return tuple(layer)


def attend(
    cache: LayerCache,
    groups: tuple[Heads, ...],
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """On shards: attention of T new tokens, whose keys and values are given, after those of a cache.

    Sequence b holds `length_B[b]` tokens, which come first. o_BTKGH in q's dtype; softmax in float32,
    scores scaled by 1/sqrt(H).
    """
    outputs = []
    q_BTKGH = q_BTKGH * q_BTKGH.shape[-1] ** -0.5
    for part, group in zip(cache, groups, strict=True):
        q, k, v = (_of(x, group.heads) for x in (q_BTKGH, k_BTKH, v_BTKH))
        outputs.append(_attend(part, group, q, k, v, length_B))
    order = np.argsort([h for group in groups for h in group.heads])
    return _of(jnp.concatenate(outputs, axis=2), tuple(order.tolist()))


def _of(x_BTK: jax.Array, heads: tuple[int, ...]) -> jax.Array:
    """Some KV heads."""
    return x_BTK if heads == tuple(range(x_BTK.shape[2])) else x_BTK[:, :, np.array(heads)]


# ------------------------------------------------------------------------------------- writing


def _quantised(k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values as int8, and the scale in float32 that each head has at each position."""

    def of(x_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x_BTKH.astype(jnp.float32)
        most_BTK = jnp.max(jnp.abs(x), axis=-1)
        scale_BTK = jnp.where(most_BTK > 0, most_BTK / 127, 1)
        return jnp.round(x / scale_BTK[..., None]).astype(jnp.int8), scale_BTK

    (k, k_scale), (v, v_scale) = of(k_BTKH), of(v_BTKH)
    return k, v, k_scale, v_scale


def _targets(
    group: Heads, slots: int, T: int, length_B: jax.Array, count_B: jax.Array
) -> tuple[jax.Array, bool]:
    """The slots that T new tokens go to, the last one's successor for nowhere, (B, K or 1, T).

    Those that the ring forgets by the last of them are left out, so that no slot is written twice.
    Where some also go behind the ring, T more slots follow, and `True`.
    """
    p, ring = group.kind, _ring(group.kind, slots)
    t_BT = length_B[:, None] + jnp.arange(T)
    counts_BT = jnp.arange(T) < count_B[:, None]
    stays_BT = counts_BT & (t_BT >= (length_B + count_B)[:, None] - ring)
    to_BKT = jnp.where(stays_BT, t_BT % ring, slots)[:, None]
    if slots == ring:
        return to_BKT, False
    block_BKT, within_BKT = t_BT[:, None] // p.block, t_BT[:, None] % p.block
    of_head = p.stride, group.offset_K1(), p.sinks
    kept_BKT = is_distant(block_BKT, *of_head) & counts_BT[:, None]
    behind_BKT = ring + distant_before(block_BKT, *of_head) * p.block + within_BKT
    behind_BKT = jnp.where(kept_BKT, behind_BKT, slots)
    K = len(group.heads)
    both = (jnp.broadcast_to(x, (len(length_B), K, T)) for x in (to_BKT, behind_BKT))
    return jnp.concatenate(list(both), axis=2), True


def _put(
    part: HeadsCache, new: tuple[jax.Array, ...], to_BKT: jax.Array, twice: bool
) -> HeadsCache:
    """The cache with new keys, values and their scales, (B, T, K, ...), in those slots."""
    B, K = part.v_BKSH.shape[:2]
    b, k = np.arange(B)[:, None, None], np.arange(K)[:, None]

    def values(x_BTK: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x_BKT = x_BTK.swapaxes(1, 2).astype(dtype)
        return jnp.concatenate([x_BKT, x_BKT], axis=2) if twice else x_BKT

    arrays = [x for x in part if x is not None]
    put = [
        (x.at[b, k, :, to_BKT] if i == 0 else x.at[b, k, to_BKT]).set(
            values(n, x.dtype), mode="drop"
        )
        for i, (x, n) in enumerate(zip(arrays, new, strict=True))
    ]
    return HeadsCache(*put)


# ------------------------------------------------------------------------------------- reading


def _attend(
    part: HeadsCache,
    group: Heads,
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """o_BTKGH: softmax over what is held, several tokens tile by tile, then over the new tokens."""
    q_BKGTH, slots, dtype = q_BTKGH.transpose(0, 2, 3, 1, 4), part.v_BKSH.shape[2], q_BTKGH.dtype
    T = q_BKGTH.shape[3]
    t_BT = length_B[:, None] + jnp.arange(T)
    held_BKS = _held(group, slots, length_B)
    # XLA for CPUs casts a whole int8 cache, all layers of it, before it reads any.
    cast = part.v_BKSH.dtype == jnp.int8 and jax.default_backend() == "cpu"
    whole = T == 1 and not cast
    tile = slots if whole else min(TILE, slots)

    def read(j: jax.Array | int, softmax: Softmax) -> Softmax:
        start = jnp.minimum(j * tile, slots - tile)  # the last tile may begin in the one before
        k, v, *scales = (
            lax.dynamic_slice_in_dim(x, start, tile, 3 if x is part.k_BKHS else 2)
            for x in part
            if x is not None
        )
        k_scale, v_scale = scales or (None, None)
        held = lax.dynamic_slice_in_dim(held_BKS, start, tile, 2)
        held = jnp.where(start + jnp.arange(tile) >= j * tile, held, -1)[:, :, None]
        # The ring still holds what it is about to forget.
        visible = (held >= 0) & _sees(group, t_BT[:, None, :, None], jnp.maximum(held, 0))
        scores = jnp.where(visible[:, :, None], _scores(q_BKGTH, k, k_scale), MASKED)
        return softmax.over(scores, lambda p: _weighed(p, v, v_scale, dtype))

    softmax = Softmax.empty(q_BKGTH.shape)
    if whole:
        softmax = read(0, softmax)
    else:
        filled = jnp.minimum(jnp.max(length_B), slots) if group.kind == DENSE else slots
        tiles = jnp.where(jnp.max(length_B) > 0, (filled + tile - 1) // tile, 0)
        softmax = lax.fori_loop(0, tiles, read, softmax)
    query, key = t_BT[:, None, :, None], t_BT[:, None, None]
    visible = (query >= key) & _sees(group, query, key)
    k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
    scores = jnp.where(visible[:, :, None], _scores(q_BKGTH, k_BKHT, None), MASKED)
    softmax = softmax.over(scores, lambda p: _weighed(p, v_BKTH, None, dtype))
    return softmax.result(dtype)[0].transpose(0, 3, 1, 2, 4)


def _sees(group: Heads, query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether queries see keys, by their positions in 4 axes, of which the second is heads."""
    return sees(group.kind, group.offset_K1()[:, :, None], query, key)


def _scores(q_BKGTH: jax.Array, k_BKHS: jax.Array, scale_BKS: jax.Array | None) -> jax.Array:
    """Scores in float32, (B, K, G, T, S)."""
    scores = einsum_f32("BKGTH,BKHS->BKGTS", q_BKGTH, k_BKHS)
    return scores if scale_BKS is None else scores * scale_BKS[:, :, None, None]


def _weighed(
    p_BKGTS: jax.Array, v_BKSH: jax.Array, scale_BKS: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Values weighed by p, in float32, (B, K, G, T, H)."""
    p_BKGTS = p_BKGTS if scale_BKS is None else p_BKGTS * scale_BKS[:, :, None, None]
    return einsum_f32("BKGTS,BKSH->BKGTH", p_BKGTS.astype(dtype), v_BKSH)


# ------------------------------------------------------------------------- what lies in a slot


def _ring(kind: HeadPattern, slots: int) -> int:
    """Slots, the first ones, that hold the latest tokens in turn."""
    return min(slots, kind.window)


def _held(group: Heads, slots: int, length_B: jax.Array) -> jax.Array:
    """Position of the token in each slot of sequences of these lengths, -1: none; (B, K or 1, S).

    A token behind the ring is held there once the ring has forgotten it.
    """
    p, ring = group.kind, _ring(group.kind, slots)
    last_B11 = length_B[:, None, None] - 1
    held = jnp.maximum(last_B11 - (last_B11 - jnp.arange(ring)) % ring, -1)
    if slots == ring:
        return held
    behind_S = jnp.arange(slots - ring)
    block_KS = distant_block(behind_S // p.block, p.stride, group.offset_K1(), p.sinks)
    moved_KS = block_KS * p.block + behind_S % p.block
    moved_BKS = jnp.where(moved_KS <= last_B11 - ring, moved_KS, -1)
    moved_BKS = jnp.broadcast_to(moved_BKS, (len(length_B), len(group.heads), slots - ring))
    return jnp.concatenate([jnp.broadcast_to(held, (*moved_BKS.shape[:2], ring)), moved_BKS], 2)
