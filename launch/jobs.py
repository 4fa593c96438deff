"""Runs onto slices, and small runs together: a grid becomes jobs."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.costs import training_steps
from gqa_scaling.devices.layout import layout_refusal
from gqa_scaling.experiment.branches import Trunk
from gqa_scaling.hardware import Hardware, Slice
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import plan_run
from gqa_scaling.units import byte_size

BUSY_TOKENS = 2048  # tokens of a batch for each chip; with fewer it waits for its peers
TOGETHER_HOURS = 1.0  # shorter runs share a job: starting machines takes a good part of an hour
NAME_LENGTH = 39  # xpk's limit; Kubernetes adds to it and allows 63


@dataclass(frozen=True)
class Job:
    """Runs that one slice does one after another, in `seconds` by prediction."""

    name: str
    slice: Slice
    runs: tuple[RunConfig, ...]
    seconds: float

    @property
    def stores(self) -> list[str]:
        """Where its runs' tokens lie."""
        return sorted({run.data.store_path for run in self.runs})

    @property
    def chip_hours(self) -> float:
        return self.seconds * self.slice.chips / 3600


def fits(run: RunConfig, place: Slice, row: Hardware) -> bool:
    """Whether the run can be laid out over the slice and its chips have the memory."""
    refused = layout_refusal(run, place.chips, row.platform)
    return not refused and memory_needed(run, place, row) <= row.memory


def memory_needed(run: RunConfig, place: Slice, row: Hardware) -> int:
    """Bytes on each chip, on the safe side."""
    return math.ceil(memory.SAFETY * memory.training_bytes(run, place.chips, row.platform).total)


def why_nowhere(run: RunConfig, offered: Sequence[Slice], row: Hardware) -> str:
    """What keeps the run from the largest slice it can be laid out over, or else from the largest."""
    for place in reversed(offered):
        if not layout_refusal(run, place.chips, row.platform):
            return (
                f"on {place.vendor_name} it needs {byte_size(memory_needed(run, place, row))} on each "
                f"chip, which has {byte_size(row.memory)}: try --parallel.remat full, "
                "--parallel.accumulation 2, --parallel.context 2 or larger chips"
            )
    reason = layout_refusal(run, offered[-1].chips, row.platform)
    return f"on {offered[-1].vendor_name} {reason}; or name another slice"


def choose(
    run: RunConfig,
    offered: Sequence[Slice],
    row: Hardware,
    hours: float,
    trunk: Trunk | None = None,
    before: Sequence[RunConfig] = (),
) -> tuple[Slice, float] | None:
    """The smallest slice on which the run fits and is done within `hours`, and its seconds there.

    Where none is fast enough: the largest on which every chip has enough to do. None when it fits
    nowhere. `offered` goes from small to large. Runs `before` it on the same slice, of smaller budgets
    of its `trunk`, count too, each from the step from which it is trained.
    """
    fitting = [place for place in offered if fits(run, place, row)]
    if not fitting:
        return None
    busy = [p for p in fitting if run.batch_tokens >= BUSY_TOKENS * p.chips] or fitting[:1]
    all_of_it = (*before, run)
    seconds = {
        place: sum(plan_run(each, row, place.chips, trunk=trunk).seconds for each in all_of_it)
        for place in busy
    }
    chosen = next((p for p in busy if seconds[p] <= 3600 * hours), busy[-1])
    return chosen, seconds[chosen]


def group(
    experiment: str,
    runs: Sequence[RunConfig],
    offered: Sequence[Slice],
    row: Hardware,
    hours: float,
    trunks: Mapping[str, Trunk] | None = None,
) -> list[Job]:
    """Every run in a job on its slice, the longest jobs first.

    Runs that share a trunk (`trunks`, by digest) are one job, the smallest budget first: side by side
    they would train its steps again, or wait for each other on machines that are paid for. Raises
    UserError when a run fits no slice.
    """
    known = trunks or {}
    together: dict[RunConfig, list[RunConfig]] = {}
    for run in runs:
        trunk = known.get(run.digest)
        together.setdefault(trunk.runs[0] if trunk else run, []).append(run)
    strands: dict[RunConfig, tuple[RunConfig, ...]] = {}  # by the last of each
    for members in together.values():
        ordered = sorted(members, key=training_steps)
        strands[ordered[-1]] = tuple(ordered)
    found = {
        last: choose(last, offered, row, hours, known.get(last.digest), strand[:-1])
        for last, strand in strands.items()
    }
    homeless = [run for last, place in found.items() if place is None for run in strands[last]]
    if homeless:
        others = f" and {len(homeless) - 1} other runs" if len(homeless) > 1 else ""
        first = why_nowhere(homeless[0], offered, row)
        raise UserError(f"no slice is right for {homeless[0].name}{others}; {first}")
    matched = [(run, *place) for run, place in found.items() if place is not None]
    bins: dict[Slice, list[list[tuple[RunConfig, float]]]] = {}
    for run, place, seconds in sorted(matched, key=lambda match: -match[2]):
        room = 3600 * TOGETHER_HOURS - seconds
        alike = bins.setdefault(place, [])
        shared = next((b for b in alike if sum(s for _, s in b) <= room), None)
        if shared is None:
            alike.append([(run, seconds)])
        else:
            shared.append((run, seconds))
    jobs = [
        Job(
            job_name(experiment, [run for last, _ in members for run in strands[last]]),
            place,
            tuple(run for last, _ in members for run in strands[last]),
            sum(seconds for _, seconds in members),
        )
        for place, alike in bins.items()
        for members in alike
    ]
    assert len({job.name for job in jobs}) == len(jobs)
    return sorted(jobs, key=lambda job: -job.seconds)


def by_slice(jobs: Sequence[Job]) -> dict[Slice, list[Job]]:
    """The jobs of each slice, in order."""
    alike: dict[Slice, list[Job]] = {}
    for job in jobs:
        alike.setdefault(job.slice, []).append(job)
    return alike


def job_name(experiment: str, runs: Sequence[RunConfig]) -> str:
    """A DNS label for people, made unique by a digest of which runs of what they are."""
    which = "\n".join([experiment, *sorted(run.digest for run in runs)])
    digest = hashlib.sha256(which.encode()).hexdigest()[:8]
    what = runs[0].name if len(runs) == 1 else f"{len(runs)}-runs"
    return f"{label(f'{experiment}-{what}', NAME_LENGTH - len(digest) - 1)}-{digest}"


def label(text: str, length: int = NAME_LENGTH) -> str:
    """The text as a DNS label: a letter, then lower-case letters, digits and inner hyphens."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    return words[:length].strip("-")
