"""Where a study's runs come from: an experiment's folder, a CSV file or the published points."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gqa_scaling.config import Question, RunConfig, require
from gqa_scaling.experiment.load import Experiment, load_experiment
from gqa_scaling.files.runs import runs_root
from gqa_scaling.study.choices import PUBLISHED, is_experiment
from gqa_scaling.study.reading import from_csv, from_runs, published
from gqa_scaling.study.results import Results

PUBLISHED_QUESTION = Question(
    contexts=(8192, 32768, 131072),
    losses=(3.0, 2.9, 2.8, 2.7, 2.6),
    baseline=(8, 8),
    convention="per_sequence",
)


@dataclass(frozen=True)
class Source:
    """The finished runs that a name stands for, and the question that they come with.

    `name` and `overrides` are as they were given. `experiment`, and `root`, the folder of all runs,
    are None for runs of others.
    """

    name: str
    overrides: tuple[str, ...]
    results: Results
    question: Question
    experiment: Experiment | None = None
    root: Path | None = None

    @property
    def grid(self) -> tuple[RunConfig, ...]:
        """The runs that the experiment declares, finished or not; none of others' data."""
        return self.experiment.runs if self.experiment else ()


def read_source(name: str, overrides: Sequence[str], named: str | None) -> Source:
    """Read the runs of an experiment, of a CSV file, or the published ones.

    `overrides` change an experiment's fields. `named` is the folder of the runs that was given, as in
    `runs_root`: others' data needs none, and is read where there can be none. Raises UserError as `load_experiment`, `from_runs` and
    `from_csv` do, and for overrides of anything but an experiment.
    """
    if is_experiment(name):
        root = runs_root(named)
        experiment = load_experiment(name, overrides, root)
        results = from_runs(root, experiment.name, experiment.runs)
        return Source(name, tuple(overrides), results, experiment.question, experiment, root)
    require(
        not overrides,
        f"unexpected argument {overrides[0] if overrides else ''!r}: {name} has no fields",
    )
    if name == PUBLISHED:
        return Source(name, (), published(), PUBLISHED_QUESTION)
    return Source(name, (), from_csv(name), Question())
