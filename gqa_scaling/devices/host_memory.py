"""How the C library keeps the memory of a CPU between steps; without jax, as it must come first."""

import ctypes
import os
from pathlib import Path

DEVICES = Path("/dev")
# What a driver puts there for each accelerator: TPUs (two kinds), NVIDIA's and AMD's GPUs.
ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")


def computes_on_cpu() -> bool:
    """Whether jax will compute on the CPU, as far as can be told before it starts."""
    named = os.environ.get("JAX_PLATFORMS", "")
    if named:
        return named.split(",")[0] == "cpu"
    return not any(any(DEVICES.glob(pattern)) for pattern in ACCELERATORS)


def keep_host_memory() -> None:
    """Have glibc keep freed memory for the next step; other C libraries are left alone.

    By default each large buffer goes back to the system when freed and is faulted in anew, page
    by page, at the next step: that made elementwise work on a CPU five times slower. To be called
    before jax starts its threads. A thread that has an arena of its own by then maps whatever is
    larger than 64 MiB all the same: a step of the laptop study's largest model took 25,518 page
    faults, and a seventh of its processor time went into them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # <malloc.h>
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)
