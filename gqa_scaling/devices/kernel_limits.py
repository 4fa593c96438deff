"""What the attention kernels cannot take, each limit stated once; arithmetic only, no jax.

Attention asks here before it starts a kernel, and so does a plan, which may have no device at hand:
what a kernel would refuse on a pod is known before the pod is paid for.

Splash, the kernel for TPUs, reads from scalar memory which tiles of keys each tile of queries
visits. How large those tables are follows from how it walks over its tiles (`walk`), which is told
here too.
"""

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from typing import NamedTuple

from gqa_scaling.context_sharding import Blocks, HeadPattern
from gqa_scaling.hardware import has_large_shared_memory

NEVER = 2**30  # a position after every query
DENSE = HeadPattern(block=NEVER, local=1)  # a head that sees all keys before it, as a pattern

KERNEL_PLATFORM = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}  # the others run on any


def kernel_limit(
    name: str,
    kinds: Collection[HeadPattern | None],
    *,
    T: int,
    context: int,
    head_dim: int,
    dtype: str,
    device: str = "",
) -> str:
    """What keeps a kernel from T positions on `context` devices; "" when nothing does.

    `kinds` are the patterns of the heads without their offsets, None or `DENSE` for dense ones.
    `device` is the `device_kind` that jax tells, "" for an accelerator that a plan names.
    """
    if name == "cudnn":
        patterned = any(kind not in (None, DENSE) for kind in kinds)
        return cudnn_limit(head_dim, dtype, patterned, context)
    if name == "triton":
        part = T // (2 * context) if context > 1 else None
        limits = (
            triton_limit(head_dim, kind.block if kind else None, part, device) for kind in kinds
        )
        return next(filter(None, limits), "")
    return splash_limit(T // context, T, 1 if context == 1 else 2, kinds)


# ---------------------------------------------------------------------------------------- GPUs

TRITON_HEAD_SIZES = (16, 32, 64, 128)
TRITON_UNIT = 16  # the least tile of positions that tensor cores multiply
CUDNN_UNIT, CUDNN_LARGEST_HEAD = 8, 128


def triton_limit(head_dim: int, block: int | None, part: int | None, device: str = "") -> str:
    """What keeps the kernel from heads of this size; "" when nothing does.

    `block` is that of the pattern, None for dense heads. `part` is the length of each of the two
    runs of positions that a device holds of a sequence, None when it holds all of it.
    """
    if head_dim not in TRITON_HEAD_SIZES:
        *most, last = map(str, TRITON_HEAD_SIZES)
        return f"needs a head_dim of {', '.join(most)} or {last}, not {head_dim}"
    if head_dim == TRITON_HEAD_SIZES[-1] and not has_large_shared_memory(device):
        return (
            f"needs up to 160 KB of shared memory for head_dim={head_dim}, as an A100, H100, H200 or "
            f"B200 has; {device} may have less"
        )
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
SCALAR_MEMORY = 2**20 - 2**16  # bytes of a TPU core, less some for the compiler


def splash_limit(T: int, S: int, parts: int, kinds: Collection[HeadPattern | None]) -> str:
    """What keeps the kernel from T queries in `parts` runs on S keys; "" when nothing does.

    `kinds` are the patterns of the heads, None or `DENSE` for dense ones. Head size and dtype do
    not matter: heads of 8 to 1,024 values and both dtypes were compiled.
    """
    if S >= NEVER:
        return f"counts positions up to {NEVER:,}, not {S:,}"
    for kind in kinds:
        found = walk(T, parts, S, kind)
        needed = metadata_bytes(T, kind, parts, S)
        if needed > SCALAR_MEMORY:
            name = "a dense head" if kind in (None, DENSE) else str(kind)
            return (
                f"needs {needed:,} bytes of tables for {name} and {T:,} queries of T={S:,}, but the "
                f"scalar memory of a TPU core has room for {SCALAR_MEMORY:,} (a shorter context, a "
                "larger context axis or a sparser pattern needs less)"
            )
        stride = found.kind.stride or 1
        if found.stripe and stride.bit_length() + position_bits(found) > 31:
            return f"needs a stride that fits 31 bits beside T={S:,}, not {stride}"
    return ""


def most_distant(kind: HeadPattern, S: int) -> tuple[int, int]:
    """Blocks that some of S queries see beyond their window: sinks, and stripes of the offset that
    has most."""
    beyond = max(0, -(-S // kind.block) - kind.local)
    sinks = min(kind.sinks, beyond)
    return sinks, -(-(beyond - sinks) // kind.stride) if kind.stride else 0


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
    near_rows: int = 0  # the most tiles of natural keys that one of queries sees
    near_columns: int = 0  # the most tiles of queries that see one of natural keys

    def keys_seen(self, tile: Blocks) -> tuple[Blocks, Blocks]:
        """The first tile of natural keys that the tile of queries at a position sees, and one past
        the last."""
        first = (tile // self.kind.block - self.kind.local + 1) * self.kind.block
        last, most = (tile + self.block - 1) // self.block, self.near // self.block - 1
        return first * (first > 0) // self.block, last - (last - most) * (last > most) + 1

    def left_by(self, tile: Blocks) -> Blocks:
        """The position from which on no query has a key of the tile at a position in its window."""
        return ((tile + self.block - 1) // self.kind.block + self.kind.local) * self.kind.block


def tile_side(run: int, S: int, kind: HeadPattern) -> int:
    """Positions on a tile's side. A step of the grid has a fixed cost, also where it does nothing:
    large tiles for dense heads, whose grid is half empty."""
    most = 1024 if kind == DENSE and S > 4096 else 512
    return _up(-(-run // -(-run // most)), LANES)


@functools.lru_cache(maxsize=1024)
def walk(T: int, parts: int, S: int, kind: HeadPattern | None) -> Walk:
    """The walk of T queries in `parts` equal runs over S keys, all heads of one kind."""
    if kind is None or not kind.hides(S):
        kind = DENSE
    run = T // parts
    block = tile_side(run, S, kind)
    sinks, stripe = most_distant(kind, S)
    far, near = _up((sinks + stripe) * kind.block, block), _up(S, block)
    rows = parts * _up(run, block) // block
    found = Walk(kind, parts, run, block, rows, sinks, stripe, far, near)
    if kind == DENSE:
        return found._replace(near_rows=near // block, near_columns=rows)
    tiles = [i + j for i in range(0, S, run) for j in range(0, run, block)]  # of all devices
    seen_by = (
        bisect_left(tiles, found.left_by(j)) - bisect_right(tiles, j - block)
        for j in range(0, near, block)
    )
    return found._replace(
        near_rows=max(end - first for first, end in map(found.keys_seen, tiles)),
        near_columns=min(rows, max(seen_by)),
    )


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
