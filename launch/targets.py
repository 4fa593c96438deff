"""Where jobs are to run, and what they may cost."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from gqa_scaling.config import UserError, require
from gqa_scaling.files.storage import SCHEMES
from gqa_scaling.hardware import SLICES, Hardware, Slice, slice_of

PRICES = "an assumption: the on-demand list price of 2025, rounded, from gqa_scaling/hardware.py"
BUCKET = re.compile(r"(gs|s3)://[a-z0-9][a-z0-9._-]+(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
# The software of a Cloud TPU machine, by kind of TPU.
TPU_RUNTIME = {"v5e": "v2-alpha-tpuv5-lite", "v6e": "v2-alpha-tpuv6e", "v5p": "v2-alpha-tpuv5"}


def startable(name: str) -> Slice:
    """The slice of that name, in either spelling, if a job can have it.

    Engines are asked for a number of chips and give the usual shape. Raises UserError for another
    shape, for several slices, and for what is no slice.
    """
    found = slice_of(name)
    if SLICES.get(found.vendor_name) != found:
        alike = ", ".join(s.vendor_name for s in SLICES.values() if s.kind == found.kind)
        raise UserError(
            f"no job can have {name}: a job has one slice of the usual shape for its size: {alike}"
        )
    return found


def sizes_up_to(largest: Slice) -> list[Slice]:
    """The slices of the same accelerator that are no larger, the smallest first."""
    return [s for s in SLICES.values() if s.kind == largest.kind and s.chips <= largest.chips]


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
    def google_place(self) -> tuple[str, ...]:
        """The options of gcloud and xpk that say where machines are."""
        return ("--project", self.project, "--zone", self.zone)

    def setup_commands(self, stores: Iterable[str]) -> tuple[str, ...]:
        """The environment on a fresh machine, whatever Python that has, for runs in the bucket that read
        these token stores."""
        schemes = {place.partition("://")[0] for place in (self.bucket, *stores)}
        storage = [extra for scheme, (_, extra) in SCHEMES.items() if scheme in schemes]
        extras = ",".join(["tpu" if self.largest.is_tpu else "cuda", *storage])
        return self.setup or (
            "python3 -m pip install --quiet --user uv",
            "rm -rf .venv",  # of a machine that starts again, whole or not; uv refuses both
            "python3 -m uv venv --quiet --python 3.12 .venv",
            f"python3 -m uv pip install --quiet --python .venv/bin/python -e '.[{extras}]'",
        )
