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
memory. Nothing was timed, and nothing has run on a GPU. float32 is exact and slow, for comparisons.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.kernel_limits import triton_limit
from gqa_scaling.model.attention.operands import check_operands

_MASKED = -1e30  # finite, so that exp2(masked - masked) is no NaN
_NEVER = 2**29  # blocks: more than any sequence has
_LOG2_E = math.log2(math.e)


def forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    kind: HeadPattern | None,
    offset_K: jax.Array,
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """On shards: causal attention of T queries to all S keys, in natural order.

    Returns o_BTKGH in q's dtype and lse_BTKG, the natural log of the sum of exponentials of scaled
    scores, float32. All heads are of one `kind` (static; None: dense) but for their offsets, int32,
    which are read where the kind has a stride. The queries are one or two equal runs of positions
    that begin at `starts`, int32, ascending multiples of a run's length: one run of all S = T
    positions, or the two parts that a device holds in zig-zag order (`layout.zigzag`).

    Any T where there is one run: what lacks to whole tiles is padded. Softmax in float32, scores
    scaled by 1/sqrt(H); memory is O(S). `interpret` runs the kernels anywhere, slowly. Raises
    `ValueError` where the shapes do not fit each other, or `triton_limit` names what does not fit.
    """
    check_operands(q_BTKGH, k_BSKH, v_BSKH, kind, offset_K, starts)
    t = _tiling(q_BTKGH, kind, starts)
    q, k, v = _rows(q_BTKGH, t), _keys(k_BSKH, t), _keys(v_BSKH, t)
    together = _together(t)
    o, lse = _call(
        functools.partial(_forward_kernel, t=t, shares=t.group // together),
        numbers=_numbers(kind, offset_K, starts, t, k_BSKH.shape[2]),
        interpret=interpret,
        size=together * t.tile,
        last_first=True,
        tiled=(q,),
        whole=(k, v),
        results=[(q.shape, q.dtype), (q.shape[:2], jnp.float32)],
    )
    return _positions(o, q_BTKGH.shape, t), _positions(lse, q_BTKGH.shape[:-1], t)


def backward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    o_BTKGH: jax.Array,
    lse_BTKG: jax.Array,
    do_BTKGH: jax.Array,
    kind: HeadPattern | None,
    offset_K: jax.Array,
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """On shards: dq_BTKGH in q's dtype, and dk_BSKH and dv_BSKH in float32 of all S keys, what
    these queries contribute. o and lse are of `forward`, and so is the rest."""
    check_operands(q_BTKGH, k_BSKH, v_BSKH, kind, offset_K, starts)
    t, (B, S, K, H) = _tiling(q_BTKGH, kind, starts), k_BSKH.shape
    delta_BTKG = jnp.sum(do_BTKGH.astype(jnp.float32) * o_BTKGH.astype(jnp.float32), axis=-1)
    q, do, lse, delta = (_rows(x, t) for x in (q_BTKGH, do_BTKGH, lse_BTKG, delta_BTKG))
    k, v = _keys(k_BSKH, t), _keys(v_BSKH, t)
    together, numbers = _together(t), _numbers(kind, offset_K, starts, t, K)
    (dq,) = _call(
        functools.partial(_dq_kernel, t=t, shares=t.group // together),
        numbers=numbers,
        interpret=interpret,
        size=together * t.tile,
        last_first=True,
        tiled=(q, do, lse, delta),
        whole=(k, v),
        results=[(q.shape, q.dtype)],
    )
    dkv = _call(
        functools.partial(_dkv_kernel, t=t, shares=t.group),
        numbers=numbers,
        interpret=interpret,
        size=t.tile,
        last_first=False,
        tiled=(k, v),
        whole=(q, do, lse, delta),
        results=[(k.shape, jnp.float32), (v.shape, jnp.float32)],
    )
    dk, dv = (x.reshape(B, K, -1, H).transpose(0, 2, 1, 3)[:, :S] for x in dkv)
    return _positions(dq, q_BTKGH.shape, t), dk, dv


# ---------------------------------------------------------------------------- what is visible


class _Tiling(NamedTuple):
    """What is known when the kernels are compiled."""

    tile: int  # positions
    run: int  # tiles of queries of each run
    group: int  # query heads of a KV head
    ratio: int  # tiles in a block
    local: int  # blocks, as the next two
    sinks: int
    stride: int


def _tiling(q_BTKGH: jax.Array, kind: HeadPattern | None, starts: jax.Array) -> _Tiling:
    """Tiles are a power of two of positions, up to 64, that divides blocks and runs; of float32,
    which must do without tensor cores, up to 32."""
    (T, _, G, H), parts = q_BTKGH.shape[1:], starts.size
    reason = triton_limit(H, kind.block if kind else None, T // parts if parts > 1 else None)
    if reason:
        raise ValueError(f"this kernel {reason}: change it, or take another implementation")
    most = 32 if q_BTKGH.dtype == jnp.float32 else 64
    tile = math.gcd(most, kind.block if kind else 0, T // parts if parts > 1 else 0)
    run = -(-T // parts // tile)
    if kind is None:
        return _Tiling(tile, run, G, 1, _NEVER, 0, 1)
    return _Tiling(tile, run, G, kind.block // tile, kind.local, kind.sinks, kind.stride or 1)


def _numbers(
    kind: HeadPattern | None, offset_K: jax.Array, starts: jax.Array, t: _Tiling, K: int
) -> jax.Array:
    """What is known when the kernels run, for each KV head: the block where its stripe begins, the
    tiles where the runs of queries begin, unused."""
    stripe_K = jnp.full(K, _NEVER)
    if kind is not None and kind.stride is not None:
        stripe_K = kind.sinks + -(offset_K + kind.sinks) % kind.stride
    first, second = jnp.append(starts // t.tile, 2 * _NEVER)[:2]
    columns = stripe_K, jnp.full(K, first), jnp.full(K, second), jnp.zeros_like(stripe_K)
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def _together(t: _Tiling) -> int:
    """Query heads whose tiles share a load of keys."""
    return 2 if t.group % 2 == 0 else 1


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
    t: _Tiling,
    shares: int,
) -> None:
    """Output and log-sum-exp of one tile of queries of one or two heads."""
    i = _place(lax.div(pl.num_programs(0) - 1 - pl.program_id(0), shares), numbers, t)
    q = q_ref[...]
    scale = q.shape[1] ** -0.5 * _LOG2_E

    def step(j: jax.Array, carry: Any, diagonal: bool = False) -> Any:
        top, total, o = carry
        here = pl.ds(j * t.tile, t.tile)
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
    start, count, distant = _keys_seen(i, numbers, t)
    carry = lax.fori_loop(0, count, lambda n, c: step(distant(n), c), carry)
    carry = lax.fori_loop(start, i, step, carry)
    top, total, o = step(i, carry, diagonal=True)
    o_ref[...] = (o / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = (top + jnp.log2(total)) * math.log(2)


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
    t: _Tiling,
    shares: int,
) -> None:
    """dQ of one tile of queries of one head."""
    i = _place(lax.div(pl.num_programs(0) - 1 - pl.program_id(0), shares), numbers, t)
    q, do = q_ref[...], do_ref[...]
    lse, delta = lse_ref[...][:, None] * _LOG2_E, delta_ref[...][:, None]
    scale = q.shape[1] ** -0.5

    def step(j: jax.Array, dq: jax.Array, diagonal: bool = False) -> jax.Array:
        here = pl.ds(j * t.tile, t.tile)
        k = k_ref[here, :]
        p = jnp.exp2(_dot(q, k, trans_b=True) * (scale * _LOG2_E) - lse)
        if diagonal:
            p = jnp.where(_below_diagonal(p.shape, 0), p, 0.0)
        ds = p * (_dot(do, v_ref[here, :], trans_b=True) - delta)
        return dq + _dot(ds.astype(q.dtype), k)

    start, count, distant = _keys_seen(i, numbers, t)
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
    t: _Tiling,
    shares: int,
) -> None:
    """dK and dV of one tile of keys, summed over the query heads that share it."""
    j = pl.program_id(0)
    k, v = k_ref[...], v_ref[...]
    scale = k.shape[1] ** -0.5

    def step(m: jax.Array, carry: Any, diagonal: bool = False) -> Any:
        dk, dv = carry
        here = pl.ds(m * t.tile, t.tile)
        q, do = q_ref[here, :], do_ref[here, :]
        p = _dot(k, q, trans_b=True) * (scale * _LOG2_E) - lse_ref[here][None, :] * _LOG2_E
        p = jnp.exp2(p)  # (keys, queries)
        if diagonal:
            p = jnp.where(_below_diagonal(p.shape, 1), p, 0.0)
        dv = dv + _dot(p.astype(do.dtype), do)
        ds = p * (_dot(v, do, trans_b=True) - delta_ref[here][None, :])
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
            pl.BlockSpec((None, numbers.shape[1]), lambda p, n: (lax.rem(n, K), 0)),
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


def _rows(x_BTKG: jax.Array, t: _Tiling) -> jax.Array:
    """Tiles of queries, those of a group's heads after each other: (B K, T G, ...), 0 past T."""
    B, T, K, G, *rest = x_BTKG.shape
    x = jnp.pad(x_BTKG, [(0, 0), (0, -T % t.tile)] + [(0, 0)] * (x_BTKG.ndim - 2))
    x = x.reshape(B, -1, t.tile, K, G, *rest)
    return x.transpose(0, 3, 1, 4, 2, *range(5, x.ndim)).reshape(B * K, -1, *rest)


def _positions(x_NR: jax.Array, shape: tuple[int, ...], t: _Tiling) -> jax.Array:
    """The inverse of `_rows`."""
    B, T, K, G, *rest = shape
    x = x_NR.reshape(B, K, -1, G, t.tile, *rest)
    return x.transpose(0, 2, 4, 1, 3, *range(5, x.ndim)).reshape(B, -1, K, G, *rest)[:, :T]


def _keys(x_BSKH: jax.Array, t: _Tiling) -> jax.Array:
    """(B K, S, H), 0 past S."""
    B, S, K, H = x_BSKH.shape
    x = jnp.pad(x_BSKH, [(0, 0), (0, -S % t.tile), (0, 0), (0, 0)])
    return x.transpose(0, 2, 1, 3).reshape(B * K, -1, H)
