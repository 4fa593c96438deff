"""Causal grouped-query attention, q_BTKGH on k_BSKH and v_BSKH, two ways.

Query head (k, g) reads KV head k; softmax in float32, scores scaled by 1/sqrt(H).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gqa_scaling.model.product import product

_MASKED = -1e30  # finite, so that exp(masked - masked) is no NaN


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Causal attention: position t reads positions s <= t. Returns o_BTKGH in q's dtype.

    "reference" builds all T x T scores; "blockwise" walks over tiles, skips those above the
    diagonal and keeps O(T) memory, forward and backward; "auto" is blockwise on every platform:
    on a CPU it was ahead at every T from 128 on, by 3 times at 256 (benchmarks/attention.py).
    """
    if implementation == "reference":
        return _reference(q_BTKGH, k_BSKH, v_BSKH)
    if implementation in ("auto", "blockwise"):
        return _blockwise(q_BTKGH, k_BSKH, v_BSKH)
    raise ValueError(f"implementation={implementation!r} must be auto, reference or blockwise")


def _reference(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    scores_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    visible_TS = jnp.tri(T, dtype=bool)
    weights = jax.nn.softmax(jnp.where(visible_TS, scores_BKGTS / math.sqrt(H), _MASKED), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)


@jax.custom_vjp
def _blockwise(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH)[0]


def _block(T: int) -> int:
    """Positions on a tile's side: small tiles skip more of the half above the diagonal, large
    ones mean fewer turns of the loop."""
    return min(T, 128 if T <= 1024 else 512)


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


def _forward(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> tuple[jax.Array, Any]:
    """Online softmax over the tiles of each row (Dao et al. 2022, algorithm 1)."""
    T, _, G, H = q_BTKGH.shape[1:]
    block = _block(T)
    q_rows = _rows(q_BTKGH * H**-0.5, block)
    k_tiles, v_tiles = _tiles(k_BSKH, block), _tiles(v_BSKH, block)

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

    o_rows, lse_rows = lax.map(row, (jnp.arange(len(q_rows)), q_rows))
    o_BTKGH = _positions(o_rows, T, G, block)
    return o_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse_rows)


def _backward(residuals: Any, do_BTKGH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Recomputes each tile's weights from the saved log-sum-exp (ibid., algorithm 4).

    The operand with H comes first and positions last, so that no product transposes a tile.
    """
    q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse_rows = residuals
    (S, K, H), G, dtype = k_BSKH.shape[1:], q_BTKGH.shape[3], q_BTKGH.dtype
    block = _block(S)
    delta_BTKG = jnp.sum(do_BTKGH.astype(jnp.float32) * o_BTKGH.astype(jnp.float32), axis=-1)
    rows = *(_rows(x, block) for x in (q_BTKGH * H**-0.5, do_BTKGH, delta_BTKG)), lse_rows
    k_tiles, v_tiles = _tiles(k_BSKH, block), _tiles(v_BSKH, block)

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
    (dk, dv), dq_rows = lax.scan(row, (zero, zero), (jnp.arange(len(lse_rows)), rows))

    def joined(tiles: jax.Array) -> jax.Array:
        x = tiles.transpose(1, 0, 4, 2, 3).reshape(-1, len(tiles) * block, K, H)
        return x[:, :S].astype(dtype)

    return _positions(dq_rows, S, G, block) * H**-0.5, joined(dk), joined(dv)


_blockwise.defvjp(_forward, _backward)
