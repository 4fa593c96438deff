"""What accelerators can do and cost, and how slices of them are named.

`plan`, `launch` and cost objectives read the named rows.

Peaks are the vendors' dense bf16 figures for one chip (v5e, v5p, v6e) or one GPU. The memory of a
TPU chip is what its compiler lets a program use. Prices are on-demand list prices in US dollars an
hour, rounded, and differ by region and contract: give your own with `--price`. The `cpu` row
stands for any CPU: its peak is measured when it is used.
"""

import functools
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace

from gqa_scaling.config import UserError, between, require
from gqa_scaling.fields import did_you_mean

GIB = 2**30
LEAST_MFU, MOST_DOLLARS = (
    1e-6,
    1e6,
)  # beyond these a figure is a slip, and prints hundreds of digits


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
        between("mfu", self.mfu, LEAST_MFU, 1)
        between("price", self.price, 0, MOST_DOLLARS, "dollars an hour")

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
        Hardware("h100-pcie", 7.56e14, 2.0e12, 80 * GIB, 7.0),  # cards, slower than those above
        Hardware("h100-nvl", 8.35e14, 3.9e12, 94 * GIB, 7.0),
        Hardware("h200-nvl", 8.36e14, 4.8e12, 141 * GIB, 8.0),
    )
}


def hardware(name: str) -> Hardware:
    """The named row; an unknown name is refused with the nearest."""
    known = ", ".join(HARDWARE)
    require(
        name in HARDWARE, f"unknown hardware {name!r}{did_you_mean(name, HARDWARE)}; known: {known}"
    )
    return HARDWARE[name]


FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
TPU_SHAPES = {"v5e": FLAT, "v6e": FLAT, "v5p": CUBES}  # for each number of chips the usual one
LARGEST_V5P = (16, 16, 24)  # and from 4x4x4 on whatever has multiples of 4
GPUS, GPU_COUNTS = ("a100", "h100", "h200"), (1, 2, 4, 8, 16, 32, 64)
GPUS_PER_HOST = 8


@dataclass(frozen=True)
class Slice:
    """Accelerators that one job has to itself: TPU chips wired to each other, or GPUs.

    `kind` is a row of HARDWARE. `shape` is how the chips of a TPU slice are wired; of GPUs it is
    how many there are. A program may also span several TPU `slices` of one shape, which a slower
    network joins.

    A slice has two spellings, and `slice_of` reads both. `name` says the shape, as the compiler
    wants it: v5e:16x16. `vendor_name` says the size as its vendor counts: v5e-256 is 256 chips, but
    v5p-128 is 128 cores, which are 64 chips. Of GPUs both are 8xH100.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.kind in TPU_SHAPES

    @property
    def chips(self) -> int:
        """TPU chips, or GPUs, of all slices together."""
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Machines that the chips are on; up to 8 flat TPU chips share one, beyond that 4."""
        flat_on_one = self.kind != "v5p" and math.prod(self.shape) <= 8
        each = GPUS_PER_HOST if flat_on_one or not self.is_tpu else 4
        return self.slices * max(1, math.prod(self.shape) // each)

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def name(self) -> str:
        """The spelling that tells the shape: v5e:16x16, 2xv5e:16x16 or 8xH100."""
        return self._spelled(f"{self.kind}:{'x'.join(map(str, self.shape))}")

    @property
    def vendor_name(self) -> str:
        """The spelling that tells the size: v5e-256, 2xv5e-256 or 8xH100."""
        return self._spelled(f"{self.kind}-{self._counted // self.slices}")

    @property
    def cloud_type(self) -> str:
        """The TPU type as Google Cloud spells it: v5litepod-16, v6e-16, v5p-128."""
        return f"{'v5litepod' if self.kind == 'v5e' else self.kind}-{self._counted}"

    @property
    def _counted(self) -> int:
        """What the vendor counts: the cores of v5p, two on each chip, else the chips."""
        return self.chips * (2 if self.kind == "v5p" else 1)

    def _spelled(self, one: str) -> str:
        if not self.is_tpu:
            return f"{self.chips}x{self.kind.upper()}"
        return f"{self.slices}x{one}" if self.slices > 1 else one


def _sides(shape: str) -> tuple[int, ...]:
    return tuple(int(side) for side in shape.split("x"))


_USUAL = [Slice(kind, _sides(shape)) for kind, shapes in TPU_SHAPES.items() for shape in shapes]
_USUAL += [Slice(kind, (count,)) for kind in GPUS for count in GPU_COUNTS]
SLICES = {place.vendor_name: place for place in _USUAL}  # of each kind from small to large


def slice_of(name: str) -> Slice:
    """The slice of either spelling: v5e:16x16 or v5e-256, 8xH100, 2xv5e:16x16 for two slices.

    Raises UserError for a kind, size or shape that no slice has, naming those there are.
    """
    if name in SLICES:
        return SLICES[name]
    several = re.fullmatch(r"(\d{1,6})x(\D.*)", name)
    slices, one = (int(several[1]), several[2]) if several else (1, name)
    require(slices > 0, f"slice {name!r} must have at least one slice")
    if one in SLICES and SLICES[one].is_tpu:
        return replace(SLICES[one], slices=slices)
    shaped = re.fullmatch(r"(\w+):(\d{1,6}(?:x\d{1,6})+)", one)
    if shaped is None:
        raise UserError(
            f"unknown slice {name!r}{did_you_mean(name, SLICES)}; they are v5e-16, v6e-64, v5p-128, 8xH100, "
            "8xH200, ..., or by their shape v5e:4x4, v5p:4x4x8, ...; 2xv5e:16x16 is two slices"
        )
    kind, shape = shaped[1], shaped[2]
    known = ", ".join(TPU_SHAPES)
    require(
        kind in TPU_SHAPES,
        f"unknown TPU {kind!r} in {name!r}{did_you_mean(kind, TPU_SHAPES)}; known: {known}",
    )
    more = ", or three multiples of 4 in rising order up to 16x16x24" if kind == "v5p" else ""
    require(
        shape in TPU_SHAPES[kind] or (kind == "v5p" and _is_large_v5p(_sides(shape))),
        f"no {kind} slice is {shape}: it may be {', '.join(TPU_SHAPES[kind])}{more}",
    )
    return Slice(kind, _sides(shape), slices)


def _is_large_v5p(sides: tuple[int, ...]) -> bool:
    rising = len(sides) == 3 and list(sides) == sorted(sides)
    return rising and all(
        side % 4 == 0 and 0 < side <= most for side, most in zip(sides, LARGEST_V5P, strict=True)
    )


def hardware_of(name: str) -> tuple[Hardware, int | None]:
    """The row of v5e, or the row and the number of devices of a slice such as v5e-16 or 8xH100.

    Raises UserError for a name that is neither.
    """
    if name in HARDWARE or not re.search(r"^\d|[-:]", name):
        return hardware(name), None
    place = slice_of(name)
    return hardware(place.kind), place.chips


def changed(row: Hardware, mfu: float | None = None, price: float | None = None) -> Hardware:
    """The row with one's own MFU or price in dollars an hour."""
    return replace(
        row,
        mfu=row.mfu if mfu is None else mfu,
        price=row.price if price is None else price,
    )


def detected(kind: str, devices: int = 1) -> Hardware | None:
    """The row for a JAX `device_kind` such as 'TPU v5 lite' or 'NVIDIA H200'; None if unknown.

    The `devices` that jax shows of one CPU share its peak, memory and price.
    """
    name = name_of(kind)
    if name != "cpu":
        return None if name is None else HARDWARE[name]
    row = HARDWARE["cpu"]
    return replace(
        row,
        peak_flops=measured_peak() / devices,
        memory=row.memory // devices,
        price=row.price / devices,
    )


def name_of(kind: str) -> str | None:
    """The name of the row for a JAX `device_kind`; None if unknown."""
    names = {"v5 lite": "v5e", "v5e": "v5e", "tpu v5": "v5p", "v6": "v6e"}  # first match counts
    names |= {"h100 pcie": "h100-pcie", "h100 nvl": "h100-nvl", "h200 nvl": "h200-nvl"}
    names |= {"a100": "a100", "h100": "h100", " h200": "h200"}  # not the GH200
    kind = kind.lower()
    return "cpu" if kind == "cpu" else next((names[part] for part in names if part in kind), None)


def has_large_shared_memory(kind: str) -> bool:
    """Whether a GPU of that `device_kind` gives a program 160 KB of memory that its threads share:
    those for data centres do, from the A100 on. An RTX, L4 or L40S gives 99 KB, and so may any
    other. "": one of HARDWARE, which all do."""
    large = r"\b(a30|a100|a800|h20|h100|h200|h800|gh200|b100|b200|b300|gb200|gb300)\b"
    return not kind or re.search(large, kind.lower()) is not None


def cores() -> list[int]:
    """The CPU cores this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


# The best of many products within a quarter of a second of CPU time, by one thread: so a machine that
# is busy with other things gives the same figure as an idle one.
_PRODUCTS = """
import time
import numpy as np

a, best = np.ones((512, 512), np.float32), float("inf")
end = time.process_time() + 0.25
while time.process_time() < end:
    start = time.process_time()
    a @ a
    best = min(best, time.process_time() - start)
print(2 * 512**3 / best)
"""
_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@functools.cache  # once in a process: it takes half a second
def measured_peak() -> float:
    """fp32 FLOP/s of the CPU cores that this process may use: those of one core in matrix products, by
    the CPU time that these take in a process of their own, times the number of cores."""
    environment = os.environ | dict.fromkeys(_THREADS, "1")
    command = [sys.executable, "-c", _PRODUCTS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return len(cores()) * float(done.stdout)
