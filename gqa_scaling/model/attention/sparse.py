"""Causal attention in which each KV head reads a window and its own stripe of distant key blocks.

Heterogeneous context sharding (arXiv 2407.17678; patterns in `gqa_scaling.context_sharding`), on
any platform, without gathers and without T x T scores. The distant keys of a KV head, its sinks
and its stripe, are a slice and a strided slice of the keys, taken once; heads that differ in their
offsets alone share one computation. A row of queries reads its windows, overlapping slices side
by side, then walks over tiles of distant keys as far as it sees any, in one softmax. A distant key
counts for queries whose window it has left, so none counts twice.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqa_scaling.context_sharding import HeadPattern, distant_before, distant_block
from gqa_scaling.devices.mesh import axis_size
from gqa_scaling.model.product import product

_MASKED = -1e30  # finite, so that exp(masked - masked) is no NaN
_NEVER = 2**30  # a position after every query
_SCORES = 512 * 512 * 4  # computed at once: enough for all cores, little memory
_SCORE, _SUM = "...qh,...sh->...qs", "...qs,...sh->...qh"


class _Tiling(NamedTuple):
    """How the queries of a device walk over the keys of one kind of head, in positions."""

    window: int  # queries that share a window of keys
    row: int  # queries of several windows, which share tiles of distant keys
    near: int  # keys of a window
    far: int  # distant keys: whole tiles
    side: int  # keys of a tile


def _tiling(q_BTKGH: jax.Array, head: HeadPattern) -> _Tiling:
    (B, T, K, G, _), C, block = q_BTKGH.shape, axis_size("context"), head.block
    if C > 1 and T // 2 % block:
        raise ValueError(
            f"a context axis of {C} cuts {T * C} positions into parts of {T // 2}, which must be a "
            f"multiple of the pattern's block={block}"
        )
    window = _fitting(T, block, 64 if G >= 4 else 128)
    near = (head.local - 1) * block + window
    row = _fitting(T, window, _SCORES // (B * K * G * near))
    beyond = max(0, -(-T * C // block) - head.local)  # blocks that leave some query's window
    stripes = max(0, beyond - head.sinks)
    distant = min(head.sinks, beyond) + (-(-stripes // head.stride) if head.stride else 0)
    tiles = max(1, min(distant, distant * block // 128))
    side = -(-distant // tiles) * block
    far = -(-distant * block // side) * side if distant else 0
    return _Tiling(window, row, near, far, side)


def _fitting(T: int, unit: int, most: int) -> int:
    """The largest multiple of `unit` up to `most` that T queries here can use, at least one."""
    n = max(1, min(most, T) // unit)
    if axis_size("context") > 1:  # a row may not reach from one part of the sequence into another
        n = next(m for m in range(n, 0, -1) if T // 2 % (m * unit) == 0)
    return n * unit


def _places(starts: jax.Array, n: int, row: int) -> jax.Array:
    """Where in the sequence the n rows of queries held here begin."""
    return (starts[:, None] + row * jnp.arange(n // len(starts))).reshape(-1)


def _rows(x_BTKG: jax.Array, t: _Tiling) -> jax.Array:
    """Rows of queries, by windows: (T / row, B, K, row / window, G window, ...), 0 past T."""
    B, T, K, G, *rest = x_BTKG.shape
    n = -(-T // t.row)
    x = jnp.pad(x_BTKG, [(0, 0), (0, n * t.row - T)] + [(0, 0)] * (x_BTKG.ndim - 2))
    x = x.reshape(B, n, t.row // t.window, t.window, K, G, *rest)
    x = x.transpose(1, 0, 4, 2, 5, 3, *range(6, x.ndim))
    return x.reshape(n, B, K, t.row // t.window, G * t.window, *rest)


def _positions(rows: jax.Array, T: int, G: int, t: _Tiling) -> jax.Array:
    """The inverse of `_rows`."""
    n, B, K, windows, _, *rest = rows.shape
    x = rows.reshape(n, B, K, windows, G, t.window, *rest)
    x = x.transpose(1, 0, 3, 5, 2, 4, *range(6, x.ndim))
    return x.reshape(B, n * t.row, K, G, *rest)[:, :T]


def _laid(
    x_BSKH: jax.Array, offset_K: jax.Array, head: HeadPattern, t: _Tiling
) -> tuple[jax.Array, jax.Array]:
    """Keys or values, distant ones of each head (B, K, far, H) and all (B, K, S, H) for windows.

    0 where there is none: before the first position, as far as a window reaches, and at the end.
    """
    B, S, K, H = x_BSKH.shape
    (block, sinks), s = (head.block, head.sinks), head.stride or 1
    x = x_BSKH.transpose(0, 2, 1, 3)

    def padded(x: jax.Array, before: int, after: int) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, 0), (before, after), (0, 0)])

    near = padded(x, t.near - t.window, -S % t.row)
    first = min(sinks * block, t.far)
    far = padded(x, 0, max(0, first - S))[:, :, :first]
    stripes = (t.far - first) // block
    if stripes and head.stride:
        size = stripes * s * block
        x = padded(x, 0, max(0, first + size - S))[:, :, first : first + size]
        x = x.reshape(B, K, stripes, s, block, H)
        kept = [
            lax.dynamic_index_in_dim(x[:, h], -(offset_K[h] + sinks) % s, axis=2, keepdims=False)
            for h in range(K)
        ]
        stripe = jnp.stack(kept, axis=1).reshape(B, K, stripes * block, H)
        far = jnp.concatenate([far, stripe], axis=2)
    return padded(far, 0, t.far - far.shape[2]), near


def _windows(near_BKSH: jax.Array, start: jax.Array, t: _Tiling) -> jax.Array:
    """The windows of the row of queries that begins at `start`: (B, K, row / window, near, H)."""
    x = lax.dynamic_slice_in_dim(near_BKSH, start, t.near - t.window + t.row, axis=2)
    return jnp.stack([x[:, :, at : at + t.near] for at in range(0, t.row, t.window)], axis=2)


def _overlaid(dx: jax.Array, t: _Tiling) -> jax.Array:
    """The gradients of `_windows`, added where they overlap."""
    B, K, _, _, H = dx.shape
    whole = jax.ShapeDtypeStruct((B, K, t.near - t.window + t.row, H), dx.dtype)
    return jax.linear_transpose(lambda x: _windows(x, 0, t), whole)(dx)[0]


def _near_visible(start: jax.Array, G: int, head: HeadPattern, t: _Tiling) -> jax.Array:
    """Which keys of its window a query sees: (row / window, G window, near)."""
    query = np.tile(np.arange(t.window), G)[:, None]
    key = np.arange(t.near) - (t.near - t.window)  # both from the first query of the window on
    fixed = (key <= query) & (query // head.block - key // head.block < head.local)
    there = start + jnp.arange(0, t.row, t.window)[:, None, None] + key >= 0
    return there & fixed


def _far_visible(start: jax.Array, since: jax.Array, G: int, t: _Tiling) -> jax.Array:
    """Which distant keys, each seen `since` a position, a query sees: (K, G row, side)."""
    query = np.arange(t.row).reshape(-1, 1, t.window)
    query = np.broadcast_to(query, (len(query), G, t.window)).reshape(-1, 1)
    return since[:, None] <= start + query


def _since(offset_K: jax.Array, head: HeadPattern, t: _Tiling) -> jax.Array:
    """For each head and distant key the position from which on queries see it, (K, far)."""
    n = jnp.broadcast_to(jnp.arange(t.far // head.block), (len(offset_K), t.far // head.block))
    j = distant_block(n, head.stride, offset_K[:, None], head.sinks)
    since = (j + head.local) * head.block
    if head.stride is None:  # nothing follows the sinks but what fills the last tile
        since = jnp.where(n < head.sinks, since, _NEVER)
    return jnp.repeat(since, head.block, axis=1)


def _far_tiles(start: jax.Array, offset_K: jax.Array, head: HeadPattern, t: _Tiling) -> jax.Array:
    """How many tiles of distant keys the row of queries that begins at `start` sees any of."""
    gone = jnp.maximum(0, (start + t.row) // head.block - head.local)  # blocks before a window
    blocks = distant_before(gone, head.stride, offset_K, head.sinks).max()
    return jnp.minimum(-(-blocks * head.block // t.side), t.far // t.side)


def _cut(x: jax.Array, n: jax.Array, t: _Tiling, axis: int = 2) -> jax.Array:
    """The n-th tile of distant keys."""
    return lax.dynamic_slice_in_dim(x, n * t.side, t.side, axis)


def forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    head: HeadPattern,
    offset_K: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """o_BTKGH and the log-sum-exp of the scores, lse_BTKG (see `attention._Kernels.forward`).

    Softmax over the window, then online over the tiles of distant keys.
    """
    T, K, G, H = q_BTKGH.shape[1:]
    t = _tiling(q_BTKGH, head)
    (k_far, k_near), (v_far, v_near) = (_laid(x, offset_K, head, t) for x in (k_BSKH, v_BSKH))
    since, dtype = _since(offset_K, head, t), q_BTKGH.dtype
    q_rows = _rows(q_BTKGH * H**-0.5, t)

    def row(x: Any) -> tuple[jax.Array, jax.Array]:
        start, q = x
        k, v = _windows(k_near, start, t), _windows(v_near, start, t)
        s = jnp.where(_near_visible(start, G, head, t), product(_SCORE, q, k), _MASKED)
        top = s.max(-1)
        p = jnp.exp(s - top[..., None])
        total, o = p.sum(-1), product(_SUM, p.astype(dtype), v)
        flat = q.shape[0], K, -1
        q = q.reshape(*flat, H)

        def tile(n: jax.Array, carry: Any) -> Any:
            top, total, o = carry
            visible = _far_visible(start, _cut(since, n, t, axis=1), G, t)
            s = jnp.where(visible, product(_SCORE, q, _cut(k_far, n, t)), _MASKED)
            new_top = jnp.maximum(top, s.max(-1))
            p, fade = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            o = o * fade[..., None] + product(_SUM, p.astype(dtype), _cut(v_far, n, t))
            return new_top, total * fade + p.sum(-1), o

        carry = top.reshape(flat), total.reshape(flat), o.reshape(*flat, H)
        if t.far:
            carry = lax.fori_loop(0, _far_tiles(start, offset_K, head, t), tile, carry)
        top, total, o = carry
        return (o / total[..., None]).astype(dtype), top + jnp.log(total)

    o_rows, lse_rows = lax.map(row, (_places(starts, len(q_rows), t.row), q_rows))
    o_rows, lse_rows = o_rows.reshape(q_rows.shape), lse_rows.reshape(q_rows.shape[:-1])
    return _positions(o_rows, T, G, t), _positions(lse_rows, T, G, t)


def backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    o_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    do_BTKGH: jax.Array,
    head: HeadPattern,
    offset_K: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq_BTKGH, dk_BSKH and dv_BSKH, the latter in float32 (see `attention._Kernels.backward`).

    Gradients of windows and of distant keys are apart; the latter find home at the end, once.
    """
    (T, _, G, H), dtype = q_BTKGH.shape[1:], q_BTKGH.dtype
    t = _tiling(q_BTKGH, head)

    def laid(x_BSKH: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _laid(x_BSKH, offset_K, head, t)

    (k_far, k_near), (v_far, v_near) = laid(k_BSKH), laid(v_BSKH)
    since = _since(offset_K, head, t)
    delta_BTKG = product("BTKGH,BTKGH->BTKG", do_BTKGH, o_BTKGH)
    rows = tuple(_rows(x, t) for x in (q_BTKGH * H**-0.5, do_BTKGH, delta_BTKG, lse_BTKG))

    def step(x: Any, k: jax.Array, v: jax.Array, visible: jax.Array) -> Any:
        q, do, delta, lse = x
        s = jnp.where(visible.mT, product("...sh,...qh->...sq", k, q), _MASKED)
        p = jnp.exp(s - lse[..., None, :])
        ds = p * (product("...sh,...qh->...sq", v, do) - delta[..., None, :])
        ds, p = ds.astype(dtype), p.astype(dtype)
        dk, dv = product("...sq,...qh->...sh", ds, q), product("...sq,...qh->...sh", p, do)
        return product("...sh,...sq->...hq", k, ds), dk, dv

    def add(x: jax.Array, dx: jax.Array, start: jax.Array) -> jax.Array:
        dx += lax.dynamic_slice_in_dim(x, start, dx.shape[2], axis=2)
        return lax.dynamic_update_slice_in_dim(x, dx, start, axis=2)

    def row(carry: Any, x: Any) -> tuple[Any, jax.Array]:
        (dk_near, dv_near, dk_far, dv_far), (start, x) = carry, x
        k, v = _windows(k_near, start, t), _windows(v_near, start, t)
        dq, dk, dv = step(x, k, v, _near_visible(start, G, head, t))
        dk_near = add(dk_near, _overlaid(dk, t), start)
        dv_near = add(dv_near, _overlaid(dv, t), start)
        dq = dq.mT
        x = tuple(a.reshape(*a.shape[:2], -1, *a.shape[4:]) for a in x)

        def tile(n: jax.Array, carry: Any) -> Any:
            dq, dk_far, dv_far = carry
            visible = _far_visible(start, _cut(since, n, t, axis=1), G, t)
            more, dk, dv = step(x, _cut(k_far, n, t), _cut(v_far, n, t), visible)
            return dq + more, add(dk_far, dk, n * t.side), add(dv_far, dv, n * t.side)

        if t.far:
            carry = jnp.zeros_like(x[0].mT, jnp.float32), dk_far, dv_far
            tiles = _far_tiles(start, offset_K, head, t)
            more, dk_far, dv_far = lax.fori_loop(0, tiles, tile, carry)
            dq += more.mT.reshape(dq.shape)
        return (dk_near, dv_near, dk_far, dv_far), dq.astype(dtype)

    zeros = (jnp.zeros_like(x, jnp.float32) for x in (k_near, v_near, k_far, v_far))
    starting = _places(starts, len(rows[0]), t.row)
    carry, dq_rows = lax.scan(row, tuple(zeros), (starting, rows))
    dk_near, dv_near, dk_far, dv_far = carry
    home = jax.linear_transpose(laid, jax.ShapeDtypeStruct(k_BSKH.shape, jnp.float32))
    dk_BSKH, dv_BSKH = (*home((dk_far, dk_near)), *home((dv_far, dv_near)))
    return _positions(dq_rows, T, G, t) * H**-0.5, dk_BSKH, dv_BSKH
