"""A calibrated machine: what its timings say of the time of a step, how well, and the file of that.

`calibrate` makes one of the timings of `bench-inference`; `frontier --cost` reads it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gqa_scaling.config import UserError, require
from gqa_scaling.fields import JsonShape, shape_of, value_of
from gqa_scaling.files.runs import read_json, require_schema
from gqa_scaling.files.storage import make_folder, write_json
from gqa_scaling.files.timings import Machine, Phase
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.points import Interval
from gqa_scaling.study.roofline import FORMS, Roofline
from gqa_scaling.study.zform import ZLaw

# rooflines of either form; the paper's Z fitted, with its own constants, and of one sequence, as
# `frontier` ranks by; bytes read or FLOPs alone; the machine's measured rates; a row of `hardware`
Law = Literal["sum", "max", "z", "z_default", "z_one", "bytes", "flops", "machine", "hardware"]
SCHEMA = 1
REMEDY = "make it again with `gqa-scaling calibrate`"
_UNTOLD = ("rank", "rank_within", "wrong", "regret", "regret_seconds", "ratio")  # null where NaN


@dataclass(frozen=True)
class Judged:
    """How a law did on the shapes that were held out.

    `law` is a code (`Law`). Of the `shapes`, `median` and `most` are the middle and the
    90th percentile of the relative error of the seconds; `rank` is Spearman's correlation over all
    of them, `rank_within` the mean of those among the configurations of one context, batch and
    cache. `pairs` are those of such configurations of which neither has less of everything. Of them
    the law chooses the slower in the share `wrong`; `regret` is what it loses so, as a share of the
    faster one's seconds, and `regret_seconds` in seconds, means over all pairs. `ratio` is the 90th
    percentile of the relative error of the ratio of their seconds. What these shapes do not tell is
    NaN.
    """

    phase: Phase
    law: Law
    shapes: int
    pairs: int
    median: float
    most: float
    rank: float
    rank_within: float
    wrong: float
    regret: float
    regret_seconds: float
    ratio: float


@dataclass(frozen=True)
class Misled:
    """At one context, batch and cache: where Z as the paper has it prefers the slower of two.

    `wrong` of `pairs`, as `Judged` has them, are so, by more than the spread of both timings. The worst of them in seconds:
    `chosen`, and `faster`, with their measured seconds.
    """

    context: int
    batch: int
    cache: str
    wrong: int
    pairs: int
    chosen: str
    faster: str
    chosen_seconds: float
    faster_seconds: float

    @property
    def lost(self) -> float:
        return self.chosen_seconds / self.faster_seconds - 1


@dataclass(frozen=True)
class Calibration:
    """The laws of one machine at its usual pace, fitted to all its timings, and how they did on half.

    `decode` and `prefill` are rooflines, the latter None where too little of it was timed; `z` is the
    paper's cost for each type of the cache. `judged` was fitted to the models `fitted` alone and
    judged on `held_out`. `ranges` say what was timed: least and most of context, batch, n (parameters
    without embeddings) and head_dim, and `patterns` which. The models computed in `dtype` and kept
    weights in it. `timings` is the name of the file of timings, and `sha256` that of its bytes.
    """

    timings: str
    sha256: str
    machine: Machine
    versions: Mapping[str, str]
    dtype: str
    fitted: tuple[str, ...]
    held_out: tuple[str, ...]
    decode: Roofline
    prefill: Roofline | None
    z: Mapping[str, ZLaw]
    judged: tuple[Judged, ...]
    misled: tuple[Misled, ...]
    ranges: Mapping[str, Interval]
    patterns: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def caches(self) -> tuple[str, ...]:
        """The types of the cache that were timed decoding."""
        return tuple(self.z)

    @property
    def name(self) -> str:
        many = f"{self.machine.devices} x " if self.machine.devices > 1 else ""
        return f"{many}{self.machine.device}"

    @property
    def error(self) -> Judged:
        """How the roofline of decoding did on the shapes that were held out."""
        return next(j for j in self.judged if (j.law, j.phase) == (self.decode.form, "decode"))

    def to_dict(self) -> dict[str, Any]:
        return plain({"schema": SCHEMA, "kind": "calibration", **asdict(self)})


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Replace the file at one stroke."""
    make_folder(path.parent)
    write_json(path, calibration.to_dict())


def require_replaceable(path: Path) -> None:
    """Raise UserError where a calibration would replace a file that is none."""
    if path.exists():
        try:
            read_calibration(path)
        except UserError:
            raise UserError(
                f"{path} is there and no calibration that can be read: name another, or remove it"
            ) from None


def read_calibration(path: Path) -> Calibration:
    """The calibration in a file. Raises UserError where there is none, or one that is no such file."""
    try:
        said = read_json(path, dict, REMEDY)
        require(
            said.get("kind") == "calibration",
            f"{path} is no calibration: make one of timings with `gqa-scaling calibrate`",
        )
        said = read_json(path, _file(), REMEDY)
    except FileNotFoundError:
        raise UserError(
            f"there is no {path}: make it of timings with `gqa-scaling calibrate`"
        ) from None
    require_schema(path, said, SCHEMA)
    try:
        return _read(said)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from None


def _file() -> JsonShape:
    """What JSON of a calibration must be."""
    shape = {"schema": int, "kind": str} | shape_of(Calibration)
    shape["judged"] = [shape_of(Judged) | dict.fromkeys(_UNTOLD, (float,))]
    shape["ranges"] = {key: [float] for key in ("context", "batch", "n", "head_dim")}
    return shape


def _read(said: Mapping[str, Any]) -> Calibration:
    """The value of a file of the right form."""
    found: Calibration = value_of(Calibration, said)
    laws = [law for law in (found.decode, found.prefill) if law]
    require(laws[0].phase == "decode", "decode is no law of decoding")
    require(bool(found.z), "z has no cache that was timed")
    require(all(len(ends) == 2 for ends in found.ranges.values()), "ranges have two ends each")
    for law in laws:
        require(law.form in FORMS, f"form={law.form!r} must be one of {', '.join(FORMS)}")
        for name, value in law.seconds_per.items():
            require(value >= 0, f"seconds_per.{name}={value} must not be negative")
        judged = any((j.phase, j.law) == (law.phase, law.form) for j in found.judged)
        require(judged, f"judged has no error of {law.phase}")
    return found


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
