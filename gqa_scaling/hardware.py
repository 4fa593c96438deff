"""What accelerators can do and cost: named rows that `plan` and cost objectives read.

Peaks are the vendors' dense bf16 figures for one chip (v5e, v5p, v6e) or one GPU. The memory of a
TPU chip is what its compiler lets a program use. Prices are on-demand list prices in US dollars an
hour, rounded, and differ by region and contract: give your own with `--price`. The `cpu` row
stands for any CPU: its peak is measured when it is used.
"""

import functools
import math
import os
import re
import time
from dataclasses import dataclass, replace

import numpy as np

from gqa_scaling.config import nearest, require

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One accelerator: FLOP/s, bytes/s, bytes of memory, dollars an hour.

    A run is predicted to take `start_seconds` (compiling, mostly), and for each step
    `step_seconds` and its model FLOPs at the share `mfu` of the peak.
    """

    name: str
    peak_flops: float
    bandwidth: float
    memory: int
    price: float
    mfu: float = 0.4
    step_seconds: float = 0.0
    start_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("peak_flops", "bandwidth", "memory"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be greater than 0")
        require(0 < self.mfu <= 1, f"mfu={self.mfu} must lie in (0, 1]")
        finite = 0 <= self.price < math.inf
        require(finite, f"price={self.price} must not be negative, and finite")

    @property
    def platform(self) -> str:
        """What JAX calls such devices: "cpu", "gpu" or "tpu"."""
        return "tpu" if self.name in TPU_SHAPES else "cpu" if self.name == "cpu" else "gpu"

    def seconds(self, flops: float, steps: int, devices: int = 1) -> float:
        """Predicted seconds for a run of that many model FLOPs and steps."""
        working = flops / (self.peak_flops * self.mfu * devices)
        return self.start_seconds + steps * self.step_seconds + working


HARDWARE = {
    h.name: h
    for h in (
        Hardware("cpu", 2.0e11, 2.0e10, 16 * GIB, 0.1, 0.15, 0.003, 4.0),
        Hardware("v5e", 1.97e14, 8.19e11, int(15.75 * GIB), 1.2),
        Hardware("v5p", 4.59e14, 2.765e12, int(95.74 * GIB), 4.2),
        Hardware("v6e", 9.18e14, 1.64e12, int(31.25 * GIB), 2.7),
        Hardware("a100", 3.12e14, 2.039e12, 80 * GIB, 3.7),
        Hardware("h100", 9.89e14, 3.35e12, 80 * GIB, 7.0),
        Hardware("h200", 9.89e14, 4.8e12, 141 * GIB, 8.0),
    )
}


def hardware(name: str) -> Hardware:
    """The named row; an unknown name is refused with the nearest."""
    known = ", ".join(HARDWARE)
    require(name in HARDWARE, f"unknown hardware {name!r}{nearest(name, HARDWARE)}; known: {known}")
    return HARDWARE[name]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
TPU_SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4")}
LARGEST_V5P = (16, 16, 24)  # and from 4x4x4 on whatever has multiples of 4


@dataclass(frozen=True)
class Topology:
    """TPU chips wired to each other: `slices` of one kind and shape, joined by a slower network."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def slice_name(self) -> str:
        """One slice, as libtpu spells it: v5e:16x16."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        return f"{self.slices}x{self.slice_name}" if self.slices > 1 else self.slice_name

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)


def topology(name: str) -> Topology:
    """The topology of a name such as v5e:16x16, v5p:4x4x8 or, for two slices, 2xv5e:16x16.

    Raises UserError for a kind or shape that no slice has, naming those there are.
    """
    found = re.fullmatch(r"(?:(\d{1,6})x)?(\w+):(\d{1,6}(?:x\d{1,6})+)", name)
    example = "such as v5e:16x16, v5p:4x4x8 or, for two slices, 2xv5e:16x16"
    require(found is not None, f"topology {name!r} must be KIND:SHAPE, {example}")
    assert found is not None
    slices, kind, shape = int(found[1] or 1), found[2], found[3]
    known = ", ".join(TPU_SHAPES)
    require(
        kind in TPU_SHAPES,
        f"unknown TPU {kind!r} in {name!r}{nearest(kind, TPU_SHAPES)}; known: {known}",
    )
    require(slices > 0, f"topology {name!r} must have at least one slice")
    sides = tuple(int(side) for side in shape.split("x"))
    cube = kind == "v5p" and len(sides) == 3 and list(sides) == sorted(sides)
    cube = cube and all(
        side % 4 == 0 and 0 < side <= most for side, most in zip(sides, LARGEST_V5P, strict=True)
    )
    shapes = ", ".join(TPU_SHAPES[kind])
    more = ", or three multiples of 4 in rising order up to 16x16x24" if kind == "v5p" else ""
    require(
        cube or shape in TPU_SHAPES[kind], f"no {kind} slice is {shape}: it may be {shapes}{more}"
    )
    return Topology(kind, sides, slices)


def changed(row: Hardware, mfu: float | None = None, price: float | None = None) -> Hardware:
    """The row with one's own MFU or price in dollars an hour."""
    changes = {k: v for k, v in (("mfu", mfu), ("price", price)) if v is not None}
    return replace(row, **changes)


def detected(kind: str, devices: int = 1) -> Hardware | None:
    """The row for a JAX `device_kind` such as 'TPU v5 lite' or 'NVIDIA H200'; None if unknown.

    The `devices` that jax shows of one CPU share its peak, memory and price.
    """
    kind = kind.lower()
    if kind == "cpu":
        row = HARDWARE["cpu"]
        share = {"memory": row.memory // devices, "price": row.price / devices}
        return replace(row, peak_flops=measured_peak() / devices, **share)
    names = {"v5 lite": "v5e", "v5e": "v5e", "tpu v5": "v5p", "v6": "v6e"}  # first match counts
    names |= {"a100": "a100", "h100": "h100", " h200": "h200"}  # not the GH200
    return next((HARDWARE[name] for part, name in names.items() if part in kind), None)


def cores() -> list[int]:
    """The CPU cores this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@functools.cache  # once in a process: it takes a second
def measured_peak(size: int = 1024, repeats: int = 20) -> float:
    """fp32 FLOP/s of this machine's CPU: the best of a few square matrix products."""
    a = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
