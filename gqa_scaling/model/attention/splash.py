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
from gqa_scaling.model.attention.shard import Operands, Upstream, distant_of, padded, positions


def forward(
    kind: HeadPattern, x: Operands, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `shard`; what the kernels cannot take, `kernel_limits.splash_limit` names."""
    walk = _walk(x, kind)
    block, G = walk.block, x.q_BTKGH.shape[3]

    def head(queries: Any, k: Any, v: Any, residue: Any) -> tuple[jax.Array, jax.Array]:
        (q,) = queries
        found: Any = kernels._splash_attention_forward(
            _rows(walk, x.starts, residue),
            q,
            _laid(k, walk, residue),
            _laid(v, walk, residue),
            segment_ids=None,
            sinks=None,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            is_mqa=False,
            block_sizes=kernels.BlockSizes(block, block, _part(block)),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_mask(walk),
            attn_logits_soft_cap=None,
            interpret=interpret,
        )
        o_NTH, (lse_NT,) = found
        return o_NTH, lse_NT

    o, lse = _each_head(head, walk, x, [x.q_BTKGH * x.q_BTKGH.shape[-1] ** -0.5])
    return _positions(o, G, walk), _positions(lse, G, walk)


def backward(
    kind: HeadPattern, x: Operands, y: Upstream, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `shard`."""
    walk = _walk(x, kind)
    scale, G = x.q_BTKGH.shape[-1] ** -0.5, x.q_BTKGH.shape[3]

    def head(queries: Any, k: Any, v: Any, residue: Any) -> tuple[jax.Array, ...]:
        q, do, lse, delta = queries
        k_laid, v_laid = _laid(k, walk, residue), _laid(v, walk, residue)
        both: dict[str, Any] = {  # of the gradients of queries and of keys
            "segment_ids": None,
            "sinks": None,
            "logsumexp": lse,
            "do": do,
            "di": delta,
            "bq": walk.block,
            "bkv": walk.block,
            "is_mqa": False,
            "mask_value": kernels.DEFAULT_MASK_VALUE,
            "attn_logits_soft_cap": None,
            "q_layout": kernels.QKVLayout.HEAD_DIM_MINOR,
            "k_layout": kernels.QKVLayout.HEAD_DIM_MINOR,
            "v_layout": kernels.QKVLayout.HEAD_DIM_MINOR,
            "interpret": interpret,
        }
        dq = kernels._splash_attention_bwd_dq(
            q,
            k_laid,
            v_laid,
            mask_info=_rows(walk, x.starts, residue),
            mask_function=_mask(walk),
            **both,
        )

        def of_keys(start: int, end: int, table: MaskInfo) -> list[jax.Array]:
            _, *dkv = kernels._splash_attention_bwd_dkv(
                q,
                k_laid[:, start:end],
                v_laid[:, start:end],
                bkv_compute=_part(walk.block),
                mask_info=table,
                use_fused_bwd_kernel=False,
                mask_function=_mask(walk, start),
                **both,
            )
            return [x.astype(jnp.float32) for x in dkv]

        far, end = walk.far, walk.far + walk.near
        parts = [of_keys(far, end, _columns_near(walk, x.starts, residue))]
        if far:
            parts.insert(0, of_keys(0, far, _columns_far(walk, x.starts, residue)))
        key = jax.ShapeDtypeStruct(k.shape, jnp.float32)
        home: Any = jax.linear_transpose(lambda x: _laid(x, walk, residue), key)
        dk, dv = (home(jnp.concatenate(x, axis=1))[0] for x in zip(*parts, strict=True))
        return dq, dk, dv

    of_queries = [x.q_BTKGH * scale, y.do_BTKGH, y.lse_BTKG, y.delta_BTKG()]
    dq, dk, dv = _each_head(head, walk, x, of_queries)
    dk, dv = (x.transpose(1, 2, 0, 3) for x in (dk, dv))
    return _positions(dq, G, walk) * scale, dk, dv


# --------------------------------------------------------------------------- what is visited


def _since(n: Any, residue: Any, walk: Walk) -> jax.Array:
    """The position from which on queries see the n-th distant block: it has left their window.

    The stripe begins `residue` blocks after the sinks. Past the last block, after all queries.
    """
    b, w, sinks = walk.kind.block, walk.kind.local, walk.sinks
    if walk.kind.stride is None or not walk.stripe:
        return jnp.where(n < sinks, (n + w) * b, NEVER)
    block = sinks + residue + (n - sinks) * walk.kind.stride
    return (jnp.where(n < sinks, n, block) + w) * b


def _tiles(walk: Walk, starts: jax.Array) -> jax.Array:
    """Where tiles of queries begin, ascending."""
    return positions(starts, walk.rows, walk.block)


def _rows(walk: Walk, starts: jax.Array, residue: jax.Array) -> MaskInfo:
    """For each tile of queries the tiles of keys that it visits, distant ones first; the entries
    after them fetch what the next one needs first."""
    block, n = walk.block, walk.far // walk.block
    tiles = _tiles(walk, starts)[:, None]
    far = (_far_since(walk, residue) < tiles + block).sum(1, keepdims=True)
    first, end = walk.keys_seen(tiles)
    step = jnp.arange(n + walk.near_rows)
    visits = jnp.where(step < far, step, n + first + step - far)
    busy = step < far + end - first
    visits = jnp.where(busy, visits, jnp.roll(visits[:, :1], -1, axis=0))
    return _table(visits, n + walk.near // block, busy, walk, starts, residue)


def _columns_near(walk: Walk, starts: jax.Array, residue: jax.Array) -> MaskInfo:
    """For each tile of natural keys the tiles of queries that visit it: from those that end after
    it begins to those that begin while some query has it in its window."""
    tiles, keys = _tiles(walk, starts)[:, None], np.arange(0, walk.near, walk.block)
    first, end = (tiles + walk.block <= keys).sum(0), (tiles < walk.left_by(keys)).sum(0)
    return _columns(first, end, walk.near_columns, walk, starts, residue)


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
    queries = positions(starts, walk.rows * walk.block)
    if walk.stripe:
        queries += residue << position_bits(walk)
    return MaskInfo(
        data_next=visits.astype(f"int{8 * kernel_limits.entry_bytes(most)}")[None],
        mask_next=None,
        block_mask=busy.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=queries.astype(jnp.int32),  # type: ignore[arg-type]  # kernels take any array
    )


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


def _part(block: int) -> int:
    """Keys of a tile that a kernel works on at once."""
    return block // 2 if block > 512 and block % (2 * LANES) == 0 else block


def _walk(x: Operands, kind: HeadPattern) -> Walk:
    return kernel_limits.walk(x.q_BTKGH.shape[1], len(x.starts), x.k_BSKH.shape[1], kind)


def _each_head(head: Callable, walk: Walk, x: Operands, queries_BTKG: list[jax.Array]) -> Any:
    """`head(queries, keys, values, residue)` for each KV head, one after the other where their
    tables differ, otherwise at once, with all heads in the first axis.

    Queries are (B G, T, ...), keys and values (B, S, H); results begin with the KV heads.
    """
    keys, values = (each.transpose(2, 0, 1, 3) for each in (x.k_BSKH, x.v_BSKH))
    arrays = [_queries(each, walk) for each in queries_BTKG], keys, values
    if walk.stripe:
        residue_K = x.residue_K(walk.kind)
        return lax.map(lambda xs: head(*xs), (*arrays, residue_K))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
    return [x.reshape(len(keys), -1, *x.shape[1:]) for x in head(*flat, jnp.int32(0))]


def _queries(x_BTKG: jax.Array, walk: Walk) -> jax.Array:
    """(K, B G, tiles of queries, ...), 0 past the end of a run."""
    B, _, K, G, *rest = x_BTKG.shape
    padding = walk.rows * walk.block // walk.parts - walk.run
    x = x_BTKG.reshape(B, walk.parts, walk.run, K, G, *rest)
    x = padded(x, 2, after=padding).transpose(3, 0, 4, 1, 2, *range(5, x.ndim))
    return x.reshape(K, B * G, walk.rows * walk.block, *rest)


def _positions(x_KNT: jax.Array, G: int, walk: Walk) -> jax.Array:
    """The inverse of `_queries`."""
    K, N, _, *rest = x_KNT.shape
    x = x_KNT.reshape(K, N // G, G, walk.parts, -1, *rest)[:, :, :, :, : walk.run]
    x = x.transpose(1, 3, 4, 0, 2, *range(5, x.ndim))
    return x.reshape(N // G, walk.parts * walk.run, K, G, *rest)


def _laid(x_NSH: jax.Array, walk: Walk, residue: jax.Array) -> jax.Array:
    """A head's distant keys, then all in natural order, each padded by 0."""
    near = padded(x_NSH, 1, after=walk.near - x_NSH.shape[1])
    if not walk.far:
        return near
    far = distant_of(x_NSH, walk.kind, residue)
    return jnp.concatenate([padded(far, 1, after=walk.far - far.shape[1]), near], axis=1)
