"""Runs that differ in their token budget alone: one trunk, from which the decay of each branches off.

Where the warmup is counted in tokens (`OptimizerConfig.warmup_tokens`), the learning rate is the
same at every budget until the decay begins, and so is every batch. The state at that step is then
a state of each run with a larger budget, which goes on from it in place of training it once more.
The runs of a trunk are trained in the order of their budgets. Each keeps its state where its decay
begins, among its checkpoints, until all of them have their results.
"""

import itertools
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gqa_scaling import costs
from gqa_scaling.config import RunConfig
from gqa_scaling.fields import digest_of
from gqa_scaling.files.checksums import is_saved
from gqa_scaling.files.runs import RunDirectory, run_directory


def at_budgets(run: RunConfig, tokens_per_param: Sequence[float]) -> list[RunConfig]:
    """The run at each of these budgets, all warmed up as the smallest is: they share a trunk."""
    tokens = min(tokens_per_param) * costs.n_exact(run.model)
    warmup = max(run.batch_tokens, round(run.optimizer.warmup * tokens))
    optimizer = replace(run.optimizer, warmup=0.1, warmup_tokens=warmup)
    return [
        replace(
            run,
            name=f"{run.name}-D{x:g}",
            tokens=None,
            tokens_per_param=float(x),
            optimizer=optimizer,
        )
        for x in tokens_per_param
    ]


def decay_begins(run: RunConfig) -> int:
    """Steps that the run takes before its decay."""
    steps = costs.training_steps(run)
    return steps - run.optimizer.phases(steps, run.batch_tokens)[1]


def _latest_start(run: RunConfig) -> int:
    """The last step whose state the run may take from another: 0 where its last states are averaged,
    as these are its own."""
    return decay_begins(run) if run.evaluation.average == 1 else 0


@dataclass(frozen=True)
class Trunk:
    """Two runs or more that differ in their token budget alone, the least budget first."""

    runs: tuple[RunConfig, ...]

    def kept_steps(self, run: RunConfig) -> tuple[int, ...]:
        """The steps whose states `run`, one of them, keeps for the others."""
        latest = decay_begins(run)
        others = (_latest_start(other) for other in self.runs if other.digest != run.digest)
        return tuple(sorted({min(latest, step) for step in others} - {0}))

    def sources(self, run: RunConfig) -> list[tuple[int, RunConfig]]:
        """(step, whose state it is) of every state that `run` may begin with and that those with
        smaller budgets come by."""
        before = itertools.takewhile(lambda other: other.digest != run.digest, self.runs)
        latest = _latest_start(run)
        return [(min(latest, decay_begins(other)), other) for other in before if latest]

    def begins(self, run: RunConfig, without: Container[RunConfig] = ()) -> int:
        """The step from which `run` is trained once those with smaller budgets, `without` these, have
        come so far."""
        return max((step for step, other in self.sources(run) if other not in without), default=0)

    def directories(self, folder: Path) -> Iterator[tuple[RunConfig, RunDirectory]]:
        """Every run with its directory in the folder of its experiment."""
        return ((run, run_directory(folder.parent, folder.name, run)) for run in self.runs)

    def states(self, run: RunConfig, folder: Path) -> list[tuple[int, RunConfig]]:
        """(step, whose it is) of every state that others have kept and `run` may begin with, the
        latest first; found by their files, which are not verified here."""
        latest = _latest_start(run)
        found = [
            (step, other)
            for other, directory in self.directories(folder)
            if other.digest != run.digest and directory.checkpoints.exists()
            for step in self.kept_steps(other)
            if step <= latest and is_saved(directory.checkpoints / str(step))
        ]
        return sorted(found, key=lambda each: -each[0])

    def finished(self, folder: Path) -> bool:
        """Whether all of them have a result, so that no state is needed any more."""
        return all(directory.result_file.exists() for _, directory in self.directories(folder))


def trunks(runs: Iterable[RunConfig]) -> dict[str, Trunk]:
    """The trunk of each run that shares one with others, by the run's digest."""
    alike: dict[str, list[RunConfig]] = {}
    for run in runs:
        if run.optimizer.warmup_tokens and run.optimizer.schedule == "wsd":
            alike.setdefault(_but_for_the_budget(run), []).append(run)
    found = [Trunk(tuple(sorted(each, key=costs.training_steps))) for each in alike.values()]
    return {run.digest: trunk for trunk in found if len(trunk.runs) > 1 for run in trunk.runs}


def _but_for_the_budget(run: RunConfig) -> str:
    budget = ("tokens", "tokens_per_param")
    return digest_of({name: x for name, x in run.definition().items() if name not in budget})


def smallest_budget_first(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs in their order, but those of a trunk together, the smallest budget first."""
    found = trunks(runs)
    each = (found[run.digest].runs if run.digest in found else (run,) for run in runs)
    return list({run.digest: run for run in itertools.chain.from_iterable(each)}.values())
