"""Where a study's runs come from: an experiment's folder, a CSV file or the published points."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import numpy as np

from gqa_scaling.baselines import bare
from gqa_scaling.config import Question, RunConfig, require
from gqa_scaling.experiment.load import Experiment, load_experiment
from gqa_scaling.files.runs import runs_root
from gqa_scaling.files.storage import as_path
from gqa_scaling.study.choices import PUBLISHED, is_experiment
from gqa_scaling.study.reading import from_csv, from_results, from_runs, published
from gqa_scaling.study.records import Records, beside, read_records, require_equal
from gqa_scaling.study.results import (
    NOT_COPYING,
    Heads,
    Results,
    heads_of,
    listed,
    pair,
    pairs,
)
from gqa_scaling.units import count

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
    are None for runs of others; `root` also for an experiment without a module, which no command can
    name. `without` is what was left out of both runs and grid, as it was named. `kept` is the record
    beside a CSV file.
    """

    name: str
    overrides: tuple[str, ...]
    results: Results
    question: Question
    experiment: Experiment | None = None
    root: Path | None = None
    without: tuple[str, ...] = ()
    kept: Records | None = None

    @property
    def grid(self) -> tuple[RunConfig, ...]:
        """The runs that the experiment declares, finished or not; none of others' data."""
        runs = self.experiment.runs if self.experiment else ()
        return tuple(run for run in runs if not self._left_out(run))

    def leaves_out(self, heads: Heads) -> bool:
        return any(named(what, "", heads) for what in self.without if what.strip("*"))

    def _left_out(self, run: RunConfig) -> bool:
        m = run.model
        heads = heads_of(m.n_heads, m.n_kv_heads, m.pattern)
        return any(named(what, run.name, heads) for what in self.without)


def named(what: str, name: str, heads: Heads) -> bool:
    """Whether `what` names this run, by a shell pattern, or its heads, such as 8,1 or (8,1)."""
    return fnmatch.fnmatchcase(name, what) or bare(what) == bare(pair(heads))


def _marked(what: str, results: Results) -> np.ndarray:
    """Which of the runs `what` names: by `named`, or as those that have not learned to copy."""
    if what == NOT_COPYING:
        return results.copying == 0
    return np.array(
        [named(what, str(n), h) for n, h in zip(results.name, results.heads, strict=True)]
    )


def read_source(
    name: str | Experiment,
    overrides: Sequence[str],
    folder: str | None,
    without: Sequence[str] = (),
    *,
    swept: bool = False,
) -> Source:
    """Read the runs of an experiment, of a CSV file, or the published ones.

    `name` is as on the command line, or an experiment that was declared in Python. `overrides` change an experiment's fields. `folder` is that of the runs that was given, as in
    `runs_root`: others' data needs none, and is read where there can be none. `without` names runs and
    configurations to leave out (`named`), or those that have not learned to copy from their context
    (`results.NOT_COPYING`); what that leaves out is said in the flags of every fit.
    `swept` runs may differ in their learning rate alone: nothing is fitted to them.
    Raises UserError as `load_experiment`, `from_runs` and `from_csv` do, for overrides of anything but
    an experiment, and for what names no run or all of them.
    """
    whole = _read(name, overrides, folder, swept)
    if not without:
        return whole
    r, source = whole.results, replace(whole, without=tuple(without))
    marks = [_marked(what, r) for what in without]
    for what, found in zip(without, marks, strict=True):
        fewer = replace(whole, without=(what,)).grid != whole.grid
        why = (
            f"names no run or configuration; there are {pairs(sorted(set(r.heads), key=str))} and "
            f"runs such as {r.name[0]}"
        )
        if what == NOT_COPYING:
            why = "names no run: of no dense one it is known that it does not copy from its context"
        require(bool(found.any()) or fewer, f"{whole.name}: --without {what} {why}")
    keep = ~np.any(marks, axis=0)
    require(bool(keep.any()), f"{whole.name}: --without {' '.join(without)} leaves out every run")
    gone, known = r.name[~keep].tolist(), {run.name for run in source.grid}
    left = replace(
        r.select(keep),
        missing=tuple(m for m in r.missing if m in known),
        also_run=r.select(~keep).shapes,
    )
    said = (
        f"left out by --without {' '.join(without)}: {count(len(gone), 'run')} ({listed(gone, 4)})"
    )
    question = whole.question
    if question.baseline in set(r.heads) - set(left.heads):
        said += f"; the baseline {pair(question.baseline)} with them: savings are against another"
        question = replace(question, baseline=None)
    return replace(source, results=replace(left, left_out=said), question=question)


def _read(
    name: str | Experiment, overrides: Sequence[str], folder: str | None, swept: bool
) -> Source:
    if isinstance(name, Experiment):
        require(
            not overrides, f"{name.name} is declared here: change its runs instead of overrides"
        )
        results = from_runs(runs_root(folder), name.name, name.runs)
        return Source(name.name, (), results, name.question, name)
    if is_experiment(name):
        root = runs_root(folder)
        experiment = load_experiment(name, overrides, root)
        results = from_runs(root, experiment.name, experiment.runs, swept=swept)
        return Source(name, tuple(overrides), results, experiment.question, experiment, root)
    require(
        not overrides,
        f"unexpected argument {overrides[0] if overrides else ''!r}: {name} has no fields",
    )
    if name == PUBLISHED:
        return Source(name, (), published(), PUBLISHED_QUESTION)
    return _from_file(name, swept)


def _from_file(name: str, swept: bool) -> Source:
    """The runs of a CSV file; with all that was kept of them where its record lies beside it."""
    rows, record = from_csv(name, swept=swept), beside(as_path(name))
    if not record.exists():
        return Source(name, (), rows, Question())
    kept = read_records(record)
    found = zip(repeat(str(record)), kept.runs, kept.results, strict=False)
    results = from_results(kept.experiment, str(record), found, swept=swept)
    require_equal(results, rows, record)
    results = replace(results, source=name)
    return Source(name, (), results, kept.question, kept=kept)
