"""What accelerators can do and cost: named rows that `plan` and cost objectives read.

Peaks are the vendors' dense bf16 figures for one chip (v5e, v5p, v6e) or one GPU. Prices are
on-demand list prices in US dollars an hour, rounded, and differ by region and contract: give your
own with `--price`. `cpu` is a guess for one core pair and is meant to be replaced by a measurement.
"""

from dataclasses import dataclass, replace

from gqa_scaling.config import nearest, require

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One accelerator: FLOP/s, bytes/s, bytes and dollars an hour."""

    name: str
    peak_flops: float
    bandwidth: float
    memory: int
    price: float
    mfu: float = 0.4

    def __post_init__(self) -> None:
        for name in ("peak_flops", "bandwidth", "memory"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be greater than 0")
        require(0 < self.mfu <= 1, f"mfu={self.mfu} must lie in (0, 1]")
        require(self.price >= 0, f"price={self.price} must not be negative")

    def seconds(self, flops: float, devices: int = 1) -> float:
        """Time for that many model FLOPs at the stated MFU."""
        return flops / (self.peak_flops * self.mfu * devices)


HARDWARE = {
    h.name: h
    for h in (
        Hardware("cpu", 2.0e11, 2.0e10, 16 * GIB, 0.1, mfu=0.2),
        Hardware("v5e", 1.97e14, 8.19e11, 16 * GIB, 1.2),
        Hardware("v5p", 4.59e14, 2.765e12, 95 * GIB, 4.2),
        Hardware("v6e", 9.18e14, 1.64e12, 32 * GIB, 2.7),
        Hardware("a100", 3.12e14, 2.039e12, 80 * GIB, 3.7),
        Hardware("h100", 9.89e14, 3.35e12, 80 * GIB, 7.0),
        Hardware("h200", 9.89e14, 4.8e12, 141 * GIB, 8.0),
    )
}


def hardware(name: str, mfu: float | None = None, price: float | None = None) -> Hardware:
    """The named row, with one's own MFU or price; an unknown name is refused with the nearest."""
    require(
        name in HARDWARE,
        f"unknown hardware {name!r}{nearest(name, HARDWARE)}; known: {', '.join(HARDWARE)}",
    )
    changes = {k: v for k, v in (("mfu", mfu), ("price", price)) if v is not None}
    return replace(HARDWARE[name], **changes)


def from_device_kind(kind: str) -> Hardware | None:
    """The row for a JAX `device_kind` such as 'TPU v5 lite' or 'NVIDIA H200'; None if unknown."""
    kind = kind.lower()
    names = {"v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v6": "v6e", "a100": "a100"}
    names |= {"h100": "h100", "h200": "h200", "cpu": "cpu"}
    return next((HARDWARE[name] for part, name in names.items() if part in kind), None)
