"""Dense causal attention over tiles in XLA, on any platform (arXiv 2205.14135).

Tiles above the diagonal are skipped. On a CPU it was ahead of all T x T scores at every T from 128
on, by 3 times at 256 (benchmarks/attention.py). It is not `sparse` with every key a distant one:
that walks over keys in another order and multiplies in another layout, and so rounds otherwise.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.mesh import axis_size
from gqa_scaling.model.attention.shard import MASKED, Operands, Upstream, padded, positions
from gqa_scaling.model.attention.tiles import Softmax, natural, rows_of
from gqa_scaling.model.einsum import einsum_f32


def _block(T: int, G: int = 1, most: float = math.inf) -> int:
    """Positions on a tile's side, for T queries on this device: small tiles skip more of the half
    above the diagonal, large ones mean fewer turns of the loop."""
    C = axis_size("context")
    sides = (512, 256) if T * C > 1024 else ()
    block = min(T, next((side for side in sides if G * side**2 <= most), 128))
    if C > 1:  # a tile may not reach from one part of the sequence into another
        block = next(b for b in range(min(block, T // 2), 0, -1) if T // 2 % b == 0)
    return block


def mean_tiles(T: int) -> float:
    """Tiles that the T queries of a device visit for each tile of them, on average: zig-zag order
    gives every device the mean of the whole sequence."""
    block = _block(T)
    return (-(-T * axis_size("context") // block) + 1) / 2


def _rows(block: int, *xs_BTKG: jax.Array) -> tuple[jax.Array, ...]:
    """Blocks of queries, (T / block, B, K, G block, ...)."""
    return tuple(rows_of(x, block, block).squeeze(3) for x in xs_BTKG)


def _tiles(x_BSKH: jax.Array, block: int) -> jax.Array:
    """Blocks of keys, positions last: (S / block, B, K, H, block), 0 past S."""
    B, S, K, H = x_BSKH.shape
    n = -(-S // block)
    x = padded(x_BSKH, 1, after=n * block - S).reshape(B, n, block, K, H)
    return x.transpose(1, 0, 3, 4, 2)


def _scores(q: jax.Array, k_BKHS: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Scores of one tile, (B, K, G block, block), masked where it lies on the diagonal."""
    block = k_BKHS.shape[-1]
    visible = jnp.tile(jnp.tri(block, dtype=bool), (q.shape[2] // block, 1))
    return jnp.where(visible | ~diagonal, einsum_f32("bkqh,bkhs->bkqs", q, k_BKHS), MASKED)


def least_scores(kind: HeadPattern, x: Operands, most: float) -> int:
    """See `turns`."""
    T, _, G = x.q_BTKGH.shape[1:4]
    return G * _block(T, G, most) ** 2


def forward(kind: HeadPattern, x: Operands, most: float = math.inf) -> tuple[jax.Array, jax.Array]:
    """See `shard`. Of each row of queries, softmax over one tile of keys after the other."""
    T, _, G, H = x.q_BTKGH.shape[1:]
    block = _block(T, G, most)
    (q_rows,) = _rows(block, x.q_BTKGH * H**-0.5)
    k_tiles, v_tiles = _tiles(x.k_BSKH, block), _tiles(x.v_BSKH, block)

    def row(x: Any) -> tuple[jax.Array, jax.Array]:
        i, q = x

        def tile(j: jax.Array, softmax: Softmax) -> Softmax:
            def weigh(p: jax.Array) -> jax.Array:
                return einsum_f32("bkqs,bkhs->bkqh", p.astype(q.dtype), v_tiles[j])

            return softmax.over(_scores(q, k_tiles[j], i == j), weigh)

        return lax.fori_loop(0, i + 1, tile, Softmax.empty(q.shape)).result(q.dtype)

    places = positions(x.starts, len(q_rows), block) // block
    o_rows, lse_rows = lax.map(row, (places, q_rows))
    return natural(o_rows[:, :, :, None], T, G), natural(lse_rows[:, :, :, None], T, G)


def backward(
    kind: HeadPattern, x: Operands, y: Upstream, most: float = math.inf
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `shard`. Recomputes each tile's weights from the log-sum-exp (ibid., algorithm 4).

    The operand with H comes first and positions last, so that no product transposes a tile.
    """
    (_, T, K, G, H), dtype, S = x.q_BTKGH.shape, x.q_BTKGH.dtype, x.k_BSKH.shape[1]
    block = _block(T, G, most)
    delta_BTKG = einsum_f32("BTKGH,BTKGH->BTKG", y.do_BTKGH, y.o_BTKGH)
    rows = _rows(block, x.q_BTKGH * H**-0.5, y.do_BTKGH, delta_BTKG, y.lse_BTKG)
    k_tiles, v_tiles = _tiles(x.k_BSKH, block), _tiles(x.v_BSKH, block)

    def add(x: jax.Array, dx: jax.Array, j: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(x, x[j] + dx, j, axis=0)

    def row(carry: Any, x: Any) -> tuple[Any, jax.Array]:
        i, (q, do, delta, lse) = x

        def tile(j: jax.Array, carry: Any) -> Any:
            dq, dk, dv = carry
            k, v = k_tiles[j], v_tiles[j]
            p = jnp.exp(_scores(q, k, i == j) - lse[..., None])
            ds = p * (einsum_f32("bkqh,bkhs->bkqs", do, v) - delta[..., None])
            ds, p = ds.astype(dtype), p.astype(dtype)
            dk = add(dk, einsum_f32("bkqh,bkqs->bkhs", q, ds), j)
            dv = add(dv, einsum_f32("bkqh,bkqs->bkhs", do, p), j)
            return dq + einsum_f32("bkqs,bkhs->bkqh", ds, k), dk, dv

        dq = jnp.zeros(q.shape, jnp.float32)
        dq, *carry = lax.fori_loop(0, i + 1, tile, (dq, *carry))
        return tuple(carry), dq.astype(dtype)

    zero = jnp.zeros(k_tiles.shape, jnp.float32)
    places = positions(x.starts, len(rows[0]), block) // block
    (dk, dv), dq_rows = lax.scan(row, (zero, zero), (places, rows))

    def of_keys(tiles: jax.Array) -> jax.Array:
        return tiles.transpose(1, 0, 4, 2, 3).reshape(-1, len(tiles) * block, K, H)[:, :S]

    return natural(dq_rows[:, :, :, None], T, G) * H**-0.5, of_keys(dk), of_keys(dv)
