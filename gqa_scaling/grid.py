"""Grids of runs: sizes x heads x contexts x seeds, as plain lists of `RunConfig`."""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gqa_scaling.config import RunConfig, require
from gqa_scaling.runs import run_directory, runs_root


def head_candidates(max_heads: int) -> list[tuple[int, int]]:
    """(n_h, n_kv) over powers of two up to `max_heads`, n_kv <= n_h: 21 of them for 32.

    Step 1 of the search of Chen et al. 2025, section 4.1.
    """
    require(
        max_heads > 0 and max_heads & (max_heads - 1) == 0,
        f"max_heads={max_heads} must be a power of two",
    )
    powers = [2**k for k in range(max_heads.bit_length())]
    return [(h, kv) for h, kv in itertools.product(powers, powers) if kv <= h]


def unique(runs: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs as a list, refused when two share a name or would train the same model."""
    runs = list(runs)
    for key, what in ((lambda r: r.name, "name"), (lambda r: r.digest, "definition")):
        seen: dict[str, RunConfig] = {}
        for run in runs:
            other = seen.setdefault(key(run), run)
            require(other is run, f"runs {other.name} and {run.name} share one {what}")
    return runs


# ------------------------------------------------------------------- learning rate by size


@dataclass(frozen=True)
class LearningRateChoice:
    """The best maximum learning rate for one size, of those tried with one loss each."""

    learning_rate: float
    tried: tuple[tuple[float, float], ...]  # (learning rate, loss in nats), ascending

    @property
    def edge(self) -> str:
        """'lowest' or 'highest' when the best rate is the last one tried on that side, else ''.

        The best rate may then lie outside the sweep.
        """
        rates = [rate for rate, _ in self.tried]
        if self.learning_rate == rates[0]:
            return "lowest"
        return "highest" if self.learning_rate == rates[-1] else ""


def learning_rate_choices(
    experiment: str, runs: Iterable[RunConfig], root: Path | None = None
) -> dict[tuple[int, int], LearningRateChoice]:
    """For each (n_layers, d_model) of a learning-rate sweep, the rate of least loss.

    Chen et al. 2025, appendix: swept once per size with MHA and kept for every head
    configuration. `runs` are those of the sweep; a size of which one is unfinished, or not judged
    by its evaluation, is left out, so that a grid never changes while its sweep goes on.
    """
    tried: dict[tuple[int, int], dict[float, float]] = {}
    unfinished = set()
    for run in runs:
        size = (run.model.n_layers, run.model.d_model)
        whole = run_directory(root or runs_root(), experiment, run).result()
        value = whole and whole["result"]["evaluations"].get(run.evaluation_digest)
        if value:
            tried.setdefault(size, {})[run.optimizer.learning_rate] = value["loss"]
        else:
            unfinished.add(size)
    return {
        size: LearningRateChoice(min(losses, key=losses.__getitem__), tuple(sorted(losses.items())))
        for size, losses in sorted(tried.items())
        if size not in unfinished
    }


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
