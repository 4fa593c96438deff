"""What the attention kernels cannot take, each limit stated once; arithmetic only, no jax.

The kernels ask here before they start, and so does a plan, which may have no device at hand: what a
kernel would refuse on a pod is known before the pod is paid for.

Splash, the kernel for TPUs, reads from scalar memory which tiles of keys each tile of queries
visits. How large those tables are follows from how it walks over its tiles (`walk`), which is told
here too.
"""

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from gqa_scaling.context_sharding import HeadPattern

# ---------------------------------------------------------------------------------------- GPUs

TRITON_HEAD_SIZES = (16, 32, 64, 128)
TRITON_UNIT = 16  # the least tile of positions that tensor cores multiply
CUDNN_UNIT, CUDNN_LARGEST_HEAD = 8, 128


def triton_limit(head_dim: int, block: int | None, part: int | None) -> str:
    """What keeps the kernel from heads of this size; "" when nothing does.

    `block` is that of the pattern, None when all heads are dense. `part` is the length of each of
    the two runs of positions that a device holds of a sequence, None when it holds all of it.
    """
    if head_dim not in TRITON_HEAD_SIZES:
        *most, last = map(str, TRITON_HEAD_SIZES)
        return f"needs a head_dim of {', '.join(most)} or {last}, not {head_dim}"
    if block is not None and block % TRITON_UNIT:
        return f"needs a pattern.block that is a multiple of {TRITON_UNIT}, not {block}"
    if part is not None and part % TRITON_UNIT:
        return (
            f"needs parts of a multiple of {TRITON_UNIT} positions, and the context axis makes "
            f"{part}"
        )
    return ""


def cudnn_limit(head_dim: int, dtype: str, patterned: bool, context: int) -> str:
    """What keeps NVIDIA's fused kernel from such heads on `context` devices; "" when nothing does."""
    if patterned:
        return "is dense only, and the model has a pattern"
    if dtype != "bfloat16":
        return f"needs dtype=bfloat16, not {dtype}"
    if head_dim % CUDNN_UNIT or head_dim > CUDNN_LARGEST_HEAD:
        return (
            f"needs a head_dim that is a multiple of {CUDNN_UNIT} up to {CUDNN_LARGEST_HEAD}, "
            f"not {head_dim}"
        )
    return f"needs context=1, not {context}" if context > 1 else ""


# ---------------------------------------------------------------------------------------- TPUs

LANES = 128  # a vector register holds rows of so many values
NEVER = 2**30  # a position after every query
DENSE = HeadPattern(block=NEVER, local=1)
SCALAR_MEMORY = 2**20 - 2**16  # bytes of a TPU core, less some for the compiler


def splash_limit(T: int, S: int, parts: int, kinds: Iterable[HeadPattern | None]) -> str:
    """What keeps the kernel from T queries in `parts` runs on S keys; "" when nothing does.

    `kinds` are the patterns of the heads, None for dense ones. Head size and dtype do not matter:
    heads of 8 to 1,024 values and both dtypes were compiled.
    """
    if S >= NEVER:
        return f"counts positions up to {NEVER:,}, not {S:,}"
    for kind in kinds:
        needed = metadata_bytes(T, kind, parts, S)
        if needed > SCALAR_MEMORY:
            return (
                f"needs {needed:,} bytes of tables for {kind or 'a dense head'} and {T:,} queries of "
                f"T={S:,}, but the scalar memory of a TPU core has room for {SCALAR_MEMORY:,} (a "
                "shorter context, a larger context axis or a sparser pattern needs less)"
            )
        if kind is not None and kind.stride is not None:
            found = walk(T, parts, S, kind)
            if found.stripe and kind.stride.bit_length() + position_bits(found) > 31:
                return f"needs a stride that fits 31 bits beside T={S:,}, not {kind.stride}"
    return ""


class Walk(NamedTuple):
    """How a device's queries walk over the keys of a head: `far` places for distant keys, then
    `near` for natural ones, both whole tiles of `block`."""

    kind: HeadPattern
    parts: int  # runs of queries
    run: int  # queries of each
    block: int
    rows: int  # tiles of queries
    sinks: int  # distant blocks
    stripe: int
    far: int
    near: int
    near_rows: int  # the most tiles of natural keys that one of queries sees
    near_columns: int  # the most tiles of queries that see one of natural keys


def tile_side(run: int, S: int, kind: HeadPattern) -> int:
    """Positions on a tile's side. A step of the grid has a fixed cost, also where it does nothing:
    large tiles for dense heads, whose grid is half empty."""
    most = 1024 if kind == DENSE and S > 4096 else 512
    return _up(-(-run // -(-run // most)), LANES)


@functools.lru_cache(maxsize=1024)
def walk(T: int, parts: int, S: int, kind: HeadPattern | None) -> Walk:
    """The walk of T queries in `parts` equal runs over S keys, all heads of one kind."""
    if kind is None or kind.window >= S or kind.stride == 1:  # it hides nothing
        kind = DENSE
    run = T // parts
    block = tile_side(run, S, kind)
    beyond = -(-S // kind.block) - kind.local  # blocks that leave some query's window
    sinks = min(kind.sinks, beyond)
    stripe = -(-(beyond - sinks) // kind.stride) if kind.stride else 0
    far = _up((sinks + stripe) * kind.block, block)
    rows, near = parts * _up(run, block) // block, _up(S, block)
    near_rows, near_columns = near // block, rows
    if kind != DENSE:
        tiles = [i + j for i in range(0, S, run) for j in range(0, run, block)]  # of all devices
        near_rows = max(
            min(-(-t // block) + 1, near // block)
            - max(0, (t // kind.block - kind.local + 1) * kind.block) // block
            for t in tiles
        )
        seen_by = (
            bisect_left(tiles, ((j + block - 1) // kind.block + kind.local) * kind.block)
            - bisect_right(tiles, j - block)
            for j in range(0, near, block)
        )
        near_columns = min(rows, max(seen_by))
    return Walk(kind, parts, run, block, rows, sinks, stripe, far, near, near_rows, near_columns)


def metadata_bytes(T: int, kind: HeadPattern | None, parts: int = 1, S: int | None = None) -> int:
    """Bytes of scalar memory for one head's tables, in the kernel that needs most.

    T queries in that many runs, S keys (default T). The compiler rounds the rows of a table up to
    128 entries and their number to 8.
    """
    found = walk(T, parts, S or T, kind)
    far, near, rows = found.far // found.block, found.near // found.block, found.rows

    def held(lines: int, entries: int, most: int) -> int:
        return _up(lines, 8) * _up(entries, LANES) * (1 + entry_bytes(most))

    return max(
        held(rows, far + found.near_rows, far + near),
        held(rows, far, rows),
        held(found.near_columns, near, rows),
    )


def entry_bytes(most: int) -> int:
    """Bytes of the smallest signed integer that holds numbers below `most`."""
    return 1 if most <= 2**7 else 2 if most <= 2**15 else 4


def position_bits(found: Walk) -> int:
    """Bits for the positions of a walk's queries."""
    return (found.near + found.block).bit_length()


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
