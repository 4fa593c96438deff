"""Causal grouped-query attention on TPUs, dense or after a pattern with an offset for each KV head.

The kernels are those of `jax.experimental.pallas.ops.tpu.splash_attention`; which tiles they visit
is arithmetic on the pattern, the offset and where a device's queries lie, so that the last two may
be traced and nothing grows with T x T. As a pattern's blocks are smaller than a good tile, the
distant keys of a head (sinks and stripe: a slice and a strided one) are laid before its keys in
natural order. Each key there is seen by one range of queries, which a mask function compares in
registers: masks are stored nowhere, tiles stay large, and pattern blocks of any size do, powers of
two best. A mask function sees no traced value but the positions of queries: where the stripe
begins rides in their upper bits. Scalar memory holds which tiles of keys each tile of queries
visits, of one head: 98 KB for 131,072 tokens with W = 1024 and s = 16
(`kernel_limits.metadata_bytes`). Heads with stripes run one after the other.

The library's public entry takes one table for the gradients of all keys. As distant keys are seen
by every later query and natural ones by a window, that table would be mostly empty, and its empty
steps take time: the library's inner functions are called instead, those gradients once for each
kind of key.

Heterogeneous context sharding: arXiv 2407.17678, patterns in `gqa_scaling.context_sharding`. The
kernels compile for v5e and v6e; they have not been timed on one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices import kernel_limits
from gqa_scaling.devices.kernel_limits import DENSE, LANES, NEVER, Walk, position_bits
from gqa_scaling.model.attention.operands import check_operands


def forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    kind: HeadPattern | None,
    offset_K: jax.Array,
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """On shards: causal attention of T queries to all S keys, in natural order.

    Returns o_BTKGH in q's dtype and lse_BTKG, the natural log of the sum of exponentials of scaled
    scores, float32. All heads are of one `kind` (static; None: dense) but for their offsets, int32,
    which are read where the kind has a stride. The queries are one or two equal runs of positions
    that begin at `starts`, int32, ascending multiples of a run's length: one run of all S = T
    positions, or the two parts that a device holds in zig-zag order (`layout.zigzag`).

    Any T: what lacks to whole tiles is padded. Softmax in float32, scores scaled by 1/sqrt(H);
    memory is O(S). `interpret` runs the kernels anywhere, slowly. Raises `ValueError` where the
    shapes do not fit each other or the tables would not fit the chip's scalar memory.
    """
    walk = _checked(q_BTKGH, k_BSKH, v_BSKH, kind, offset_K, starts)
    starts = jnp.asarray(starts, jnp.int32)
    block, G = walk.block, q_BTKGH.shape[3]

    def head(q: Any, k: Any, v: Any, residue: Any) -> tuple[jax.Array, jax.Array]:
        o_NTH, (lse_NT,) = kernels._splash_attention_forward(
            _rows(walk, starts, residue),
            q,
            _laid(k, walk, residue),
            _laid(v, walk, residue),
            segment_ids=None,
            sinks=None,
            block_sizes=kernels.BlockSizes(block, block, _part(block)),
            save_residuals=True,
            residual_checkpoint_name=None,
            mask_function=_mask(walk),
            interpret=interpret,
            **_PLAIN,
        )
        return o_NTH, lse_NT

    q = _queries(q_BTKGH * q_BTKGH.shape[-1] ** -0.5, walk)
    o, lse = _each_head(head, walk, offset_K, q, _heads(k_BSKH), _heads(v_BSKH))
    return _positions(o, G, walk), _positions(lse, G, walk)


def backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    o_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    do_BTKGH: jax.Array,
    kind: HeadPattern | None,
    offset_K: jax.Array,
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """On shards: dq_BTKGH in q's dtype, and dk_BSKH and dv_BSKH in float32 of all S keys, what
    these queries contribute. o and lse are of `forward`, and so is the rest."""
    walk = _checked(q_BTKGH, k_BSKH, v_BSKH, kind, offset_K, starts)
    starts = jnp.asarray(starts, jnp.int32)
    scale, G = q_BTKGH.shape[-1] ** -0.5, q_BTKGH.shape[3]
    delta_BTKG = jnp.sum(do_BTKGH.astype(jnp.float32) * o_BTKGH.astype(jnp.float32), axis=-1)
    layout = kernels.QKVLayout.HEAD_DIM_MINOR
    common = {"q_layout": layout, "k_layout": layout, "v_layout": layout, "interpret": interpret}

    def head(
        q: Any, do: Any, delta: Any, lse: Any, k: Any, v: Any, residue: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        k_laid, v_laid = _laid(k, walk, residue), _laid(v, walk, residue)
        dq = kernels._splash_attention_bwd_dq(
            *(q, k_laid, v_laid, None, None, lse, do, delta),
            bq=walk.block,
            bkv=walk.block,
            mask_info=_rows(walk, starts, residue),
            mask_function=_mask(walk),
            **common,
            **_PLAIN,
        )

        def of_keys(start: int, end: int, table: MaskInfo) -> list[jax.Array]:
            _, *dkv = kernels._splash_attention_bwd_dkv(
                *(q, k_laid[:, start:end], v_laid[:, start:end], None, None, lse, do, delta),
                bq=walk.block,
                bkv=walk.block,
                bkv_compute=_part(walk.block),
                mask_info=table,
                mask_function=_mask(walk, start),
                use_fused_bwd_kernel=False,
                **common,
                **_PLAIN,
            )
            return [x.astype(jnp.float32) for x in dkv]

        far, end = walk.far, walk.far + walk.near
        parts = [of_keys(far, end, _columns_near(walk, starts, residue))]
        if far:
            parts.insert(0, of_keys(0, far, _columns_far(walk, starts, residue)))
        key = jax.ShapeDtypeStruct(k.shape, jnp.float32)
        home = jax.linear_transpose(lambda x: _laid(x, walk, residue), key)
        dk, dv = (home(jnp.concatenate(x, axis=1))[0] for x in zip(*parts, strict=True))
        return dq, dk, dv

    queries = (q_BTKGH * scale, do_BTKGH, delta_BTKG, lse_BTKG)
    queries = [_queries(x, walk) for x in queries]
    dq, dk, dv = _each_head(head, walk, offset_K, *queries, _heads(k_BSKH), _heads(v_BSKH))
    dk, dv = (x.transpose(1, 2, 0, 3) for x in (dk, dv))
    return _positions(dq, G, walk) * scale, dk, dv


# --------------------------------------------------------------------------- what is visited


def _keys_seen(tiles: Any, kind: HeadPattern, block: int, near: int) -> tuple[Any, Any]:
    """For tiles of queries, told by where they begin, the first tile of natural keys that they see
    and one past the last."""
    first = (tiles // kind.block - kind.local + 1) * kind.block
    return first.clip(0) // block, ((tiles + block - 1) // block + 1).clip(None, near // block)


def _queries_seeing(tiles: Any, kind: HeadPattern, block: int, near: int) -> tuple[Any, Any]:
    """For each tile of natural keys how many tiles of queries end before it, and how many begin
    while it is in their window; `tiles` as in `_keys_seen`, ascending."""
    start = np.arange(0, near, block)
    until = ((start + block - 1) // kind.block + kind.local) * kind.block
    return (tiles[:, None] + block <= start).sum(0), (tiles[:, None] < until).sum(0)


def _since(n: Any, residue: Any, walk: Walk) -> jax.Array:
    """The position from which on queries see the n-th distant block: it has left their window.

    The stripe begins `residue` blocks after the sinks. Past the last block, after all queries.
    """
    b, w, sinks = walk.kind.block, walk.kind.local, walk.sinks
    if not walk.stripe:
        return jnp.where(n < sinks, (n + w) * b, NEVER)
    block = sinks + residue + (n - sinks) * walk.kind.stride
    return (jnp.where(n < sinks, n, block) + w) * b


def _tiles(walk: Walk, starts: jax.Array) -> jax.Array:
    """Where tiles of queries begin, ascending."""
    return (starts[:, None] + jnp.arange(0, walk.run, walk.block)).reshape(-1)


def _rows(walk: Walk, starts: jax.Array, residue: jax.Array) -> MaskInfo:
    """For each tile of queries the tiles of keys that it visits, distant ones first; the entries
    after them fetch what the next one needs first."""
    block, n = walk.block, walk.far // walk.block
    tiles = _tiles(walk, starts)
    far = (_far_since(walk, residue) < tiles[:, None] + block).sum(1, keepdims=True)
    first, end = _keys_seen(tiles[:, None], walk.kind, block, walk.near)
    step = jnp.arange(n + walk.near_rows)
    visits = jnp.where(step < far, step, n + first + step - far)
    busy = step < far + end - first
    visits = jnp.where(busy, visits, jnp.roll(visits[:, :1], -1, axis=0))
    return _table(visits, n + walk.near // block, busy, walk, starts, residue)


def _columns_near(walk: Walk, starts: jax.Array, residue: jax.Array) -> MaskInfo:
    """For each tile of natural keys the tiles of queries that visit it."""
    seen = _queries_seeing(_tiles(walk, starts), walk.kind, walk.block, walk.near)
    return _columns(*seen, walk.near_columns, walk, starts, residue)


def _columns_far(walk: Walk, starts: jax.Array, residue: jax.Array) -> MaskInfo:
    """For each tile of distant keys the tiles of queries that visit it."""
    tiles = _tiles(walk, starts)[:, None]
    first = (tiles + walk.block <= _far_since(walk, residue)).sum(0)
    return _columns(first, walk.rows, walk.rows, walk, starts, residue)


def _far_since(walk: Walk, residue: jax.Array) -> jax.Array:
    """The position from which on queries see some key of each tile of distant keys."""
    return _since(np.arange(0, walk.far, walk.block) // walk.kind.block, residue, walk)


def _columns(
    first: Any, end: Any, most: int, walk: Walk, starts: jax.Array, residue: jax.Array
) -> MaskInfo:
    """The tiles of queries from `first` up to `end`, below each other; the entries after them fetch
    nothing: what comes next is of another head."""
    step = jnp.arange(most)[:, None]
    visits = jnp.maximum(jnp.minimum(first + step, end - 1), 0)
    return _table(visits, walk.rows, step < end - first, walk, starts, residue)


def _table(
    visits: jax.Array, most: int, busy: jax.Array, walk: Walk, starts: jax.Array, residue: Any
) -> MaskInfo:
    """Of numbers below `most`, with the positions of the queries."""
    positions = starts[:, None] + jnp.arange(walk.rows * walk.block // walk.parts)
    if walk.stripe:
        positions += residue << position_bits(walk)
    return MaskInfo(
        visits.astype(_integer(most))[None],
        None,
        busy.astype(jnp.int8)[None],
        None,
        positions.reshape(-1).astype(jnp.int32),
    )


def _integer(most: int) -> np.dtype:
    """The smallest type for numbers below `most`."""
    return np.dtype(f"int{8 * kernel_limits.entry_bytes(most)}")


def _mask(walk: Walk, start: int = 0) -> Callable:
    """The mask function of a kernel whose keys begin at the place `start`: whether the queries of
    a `_table` see the keys at `place`."""
    kind, bits = walk.kind, position_bits(walk)

    def visible(q: jax.Array, place: jax.Array) -> jax.Array:
        place = place + start
        if kind == DENSE:
            return place <= q
        t = place - walk.far
        until = (_over(t, kind.block) + kind.local) * kind.block
        if not walk.far:
            return (t <= q) & (q < until)
        distant, n = place < walk.far, _over(place, kind.block)
        since = jnp.where(distant, _since(n, 0, walk), t)
        until = jnp.where(distant, NEVER, until)
        late = q
        if walk.stripe:  # queries move back by the residue, so that what depends on keys is static
            residue, q = q >> bits, q & (2**bits - 1)
            late = jnp.where(distant & (n >= walk.sinks), q - residue * kind.block, q)
        return (since <= late) & (q < until)

    return visible


def _over(x: jax.Array, n: int) -> jax.Array:
    """x // n for x >= 0; division of vectors is slow on a TPU, and `//` does not lower."""
    return x >> (n.bit_length() - 1) if n & (n - 1) == 0 else lax.div(x, n)


# ------------------------------------------------------------------------ around the kernels

_PLAIN = {
    "is_mqa": False,
    "mask_value": kernels.DEFAULT_MASK_VALUE,
    "attn_logits_soft_cap": None,
}


def _part(block: int) -> int:
    """Keys of a tile that a kernel works on at once."""
    return block // 2 if block > 512 and block % (2 * LANES) == 0 else block


def _checked(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    kind: HeadPattern | None,
    offset_K: jax.Array,
    starts: jax.Array,
) -> Walk:
    """The walk; what cannot be walked raises `ValueError`."""
    check_operands(q_BTKGH, k_BSKH, v_BSKH, kind, offset_K, starts)
    T, S, parts = q_BTKGH.shape[1], k_BSKH.shape[1], starts.size
    reason = kernel_limits.splash_limit(T, S, parts, (kind,))
    if reason:
        raise ValueError(f"splash {reason}: take a shorter context or another implementation")
    return kernel_limits.walk(T, parts, S, kind)


def _each_head(head: Callable, walk: Walk, offset_K: jax.Array, *xs: jax.Array) -> Any:
    """`head(*x, residue)` for each KV head x of xs, one after the other where their tables differ.

    xs begin with the KV heads, followed by batch, or batch and query heads; so do the results.
    """
    if not walk.stripe:
        out = head(*(x.reshape(-1, *x.shape[2:]) for x in xs), jnp.int32(0))
        return [x.reshape(len(xs[0]), -1, *x.shape[1:]) for x in out]
    residue_K = -(offset_K + walk.sinks) % walk.kind.stride
    return lax.map(lambda x: head(*x), (*xs, residue_K))


def _queries(x_BTKG: jax.Array, walk: Walk) -> jax.Array:
    """(K, B G, tiles of queries, ...), 0 past the end of a run."""
    B, _, K, G, *rest = x_BTKG.shape
    padding = walk.rows * walk.block // walk.parts - walk.run
    x = x_BTKG.reshape(B, walk.parts, walk.run, K, G, *rest)
    x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
    x = x.transpose(3, 0, 4, 1, 2, *range(5, x.ndim))
    return x.reshape(K, B * G, walk.rows * walk.block, *rest)


def _positions(x_KNT: jax.Array, G: int, walk: Walk) -> jax.Array:
    """The inverse of `_queries`."""
    K, N, _, *rest = x_KNT.shape
    x = x_KNT.reshape(K, N // G, G, walk.parts, -1, *rest)[:, :, :, :, : walk.run]
    x = x.transpose(1, 3, 4, 0, 2, *range(5, x.ndim))
    return x.reshape(N // G, walk.parts * walk.run, K, G, *rest)


def _heads(x_BSKH: jax.Array) -> jax.Array:
    return x_BSKH.transpose(2, 0, 1, 3)


def _laid(x_NSH: jax.Array, walk: Walk, residue: jax.Array) -> jax.Array:
    """A head's distant keys, then all in natural order, each padded by 0."""
    N, _, H = x_NSH.shape

    def padded(x: jax.Array, length: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, max(0, length - x.shape[1])), (0, 0)])

    parts = []
    if walk.far:
        b, stride, n = walk.kind.block, walk.kind.stride, walk.stripe
        far = x_NSH[:, : walk.sinks * b]
        if n:
            first, end = walk.sinks * b, (walk.sinks + n * stride) * b
            stripes = padded(x_NSH, end)[:, first:end].reshape(N, n, stride, b, H)
            stripe = lax.dynamic_index_in_dim(stripes, residue, axis=2, keepdims=False)
            far = jnp.concatenate([far, stripe.reshape(N, n * b, H)], axis=1)
        parts.append(padded(far, walk.far))
    return jnp.concatenate([*parts, padded(x_NSH, walk.near)], axis=1)
