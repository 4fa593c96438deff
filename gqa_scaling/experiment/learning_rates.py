"""The maximum learning rate of each size, chosen by a sweep that has been run before the grid."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gqa_scaling.config import RunConfig, differing_fields, require
from gqa_scaling.files.runs import evaluation_in, run_directory, runs_root


@dataclass(frozen=True)
class LearningRateSweep:
    """The sweep that an experiment takes its learning rates from, as `LEARNING_RATES` in its module.

    `experiment` names the folder of the sweep's runs, `runs` declares them.
    """

    experiment: str
    runs: Callable[[], list[RunConfig]]


@dataclass(frozen=True)
class LearningRateChoice:
    """The best maximum learning rate for one size, of those tried with one loss each."""

    learning_rate: float
    tried: tuple[tuple[float, float], ...]  # (learning rate, loss in nats), ascending

    @property
    def edge(self) -> str:
        """'lowest' or 'highest' when the best rate is the last one tried on that side, 'only' when no
        other was tried, else ''.

        The best rate may then lie outside the sweep.
        """
        rates = [rate for rate, _ in self.tried]
        if len(rates) == 1:
            return "only"
        if self.learning_rate == rates[0]:
            return "lowest"
        return "highest" if self.learning_rate == rates[-1] else ""


def learning_rate_choices(
    experiment: str, runs: Iterable[RunConfig], root: Path | None = None
) -> dict[tuple[int, int], LearningRateChoice]:
    """For each (n_layers, d_model) of a learning-rate sweep, the rate of least loss.

    Chen et al. 2025, appendix: swept once per size with MHA and kept for every head
    configuration. `runs` are those of the sweep; a size of which one is unfinished, or not judged
    by its evaluation, is left out, so that a grid never changes while its sweep goes on. Of seeds the
    mean counts. `root` is the folder of all runs, without it `runs_root()`. Raises UserError where
    runs of one size differ in more than the optimizer and the seed, or those at one rate in more than
    the seed: their losses do not tell which rate is better.
    """
    root = root or runs_root()
    tried: dict[tuple[int, int], dict[float, list[float]]] = {}
    first: dict[tuple[Any, ...], RunConfig] = {}
    unfinished = set()
    for run in runs:
        size = (run.model.n_layers, run.model.d_model)
        rate = run.optimizer.learning_rate
        for alike, free in ((size, "optimizer."), ((*size, rate), "optimizer.learning_rate:")):
            other = first.setdefault(alike, run)
            differ = [x for x in differing_fields(other, run) if not x.startswith(("seed:", free))]
            if run.evaluation_digest != other.evaluation_digest:
                differ.append("evaluation")
            require(
                not differ,
                f"{experiment}: {other.name} and {run.name} have one size, and their losses do not tell "
                f"which rate is better ({'; '.join(differ)}): let a sweep train one model of each size "
                "in one way, at several rates",
            )
        whole = run_directory(root, experiment, run).result()
        value = evaluation_in(whole, run.evaluation_digest)
        if value:
            tried.setdefault(size, {}).setdefault(rate, []).append(value["loss"])
        else:
            unfinished.add(size)
    choices = {}
    for size in sorted(tried.keys() - unfinished):
        means = {rate: statistics.fmean(losses) for rate, losses in sorted(tried[size].items())}
        choices[size] = LearningRateChoice(min(means, key=means.__getitem__), (*means.items(),))
    return choices


def with_learning_rate(
    run: RunConfig, choices: Mapping[tuple[int, int], LearningRateChoice], sweep: str
) -> RunConfig:
    """The run at its size's swept learning rate; its note says where the rate comes from.

    A size the sweep `sweep` has not finished keeps the rate it was declared with, and says so.
    """
    choice = choices.get((run.model.n_layers, run.model.d_model))
    rate = run.optimizer.learning_rate if choice is None else choice.learning_rate
    if choice is None:
        size = f"L{run.model.n_layers} d{run.model.d_model}"
        note = f"learning rate {rate:g} as declared; {sweep} has not finished {size}"
    else:
        edge = f", AT THE {choice.edge.upper()} RATE TRIED" if choice.edge else ""
        note = f"learning rate {rate:g} from {sweep} ({len(choice.tried)} tried{edge})"
    return replace(run, optimizer=replace(run.optimizer, learning_rate=rate), note=note)


def at_swept_rates(
    runs: Iterable[RunConfig], sweep: LearningRateSweep, root: Path | None = None
) -> list[RunConfig]:
    """The runs, each at the rate that the sweep below `root` chose for its size."""
    choices = learning_rate_choices(sweep.experiment, sweep.runs(), root)
    return [with_learning_rate(run, choices, sweep.experiment) for run in runs]
