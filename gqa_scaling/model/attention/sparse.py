"""Causal attention in which each KV head reads a window and its own stripe of distant key blocks.

Heterogeneous context sharding (arXiv 2407.17678; patterns in `gqa_scaling.context_sharding`), in
XLA on any platform, without gathers. The distant keys of a KV head, its sinks and its stripe, are a
slice and a strided slice of the keys, taken once; heads that differ in their offsets alone share one
computation. A row of queries reads its windows, overlapping slices side by side, then walks over
tiles of distant keys as far as it sees any, in one softmax. A distant key counts for the queries
whose window has left it, so that none counts twice. The queries of a large block are cut into several
windows, so that no tile has as many scores as the square of a block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqa_scaling.context_sharding import HeadPattern, distant_before, distant_block
from gqa_scaling.devices.kernel_limits import NEVER, most_distant
from gqa_scaling.model.attention.shard import (
    MASKED,
    Operands,
    Upstream,
    distant_of,
    padded,
    positions,
)
from gqa_scaling.model.attention.tiles import Softmax, natural, rows_of
from gqa_scaling.model.einsum import einsum_f32

_QUERIES = 128  # of a window, at most, where blocks are larger
_SCORES = 512 * 512 * 2  # computed at once: enough for all cores, and they stay in the cache


class _Tiling(NamedTuple):
    """How the queries of a device walk over the keys of one kind of head, in positions."""

    window: int  # queries that share a window of keys
    row: int  # queries of several windows, which share tiles of distant keys
    near: int  # keys of a window
    far: int  # distant keys: whole tiles
    side: int  # keys of a tile


class _Keys(NamedTuple):
    """Keys or values of all heads, or their gradients: distant ones apart from those for windows."""

    far_BKSH: jax.Array
    near_BKSH: jax.Array


def _tiling(x: Operands, kind: HeadPattern, most: int) -> _Tiling:
    (B, T, K, G, _), S, block, runs = x.q_BTKGH.shape, x.k_BSKH.shape[1], kind.block, len(x.starts)
    if runs > 1 and T // runs % block:
        raise ValueError(
            f"a context axis of {S // T} cuts {S} positions into parts of {T // runs}, which must "
            f"be a multiple of the pattern's block={block}"
        )

    def queries(unit: int, most: int) -> int:
        """The largest multiple of `unit` up to `most` that fits the queries, at least one; no row
        may reach from one run into the next."""
        n = max(1, min(most, T) // unit)
        return unit * next(m for m in range(n, 0, -1) if runs == 1 or T // runs % (m * unit) == 0)

    window = queries(block, 64 if G >= 4 else 128)
    if block > _QUERIES:
        part = max(n for n in range(1, _QUERIES + 1) if block % n == 0)
        window = part if part > _QUERIES // 4 else block  # a prime number has no parts to work with
    near = (kind.local - 1) * block + max(block, window)
    row = queries(window, most // (B * K * G * near))
    blocks = sum(most_distant(kind, S))
    tiles = max(1, min(blocks, blocks * block // 128))
    side = -(-blocks // tiles) * block
    far = -(-blocks * block // side) * side if blocks else 0
    return _Tiling(window, row, near, far, side)


def _laid(x_BSKH: jax.Array, residue_K: jax.Array, kind: HeadPattern, t: _Tiling) -> _Keys:
    """Keys or values by their use; 0 where there is none: before the first position, as far as a
    window reaches, and at the end."""
    x = x_BSKH.transpose(0, 2, 1, 3)
    near = padded(x, 2, before=t.near - t.window, after=-x.shape[2] % t.row)
    heads = [distant_of(x[:, h], kind, residue_K[h]) for h in range(x.shape[1])]
    far = jnp.stack(heads, axis=1)
    return _Keys(padded(far, 2, after=t.far - far.shape[2]), near)


def _windows(near_BKSH: jax.Array, start: Any, t: _Tiling) -> jax.Array:
    """The windows of the row of queries that begins at `start`: (B, K, row / window, near, H)."""
    x = lax.dynamic_slice_in_dim(near_BKSH, start, t.near - t.window + t.row, axis=2)
    return jnp.stack([x[:, :, at : at + t.near] for at in range(0, t.row, t.window)], axis=2)


def _overlaid(dx: jax.Array, t: _Tiling) -> jax.Array:
    """The gradients of `_windows`, added where they overlap."""
    B, K, _, _, H = dx.shape
    whole = jax.ShapeDtypeStruct((B, K, t.near - t.window + t.row, H), dx.dtype)
    return jax.linear_transpose(lambda x: _windows(x, 0, t), whole)(dx)[0]


def _near_visible(start: jax.Array, G: int, kind: HeadPattern, t: _Tiling) -> jax.Array:
    """Which keys of its window a query sees: (row / window, G window, near)."""
    query = np.tile(np.arange(t.window), G).reshape(-1, 1)
    key = np.arange(t.near) - (t.near - t.window)  # both from the first query of the window on
    first = start + jnp.arange(0, t.row, t.window)[:, None, None]
    there = first + key >= 0
    if t.window < kind.block:  # the window begins somewhere in a block, which it does not leave
        there &= first % kind.block + key >= (1 - kind.local) * kind.block
        return there & (key <= query)
    return there & (key <= query) & (query // kind.block - key // kind.block < kind.local)


def _far_visible(start: jax.Array, since_KS: jax.Array, G: int, t: _Tiling) -> jax.Array:
    """Which distant keys, each seen `since` a position, a query sees: (K, G row, side)."""
    windows = np.arange(t.row).reshape(-1, 1, t.window)
    query = np.broadcast_to(windows, (len(windows), G, t.window)).reshape(-1, 1)
    return since_KS[:, None] <= start + query


def _since(offset_K: jax.Array, kind: HeadPattern, t: _Tiling) -> jax.Array:
    """For each head and distant key the position from which on queries see it, (K, far)."""
    n = jnp.broadcast_to(jnp.arange(t.far // kind.block), (len(offset_K), t.far // kind.block))
    j = distant_block(n, kind.stride, offset_K[:, None], kind.sinks)
    since = (j + kind.local) * kind.block
    if kind.stride is None:  # nothing follows the sinks but what fills the last tile
        since = jnp.where(n < kind.sinks, since, NEVER)
    return jnp.repeat(since, kind.block, axis=1)


def _far_tiles(start: jax.Array, offset_K: jax.Array, kind: HeadPattern, t: _Tiling) -> jax.Array:
    """How many tiles of distant keys the row of queries that begins at `start` sees any of."""
    begun = -(-(start + t.row) // kind.block)  # blocks up to that of the last query
    gone = jnp.maximum(0, begun - kind.local)  # blocks before its window
    blocks = distant_before(gone, kind.stride, offset_K, kind.sinks).max()
    return jnp.minimum(-(-blocks * kind.block // t.side), t.far // t.side)


def _cut(x: jax.Array, n: jax.Array, t: _Tiling, axis: int = 2) -> jax.Array:
    """The n-th tile of distant keys."""
    return lax.dynamic_slice_in_dim(x, n * t.side, t.side, axis)


def least_scores(kind: HeadPattern, x: Operands, most: int) -> int:
    """See `turns`."""
    G, t = x.q_BTKGH.shape[3], _tiling(x, kind, 0)
    return G * t.row * max(t.near, t.side)


def forward(kind: HeadPattern, x: Operands, most: int = _SCORES) -> tuple[jax.Array, jax.Array]:
    """See `shard`. Softmax over the window, then over one tile of distant keys after the other."""
    T, _, G, H = x.q_BTKGH.shape[1:]
    t, dtype, offset_K = _tiling(x, kind, most), x.q_BTKGH.dtype, x.offset_K
    k, v = (_laid(keys, x.residue_K(kind), kind, t) for keys in (x.k_BSKH, x.v_BSKH))
    since_KS = _since(offset_K, kind, t)
    q_rows = rows_of(x.q_BTKGH * H**-0.5, t.row, t.window)

    def seen(
        softmax: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
    ) -> Softmax:
        scores = jnp.where(visible, einsum_f32("...qh,...sh->...qs", q, k), MASKED)
        return softmax.over(scores, lambda p: einsum_f32("...qs,...sh->...qh", p.astype(dtype), v))

    def row(x: Any) -> tuple[jax.Array, jax.Array]:
        start, q = x
        near = _windows(k.near_BKSH, start, t), _windows(v.near_BKSH, start, t)
        softmax = seen(Softmax.empty(q.shape), q, *near, _near_visible(start, G, kind, t))
        q = _joined(q)

        def tile(n: jax.Array, softmax: Softmax) -> Softmax:
            visible = _far_visible(start, _cut(since_KS, n, t, axis=1), G, t)
            return seen(softmax, q, _cut(k.far_BKSH, n, t), _cut(v.far_BKSH, n, t), visible)

        softmax = jax.tree.map(_joined, softmax)
        if t.far:
            softmax = lax.fori_loop(0, _far_tiles(start, offset_K, kind, t), tile, softmax)
        return softmax.result(dtype)

    o_rows, lse_rows = lax.map(row, (positions(x.starts, len(q_rows), t.row), q_rows))
    o_rows, lse_rows = o_rows.reshape(q_rows.shape), lse_rows.reshape(q_rows.shape[:-1])
    return natural(o_rows, T, G), natural(lse_rows, T, G)


def backward(
    kind: HeadPattern, x: Operands, y: Upstream, most: int = _SCORES
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `shard`. Gradients of windows and of distant keys are apart until all are summed."""
    (T, _, G, H), dtype = x.q_BTKGH.shape[1:], x.q_BTKGH.dtype
    t, offset_K = _tiling(x, kind, most), x.offset_K

    def laid(x_BSKH: jax.Array) -> _Keys:
        return _laid(x_BSKH, x.residue_K(kind), kind, t)

    k, v, since_KS = laid(x.k_BSKH), laid(x.v_BSKH), _since(offset_K, kind, t)
    delta_BTKG = einsum_f32("BTKGH,BTKGH->BTKG", y.do_BTKGH, y.o_BTKGH)
    queries = x.q_BTKGH * H**-0.5, y.do_BTKGH, delta_BTKG, y.lse_BTKG
    rows = tuple(rows_of(each, t.row, t.window) for each in queries)

    def step(x: Any, k: jax.Array, v: jax.Array, visible: jax.Array) -> Any:
        """Gradients of one tile: of queries, with H before positions, of keys and of values."""
        q, do, delta, lse = x
        s = jnp.where(visible.mT, einsum_f32("...sh,...qh->...sq", k, q), MASKED)
        p = jnp.exp(s - lse[..., None, :])
        ds = p * (einsum_f32("...sh,...qh->...sq", v, do) - delta[..., None, :])
        ds, p = ds.astype(dtype), p.astype(dtype)
        dk = einsum_f32("...sq,...qh->...sh", ds, q)
        dv = einsum_f32("...sq,...qh->...sh", p, do)
        return einsum_f32("...sh,...sq->...hq", k, ds), dk, dv

    def add(x: jax.Array, dx: jax.Array, start: jax.Array) -> jax.Array:
        dx += lax.dynamic_slice_in_dim(x, start, dx.shape[2], axis=2)
        return lax.dynamic_update_slice_in_dim(x, dx, start, axis=2)

    def row(carry: tuple[_Keys, _Keys], x: Any) -> tuple[tuple[_Keys, _Keys], jax.Array]:
        (k_sum, v_sum), (start, x) = carry, x
        near = _windows(k.near_BKSH, start, t), _windows(v.near_BKSH, start, t)
        dq, dk, dv = step(x, *near, _near_visible(start, G, kind, t))
        dk_near = add(k_sum.near_BKSH, _overlaid(dk, t), start)
        dv_near = add(v_sum.near_BKSH, _overlaid(dv, t), start)
        dq, x = dq.mT, tuple(map(_joined, x))

        def tile(n: jax.Array, carry: Any) -> Any:
            dq, dk_far, dv_far = carry
            visible = _far_visible(start, _cut(since_KS, n, t, axis=1), G, t)
            more, dk, dv = step(x, _cut(k.far_BKSH, n, t), _cut(v.far_BKSH, n, t), visible)
            return dq + more, add(dk_far, dk, n * t.side), add(dv_far, dv, n * t.side)

        dk_far, dv_far = k_sum.far_BKSH, v_sum.far_BKSH
        if t.far:
            zero = jnp.zeros_like(x[0].mT, jnp.float32)
            tiles = _far_tiles(start, offset_K, kind, t)
            more, dk_far, dv_far = lax.fori_loop(0, tiles, tile, (zero, dk_far, dv_far))
            dq += more.mT.reshape(dq.shape)
        return (_Keys(dk_far, dk_near), _Keys(dv_far, dv_near)), dq.astype(dtype)

    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (k, v))
    starting = positions(x.starts, len(rows[0]), t.row)
    (dk, dv), dq_rows = lax.scan(row, zeros, (starting, rows))
    home: Any = jax.linear_transpose(laid, jax.ShapeDtypeStruct(x.k_BSKH.shape, jnp.float32))
    return natural(dq_rows, T, G) * H**-0.5, home(dk)[0], home(dv)[0]


def _joined(x_BKwQ: jax.Array) -> jax.Array:
    """The windows of a row as one axis of queries, (B, K, row, ...)."""
    B, K, _, _, *rest = x_BKwQ.shape
    return x_BKwQ.reshape(B, K, -1, *rest)
