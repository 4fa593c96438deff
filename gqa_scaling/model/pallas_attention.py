"""Causal grouped-query attention on GPUs, dense or after a pattern for each KV head, in Triton.

FlashAttention (Dao 2023, arXiv 2307.08691) over exactly the key blocks that a pattern lets a query
see (heterogeneous context sharding, arXiv 2407.17678; `gqa_scaling.context_sharding`), through
Pallas: no lists of blocks. A tile of queries reads a run of tiles up to its own and counts through
the distant blocks before them; the queries that see a tile of keys are one run. Five numbers for
each KV head say where they begin and end, so that all heads of a layer run in one launch.

Tiles divide the pattern's blocks: a tile is seen whole, but for the diagonal. The query heads of a
KV head lie next to each other, tile by tile: two of them share each load of keys (128 x 64 products), and one
loop sums dK and dV over the whole group, so that no partial sums are stored and the result is the
same each time. Longest rows start first.

Tile sizes, warps and stages were chosen by what the compiler says of bfloat16 at head sizes 64 and
128 for compute capability 8.0 and 9.0: next to no spilled registers, at most 160 KB of shared
memory. Nothing was timed, and nothing has run on a GPU. float32 is exact and slow, for comparisons.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gqa_scaling.context_sharding import HeadPattern, LayerPattern, distant_block
from gqa_scaling.model.operands import check_operands

_MASKED = -1e30  # finite, so that exp2(masked - masked) is no NaN
_NEVER = 2**29  # blocks: more than any sequence has
_HEAD_SIZES = (16, 32, 64, 128)


def pallas_attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    pattern: LayerPattern,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention after a pattern for each KV head. Returns o_BTKGH in q's dtype.

    `pattern` (static) has one entry for each KV head, None for a dense one; all query heads of a KV
    head share it. S is T, any T: what lacks to whole tiles is padded. Softmax in float32, scores
    scaled by 1/sqrt(H); memory is O(T), forward and backward. `interpret` runs the kernels
    anywhere, slowly. Raises `ValueError` where arrays and pattern do not fit each other, H is no
    power of two from 16 to 128, or a block is no multiple of 16.
    """
    check_operands(q_BTKGH, k_BSKH, v_BSKH, pattern)
    H = q_BTKGH.shape[-1]
    if H not in _HEAD_SIZES:
        raise ValueError(
            f"head_dim={H} must be one of {', '.join(map(str, _HEAD_SIZES))} for this kernel: "
            "change it, or take another implementation"
        )
    for head in pattern:
        if head is not None and head.block % 16:
            raise ValueError(
                f"block={head.block} must be a multiple of 16 for this kernel, better of 64: "
                "change it, or take another implementation"
            )
    return _attend(q_BTKGH, k_BSKH, v_BSKH, pattern, interpret)


def _tile(pattern: LayerPattern, dtype: Any) -> int:
    """Positions on a tile's side: the largest power of two, up to 64, that divides all blocks; of
    float32, which must do without tensor cores, up to 32."""
    most = 32 if dtype == jnp.float32 else 64
    return math.gcd(most, *(head.block for head in pattern if head is not None))


def _together(G: int) -> int:
    """Query heads whose tiles share a load of keys."""
    return 2 if G % 2 == 0 else 1


# ---------------------------------------------------------------------------- what is visible


def _numbers(head: HeadPattern | None, tile: int) -> list[int]:
    """Tiles in a block; local blocks, sinks, first stripe after them, stride, in blocks; unused."""
    if head is None:
        return [1, _NEVER, 0, _NEVER, 1, 0, 0, 0]
    first, stride = _NEVER, 1
    if head.stride is not None:
        first, stride = distant_block(head.sinks, head.stride, head.offset, head.sinks), head.stride
    return [head.block // tile, head.local, head.sinks, first, stride, 0, 0, 0]


def _table(pattern: LayerPattern, tile: int) -> jax.Array:
    return jnp.array([_numbers(head, tile) for head in pattern], jnp.int32)


def _keys_seen(i: jax.Array, numbers: Any) -> tuple[jax.Array, jax.Array, Callable]:
    """Of tile i of queries: the first tile of its window, how many distant tiles it sees, and
    which the n-th of those is."""
    ratio, local, sinks, first, stride = (numbers[n] for n in range(5))
    start = jnp.maximum(lax.div(i, ratio) - local + 1, 0)  # blocks before it have left the window
    stripes = lax.div(jnp.maximum(start - first, 0) + stride - 1, stride)
    count = jnp.minimum(start, sinks) + stripes

    def distant(n: jax.Array) -> jax.Array:
        block = lax.div(n, ratio)
        block = jnp.where(block < sinks, block, first + (block - sinks) * stride)
        return block * ratio + lax.rem(n, ratio)

    return start * ratio, count * ratio, distant


def _queries_end(j: jax.Array, tiles: int, numbers: Any) -> jax.Array:
    """One past the last tile of queries that sees tile j of keys; the first is j."""
    ratio, local, sinks, first, stride = (numbers[n] for n in range(5))
    block = lax.div(j, ratio)
    stripe = (block >= first) & (lax.rem(jnp.maximum(block - first, 0), stride) == 0)
    return jnp.where((block < sinks) | stripe, tiles, jnp.minimum((block + local) * ratio, tiles))


# -------------------------------------------------------------------------------- the kernels


def _dot(a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
    """a b in float32, of float32 operands to its precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def _below_diagonal(shape: tuple[int, int], queries: int) -> jax.Array:
    """Whether a query sees a key in the tile they share; queries along axis `queries`, of several
    heads."""
    q = lax.broadcasted_iota(jnp.int32, shape, queries)
    k = lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
    return (q & (shape[1 - queries] - 1)) >= k


def _forward_kernel(
    numbers: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    *,
    tile: int,
    shares: int,
) -> None:
    """Output and log2-sum-exp2 of one tile of queries of one or two heads."""
    i = lax.div(pl.num_programs(0) - 1 - pl.program_id(0), shares)
    q = q_ref[...]
    scale = q.shape[1] ** -0.5 * math.log2(math.e)

    def step(j: jax.Array, carry: Any, diagonal: bool = False) -> Any:
        top, total, o = carry
        here = pl.ds(j * tile, tile)
        s = _dot(q, k_ref[here, :], trans_b=True) * scale
        if diagonal:
            s = jnp.where(_below_diagonal(s.shape, 0), s, _MASKED)
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        p, fade = jnp.exp2(s - new_top[:, None]), jnp.exp2(top - new_top)
        o = o * fade[:, None] + _dot(p.astype(q.dtype), v_ref[here, :])
        return new_top, total * fade + jnp.sum(p, axis=1), o

    rows = q.shape[0]
    carry = (
        jnp.full((rows,), _MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    start, count, distant = _keys_seen(i, numbers)
    carry = lax.fori_loop(0, count, lambda n, c: step(distant(n), c), carry)
    carry = lax.fori_loop(start, i, step, carry)
    top, total, o = step(i, carry, diagonal=True)
    o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = top + jnp.log2(total)


def _dq_kernel(
    numbers: Any,
    q_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dq_ref: Any,
    *,
    tile: int,
    shares: int,
) -> None:
    """dQ of one tile of queries of one head."""
    i = lax.div(pl.num_programs(0) - 1 - pl.program_id(0), shares)
    q, do = q_ref[...], do_ref[...]
    lse, delta = lse_ref[...][:, None], delta_ref[...][:, None]
    scale = q.shape[1] ** -0.5

    def step(j: jax.Array, dq: jax.Array, diagonal: bool = False) -> jax.Array:
        here = pl.ds(j * tile, tile)
        k = k_ref[here, :]
        p = jnp.exp2(_dot(q, k, trans_b=True) * (scale * math.log2(math.e)) - lse)
        if diagonal:
            p = jnp.where(_below_diagonal(p.shape, 0), p, 0.0)
        ds = p * (_dot(do, v_ref[here, :], trans_b=True) - delta)
        return dq + _dot(ds.astype(q.dtype), k)

    start, count, distant = _keys_seen(i, numbers)
    dq = jnp.zeros(q.shape, jnp.float32)
    dq = lax.fori_loop(0, count, lambda n, dq: step(distant(n), dq), dq)
    dq = step(i, lax.fori_loop(start, i, step, dq), diagonal=True)
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    numbers: Any,
    k_ref: Any,
    v_ref: Any,
    q_ref: Any,
    do_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    *,
    tile: int,
    shares: int,
) -> None:
    """dK and dV of one tile of keys, summed over the query heads that share it."""
    j = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]
    scale = k.shape[1] ** -0.5

    def step(m: jax.Array, carry: Any, diagonal: bool = False) -> Any:
        dk, dv = carry
        here = pl.ds(m * tile, tile)
        q, do = q_ref[here, :], do_ref[here, :]
        p = _dot(k, q, trans_b=True) * (scale * math.log2(math.e)) - lse_ref[here][None, :]
        p = jnp.exp2(p)  # (keys, queries)
        if diagonal:
            p = jnp.where(_below_diagonal(p.shape, 1), p, 0.0)
        dv = dv + _dot(p.astype(do.dtype), do)
        ds = p * (_dot(v, do, trans_b=True) - delta_ref[here][None, :])
        return dk + _dot(ds.astype(q.dtype), q), dv

    zero = jnp.zeros(k.shape, jnp.float32)
    end = _queries_end(j, pl.num_programs(0), numbers)
    on_diagonal = functools.partial(step, diagonal=True)
    carry = lax.fori_loop(j * shares, (j + 1) * shares, on_diagonal, (zero, zero))
    dk, dv = lax.fori_loop((j + 1) * shares, end * shares, step, carry)
    dk_ref[...], dv_ref[...] = (dk * scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


# ------------------------------------------------------------------------- calling the kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    pattern: LayerPattern,
    interpret: bool,
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, pattern, interpret)[0]


def _forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    pattern: LayerPattern,
    interpret: bool,
) -> tuple[jax.Array, Any]:
    tile, G = _tile(pattern, q_BTKGH.dtype), q_BTKGH.shape[3]
    q, k, v = _rows(q_BTKGH, tile), _keys(k_BSKH, tile), _keys(v_BSKH, tile)
    together = _together(G)
    o, lse = _call(
        functools.partial(_forward_kernel, tile=tile, shares=G // together),
        numbers=_table(pattern, tile),
        interpret=interpret,
        size=together * tile,
        last_first=True,
        tiled=(q,),
        whole=(k, v),
        results=[(q.shape, q.dtype), (q.shape[:2], jnp.float32)],
    )
    o_BTKGH = _positions(o, q_BTKGH.shape, tile)
    return o_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse)


def _backward(
    pattern: LayerPattern, interpret: bool, residuals: Any, do_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse = residuals
    tile, G = _tile(pattern, q_BTKGH.dtype), q_BTKGH.shape[3]
    delta_BTKG = jnp.sum(do_BTKGH.astype(jnp.float32) * o_BTKGH.astype(jnp.float32), axis=-1)
    q, do, delta = (_rows(x, tile) for x in (q_BTKGH, do_BTKGH, delta_BTKG))
    k, v = _keys(k_BSKH, tile), _keys(v_BSKH, tile)
    together, numbers = _together(G), _table(pattern, tile)
    (dq,) = _call(
        functools.partial(_dq_kernel, tile=tile, shares=G // together),
        numbers=numbers,
        interpret=interpret,
        size=together * tile,
        last_first=True,
        tiled=(q, do, lse, delta),
        whole=(k, v),
        results=[(q.shape, q.dtype)],
    )
    dk, dv = _call(
        functools.partial(_dkv_kernel, tile=tile, shares=G),
        numbers=numbers,
        interpret=interpret,
        size=tile,
        last_first=False,
        tiled=(k, v),
        whole=(q, do, lse, delta),
        results=[(k.shape, k.dtype), (v.shape, v.dtype)],
    )

    def shared(x_NSH: jax.Array) -> jax.Array:
        B, S, K, H = k_BSKH.shape
        return x_NSH.reshape(B, K, -1, H).transpose(0, 2, 1, 3)[:, :S]

    return _positions(dq, q_BTKGH.shape, tile), shared(dk), shared(dv)


_attend.defvjp(_forward, _backward)


def _call(
    kernel: functools.partial,
    *,
    numbers: jax.Array,
    interpret: bool,
    size: int,
    last_first: bool,
    tiled: Sequence[jax.Array],
    whole: Sequence[jax.Array],
    results: Sequence[tuple[tuple[int, ...], Any]],
) -> list[jax.Array]:
    """Runs a kernel for each part, of `size` rows, of each sequence and KV head.

    It gets, in this order, the KV head's `numbers`, that part of the `tiled` arrays, all rows of
    the `whole` ones, and that part of the results.
    """
    N, rows, H = tiled[0].shape
    parts, K = rows // size, len(numbers)

    def part(shape: tuple[int, ...]) -> pl.BlockSpec:
        def place(p: Any, n: Any) -> tuple[Any, ...]:
            return (n, parts - 1 - p if last_first else p, 0)[: len(shape)]

        return pl.BlockSpec((None, size, *shape[2:]), place)

    def all_rows(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape[1:]), lambda p, n: (n, 0, 0)[: len(shape)])

    outputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]
    return pl.pallas_call(
        kernel,
        grid=(parts, N),
        in_specs=[
            pl.BlockSpec((None, 8), lambda p, n: (lax.rem(n, K), 0)),
            *(part(x.shape) for x in tiled),
            *(all_rows(x.shape) for x in whole),
        ],
        out_specs=[part(x.shape) for x in outputs],
        out_shape=outputs,
        compiler_params=triton.CompilerParams(
            num_warps=4 if size * H <= 64 * 64 else 8, num_stages=3
        ),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(numbers, *tiled, *whole)


def _rows(x_BTKG: jax.Array, tile: int) -> jax.Array:
    """Tiles of queries, those of a group's heads after each other: (B K, T G, ...), 0 past T."""
    B, T, K, G, *rest = x_BTKG.shape
    x = jnp.pad(x_BTKG, [(0, 0), (0, -T % tile)] + [(0, 0)] * (x_BTKG.ndim - 2))
    x = x.reshape(B, -1, tile, K, G, *rest)
    return x.transpose(0, 3, 1, 4, 2, *range(5, x.ndim)).reshape(B * K, -1, *rest)


def _positions(x_NRH: jax.Array, shape: tuple[int, ...], tile: int) -> jax.Array:
    """The inverse of `_rows`."""
    B, T, K, G, H = shape
    x = x_NRH.reshape(B, K, -1, G, tile, H)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, K, G, H)[:, :T]


def _keys(x_BSKH: jax.Array, tile: int) -> jax.Array:
    """(B K, S, H), 0 past S."""
    B, S, K, H = x_BSKH.shape
    x = jnp.pad(x_BSKH, [(0, 0), (0, -S % tile), (0, 0), (0, 0)])
    return x.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
