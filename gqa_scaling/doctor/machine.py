"""What this machine has: devices, versions, memory, disk and limits, each with what is wrong of it.

Only jax's devices are touched; nothing is computed here.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from gqa_scaling.devices.compiler_flags import version_of
from gqa_scaling.devices.host_memory import DEVICES, computes_on_cpu
from gqa_scaling.files.storage import cache_folder
from gqa_scaling.hardware import cores, detected
from gqa_scaling.units import byte_size

LEAST_MEMORY, LEAST_DISK = 2 * 2**30, 2**30  # bytes: below these even the smoke study fails
LEAST_FILES = 1024  # that may be open at once: a checkpoint opens some for each array
LEAST_SHARED = 2**28  # bytes of /dev/shm, through which the GPUs of one machine talk
MOST_HELD = 0.05  # of a GPU's memory, before a run: a driver and a display hold less
IN_USE = "another process holds it: end that, or wait for it"
CUDA_DRIVER = {"12": 525, "13": 580}  # the oldest driver of each CUDA
PLUGINS = {"12": "jax-cuda12-plugin", "13": "jax-cuda13-plugin"}
SHOWN = ("jax", "jaxlib", "libtpu", *PLUGINS.values(), "flax", "optax", "orbax-checkpoint", "grain")


@dataclass(frozen=True)
class Fact:
    """One thing of the machine. `problem` says what it breaks and what helps, `note` what is good
    to know and breaks nothing; "" for nothing."""

    name: str
    value: str
    problem: str = ""
    note: str = ""


def facts(root: Path) -> list[Fact]:
    """Everything but the devices; runs are to be written below `root`."""
    return [*versions(), *flags(), *memory(), *disks(root), *limits()]


def versions() -> list[Fact]:
    """Python and libraries, held to the ranges that this package was installed for."""
    python = ".".join(map(str, sys.version_info[:3]))
    found = [Fact("python", python, _outside("python", python))]
    for package in SHOWN:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        found.append(Fact(package, version, _outside(package, version)))
    return found


def _outside(package: str, version: str) -> str:
    """What is wrong with a version: not what this package asks for, or not what jaxlib fits to."""
    if package in PLUGINS.values():
        jaxlib = metadata.version("jaxlib")
        if version != jaxlib:
            return (
                f"{package} {version} does not fit jaxlib {jaxlib}, and jax goes on without the "
                f"GPU: pip install {package}[with-cuda]=={jaxlib}"
            )
    try:
        own = metadata.metadata("gqa-scaling")
    except metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return ""
    asked = {"python": own["Requires-Python"]}
    for line in own.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if requirement.marker is None:
            asked[requirement.name] = str(requirement.specifier)
    wanted = asked.get(package, "")
    if not wanted or Requirement(f"x{wanted}").specifier.contains(version, prereleases=True):
        return ""
    return (
        f"{package} {version} is none of {wanted}, for which this was tested: install one of them"
    )


def flags() -> list[Fact]:
    """What the environment tells jax and its compilers."""
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES")
    found = [Fact(name, os.environ[name]) for name in names if os.environ.get(name)]
    path = os.environ.get("LD_LIBRARY_PATH", "")
    if any("cuda" in part.lower() for part in path.split(":")):
        problem = "libraries there are taken before those that jax brings: unset LD_LIBRARY_PATH"
        found.append(Fact("LD_LIBRARY_PATH", path, "" if computes_on_cpu() else problem))
    return found


def memory() -> list[Fact]:
    """Memory of the host that is free, also by what a container allows."""
    free = _meminfo("MemAvailable")
    allowed = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current")) or 0
    if allowed is not None:
        free = min(free, allowed - used) if free is not None else allowed - used
    if free is None:
        return []
    problem = "" if free >= LEAST_MEMORY else f"runs need {byte_size(LEAST_MEMORY)} at the least"
    return [Fact("memory free", byte_size(free), problem)]


def disks(root: Path) -> list[Fact]:
    """Room where runs and caches are written."""
    found = []
    for name, folder in (("disk for runs", root), ("disk for caches", cache_folder())):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        problem = "" if free >= LEAST_DISK else f"free some: less than {byte_size(LEAST_DISK)}"
        if not os.access(there, os.W_OK):
            problem = f"{there} cannot be written: set GQA_SCALING_RUNS and GQA_SCALING_CACHE"
        found.append(Fact(name, f"{byte_size(free)} free at {folder}", problem))
    return found


def limits() -> list[Fact]:
    """Limits of this process that break runs."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    problem = f"checkpoints need {LEAST_FILES}: ulimit -n {LEAST_FILES}"
    unlimited = files == resource.RLIM_INFINITY
    shown = "no limit" if unlimited else f"{files:,}"
    found = [Fact("open files", shown, "" if unlimited or files >= LEAST_FILES else problem)]
    for name, what, option in (
        (resource.RLIMIT_FSIZE, "size of files", "f"),
        (resource.RLIMIT_AS, "address space", "v"),
    ):
        soft, _ = resource.getrlimit(name)
        if soft != resource.RLIM_INFINITY:
            problem = f"ulimit -{option} unlimited: jax and checkpoints outgrow it"
            found.append(Fact(what, byte_size(soft), problem))
    quota = _quota()
    here = len(cores())
    if quota is not None and quota < here:
        note = f"jax starts {here} threads: taskset -c 0-{max(0, int(quota) - 1)} before it"
        found.append(Fact("processor time", f"{quota:.3g} of {here} cores", note=note))
    else:
        found.append(Fact("cores", str(here)))
    return found


def devices(held: Sequence[tuple[int, int]] = ()) -> list[Fact]:
    """The devices that jax has, and whether they are those of the machine; `held` is what
    `gpu_memory` said before jax started."""
    import jax

    there = jax.devices()
    kind, platform = there[0].device_kind, there[0].platform
    row = None if platform == "cpu" else detected(kind)
    problem = note = ""
    if platform == "cpu" and not computes_on_cpu():
        extra = _cuda_extra() if has_nvidia() else "tpu"
        problem = (
            f"the machine has an accelerator and jax computes on the CPU: pip install -e .[{extra}]"
        )
    elif platform != "cpu" and row is None:
        note = "no peak is known of this kind: MFU is not told"
    found = [Fact("devices", f"{len(there)} x {kind} ({platform})", problem, note)]
    stats = there[0].memory_stats() or {}
    if "bytes_limit" in stats:
        limit, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
        sheet = row.memory if row and platform == "tpu" else 0  # GPUs of a name differ in it
        total = held[0][1] if held else sheet
        problem = "XLA_PYTHON_CLIENT_MEM_FRACTION keeps it low: unset it" if held else IN_USE
        value = f"{byte_size(limit - used)} for this process"
        found.append(Fact("device memory", value, problem if limit < 0.7 * total else ""))
    for i, (used, total) in enumerate(held):
        if used > MOST_HELD * total:
            value = f"{byte_size(used)} of {byte_size(total)}"
            found.append(Fact(f"memory held of GPU {i}", value, IN_USE))
    if has_nvidia():
        found += _driver()
    if platform == "gpu":
        found += _shared_memory(len(there))
    return found


def gpu_memory() -> list[tuple[int, int]]:
    """Bytes that all processes hold of each NVIDIA GPU for this one, and bytes that it has, as its
    driver says; none where it does not. jax counts only what itself holds, of the share it takes."""
    command = ["nvidia-smi", "--query-gpu=memory.used,memory.total"]
    command += ["--format=csv,noheader,nounits"]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    command += [f"--id={chosen}"] if chosen else []
    try:
        text = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout
        lines = [line.split(",") for line in text.splitlines()]
        return [(int(used) * 2**20, int(total) * 2**20) for used, total in lines]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def has_nvidia() -> bool:
    """Whether the kernel shows NVIDIA GPUs, which jax may not see."""
    return any(DEVICES.glob("nvidia[0-9]*"))


def _driver_version() -> str:
    """That of NVIDIA's driver in the kernel; "" where it does not say."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\s(\d+\.\d[\d.]*)\s", text)
    return found[1] if found else ""


def _cuda_extra() -> str:
    """What of this package to install for the driver that is there."""
    version = _driver_version()
    return "cuda12" if version and int(version.split(".")[0]) < CUDA_DRIVER["13"] else "cuda"


def _driver() -> list[Fact]:
    """The kernel's driver of NVIDIA, held to the CUDA that jax came with."""
    version = _driver_version()
    if not version:
        return []
    major = int(version.split(".")[0])
    cuda = next((cuda for cuda, name in PLUGINS.items() if version_of(name)), "")
    least = CUDA_DRIVER.get(cuda, 0)
    problem = f"CUDA {cuda} needs {least} at the least: update it"
    if CUDA_DRIVER["12"] <= major:
        problem += (
            ", or pip uninstall jax-cuda13-plugin jax-cuda13-pjrt and pip install -e .[cuda12]"
        )
    return [Fact("driver", version, problem if major < least else "")]


def _shared_memory(count: int) -> list[Fact]:
    shared = Path("/dev/shm")
    if count == 1 or not shared.exists():
        return []
    total = shutil.disk_usage(shared).total
    problem = f"GPUs talk through it: docker run --shm-size={byte_size(2**30)}"
    return [Fact("/dev/shm", byte_size(total), problem if total < LEAST_SHARED else "")]


def _meminfo(name: str) -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as in one that says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _quota() -> float | None:
    """Cores' worth of processor time that a container allows."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None
