"""What the devices at hand can do, measured: bytes a second, FLOP/s, and how much memory is free."""

import contextlib
import functools
import importlib.metadata
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_scaling import __version__
from gqa_scaling.config import UserError
from gqa_scaling.files.timings import Machine
from gqa_scaling.hardware import cores
from gqa_scaling.model.einsum import einsum_f32
from gqa_scaling.units import count

DTYPES = ("float32", "bfloat16")
SAMPLES = 5  # of each figure, of which the median counts
SAMPLE_SECONDS = 0.02  # of devices, at the least: what it takes to start a program is then little
HOST_ARRAY_BYTES = 2**29  # far above any cache of a processor
DEVICE_ARRAY_BYTES = 2**30  # on each device, at most a sixteenth of its memory
ROWS = 4096  # of such an array: enough sums for all of a device's cores
HOST_PRODUCT, DEVICE_PRODUCT = 1024, 8192  # rows and columns


class Meter:
    """Takes samples of what devices do together: `bandwidth()` and `product(dtype)`.

    A CPU's bandwidth is the sum of an array by a thread of NumPy for each core, as a sum in XLA runs on
    one; a device's is a sum in XLA.
    """

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = list(devices)
        self.on_cpu = self.devices[0].platform == "cpu"
        self.mesh = Mesh(np.array(self.devices), ("all",))
        self.products: dict[str, Callable[[], float]] = {}
        if self.on_cpu:
            self.parts = np.array_split(np.ones(HOST_ARRAY_BYTES // 4, np.float32), len(cores()))
        else:
            each = min(DEVICE_ARRAY_BYTES, self.memory_bytes() // len(self.devices) // 16)
            self.array = self._on_all((ROWS, each // (4 * ROWS)), "float32")
            self.sum = jax.jit(lambda x: jnp.sum(x, axis=2))

    def bandwidth(self) -> float:
        """Bytes a second that are read."""
        if not self.on_cpu:
            return self.array.nbytes / _seconds(functools.partial(self.sum, self.array))
        with ThreadPoolExecutor(len(self.parts)) as threads:
            start = time.perf_counter()
            list(threads.map(np.sum, self.parts))
            return sum(part.nbytes for part in self.parts) / (time.perf_counter() - start)

    def product(self, dtype: str) -> float:
        """FLOP/s of a square product with float32 results."""
        n = HOST_PRODUCT if self.on_cpu else DEVICE_PRODUCT
        if dtype not in self.products:
            a = self._on_all((n, n), dtype)
            f = jax.jit(lambda a: einsum_f32("bij,bjk->bik", a, a))
            self.products[dtype] = lambda: _seconds(functools.partial(f, a))
        return 2 * n**3 * len(self.devices) / self.products[dtype]()

    def machine(self) -> Machine:
        """The devices, by the medians of a few samples."""
        speeds = [self.bandwidth() for _ in range(SAMPLES)]
        flops = {
            dtype: statistics.median(self.product(dtype) for _ in range(SAMPLES))
            for dtype in DTYPES
        }
        return Machine(
            device=device_name(self.devices[0]),
            devices=len(self.devices),
            bandwidth=statistics.median(speeds),
            flops=flops,
            memory_bytes=self.memory_bytes(),
        )

    def memory_bytes(self) -> int:
        """Bytes that the devices may hold; of a CPU those of the machine, or of this container."""
        if self.on_cpu:
            return _host_bytes()
        return sum(stats["bytes_limit"] for stats in map(_stats, self.devices))

    def free_bytes(self) -> int:
        """Bytes of them that nothing holds now."""
        if self.on_cpu:
            return min(_host_available(), _host_bytes())
        return sum(s["bytes_limit"] - s["bytes_in_use"] for s in map(_stats, self.devices))

    def _on_all(self, shape: tuple[int, ...], dtype: str) -> jax.Array:
        """Ones of this shape on each device."""
        sharding = NamedSharding(self.mesh, PartitionSpec("all"))
        whole = (len(self.devices), *shape)
        return jax.jit(lambda: jnp.ones(whole, dtype), out_shardings=sharding)()


def device_name(device: jax.Device) -> str:
    """What the device is called; of a CPU its model and the cores that this process may use."""
    if device.platform != "cpu":
        return device.device_kind
    name = "CPU"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    for line in lines:
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    many = len(cores())
    return f"{name}, {count(many, 'core')}"


def versions() -> dict[str, str]:
    """The code that was timed."""
    of = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {"gqa-scaling": __version__, **of}


def _seconds(call: Callable[[], jax.Array]) -> float:
    """Seconds of one call, of as many in a row as fill a sample; the first only warms up."""
    jax.block_until_ready(call())
    calls = 1
    while True:
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(calls)])
        seconds = time.perf_counter() - start
        if seconds >= SAMPLE_SECONDS or calls >= 1024:
            return seconds / calls
        calls *= 4


def _stats(device: jax.Device) -> dict[str, Any]:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise UserError(
            f"{device} does not say how much memory it has, so that what fits is not known: unset "
            "XLA_PYTHON_CLIENT_ALLOCATOR"
        )
    return stats


def _host_bytes() -> int:
    """Bytes of this machine's memory, or as many as a control group of Linux allows here."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        # there is none, or its limit is "max"
        with contextlib.suppress(OSError, ValueError):
            most = min(most, int(Path("/sys/fs/cgroup", name).read_text()))
    return most


def _host_available() -> int:
    """What Linux says can be had without swapping; elsewhere all there is."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return _host_bytes()
