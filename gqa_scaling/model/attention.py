"""Causal grouped-query attention, q_BTKGH on k_BSKH and v_BSKH, two ways.

Query head (k, g) reads KV head k; softmax in float32, scores scaled by 1/sqrt(H).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256  # positions on each side of a tile
_MASKED = -1e30  # finite, so that exp(masked - masked) is no NaN


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Causal attention: position t reads positions s <= t. Returns o_BTKGH in q's dtype.

    "reference" builds all T x T scores; "blockwise" walks over tiles, skips those above the
    diagonal and keeps O(T) memory, forward and backward; "auto" is blockwise everywhere, which
    was never slower (benchmarks/attention.py).
    """
    if implementation == "reference":
        return _reference(q_BTKGH, k_BSKH, v_BSKH)
    if implementation in ("auto", "blockwise"):
        return _blockwise(q_BTKGH, k_BSKH, v_BSKH)
    raise ValueError(f"implementation={implementation!r} must be auto, reference or blockwise")


def _reference(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    visible_TS = jnp.tri(T, dtype=bool)
    weights = jax.nn.softmax(jnp.where(visible_TS, scores_BKGTS / math.sqrt(H), _MASKED), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)


def _blockwise(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    B, T, K, G, H = q_BTKGH.shape
    block = min(BLOCK, T)
    # The scale goes into q once; whatever is padded lies above the diagonal of every real query.
    q, k, v = (_pad(x, -T % block) for x in (q_BTKGH * H**-0.5, k_BSKH, v_BSKH))
    o = _flash(
        q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), block
    )
    return o.transpose(0, 3, 1, 2, 4)[:, :T]


def _pad(x: jax.Array, positions: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, positions)) + ((0, 0),) * (x.ndim - 2)) if positions else x


def _rows(x_BKGTH: jax.Array, block: int) -> jax.Array:
    """Cut into blocks of queries, group and position side by side: (T/b, B, K, G b, ...)."""
    B, K, G, T, *rest = x_BKGTH.shape
    x = x_BKGTH.reshape(B, K, G, T // block, block, *rest)
    return jnp.moveaxis(x, 3, 0).reshape(T // block, B, K, G * block, *rest)


def _unrows(x: jax.Array, G: int, block: int) -> jax.Array:
    n, B, K, _, *rest = x.shape
    x = jnp.moveaxis(x.reshape(n, B, K, G, block, *rest), 0, 3)
    return x.reshape(B, K, G, n * block, *rest)


def _product(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _scores(q: jax.Array, k_BKHS: jax.Array, diagonal: jax.Array) -> jax.Array:
    """Scores of one tile, (B, K, G b, b), masked where it lies on the diagonal."""
    block = k_BKHS.shape[-1]
    visible = jnp.tile(jnp.tri(block, dtype=bool), (q.shape[2] // block, 1))
    return jnp.where(visible | ~diagonal, _product("bkqh,bkhs->bkqs", q, k_BKHS), _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _flash(q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, block: int) -> jax.Array:
    return _flash_forward(q_BKGTH, k_BKSH, v_BKSH, block)[0]


def _flash_forward(q_BKGTH, k_BKSH, v_BKSH, block):
    """Online softmax over the tiles of each row (Dao et al. 2022, algorithm 1)."""
    q_rows, k_BKHS = _rows(q_BKGTH, block), k_BKSH.swapaxes(2, 3)

    def row(x):
        i, q = x

        def tile(j, carry):
            top, total, o = carry
            k_BKHb = lax.dynamic_slice_in_dim(k_BKHS, j * block, block, axis=3)
            v_BKbH = lax.dynamic_slice_in_dim(v_BKSH, j * block, block, axis=2)
            s = _scores(q, k_BKHb, i == j)
            new_top = jnp.maximum(top, s.max(-1))
            p, fade = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            o = o * fade[..., None] + _product("bkqs,bksh->bkqh", p.astype(q.dtype), v_BKbH)
            return new_top, total * fade + p.sum(-1), o

        shape = q.shape[:-1]
        empty = jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros(q.shape, jnp.float32)
        top, total, o = lax.fori_loop(0, i + 1, tile, empty)
        return (o / total[..., None]).astype(q.dtype), top + jnp.log(total)

    o_rows, lse_rows = lax.map(row, (jnp.arange(len(q_rows)), q_rows))
    o_BKGTH = _unrows(o_rows, q_BKGTH.shape[2], block)
    return o_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, o_BKGTH, lse_rows)


def _flash_backward(block, residuals, do_BKGTH):
    """Recomputes each tile's weights from the saved log-sum-exp (ibid., algorithm 4).

    Keys and values lie as (B, K, H, S), so that no product has to transpose a tile.
    """
    q_BKGTH, k_BKSH, v_BKSH, o_BKGTH, lse_rows = residuals
    delta = jnp.sum(do_BKGTH.astype(jnp.float32) * o_BKGTH.astype(jnp.float32), axis=-1)
    rows = *(_rows(x, block) for x in (q_BKGTH, do_BKGTH, delta)), lse_rows
    k_BKHS, v_BKHS = k_BKSH.swapaxes(2, 3), v_BKSH.swapaxes(2, 3)

    def row(carry, x):
        i, (q, do, delta, lse) = x

        def tile(j, carry):
            dq, dk, dv = carry
            cut = functools.partial(
                lax.dynamic_slice_in_dim, start_index=j * block, slice_size=block, axis=3
            )
            put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=j * block, axis=3)
            k = cut(k_BKHS)
            p = jnp.exp(_scores(q, k, i == j) - lse[..., None])
            dp = _product("bkqh,bkhs->bkqs", do, cut(v_BKHS))
            ds = (p * (dp - delta[..., None])).astype(q.dtype)
            dq += _product("bkqs,bkhs->bkqh", ds, k)
            dk = put(dk, cut(dk) + _product("bkqh,bkqs->bkhs", q, ds))
            dv = put(dv, cut(dv) + _product("bkqh,bkqs->bkhs", do, p.astype(q.dtype)))
            return dq, dk, dv

        dq = jnp.zeros(q.shape, jnp.float32)
        dq, *carry = lax.fori_loop(0, i + 1, tile, (dq, *carry))
        return tuple(carry), dq.astype(q.dtype)

    zero = jnp.zeros(k_BKHS.shape, jnp.float32)
    (dk, dv), dq_rows = lax.scan(row, (zero, zero), (jnp.arange(len(lse_rows)), rows))
    dq_BKGTH = _unrows(dq_rows, q_BKGTH.shape[2], block)
    dk_BKSH, dv_BKSH = (x.swapaxes(2, 3).astype(q_BKGTH.dtype) for x in (dk, dv))
    return dq_BKGTH, dk_BKSH, dv_BKSH


_flash.defvjp(_flash_forward, _flash_backward)
