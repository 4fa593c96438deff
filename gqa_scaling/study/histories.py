"""How runs went: their training losses, thinned, and what became of those without a result."""

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gqa_scaling.config import RunConfig
from gqa_scaling.files.runs import RunDirectory, State, run_directories
from gqa_scaling.files.storage import together
from gqa_scaling.study.source import Source

LOSS = "learning/loss"
MOST_PLACES, TOGETHER = 100, 4  # of a curve: places, and logged lines averaged at each


Curve = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Unfinished:
    """A declared run without a result: its state, and of a failed one the kind of error and its text."""

    name: str
    state: State
    kind: str = ""
    why: str = ""


@dataclass(frozen=True)
class Histories:
    """Training curves by run, and the runs that have no result.

    A curve is the training tokens seen and the training loss in nats there, a mean of up to TOGETHER
    logged steps; places are even in the logarithm of the step. `command` begins what trains one run
    again, after `--only`; "" for others' runs. `config` are the fields that all runs share.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    unfinished: tuple[Unfinished, ...] = ()
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)


NO_HISTORIES = Histories()


def histories(source: Source, command: str) -> Histories:
    """Those of an experiment's runs; none of others' data. `command` as in `Histories`."""
    if source.experiment is None or source.root is None:
        return NO_HISTORIES
    finished, unfinished = set(source.results.name.tolist()), []
    curves: dict[str, Curve] = {}

    def history(run: RunConfig, directory: RunDirectory) -> Curve | Unfinished:
        if run.name in finished:
            return training_curve(directory, run.batch_tokens)
        return _unfinished(directory, run)

    directories = run_directories(source.root, source.experiment.name, source.grid)
    pairs = list(zip(source.grid, directories, strict=True))
    for run, found in zip(source.grid, together(lambda each: history(*each), pairs), strict=True):
        if isinstance(found, Unfinished):
            unfinished.append(found)
        elif found[0]:
            curves[run.name] = found
    shared = _shared([run.to_dict() for run in source.grid])
    return Histories(curves, tuple(unfinished), command, shared)


def _unfinished(directory: RunDirectory, run: RunConfig) -> Unfinished:
    state = directory.state()
    failed = directory.failure() if state == "failed" else None
    if failed is None:
        return Unfinished(run.name, state)
    last = next((line for line in reversed(failed["traceback"].splitlines()) if line.strip()), "")
    return Unfinished(run.name, state, failed["kind"], last.strip())


def training_curve(directory: RunDirectory, batch_tokens: int) -> Curve:
    """The training curve of one run, as `Histories` has it; empty where nothing was logged.

    Only the lines that are taken are parsed: a long run logs more than a page could show. Raises
    UserError for a damaged one, naming it.
    """
    if not directory.metrics_file.exists():
        return (), ()
    lines = directory.metrics_file.read_bytes().splitlines()
    places = np.unique(np.geomspace(1, max(len(lines), 1), MOST_PLACES).round().astype(int)) - 1
    edges = [*places.tolist(), len(lines)] if lines else []
    tokens, losses = [], []
    for start, end in itertools.pairwise(edges):
        taken: set[int] = set(np.linspace(start, end - 1, TOGETHER).round().astype(int).tolist())
        logged = [each for i in sorted(taken) if (each := _line(lines, i, directory))]
        if logged:
            tokens.append(float(np.mean([step for step, _ in logged])) * batch_tokens)
            losses.append(float(np.mean([loss for _, loss in logged])))
    return tuple(tokens), tuple(losses)


def _line(lines: list[bytes], i: int, directory: RunDirectory) -> tuple[int, float] | None:
    """The step and the loss of a logged line; None for one without a loss, or cut short at the end."""
    try:
        line = json.loads(lines[i])
        loss = line.get(LOSS)
        return (line["step"], loss) if loss is not None and np.isfinite(loss) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        directory.metrics()  # raises, and names the damaged line, unless it is a last one cut short
        return None


def _shared(configs: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields that all these nested dictionaries have in common."""
    first, *others = configs
    out: dict[str, Any] = {}
    for name, value in first.items():
        found = [other[name] for other in others]
        if isinstance(value, dict) and all(isinstance(each, dict) for each in found):
            inner = _shared([value, *found])
            out |= {name: inner} if inner else {}
        elif all(each == value for each in found):
            out[name] = value
    return out
