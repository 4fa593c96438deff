"""How runs went: their training losses, thinned, and what became of those without a result."""

from dataclasses import dataclass, field
from typing import Any

from gqa_scaling.config import RunConfig
from gqa_scaling.files.runs import RunDirectory, State, run_directories
from gqa_scaling.files.storage import together
from gqa_scaling.study.source import Source
from gqa_scaling.study.training_curves import Curve, training_curves


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

    `command` begins what trains one run again, after `--only`; "" for others' runs and kept ones.
    `config` are the fields that all runs share.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    unfinished: tuple[Unfinished, ...] = ()
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)


NO_HISTORIES = Histories()


def histories(source: Source, command: str) -> Histories:
    """Those of an experiment's runs, or what is kept of them; none of others' data. `command` as in
    `Histories`."""
    if source.kept is not None:
        return Histories(
            source.kept.curves, config=_shared([r.to_dict() for r in source.kept.runs])
        )
    if source.experiment is None or source.root is None:
        return NO_HISTORIES
    finished, unfinished = set(source.results.name.tolist()), []
    curves: dict[str, Curve] = {}

    def history(run: RunConfig, directory: RunDirectory) -> Curve | Unfinished:
        if run.name in finished:
            return training_curves(directory, run.batch_tokens)[0]
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
