"""Dense causal attention over tiles in XLA, on any platform: O(T) memory, forward and backward.

Tiles above the diagonal are skipped. On a CPU it was ahead of all T x T scores at every T from
128 on, by 3 times at 256 (benchmarks/attention.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gqa_scaling.devices.mesh import axis_size
from gqa_scaling.model.product import product

_MASKED = -1e30  # finite, so that exp(masked - masked) is no NaN


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


def _places(starts: jax.Array, n: int, block: int) -> jax.Array:
    """The places in the sequence of the n blocks of queries held here."""
    return (starts[:, None] // block + jnp.arange(n // len(starts))).reshape(-1)


def forward(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, starts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """o_BTKGH and the log-sum-exp of the scores, lse_BTKG (see `attention._Kernels.forward`).

    Online softmax over the tiles of each row (Dao et al. 2022, algorithm 1).
    """
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

    o_rows, lse_rows = lax.map(row, (_places(starts, len(q_rows), block), q_rows))
    return _positions(o_rows, T, G, block), _positions(lse_rows, T, G, block)


def backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    o_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    do_BTKGH: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq_BTKGH, dk_BSKH and dv_BSKH, the latter in float32 (see `attention._Kernels.backward`).

    Recomputes each tile's weights from the saved log-sum-exp (ibid., algorithm 4).

    The operand with H comes first and positions last, so that no product transposes a tile.
    """
    (_, T, K, G, H), dtype, S = q_BTKGH.shape, q_BTKGH.dtype, k_BSKH.shape[1]
    block = _block(T)
    delta_BTKG = product("BTKGH,BTKGH->BTKG", do_BTKGH, o_BTKGH)
    rows = tuple(_rows(x, block) for x in (q_BTKGH * H**-0.5, do_BTKGH, delta_BTKG, lse_BTKG))
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
    (dk, dv), dq_rows = lax.scan(row, (zero, zero), (_places(starts, len(rows[0]), block), rows))

    def natural(tiles: jax.Array) -> jax.Array:
        return tiles.transpose(1, 0, 4, 2, 3).reshape(-1, len(tiles) * block, K, H)[:, :S]

    return _positions(dq_rows, T, G, block) * H**-0.5, natural(dk), natural(dv)
