"""A matrix product and a pass through memory, measured on a device and held to its data sheet."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gqa_scaling.hardware import detected

SLOW = 0.5  # of the data sheet: healthy accelerators are above it in both
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """`measured` a second beside what the data sheet says, None where it says nothing of it."""

    name: str
    unit: str
    measured: float
    peak: float | None

    @property
    def share(self) -> float | None:
        return None if self.peak is None else self.measured / self.peak

    @property
    def slow(self) -> bool:
        """Whether the device is throttled, or shared with somebody."""
        return self.share is not None and self.share < SLOW


def speeds() -> list[Speed]:
    """Of the first device: FLOP/s of a square product, in bfloat16 on accelerators and float32 on
    a CPU, and bytes/s read and written together. Best of a few; seconds on any device."""
    device = jax.local_devices()[0]
    accelerated = device.platform != "cpu"
    row = detected(device.device_kind) if accelerated else None
    side, dtype = (8192, jnp.bfloat16) if accelerated else (1024, jnp.float32)
    count = 2**28 if accelerated else 2**25
    a = jax.random.normal(jax.random.key(0), (side, side), dtype)
    x = jnp.zeros(count, jnp.float32)
    product = jax.jit(lambda a: a @ a)
    move = jax.jit(lambda x: x + 1)
    peaks = (None, None) if row is None else (row.peak_flops, row.bandwidth)
    name = f"product {side:,} x {side:,} {jnp.dtype(dtype)}"
    return [
        Speed(name, "FLOP/s", 2 * side**3 / seconds(product, a), peaks[0]),
        Speed("memory", "bytes/s", 2 * x.nbytes / seconds(move, x), peaks[1]),
    ]


def seconds(f: Callable, *xs: jax.Array) -> float:
    """The least that a call takes; several in a row, so that starting them does not count."""
    jax.block_until_ready(f(*xs))
    best, calls = float("inf"), 4
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([f(*xs) for _ in range(calls)])
        best = min(best, (time.perf_counter() - start) / calls)
    return best
