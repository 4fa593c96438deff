"""Causal grouped-query attention on GPUs, dense or after a pattern with an offset for each KV head.

FlashAttention (Dao 2023, arXiv 2307.08691) over exactly the key blocks that a pattern lets a query
see (heterogeneous context sharding, arXiv 2407.17678; `gqa_scaling.context_sharding`), through
Pallas and Triton: no lists of blocks. A tile of queries reads a run of tiles up to its own and
counts through the distant blocks before them; the queries that see a tile of keys are one run. What
differs between heads is where the stripe begins, one number, which may be traced, as may where a
device's queries lie: all heads of a layer run in one launch.

Tiles divide the pattern's blocks: a tile is seen whole, but for the diagonal. The query heads of a
KV head lie next to each other, tile by tile: two of them share each load of keys (128 x 64
products), and one loop sums dK and dV over the whole group, so that no partial sums are stored and
the result is the same each time. Longest rows start first.

Tile sizes, warps and stages were chosen by what the compiler says of bfloat16 at head sizes 64 and
128 for compute capability 8.0 and 9.0: next to no spilled registers, at most 160 KB of shared
memory, which GPUs of 8.6, 8.9 and 12.0 do not have: there `triton_limit` refuses head size 128.
Nothing was timed, and nothing has run on a GPU. float32 is exact and slow, for comparisons.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.model.attention.shard import MASKED, Operands, Upstream, padded
from gqa_scaling.model.attention.tiles import Softmax

_NEVER = 2**29  # blocks: more than any sequence has
_LOG2_E = math.log2(math.e)


class _Queries(NamedTuple):
    """What is known of queries, each (B K, T G, ...): as arrays, or as the references of a kernel."""

    q: Any
    do: Any
    lse: Any
    delta: Any


class _Keys(NamedTuple):
    """Keys and values, each (B K, S, H), or their gradients: arrays or references."""

    k: Any
    v: Any


def forward(
    kind: HeadPattern, x: Operands, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """See `shard`; what the kernels cannot take, `kernel_limits.triton_limit` names."""
    t = _tiling(x, kind)
    q = _rows(x.q_BTKGH, t)
    o, lse = _call(
        functools.partial(_forward_kernel, t=t, shares=t.group // t.together),
        numbers=_numbers(x, kind, t),
        interpret=interpret,
        size=t.together * t.tile,
        last_first=True,
        tiled=q,
        whole=_keys(x, t),
        results=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:2], jnp.float32),
        ),
    )
    return _positions(o, x.q_BTKGH.shape, t), _positions(lse, x.q_BTKGH.shape[:-1], t)


def backward(
    kind: HeadPattern, x: Operands, y: Upstream, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `shard`."""
    t, (B, S, K, _) = _tiling(x, kind), x.k_BSKH.shape
    of_queries = x.q_BTKGH, y.do_BTKGH, y.lse_BTKG, y.delta_BTKG()
    queries, keys = _Queries(*(_rows(each, t) for each in of_queries)), _keys(x, t)
    numbers = _numbers(x, kind, t)
    dq = _call(
        functools.partial(_dq_kernel, t=t, shares=t.group // t.together),
        numbers=numbers,
        interpret=interpret,
        size=t.together * t.tile,
        last_first=True,
        tiled=queries,
        whole=keys,
        results=jax.ShapeDtypeStruct(queries.q.shape, queries.q.dtype),
    )
    dkv = _call(
        functools.partial(_dkv_kernel, t=t, shares=t.group),
        numbers=numbers,
        interpret=interpret,
        size=t.tile,
        last_first=False,
        tiled=keys,
        whole=queries,
        results=_Keys(*(jax.ShapeDtypeStruct(each.shape, jnp.float32) for each in keys)),
    )
    dk, dv = (each.reshape(B, K, -1, each.shape[-1]).swapaxes(1, 2)[:, :S] for each in dkv)
    return _positions(dq, x.q_BTKGH.shape, t), dk, dv


# ---------------------------------------------------------------------------- what is visible


class _Tiling(NamedTuple):
    """What is known when the kernels are compiled."""

    tile: int  # positions
    run: int  # tiles of queries of each run
    group: int  # query heads of a KV head
    together: int  # of them, those whose tiles share a load of keys
    ratio: int  # tiles in a block
    local: int  # blocks, as the next two
    sinks: int
    stride: int


def _tiling(x: Operands, kind: HeadPattern) -> _Tiling:
    """Tiles are a power of two of positions, up to 64, that divides blocks and runs; of float32,
    which must do without tensor cores, up to 32."""
    (T, _, G, _), runs = x.q_BTKGH.shape[1:], len(x.starts)
    most = 32 if x.q_BTKGH.dtype == jnp.float32 else 64
    tile = math.gcd(most, kind.block, T // runs if runs > 1 else 0)
    together = 2 if G % 2 == 0 else 1
    blocks = kind.block // tile, kind.local, kind.sinks, kind.stride or 1
    return _Tiling(tile, -(-T // runs // tile), G, together, *blocks)


def _numbers(x: Operands, kind: HeadPattern, t: _Tiling) -> jax.Array:
    """What is known when the kernels run, for each KV head: the block where its stripe begins, the
    tiles where the runs of queries begin, and one number more, unused."""
    stripe_K = jnp.full(len(x.offset_K), _NEVER)
    if kind.stride is not None:
        stripe_K = kind.sinks + x.residue_K(kind)
    first, second = jnp.append(x.starts // t.tile, 2 * _NEVER)[:2]
    columns = stripe_K, jnp.full_like(stripe_K, first), jnp.full_like(stripe_K, second)
    return jnp.stack([*columns, jnp.zeros_like(stripe_K)], axis=1).astype(jnp.int32)


def _place(m: jax.Array, numbers: Any, t: _Tiling) -> jax.Array:
    """The m-th tile of queries held here, as one of the sequence."""
    return jnp.where(m < t.run, numbers[1] + m, numbers[2] + m - t.run)


def _held_before(i: jax.Array, numbers: Any, t: _Tiling) -> jax.Array:
    """How many tiles of queries held here come before tile i of the sequence."""
    first, second = (jnp.clip(i - numbers[n], 0, t.run) for n in (1, 2))
    return first + second


def _keys_seen(i: jax.Array, numbers: Any, t: _Tiling) -> tuple[jax.Array, jax.Array, Callable]:
    """Of tile i of queries: the first tile of its window, how many distant tiles it sees, and
    which the n-th of those is."""
    stripe = numbers[0]
    start = jnp.maximum(lax.div(i, t.ratio) - t.local + 1, 0)  # the window has left what is before
    stripes = lax.div(jnp.maximum(start - stripe, 0) + t.stride - 1, t.stride)
    count = jnp.minimum(start, t.sinks) + stripes

    def distant(n: jax.Array) -> jax.Array:
        block = lax.div(n, t.ratio)
        block = jnp.where(block < t.sinks, block, stripe + (block - t.sinks) * t.stride)
        return block * t.ratio + lax.rem(n, t.ratio)

    return start * t.ratio, count * t.ratio, distant


def _queries_end(j: jax.Array, numbers: Any, t: _Tiling) -> jax.Array:
    """One past the last tile of queries that sees tile j of keys; the first is j."""
    block, stripe = lax.div(j, t.ratio), numbers[0]
    striped = (block >= stripe) & (lax.rem(jnp.maximum(block - stripe, 0), t.stride) == 0)
    return jnp.where((block < t.sinks) | striped, _NEVER, (block + t.local) * t.ratio)


# -------------------------------------------------------------------------------- the kernels


def _dot(a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
    """a b in float32, of float32 operands to its precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return triton.dot(a, b, precision=precision, **transposed)


def _below_diagonal(shape: tuple[int, ...], queries: int) -> jax.Array:
    """Whether a query sees a key in the tile they share; queries along axis `queries`, of several
    heads."""
    q = lax.broadcasted_iota(jnp.int32, shape, queries)
    k = lax.broadcasted_iota(jnp.int32, shape, 1 - queries)
    return (q & (shape[1 - queries] - 1)) >= k


def _tile_of_queries(numbers: Any, shares: int, t: _Tiling) -> jax.Array:
    """Which tile of the sequence a kernel that runs over queries works on, the last ones first."""
    return _place(lax.div(pl.num_programs(0) - 1 - pl.program_id(0), shares), numbers, t)


def _forward_kernel(
    numbers: Any, q_ref: Any, keys: _Keys, o_ref: Any, lse_ref: Any, *, t: _Tiling, shares: int
) -> None:
    """Output and log-sum-exp of one tile of queries of one or two heads."""
    i = _tile_of_queries(numbers, shares, t)
    q = q_ref[...]
    scale = q.shape[1] ** -0.5 * _LOG2_E

    def step(j: jax.Array, softmax: Softmax, diagonal: bool = False) -> Softmax:
        here = pl.ds(j * t.tile, t.tile)
        s = _dot(q, keys.k[here, :], trans_b=True) * scale
        if diagonal:
            s = jnp.where(_below_diagonal(s.shape, 0), s, MASKED)
        return softmax.over(s, lambda p: _dot(p.astype(q.dtype), keys.v[here, :]), jnp.exp2)

    softmax = Softmax.empty(q.shape)
    start, count, distant = _keys_seen(i, numbers, t)
    softmax = lax.fori_loop(0, count, lambda n, c: step(distant(n), c), softmax)
    softmax = lax.fori_loop(start, i, step, softmax)
    top, total, o = step(i, softmax, diagonal=True)
    o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = (top + jnp.log2(total)) * math.log(2)


def _dq_kernel(
    numbers: Any, queries: _Queries, keys: _Keys, dq_ref: Any, *, t: _Tiling, shares: int
) -> None:
    """dQ of one tile of queries of one or two heads."""
    i = _tile_of_queries(numbers, shares, t)
    q, do = queries.q[...], queries.do[...]
    lse, delta = queries.lse[...][:, None] * _LOG2_E, queries.delta[...][:, None]
    scale = q.shape[1] ** -0.5

    def step(j: jax.Array, dq: jax.Array, diagonal: bool = False) -> jax.Array:
        here = pl.ds(j * t.tile, t.tile)
        k = keys.k[here, :]
        p = jnp.exp2(_dot(q, k, trans_b=True) * (scale * _LOG2_E) - lse)
        if diagonal:
            p = jnp.where(_below_diagonal(p.shape, 0), p, 0.0)
        ds = p * (_dot(do, keys.v[here, :], trans_b=True) - delta)
        return dq + _dot(ds.astype(q.dtype), k)

    start, count, distant = _keys_seen(i, numbers, t)
    dq = jnp.zeros(q.shape, jnp.float32)
    dq = lax.fori_loop(0, count, lambda n, dq: step(distant(n), dq), dq)
    dq = step(i, lax.fori_loop(start, i, step, dq), diagonal=True)
    dq_ref[...] = (dq * scale).astype(dq_ref.dtype)


def _dkv_kernel(
    numbers: Any,
    keys: _Keys,
    queries: _Queries,
    dk_ref: Any,
    dv_ref: Any,
    *,
    t: _Tiling,
    shares: int,
) -> None:
    """dK and dV of one tile of keys, summed over the query heads that share it."""
    j = pl.program_id(0)
    k, v = keys.k[...], keys.v[...]
    scale = k.shape[1] ** -0.5

    def step(m: jax.Array, carry: Any, diagonal: bool = False) -> Any:
        dk, dv = carry
        here = pl.ds(m * t.tile, t.tile)
        q, do = queries.q[here, :], queries.do[here, :]
        p = _dot(k, q, trans_b=True) * (scale * _LOG2_E) - queries.lse[here][None, :] * _LOG2_E
        p = jnp.exp2(p)  # (keys, queries)
        if diagonal:
            p = jnp.where(_below_diagonal(p.shape, 1), p, 0.0)
        dv = dv + _dot(p.astype(do.dtype), do)
        ds = p * (_dot(v, do, trans_b=True) - queries.delta[here][None, :])
        return dk + _dot(ds.astype(q.dtype), q), dv

    zero = jnp.zeros(k.shape, jnp.float32)
    first, past, end = (
        _held_before(i, numbers, t) * shares for i in (j, j + 1, _queries_end(j, numbers, t))
    )
    carry = lax.fori_loop(first, past, functools.partial(step, diagonal=True), (zero, zero))
    dk, dv = lax.fori_loop(past, end, step, carry)
    dk_ref[...], dv_ref[...] = (dk * scale).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


# ------------------------------------------------------------------------- calling the kernels


def _call(
    kernel: functools.partial,
    *,
    numbers: jax.Array,
    interpret: bool,
    size: int,
    last_first: bool,
    tiled: Any,
    whole: Any,
    results: Any,
) -> Any:
    """Runs a kernel for each part, of `size` rows, of each sequence and KV head.

    It gets, in this order, the KV head's `numbers`, that part of the `tiled` arrays, all rows of
    the `whole` ones, and that part of the results, one by one.
    """
    N, rows, H = jax.tree.leaves(tiled)[0].shape
    parts, K = rows // size, len(numbers)

    def part(x: Any) -> pl.BlockSpec:
        def place(p: Any, n: Any) -> tuple[Any, ...]:
            return (n, parts - 1 - p if last_first else p, 0)[: x.ndim]

        return pl.BlockSpec((None, size, *x.shape[2:]), place)

    def all_rows(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda p, n: (n, 0, 0)[: x.ndim])

    numbers_of_head = pl.BlockSpec((None, numbers.shape[1]), lambda p, n: (lax.rem(n, K), 0))
    return pl.pallas_call(
        kernel,
        grid=(parts, N),
        in_specs=[numbers_of_head, jax.tree.map(part, tiled), jax.tree.map(all_rows, whole)],
        out_specs=jax.tree.map(part, results),
        out_shape=results,
        compiler_params=triton.CompilerParams(
            num_warps=4 if size * H <= 64 * 64 else 8, num_stages=3
        ),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )(numbers, tiled, whole)


def _rows(x_BTKG: jax.Array, t: _Tiling) -> jax.Array:
    """Tiles of queries, those of a group's heads after each other: (B K, T G, ...), 0 past T."""
    B, T, K, G, *rest = x_BTKG.shape
    x = padded(x_BTKG, 1, after=-T % t.tile).reshape(B, -1, t.tile, K, G, *rest)
    return x.transpose(0, 3, 1, 4, 2, *range(5, x.ndim)).reshape(B * K, -1, *rest)


def _positions(x_NR: jax.Array, shape: tuple[int, ...], t: _Tiling) -> jax.Array:
    """The inverse of `_rows`."""
    B, T, K, G, *rest = shape
    x = x_NR.reshape(B, K, -1, G, t.tile, *rest)
    return x.transpose(0, 2, 4, 1, 3, *range(5, x.ndim)).reshape(B, -1, K, G, *rest)[:, :T]


def _keys(x: Operands, t: _Tiling) -> _Keys:
    """Keys and values with 0 past S."""

    def of(x_BSKH: jax.Array) -> jax.Array:
        B, S, K, H = x_BSKH.shape
        return padded(x_BSKH, 1, after=-S % t.tile).swapaxes(1, 2).reshape(B * K, -1, H)

    return _Keys(of(x.k_BSKH), of(x.v_BSKH))
