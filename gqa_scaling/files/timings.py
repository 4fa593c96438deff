"""What `bench-inference` measured, as a file: a machine, and how long prefill and decoding take on it.

Nothing of this needs jax: what is fitted to the timings reads them by `read_timings`.
"""

import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from gqa_scaling.config import ModelConfig, UserError, require
from gqa_scaling.fields import JsonShape, shape_of, value_of
from gqa_scaling.files.runs import read_json, require_schema
from gqa_scaling.files.storage import make_folder, write_json

SCHEMA = 1
Phase = Literal["prefill", "decode"]
CacheName = Literal["float32", "bfloat16", "int8"]
_LATER = ("bandwidth", "peak")  # of a row: files of older versions have neither


@dataclass(frozen=True)
class Machine:
    """The devices that computed, all of them together, as they were measured in the same run.

    `device` is what jax calls one of them, `bandwidth` the bytes a second that they read, `flops` the
    FLOP/s of a square product in each dtype, `memory_bytes` what they can hold.
    """

    device: str
    devices: int
    bandwidth: float
    flops: Mapping[str, float]
    memory_bytes: int

    def __post_init__(self) -> None:
        rates = {f"flops.{dtype}": rate for dtype, rate in self.flops.items()}
        sizes = {"devices": self.devices, "memory_bytes": self.memory_bytes}
        for name, value in {**sizes, "bandwidth": self.bandwidth, **rates}.items():
            require(value > 0, f"{name}={value} must be greater than 0")


@dataclass(frozen=True)
class Timing:
    """One step of decoding a batch, or the prefill of its prompts, of a model with random weights.

    `context` is the tokens of each sequence that are there after the step, the new one counted, or
    of its prompt. `seconds` is the median over `rounds` for the whole batch, `spread` the distance
    of its quartiles as a fraction of it. `bytes` are those of the weights and the cache that are
    read, every copy of a KV head that serves several devices counted, and of weights where devices
    share out the sequences (`inference/cases.py`, `read_bytes`). `flops` are those that the model needs (`costs.py`, `decode_flops` and
    `prefill_flops`), and `memory_bytes` is what is held; each of all devices together.
    `model.dtype` is what was computed in, and `cache` what keys and values are kept in.

    `bandwidth` and `peak` are what the machine did between the rounds, bytes and FLOP/s of a product
    in the model's dtype: others may keep it busy. 0: not known, and those of the machine count.

    A row that was not timed says in `skipped` why, and has 0 for seconds, spread and rounds.
    """

    model: ModelConfig
    phase: Phase
    context: int
    batch: int
    cache: CacheName
    seconds: float
    spread: float
    rounds: int
    bytes: int
    flops: float
    memory_bytes: int
    skipped: str | None = None
    bandwidth: float = 0.0
    peak: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("phase", Phase), ("cache", CacheName)):
            value, known = getattr(self, name), typing.get_args(kind)
            require(value in known, f"{name}={value!r} must be one of {', '.join(known)}")
        for name in ("context", "batch", "bytes", "flops", "memory_bytes"):
            value = getattr(self, name)
            require(value > 0, f"{name}={value} must be greater than 0")
        for name in ("bandwidth", "peak"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value} must not be negative")
        timed = self.seconds > 0 and self.rounds > 0 and self.spread >= 0
        require(
            timed if self.skipped is None else self.seconds == 0,
            f"seconds={self.seconds}, spread={self.spread} and rounds={self.rounds} are not those of "
            "a row that was " + ("timed" if self.skipped is None else "skipped"),
        )

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences, or tokens of all prompts, in a second; 0 where skipped."""
        tokens = self.batch * (self.context if self.phase == "prefill" else 1)
        return tokens / self.seconds if self.seconds else 0.0

    def bandwidth_share(self, machine: Machine) -> float:
        """`bytes` a second, as a share of the bandwidth that was measured; 0 where skipped."""
        bandwidth = self.bandwidth or machine.bandwidth
        return self.bytes / self.seconds / bandwidth if self.seconds else 0.0

    def flops_share(self, machine: Machine) -> float:
        """`flops` a second, as a share of a product's in the model's dtype; 0 where skipped."""
        peak = self.peak or machine.flops[self.model.dtype]
        return self.flops / self.seconds / peak if self.seconds else 0.0


@dataclass(frozen=True)
class Timings:
    """All that was timed on a machine. `source` says what was asked for, `versions` by which code."""

    machine: Machine
    rows: tuple[Timing, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            require(
                row.model.dtype in self.machine.flops,
                f"flops.{row.model.dtype} is missing: a row was computed in it",
            )

    @property
    def timed(self) -> tuple[Timing, ...]:
        """The rows that were not skipped."""
        return tuple(row for row in self.rows if row.skipped is None)


def to_json(timings: Timings) -> dict[str, Any]:
    """The timings as JSON has them."""
    rows = [{**vars(row), "model": row.model.to_dict()} for row in timings.rows]
    machine = asdict(timings.machine)
    said = {"versions": dict(timings.versions), "source": timings.source}
    return {"schema": SCHEMA, "machine": machine, "rows": rows, **said}


def write_timings(path: Path, timings: Timings) -> None:
    """Replace the file at one stroke."""
    make_folder(path.parent)
    write_json(path, to_json(timings))


def read_timings(path: Path) -> Timings:
    """The timings in a file. Raises `UserError` where there is none, or one that is no such file."""
    remedy = "move it away and time again with `gqa-scaling bench-inference`"
    try:
        said = read_json(path, _file(), remedy)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}: measure this machine with `gqa-scaling bench-inference --output {path}`"
        ) from None
    require_schema(path, said, SCHEMA)
    try:
        found: Timings = value_of(Timings, said)
        return found
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def _file() -> JsonShape:
    """What JSON of timings must be."""
    row = {name + "?" * (name in _LATER): each for name, each in shape_of(Timing).items()}
    return {"schema": int} | shape_of(Timings) | {"rows": [row]}
