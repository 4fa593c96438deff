"""Whether what is about to be paid for fits where it goes, said by the TPU compiler itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from gqa_scaling.config import RunConfig, require
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.hardware import Slice, hardware
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.pods import Compiled, compile_experiment, shapes
from launch.jobs import Job, by_slice

NEAREST = 2  # runs of each slice that are compiled for it


def chosen(jobs: Sequence[Job]) -> dict[Slice, tuple[RunConfig, ...]]:
    """By slice the runs that say most of whether all of them fit: the two predicted to come nearest
    to its memory, and one of each size, layers by width, that is not among these. Of a size it is the
    one nearest to the memory of its own slice."""

    def share(run: RunConfig, place: Slice) -> float:
        needed = memory.training_bytes(run, place.chips, hardware(place.kind).platform).total
        return needed / hardware(place.kind).memory

    runs = {
        place: sorted(
            (first for first, *_ in shapes(tuple(run for job in alike for run in job.runs))),
            key=lambda run: -share(run, place),
        )
        for place, alike in by_slice(jobs).items()
    }
    found = {place: alike[:NEAREST] for place, alike in runs.items()}
    sizes = {_size(run) for alike in found.values() for run in alike}
    rest = [(share(run, place), place, run) for place in runs for run in runs[place]]
    for _, place, run in sorted(rest, key=lambda one: -one[0]):
        if _size(run) not in sizes:
            sizes.add(_size(run))
            found[place].append(run)
    return {place: tuple(found[place]) for place in sorted(found, key=lambda s: s.chips)}


def _size(run: RunConfig) -> tuple[int, int]:
    return run.model.n_layers, run.model.d_model


def compile_chosen(
    experiment: Experiment, jobs: Sequence[Job], kept: Path, say: Callable[[str], None]
) -> dict[Slice, list[Compiled]]:
    """By slice what the compiler says of the runs `chosen`; answers are kept in a folder as they come.

    Raises UserError for slices of GPUs, and as `compile_experiment` does.
    """
    runs = chosen(jobs)
    for place in runs:
        require(place.is_tpu, f"--compile asks the compiler of TPUs: {place.name} is none")
    return {
        place: compile_experiment(replace(experiment, runs=runs[place]), place, say, kept)
        for place in runs
    }
