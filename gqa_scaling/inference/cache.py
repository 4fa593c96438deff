"""What each head may still see of the tokens so far: a cache of keys and values for decoding.

A head with a window of w blocks keeps a ring of the latest w blocks. Tokens of sinks and stripes go
to a buffer behind it as well, which is read for them once they have left the ring; all others are
then forgotten, so that a head holds `HeadPattern.slots` tokens instead of T. A dense head holds all
T. Every sequence of a batch has its own length: its first token is at position 0, without padding.

Array names end in their axes: B batch, T new tokens, K KV heads, G query heads per KV head, H head
size, S slots. Keys have their positions last, where a CPU reads them faster (19 against 13 GB/s).
"""

import functools
import math
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

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
from gqa_scaling.model.attention.shard import MASKED, sees
from gqa_scaling.model.attention.tiles import Softmax
from gqa_scaling.model.einsum import einsum_f32

CacheType = Literal["float32", "bfloat16", "int8"]
CACHE_TYPES: tuple[CacheType, ...] = get_args(CacheType)
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
    groups: tuple[Heads, ...], batch: int, max_length: int, head_dim: int, dtype: CacheType
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


def attend_and_append(
    cache: LayerCache,
    groups: tuple[Heads, ...],
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    length_B: jax.Array,
    count_B: jax.Array,
) -> tuple[jax.Array, LayerCache]:
    """On shards: attention of T new tokens, o_BTKGH in q's dtype, and the cache with them in it.

    Sequence b holds `length_B[b]` tokens; of its new ones the first `count_B[b]` count, and what
    is returned for others means nothing. Lengths are not checked: what goes beyond those that the
    cache was made for is lost. Softmax in float32, scores scaled by 1/sqrt(H). Jit it with the
    cache donated, or every step copies all of it.
    """
    outputs, caches = [], []
    q_BTKGH = q_BTKGH * q_BTKGH.shape[-1] ** -0.5
    for part, group in zip(cache, groups, strict=True):
        q, k, v = (_of(x, group.heads) for x in (q_BTKGH, k_BTKH, v_BTKH))
        new = _quantised(k, v) if part.k_scale_BKS is not None else (k, v, None, None)
        added = _append(part, group, new, length_B, count_B)
        if q.shape[1] == 1:
            outputs.append(_attend_one(added, group, q, length_B))
        else:
            outputs.append(_attend_several(part, group, q, k, v, length_B))
        caches.append(added)
    order = np.argsort([h for group in groups for h in group.heads])
    return _of(jnp.concatenate(outputs, axis=2), tuple(order.tolist())), tuple(caches)


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


def _append(
    part: HeadsCache, group: Heads, new: tuple, length_B: jax.Array, count_B: jax.Array
) -> HeadsCache:
    slots, T = part.v_BKSH.shape[2], new[0].shape[1]
    p, ring = group.kind, _ring(group.kind, slots)
    t_BT = length_B[:, None] + jnp.arange(T)
    counts_BT = jnp.arange(T) < count_B[:, None]
    stays_BT = counts_BT & (t_BT >= (length_B + count_B)[:, None] - ring)
    # What goes past the last slot goes nowhere.
    to_BKT = jnp.where(stays_BT, t_BT % ring, slots)[:, None]
    if slots > ring:
        block_B1T, within_B1T = t_BT[:, None] // p.block, t_BT[:, None] % p.block
        of_head = p.stride, group.offset_K1(), p.sinks
        kept_BKT = is_distant(block_B1T, *of_head) & counts_BT[:, None]
        behind_BKT = ring + distant_before(block_B1T, *of_head) * p.block + within_B1T
        behind_BKT = jnp.where(kept_BKT, behind_BKT, slots)
        to_BKT = jnp.concatenate([jnp.broadcast_to(to_BKT, kept_BKT.shape), behind_BKT], axis=2)
        new = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), new)
    b, k = np.arange(part.v_BKSH.shape[0])[:, None, None], np.arange(part.v_BKSH.shape[1])[:, None]

    # One scatter for each array: XLA for CPUs copies the cache for every further use of its result.
    def put(x: jax.Array | None, new_BTK: jax.Array | None, last: bool = False) -> jax.Array | None:
        if x is None or new_BTK is None:
            return None
        values = new_BTK.swapaxes(1, 2).astype(x.dtype)
        at = x.at[b, k, :, to_BKT] if last else x.at[b, k, to_BKT]
        return at.set(values, mode="drop")

    k_new, v_new, k_scale, v_scale = new
    k_BKHS, v_BKSH = put(part.k_BKHS, k_new, last=True), put(part.v_BKSH, v_new)
    assert k_BKHS is not None
    assert v_BKSH is not None
    scales = put(part.k_scale_BKS, k_scale), put(part.v_scale_BKS, v_scale)
    return HeadsCache(k_BKHS, v_BKSH, *scales)


# ------------------------------------------------------------------------------------- reading


def _attend_one(
    part: HeadsCache, group: Heads, q_B1KGH: jax.Array, length_B: jax.Array
) -> jax.Array:
    """o_B1KGH of the token at position `length_B`, which is in the cache already."""
    held_BKS = _held(group, part.v_BKSH.shape[2], length_B + 1)
    visible_BKS = _sees_held(group, length_B[:, None, None], held_BKS)
    scores_BKGS = _scores(q_B1KGH[:, 0], part.k_BKHS, part.k_scale_BKS)
    scores_BKGS = jnp.where(visible_BKS[:, :, None], scores_BKGS, MASKED)
    weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1)
    o_BKGH = _weighed(weights_BKGS, part.v_BKSH, part.v_scale_BKS, q_B1KGH.dtype)
    return o_BKGH.astype(q_B1KGH.dtype)[:, None]


def _attend_several(
    part: HeadsCache,
    group: Heads,
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """o_BTKGH of T tokens that come after those in the cache, read tile by tile, then themselves.

    The ring may forget what the first of them see, so these are not in it yet.
    """
    q_BKGTH, slots = q_BTKGH.transpose(0, 2, 3, 1, 4), part.v_BKSH.shape[2]
    (*_, T, _), dtype = q_BKGTH.shape, q_BTKGH.dtype
    t_BT = length_B[:, None] + jnp.arange(T)
    held_BKS = _held(group, slots, length_B)
    tile = min(TILE, slots)
    filled = jnp.minimum(jnp.max(length_B), slots) if group.kind == DENSE else slots
    tiles = jnp.where(jnp.max(length_B) > 0, (filled + tile - 1) // tile, 0)

    def read(j: jax.Array, softmax: Softmax) -> Softmax:
        start = jnp.minimum(j * tile, slots - tile)  # the last tile may begin in the one before

        def cut(x: jax.Array | None, axis: int = 2) -> jax.Array | None:
            return None if x is None else lax.dynamic_slice_in_dim(x, start, tile, axis)

        held = lax.dynamic_slice_in_dim(held_BKS, start, tile, 2)
        held = jnp.where(start + jnp.arange(tile) >= j * tile, held, -1)[:, :, None]
        visible_BKTS = _sees_held(group, t_BT[:, None, :, None], held)
        k, v = cut(part.k_BKHS, 3), cut(part.v_BKSH)
        assert k is not None
        assert v is not None
        scores = _scores(q_BKGTH, k, cut(part.k_scale_BKS))
        scores = jnp.where(visible_BKTS[:, :, None], scores, MASKED)
        return softmax.over(scores, lambda p: _weighed(p, v, cut(part.v_scale_BKS), dtype))

    softmax = lax.fori_loop(0, tiles, read, Softmax.empty(q_BKGTH.shape))
    own = t_BT[:, None]
    visible = (own[..., None] >= own[:, :, None]) & sees(
        group.kind, group.offset_K1()[:, :, None], own[..., None], own[:, :, None]
    )
    k_BKHT, v_BKTH = k_BTKH.transpose(0, 2, 3, 1), v_BTKH.swapaxes(1, 2)
    scores = jnp.where(visible[:, :, None], _scores(q_BKGTH, k_BKHT, None), MASKED)
    softmax = softmax.over(scores, lambda p: _weighed(p, v_BKTH, None, dtype))
    return softmax.result(dtype)[0].transpose(0, 3, 1, 2, 4)


def _scores(q: jax.Array, k_BKHS: jax.Array, scale_BKS: jax.Array | None) -> jax.Array:
    """Scores of q_BKGH or q_BKGTH, in float32."""
    letters = "BKGH" if q.ndim == 4 else "BKGTH"
    scores = einsum_f32(f"{letters},BKHS->{letters[:-1]}S", q, k_BKHS)
    return scores if scale_BKS is None else scores * _between(scale_BKS, scores.ndim)


def _weighed(
    p: jax.Array, v_BKSH: jax.Array, scale_BKS: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """Values weighed by p_BKGS or p_BKGTS, in float32."""
    letters = "BKGS" if p.ndim == 4 else "BKGTS"
    p = p if scale_BKS is None else p * _between(scale_BKS, p.ndim)
    return einsum_f32(f"{letters},BKSH->{letters[:-1]}H", p.astype(dtype), v_BKSH)


def _between(scale_BKS: jax.Array, ndim: int) -> jax.Array:
    """Scales against scores: (B, K, 1, S) or (B, K, 1, 1, S)."""
    return scale_BKS.reshape(*scale_BKS.shape[:2], *(1,) * (ndim - 3), -1)


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


def _sees_held(group: Heads, t: jax.Array, held: jax.Array) -> jax.Array:
    """Whether the queries at positions t see what is held; (B, K, S) or (B, K, T, S)."""
    offset = group.offset_K1().reshape(-1, *(1,) * (held.ndim - 2))
    # The ring still holds the rest of the block that is being overwritten.
    return (held >= 0) & sees(group.kind, offset, t, jnp.maximum(held, 0))
