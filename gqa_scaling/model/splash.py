"""Causal grouped-query attention on TPUs, dense or after a pattern for each KV head.

The kernels are those of `jax.experimental.pallas.ops.tpu.splash_attention`; which tiles they visit
is built here from the pattern, with no work that grows with T x T. As a pattern's blocks are
smaller than a good tile, the distant keys of a head (sinks and stripe: strided slices) are laid
before its keys in natural order. Each key there is seen by one range of queries, which a mask
function compares in registers: masks are stored nowhere, tiles stay large, and pattern blocks of
any size do, powers of two best. Scalar memory holds which tiles of keys each tile of queries
visits: 98 KB for 131,072 tokens with W = 1024 and s = 16 (`metadata_bytes`).

The library's public entry takes one table for the gradients of all keys. As distant keys are seen
by every later query and natural ones by a window, that table would be mostly empty, and its empty
steps take time: the library's inner functions are called instead, those gradients once for each
kind of key.

Heterogeneous context sharding: arXiv 2407.17678, patterns in `gqa_scaling.context_sharding`. The
kernels compile for v5e and v6e; they have not been timed on one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from gqa_scaling.context_sharding import (
    HeadPattern,
    LayerPattern,
    distant_before,
    distant_block,
)
from gqa_scaling.model.operands import check_operands

_LANES = 128
_NEVER = 2**30  # a position after every query
SCALAR_MEMORY = 2**20 - 2**16  # bytes of a TPU core, less some for the compiler


def splash_attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    pattern: LayerPattern,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention after a pattern for each KV head. Returns o_BTKGH in q's dtype.

    `pattern` (static) has one entry for each KV head, None for a dense one; heads with the same
    entry are computed together. S is T, any T: what lacks to whole tiles is padded. Softmax in
    float32, scores scaled by 1/sqrt(H); memory is O(T), forward and backward. `interpret` runs the
    kernels anywhere, slowly. Raises `ValueError` where the shapes do not fit each other or the
    tables would not fit the chip's scalar memory.
    """
    check_operands(q_BTKGH, k_BSKH, v_BSKH, pattern)
    T = q_BTKGH.shape[1]
    kinds: dict[HeadPattern | None, list[int]] = {}
    for h, head in enumerate(pattern):
        kinds.setdefault(_simplest(head, T), []).append(h)
    outputs = []
    for head, heads in kinds.items():
        needed = metadata_bytes(T, head)
        if needed > SCALAR_MEMORY:
            raise ValueError(
                f"T={T} needs {needed:,} bytes of tables for {head or 'a dense head'}, but the "
                f"scalar memory of a TPU core has room for {SCALAR_MEMORY:,}: take a shorter "
                "context or a sparser pattern"
            )
        qkv = (_heads(x, heads) for x in (q_BTKGH, k_BSKH, v_BSKH))
        outputs.append(_attend(*qkv, head, interpret))
    order = np.argsort([h for heads in kinds.values() for h in heads])
    return _heads(jnp.concatenate(outputs, axis=2), order.tolist())


def metadata_bytes(T: int, head: HeadPattern | None) -> int:
    """Bytes of scalar memory for one head's tables, in the kernel that needs most.

    The compiler rounds the rows of a table up to 128 entries and their number to 8.
    """

    def held(table: np.ndarray) -> int:
        return _up(table.shape[1], 8) * _up(table.shape[2], _LANES) * table.itemsize

    walk = _walk(T, _simplest(head, T))
    tables = [x for x in (walk.rows, walk.columns_far, walk.columns_near) if x is not None]
    return max(held(x.data_next) + held(x.block_mask) for x in tables)


def _simplest(head: HeadPattern | None, T: int) -> HeadPattern | None:
    """None also for a pattern that hides nothing from T queries."""
    return None if head is None or head.window >= T or head.stride == 1 else head


def _heads(x_BTK: jax.Array, heads: list[int]) -> jax.Array:
    """Some KV heads, in any order, without a gather."""
    if heads == list(range(x_BTK.shape[2])):
        return x_BTK
    return jnp.concatenate([x_BTK[:, :, h : h + 1] for h in heads], axis=2)


# --------------------------------------------------------------------------- what is visited


class _Walk(NamedTuple):
    """How T queries walk over the keys of one head: `far` places for distant keys, then natural
    ones, both whole tiles of `block`."""

    block: int
    sinks: int  # distant blocks
    stripe: int
    far: int
    near: int
    rows: MaskInfo  # tiles of keys for each tile of queries
    columns_far: MaskInfo | None  # tiles of queries for each tile of distant keys
    columns_near: MaskInfo


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _block(T: int, head: HeadPattern | None) -> int:
    """Positions on a tile's side. A step of the grid has a fixed cost, also where it does nothing:
    large tiles for dense heads, whose grid is half empty."""
    most = 512 if head is not None or T <= 4096 else 1024
    return _up(-(-T // -(-T // most)), _LANES)


@functools.lru_cache(maxsize=1024)
def _walk(T: int, head: HeadPattern | None) -> _Walk:
    block = _block(T, head)
    near = _up(T, block)
    sinks = stripe = far = 0
    if head is not None:
        beyond = max(0, -(-T // head.block) - head.local)  # blocks that leave some query's window
        sinks = min(head.sinks, beyond)
        stripe = distant_before(beyond, head.stride, head.offset, head.sinks) - sinks
        far = _up((sinks + stripe) * head.block, block)
    live = _live(*_seen(np.arange(far + near), head, far, sinks + stripe), block, near)
    n = far // block

    def info(table: tuple[np.ndarray, np.ndarray]) -> MaskInfo:
        visits, busy = table
        return MaskInfo(visits[None], None, busy[None], None, None)

    return _Walk(
        *(block, sinks, stripe, far, near),
        rows=info(_rows(live)),
        columns_far=info(_columns(live[:, :n])) if far else None,
        columns_near=info(_columns(live[:, n:])),
    )


def _seen(place: Any, head: HeadPattern | None, far: int, distant: int) -> tuple[Any, Any]:
    """The queries that see the key at each place: the first, and one past the last (None: all).

    A distant key is seen from where its block has left the window, by all; before that it is in
    its natural place. Both ends rise with the place in either part.
    """
    if head is None:
        return place, None
    b, w = head.block, head.local
    np_ = np if isinstance(place, np.ndarray) else jnp
    block = _over(place, b)
    left = (distant_block(block, head.stride, head.offset, head.sinks) + w) * b
    t = place - far
    if not far:
        return t, (_over(t, b) + w) * b
    since = np_.where(place < far, np_.where(block < distant, left, _NEVER), t)
    return since, np_.where(place < far, _NEVER, (_over(t, b) + w) * b)


def _over(x: Any, n: int) -> Any:
    """x // n for x >= 0; division of vectors is slow on a TPU, and `//` does not lower."""
    if n & (n - 1) == 0:
        return x >> (n.bit_length() - 1)
    return x // n if isinstance(x, np.ndarray) else lax.div(x, n)


def _live(since: np.ndarray, until: np.ndarray | None, block: int, T: int) -> np.ndarray:
    """Whether some query of tile i sees some key of tile j, at [i, j]."""
    start = np.arange(0, T, block)
    first = since.reshape(-1, block)
    end = np.full_like(first, _NEVER) if until is None else until.reshape(-1, block)
    out = np.empty((len(start), len(first)), bool)
    for j in range(len(first)):
        begun = np.searchsorted(first[j], start + block)  # keys seen before the tile's end
        out[:, j] = (begun > 0) & (end[j][np.maximum(begun, 1) - 1] > start)
    return out


def _rows(live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row its live columns, side by side, and which entries those are. The others fetch
    what the next row needs first."""
    counts = live.sum(axis=1)
    steps = np.arange(counts.max())
    busy = steps < counts[:, None]
    order = np.argsort(~live, axis=1, kind="stable")[:, : len(steps)]
    return _small(np.where(busy, order, np.roll(order[:, :1], -1, axis=0))), busy.astype(np.int8)


def _columns(live: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each column its live rows, below each other, and which entries those are. The others
    fetch nothing: what comes next is of another head."""
    visits, busy = _rows(live.T)
    last = np.take_along_axis(visits, busy.sum(axis=1, keepdims=True, dtype=int) - 1, axis=1)
    return np.where(busy, visits, last).T.copy(), busy.T.copy()


def _small(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int8 if x.max() < 2**7 else np.int16 if x.max() < 2**15 else np.int32)


# -------------------------------------------------------------------------------- the kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    head: HeadPattern | None,
    interpret: bool,
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, head, interpret)[0]


def _forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    head: HeadPattern | None,
    interpret: bool,
) -> tuple[jax.Array, Any]:
    walk = _walk(q_BTKGH.shape[1], head)
    block = walk.block
    o_NTH, (lse_NT,) = kernels._splash_attention_forward(
        _with_positions(walk.rows, walk),
        _queries(q_BTKGH * q_BTKGH.shape[-1] ** -0.5, walk),
        _keys(k_BSKH, head, walk),
        _keys(v_BSKH, head, walk),
        segment_ids=None,
        sinks=None,
        block_sizes=kernels.BlockSizes(block, block, _part(block)),
        save_residuals=True,
        residual_checkpoint_name=None,
        mask_function=_visible(head, walk),
        interpret=interpret,
        **_PLAIN,
    )
    o_BTKGH = _positions(o_NTH, q_BTKGH.shape)
    return o_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse_NT)


def _backward(
    head: HeadPattern | None, interpret: bool, residuals: Any, do_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse_NT = residuals
    scale = q_BTKGH.shape[-1] ** -0.5
    walk = _walk(q_BTKGH.shape[1], head)
    delta_BTKG = jnp.sum(do_BTKGH.astype(jnp.float32) * o_BTKGH.astype(jnp.float32), axis=-1)
    q, do = _queries(q_BTKGH * scale, walk), _queries(do_BTKGH, walk)
    delta = _queries(delta_BTKG[..., None], walk)[..., 0]
    k, pull_k = jax.vjp(lambda x: _keys(x, head, walk), k_BSKH)
    v, pull_v = jax.vjp(lambda x: _keys(x, head, walk), v_BSKH)
    layout = kernels.QKVLayout.HEAD_DIM_MINOR
    common = {"q_layout": layout, "k_layout": layout, "v_layout": layout} | _PLAIN

    dq = kernels._splash_attention_bwd_dq(
        *(q, k, v, None, None, lse_NT, do, delta),
        bq=walk.block,
        bkv=walk.block,
        mask_info=_with_positions(walk.rows, walk),
        mask_function=_visible(head, walk),
        interpret=interpret,
        **common,
    )

    def of_keys(start: int, end: int, table: MaskInfo) -> tuple[jax.Array, jax.Array]:
        _, dk, dv = kernels._splash_attention_bwd_dkv(
            *(q, k[:, start:end], v[:, start:end], None, None, lse_NT, do, delta),
            bq=walk.block,
            bkv=walk.block,
            bkv_compute=_part(walk.block),
            mask_info=_with_positions(table, walk),
            mask_function=_visible(head, walk, start),
            use_fused_bwd_kernel=False,
            interpret=interpret,
            **common,
        )
        return dk, dv

    dk, dv = of_keys(walk.far, walk.far + walk.near, walk.columns_near)
    if walk.columns_far is not None:
        dk_far, dv_far = of_keys(0, walk.far, walk.columns_far)
        dk, dv = (jnp.concatenate(x, axis=1) for x in ((dk_far, dk), (dv_far, dv)))
    return _positions(dq, q_BTKGH.shape) * scale, *pull_k(dk), *pull_v(dv)


_attend.defvjp(_forward, _backward)

_PLAIN = {
    "is_mqa": False,
    "mask_value": kernels.DEFAULT_MASK_VALUE,
    "attn_logits_soft_cap": None,
}


def _part(block: int) -> int:
    """Keys of a tile that a kernel works on at once."""
    return block // 2 if block > 512 and block % (2 * _LANES) == 0 else block


def _visible(head: HeadPattern | None, walk: _Walk, start: int = 0) -> Callable:
    """The mask function of a kernel whose keys begin at the place `start`."""

    def visible(q: jax.Array, place: jax.Array) -> jax.Array:
        since, until = _seen(place + start, head, walk.far, walk.sinks + walk.stripe)
        return since <= q if until is None else (since <= q) & (q < until)

    return visible


def _with_positions(info: MaskInfo, walk: _Walk) -> MaskInfo:
    return info._replace(q_sequence=jnp.arange(walk.near, dtype=jnp.int32))


def _queries(x_BTKGH: jax.Array, walk: _Walk) -> jax.Array:
    """x_NTH, N = B K G, 0 past T."""
    B, T, K, G, H = x_BTKGH.shape
    x = jnp.pad(x_BTKGH, [(0, 0), (0, walk.near - T), (0, 0), (0, 0), (0, 0)])
    return x.transpose(0, 2, 3, 1, 4).reshape(B * K * G, walk.near, H)


def _positions(x_NTH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_queries`."""
    B, T, K, G, H = shape
    return x_NTH.reshape(B, K, G, -1, H).transpose(0, 3, 1, 2, 4)[:, :T]


def _keys(x_BSKH: jax.Array, head: HeadPattern | None, walk: _Walk) -> jax.Array:
    """x_NSH, N = B K: the head's distant keys, then all in natural order, each padded by 0."""
    B, S, K, H = x_BSKH.shape
    x = x_BSKH.transpose(0, 2, 1, 3).reshape(B * K, S, H)
    parts = []
    if head is not None and walk.far:
        b, sinks, n = head.block, walk.sinks, walk.stripe
        parts.append(x[:, : sinks * b])
        if n:
            first = distant_block(head.sinks, head.stride, head.offset, head.sinks)
            end = (first + n * head.stride) * b
            stripes = jnp.pad(x, [(0, 0), (0, max(0, end - S)), (0, 0)])[:, first * b : end]
            stripes = stripes.reshape(B * K, n, head.stride, b, H)[:, :, 0]
            parts.append(stripes.reshape(B * K, n * b, H))
        parts.append(jnp.zeros((B * K, walk.far - (sinks + n) * b, H), x.dtype))
    return jnp.concatenate([*parts, jnp.pad(x, [(0, 0), (0, walk.near - S), (0, 0)])], axis=1)
