"""Causal grouped-query attention, q_BTKGH on k_BSKH and v_BSKH, two ways.

Query head (k, g) reads KV head k; softmax in float32, scores scaled by 1/sqrt(H).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqa_scaling.layout import zigzag
from gqa_scaling.model.product import product
from gqa_scaling.parallel import all_gather, axis_index, axis_size, on_shards, reduce_scatter

_MASKED = -1e30  # finite, so that exp(masked - masked) is no NaN
_Q = ("batch", "time", "kv_heads", None, None)
_KV = ("batch", "time", "kv_heads", None)
_ROWS = ("time", "batch", "kv_heads", None)  # tiles of queries


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Causal attention: position t reads positions s <= t. Returns o_BTKGH in q's dtype.

    "reference" builds all T x T scores; "blockwise" walks over tiles, skips those above the
    diagonal and keeps O(T) memory, forward and backward; "auto" is blockwise on every platform:
    on a CPU it was ahead at every T from 128 on, by 3 times at 256 (benchmarks/attention.py).
    On a mesh positions are in zig-zag order over `context` (`layout.zigzag`): K and V, which are
    small, are gathered, and each device answers its own queries. Where q has more KV heads than k,
    for a `tensor` axis larger than K, those of k and v are repeated.
    """
    repeats = q_BTKGH.shape[2] // k_BSKH.shape[2]
    if repeats > 1:
        k_BSKH, v_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
    if implementation == "reference":
        return on_shards(_reference, (_Q, _KV, _KV), _Q, q_BTKGH, k_BSKH, v_BSKH)
    if implementation in ("auto", "blockwise"):
        return _blockwise(q_BTKGH, k_BSKH, v_BSKH)
    raise ValueError(f"implementation={implementation!r} must be auto, reference or blockwise")


def _join(x_BSKH: jax.Array) -> jax.Array:
    """On shards: keys or values of all devices, in natural order."""
    C, x = axis_size("context"), all_gather(x_BSKH, 1, "context")
    if C == 1:
        return x
    parts = x.reshape(x.shape[0], 2 * C, -1, *x.shape[2:])
    return parts[:, np.argsort(zigzag(np.arange(2 * C), C))].reshape(x.shape)


def _share(dx_BSKH: jax.Array) -> jax.Array:
    """On shards: the transpose of `_join`, each device's sum of the gradients for its positions."""
    C = axis_size("context")
    if C > 1:
        parts = dx_BSKH.reshape(dx_BSKH.shape[0], 2 * C, -1, *dx_BSKH.shape[2:])
        dx_BSKH = parts[:, zigzag(np.arange(2 * C), C)].reshape(dx_BSKH.shape)
    return reduce_scatter(dx_BSKH, 1, "context")


def _held(n: int) -> jax.Array:
    """On shards: the places in the sequence of the n equal parts held here, in zig-zag order."""
    C = axis_size("context")
    if C == 1:
        return jnp.arange(n)
    i, half = axis_index("context"), jnp.arange(n // 2)
    return jnp.concatenate([i * (n // 2) + half, (2 * C - 1 - i) * (n // 2) + half])


def _reference(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    k_BSKH, v_BSKH = _join(k_BSKH), _join(v_BSKH)
    scores_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    visible_TS = _held(T)[:, None] >= jnp.arange(k_BSKH.shape[1])
    weights = jax.nn.softmax(jnp.where(visible_TS, scores_BKGTS / math.sqrt(H), _MASKED), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)


@jax.custom_vjp
def _blockwise(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH)[0]


def _forward(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, Any]:
    qkv = q_BTKGH, k_BSKH, v_BSKH
    o_BTKGH, lse_rows = on_shards(_forward_here, (_Q, _KV, _KV), [_Q, _ROWS], *qkv)
    return o_BTKGH, (*qkv, o_BTKGH, lse_rows)


def _backward(residuals: Any, do_BTKGH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    axes = (_Q, _KV, _KV, _Q, _ROWS, _Q)
    return on_shards(_backward_here, axes, [_Q, _KV, _KV], *residuals, do_BTKGH)


def _block(T: int) -> int:
    """Positions on a tile's side, for T queries on this device: small tiles skip more of the half
    above the diagonal, large ones mean fewer turns of the loop."""
    C = axis_size("context")
    block = min(T, 128 if T * C <= 1024 else 512)
    if C > 1:  # a tile may not reach from one part of the sequence into another
        block = next(b for b in range(min(block, T // 2), 0, -1) if T // 2 % b == 0)
    return block


def mean_tiles(T: int) -> float:
    """Tiles that the T queries of a device visit for each tile of them, on average: zig-zag order
    gives every device the mean of the whole sequence."""
    block = _block(T)
    return (-(-T * axis_size("context") // block) + 1) / 2


def _rows(x_BTKG: jax.Array, block: int) -> jax.Array:
    """Blocks of queries, a group's positions side by side: (T/b, B, K, G b, ...), 0 past T."""
    B, T, K, G, *rest = x_BTKG.shape
    n = -(-T // block)
    x = jnp.pad(x_BTKG, [(0, 0), (0, n * block - T)] + [(0, 0)] * (x_BTKG.ndim - 2))
    x = x.reshape(B, n, block, K, G, *rest)
    x = x.transpose(1, 0, 3, 4, 2, *range(5, x.ndim))
    return x.reshape(n, B, K, G * block, *rest)


def _positions(rows: jax.Array, T: int, G: int, block: int) -> jax.Array:
    """The inverse of `_rows`."""
    n, B, K, _, *rest = rows.shape
    x = rows.reshape(n, B, K, G, block, *rest)
    x = x.transpose(1, 0, 4, 2, 3, *range(5, x.ndim))
    return x.reshape(B, n * block, K, G, *rest)[:, :T]


def _tiles(x_BSKH: jax.Array, block: int) -> jax.Array:
    """Blocks of keys, positions last: (S/b, B, K, H, b), 0 past S."""
    B, S, K, H = x_BSKH.shape
    n = -(-S // block)
    x = jnp.pad(x_BSKH, [(0, 0), (0, n * block - S), (0, 0), (0, 0)])
    return x.reshape(B, n, block, K, H).transpose(1, 0, 3, 4, 2)


def _scores(q: jax.Array, k_BKHS: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Scores of one tile, (B, K, G b, b), masked where it lies on the diagonal."""
    block = k_BKHS.shape[-1]
    visible = jnp.tile(jnp.tri(block, dtype=bool), (q.shape[2] // block, 1))
    return jnp.where(visible | ~diagonal, product("bkqh,bkhs->bkqs", q, k_BKHS), _MASKED)


def _forward_here(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over the tiles of each row (Dao et al. 2022, algorithm 1)."""
    T, _, G, H = q_BTKGH.shape[1:]
    block = _block(T)
    q_rows = _rows(q_BTKGH * H**-0.5, block)
    k_tiles, v_tiles = _tiles(_join(k_BSKH), block), _tiles(_join(v_BSKH), block)

    def row(x: Any) -> tuple[jax.Array, jax.Array]:
        i, q = x

        def tile(j: jax.Array, carry: Any) -> Any:
            top, total, o = carry
            s = _scores(q, k_tiles[j], i == j)
            new_top = jnp.maximum(top, s.max(-1))
            p, fade = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            o = o * fade[..., None] + product("bkqs,bkhs->bkqh", p.astype(q.dtype), v_tiles[j])
            return new_top, total * fade + p.sum(-1), o

        shape = q.shape[:-1]
        empty = jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32)
        top, total, o = lax.fori_loop(0, i + 1, tile, empty)
        return (o / total[..., None]).astype(q.dtype), top + jnp.log(total)

    o_rows, lse_rows = lax.map(row, (_held(len(q_rows)), q_rows))
    return _positions(o_rows, T, G, block), lse_rows


def _backward_here(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    o_BTKGH: jax.Array,
    lse_rows: jax.Array,
    do_BTKGH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Recomputes each tile's weights from the saved log-sum-exp (ibid., algorithm 4).

    The operand with H comes first and positions last, so that no product transposes a tile.
    """
    (_, T, K, G, H), dtype = q_BTKGH.shape, q_BTKGH.dtype
    block, S = _block(T), T * axis_size("context")
    delta_BTKG = product("BTKGH,BTKGH->BTKG", do_BTKGH, o_BTKGH)
    rows = *(_rows(x, block) for x in (q_BTKGH * H**-0.5, do_BTKGH, delta_BTKG)), lse_rows
    k_tiles, v_tiles = _tiles(_join(k_BSKH), block), _tiles(_join(v_BSKH), block)

    put = lax.dynamic_update_index_in_dim

    def row(carry: Any, x: Any) -> tuple[Any, jax.Array]:
        i, (q, do, delta, lse) = x

        def tile(j: jax.Array, carry: Any) -> Any:
            dq, dk, dv = carry
            k, v = k_tiles[j], v_tiles[j]
            p = jnp.exp(_scores(q, k, i == j) - lse[..., None])
            ds = p * (product("bkqh,bkhs->bkqs", do, v) - delta[..., None])
            ds, p = ds.astype(dtype), p.astype(dtype)
            dk = put(dk, dk[j] + product("bkqh,bkqs->bkhs", q, ds), j, axis=0)
            dv = put(dv, dv[j] + product("bkqh,bkqs->bkhs", do, p), j, axis=0)
            return dq + product("bkqs,bkhs->bkqh", ds, k), dk, dv

        dq = jnp.zeros(q.shape, jnp.float32)
        dq, *carry = lax.fori_loop(0, i + 1, tile, (dq, *carry))
        return tuple(carry), dq.astype(dtype)

    zero = jnp.zeros(k_tiles.shape, jnp.float32)
    (dk, dv), dq_rows = lax.scan(row, (zero, zero), (_held(len(lse_rows)), rows))

    def shared(tiles: jax.Array) -> jax.Array:
        x = tiles.transpose(1, 0, 4, 2, 3).reshape(-1, len(tiles) * block, K, H)
        return _share(x[:, :S]).astype(dtype)

    return _positions(dq_rows, T, G, block) * H**-0.5, shared(dk), shared(dv)


_blockwise.defvjp(_forward, _backward)
