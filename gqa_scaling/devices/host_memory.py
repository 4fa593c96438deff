"""How the C library keeps the memory of a CPU between steps; without jax, as it must come first.

What a step needs beside its state is one block, asked for anew at each step. By default glibc gives a
large block back to the system when it is freed, and it is faulted in again in pages of 4 KiB. With huge
pages (2 MiB) that costs nothing to speak of. Where there are none, freed memory is kept instead; that
is as fast, but takes more of it: a small array can sit in the way of the block, which then
gets a second place, up to five of them (docs/performance.md).
"""

import ctypes
import os
import re
import sys
from pathlib import Path

DEVICES = Path("/dev")
# What a driver puts there for each accelerator: TPUs (two kinds), NVIDIA's and AMD's GPUs.
ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def computes_on_cpu() -> bool:
    """Whether jax will compute on the CPU, as far as can be told before it starts."""
    named = os.environ.get("JAX_PLATFORMS", "")
    if named:
        return named.split(",")[0] == "cpu"
    return not any(any(DEVICES.glob(pattern)) for pattern in ACCELERATORS)


def ready_host_memory() -> None:
    """Make memory cheap for the whole of this program; its first call, before jax is imported.

    Where Linux gives huge pages to those who ask, only the environment that a process starts
    in makes glibc ask for them: the program starts itself again, once, under the same process number.
    What the user has set of it stands. Otherwise `keep_host_memory`. Does nothing where an
    accelerator computes.
    """
    if not computes_on_cpu():
        return
    if _huge_pages_on_request() and not _asked():
        tunables = filter(None, (os.environ.get(TUNABLES), f"{PAGES}=1"))
        os.environ[TUNABLES] = ":".join(tunables)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    keep_host_memory()


def keep_host_memory() -> None:
    """Have glibc keep freed memory for the next step, unless it uses huge pages already.

    Other C libraries are left alone. To be called before jax starts its threads: a thread that has
    an arena of its own by then maps whatever is larger than 64 MiB all the same.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or (_asked() not in ("", "0") and _huge_pages_on_request()):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # <malloc.h>
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(arena_max, 1)


def _asked() -> str:
    """What glibc was told of huge pages as this process started: "0" none, "" nothing."""
    tunables = (each.partition("=") for each in os.environ.get(TUNABLES, "").split(":"))
    return {name: value for name, _, value in tunables}.get(PAGES, "")


def _huge_pages_on_request() -> bool:
    """Whether glibc can ask for huge pages (from 2.35 on) and Linux gives them to those who do."""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
        given = HUGE_PAGES.read_text()
    except (OSError, ValueError):  # another system
        return False
    glibc = re.match(r"glibc (\d+)\.(\d+)", library)
    return glibc is not None and tuple(map(int, glibc.groups())) >= (2, 35) and "[madvise]" in given
