"""What can be asked for: slices of TPU chips and groups of GPUs, and where they stand.

A slice is named as its vendor does: v5e-16 is 16 chips, but v5p-128 is 128 cores, which are 64 chips.
"""

import re
from dataclasses import dataclass

from gqa_scaling.fields import did_you_mean, require
from gqa_scaling.hardware import HARDWARE, Hardware, changed, hardware

PRICES = "an assumption: the on-demand list price of 2025, rounded, from gqa_scaling/hardware.py"


@dataclass(frozen=True)
class Slice:
    """`chips` accelerators that one job has to itself, on `hosts` machines.

    `accelerator` is its row in gqa_scaling.hardware; `topology` is how TPU chips are wired, empty
    for GPUs.
    """

    name: str
    accelerator: str
    chips: int
    hosts: int
    topology: str = ""

    @property
    def is_tpu(self) -> bool:
        return bool(self.topology)

    @property
    def chips_per_host(self) -> int:
        return self.chips // self.hosts

    @property
    def cloud_type(self) -> str:
        """The TPU type as Google Cloud spells it: v5litepod-16, v6e-16, v5p-128."""
        return self.name.replace("v5e-", "v5litepod-")


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
GPUS_PER_HOST = 8


def _slices() -> list[Slice]:
    flat = [  # up to 8 chips share a host, beyond that 4
        Slice(f"{kind}-{n}", kind, n, 1 if n <= 8 else n // 4, topology)
        for kind in ("v5e", "v6e")
        for n, topology in FLAT.items()
    ]
    cubes = [Slice(f"v5p-{2 * n}", "v5p", n, n // 4, topology) for n, topology in CUBES.items()]
    gpus = [
        Slice(f"{n}x{kind.upper()}", kind, n, max(1, n // GPUS_PER_HOST))
        for kind in ("a100", "h100", "h200")
        for n in (1, 2, 4, 8, 16, 32, 64)
    ]
    return flat + cubes + gpus


SLICES = {s.name: s for s in _slices()}


def slice_of(name: str) -> Slice:
    """The named slice; an unknown name is refused with the nearest."""
    kinds = "v5e-16, v6e-64, v5p-128, 8xH100, 8xH200, ..."
    require(name in SLICES, f"unknown slice {name!r}{did_you_mean(name, SLICES)}; they are {kinds}")
    return SLICES[name]


def sizes_up_to(largest: Slice) -> list[Slice]:
    """The slices of the same accelerator that are no larger, the smallest first."""
    alike = [s for s in SLICES.values() if s.accelerator == largest.accelerator]
    return sorted((s for s in alike if s.chips <= largest.chips), key=lambda s: s.chips)


BUCKET = re.compile(r"(gs|s3)://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class Target:
    """Where jobs are to run. Each engine reads what it needs and asks for what is missing.

    `largest` is the largest slice a job may take. Runs are kept in `bucket`. `setup` are shell
    commands that make the environment .venv on a fresh machine, `image` a container that has one.
    `sbatch` are further options of SLURM's sbatch, such as qos=high.
    """

    engine: str
    largest: Slice
    hardware: Hardware
    spot: bool = True
    bucket: str = ""
    project: str = ""
    zone: str = ""
    infra: str = ""
    cluster: str = ""
    image: str = ""
    setup: tuple[str, ...] = ()
    partition: str = ""
    account: str = ""
    sbatch: tuple[str, ...] = ()
    hours: float = 24.0

    def __post_init__(self) -> None:
        require(
            not self.bucket or BUCKET.fullmatch(self.bucket) is not None,
            f"--bucket {self.bucket!r} must look like gs://my-bucket or s3://my-bucket/folder",
        )
        require(self.hours > 0, f"--hours {self.hours:g} must be greater than 0")

    @property
    def setup_commands(self) -> tuple[str, ...]:
        """The environment on a fresh machine, whatever Python that has."""
        storage = {"gs": ",gcs", "s3": ",s3"}.get(self.bucket.partition("://")[0], "")
        return self.setup or (
            "python3 -m pip install --quiet --user uv",
            "rm -rf .venv",  # of a machine that starts again, whole or not; uv refuses both
            "python3 -m uv venv --quiet --python 3.12 .venv",
            "python3 -m uv pip install --quiet --python .venv/bin/python -e "
            f"'.[{'tpu' if self.largest.is_tpu else 'cuda'}{storage}]'",
        )

    def require_fields(self, **remedies: str) -> None:
        """Raise UserError for the first field that is empty; a remedy says what to give."""
        for field, remedy in remedies.items():
            require(bool(getattr(self, field)), f"{self.engine} needs --{field}: {remedy}")


def accelerator(largest: Slice, mfu: float | None, price: float | None) -> Hardware:
    """The hardware row of a slice, with one's own MFU or dollars a chip-hour."""
    assert largest.accelerator in HARDWARE
    return changed(hardware(largest.accelerator), mfu, price)
