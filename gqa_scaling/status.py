"""Where a grid stands, from the files on disk alone."""

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gqa_scaling import costs
from gqa_scaling.checksums import Kept, examine_run, few
from gqa_scaling.config import RunConfig
from gqa_scaling.experiment import Experiment
from gqa_scaling.grid import learning_rate_choices
from gqa_scaling.runs import RunDirectory, State, read_json, run_directory
from gqa_scaling.storage import is_remote
from gqa_scaling.units import byte_size

ORDER: tuple[State, ...] = ("done", "running", "stale", "failed", "pending")
REQUESTS = 16  # to a bucket at once
COLOURS = {"done": "green", "running": "cyan", "stale": "yellow", "failed": "red", "pending": "dim"}


@dataclass(frozen=True)
class RunStatus:
    """One run: how far it is, its last loss in nats, and why it failed."""

    name: str
    state: State
    step: int
    steps: int
    loss: float | None
    evaluation_loss: float | None
    tokens_per_second: float | None
    attempts: int
    failure: str
    path: str

    @property
    def progress(self) -> float:
        """Share of the steps taken."""
        return 1.0 if self.state == "done" else self.step / self.steps


def read_status(root: Path, experiment: Experiment) -> list[RunStatus]:
    """The status of every run of the experiment, in its order."""

    def status(run: RunConfig) -> RunStatus:
        return _status(run, run_directory(root, experiment.name, run))

    if not is_remote(root):
        return [status(run) for run in experiment.runs]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(status, experiment.runs))


def _status(run: RunConfig, directory: RunDirectory) -> RunStatus:
    state, steps = directory.state(), costs.training_steps(run)
    last = directory.last_metrics("learning/loss")
    rate = last.get("perf/per_device_tokens_per_sec")
    loss, failure = None, ""
    if state == "done":
        result = directory.result()
        assert result is not None
        evaluation = result["result"]["evaluations"].get(run.evaluation_digest)
        loss = evaluation["loss"] if evaluation else None
    if state in ("failed", "done"):  # judging a trained model anew can fail as well
        with contextlib.suppress(FileNotFoundError):  # it is being tried again just now
            failure = read_json(directory.failure_file)["traceback"].strip().splitlines()[-1]
    return RunStatus(
        run.name,
        state,
        steps if state == "done" else last.get("step", 0),
        steps,
        last.get("learning/loss"),
        loss,
        rate,
        len(directory.attempts()),
        failure,
        str(directory.path),
    )


def status_table(experiment: str, rows: list[RunStatus]) -> Table:
    """The status as people read it."""
    counts = ", ".join(f"{n} {s}" for s in ORDER if (n := sum(r.state == s for r in rows)))
    table = Table(title=f"{experiment}: {len(rows)} runs, {counts}")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for column in (
        "step",
        "training loss\n(nats)",
        "held-out loss\n(nats)",
        "tokens/s\nper device",
        "attempts",
    ):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r.name,
            f"[{COLOURS[r.state]}]{r.state}[/]",
            f"{r.step:,}/{r.steps:,}",
            "" if r.loss is None else f"{r.loss:.4f}",
            "" if r.evaluation_loss is None else f"{r.evaluation_loss:.4f}",
            "" if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}",
            str(r.attempts),
        )
        if r.failure:
            table.add_row("", Text(r.failure[:70], style="red"), end_section=True)
    return table


def status_dict(experiment: str, rows: list[RunStatus]) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "counts": {s: sum(r.state == s for r in rows) for s in ORDER},
        "runs": [asdict(r) for r in rows],
    }


def learning_rate_table(experiment: Experiment) -> tuple[list[dict[str, Any]], Table]:
    """The best learning rate of each size of a sweep, for programs and for people."""
    choices = learning_rate_choices(experiment.name, experiment.runs)
    missing = {(r.model.n_layers, r.model.d_model) for r in experiment.runs} - choices.keys()
    table = Table(title=f"{experiment.name}: best maximum learning rate by size")
    for column in ("L", "d", "learning rate", "held-out loss (nats)", "tried", "flag"):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for (layers, width), c in choices.items():
        loss = dict(c.tried)[c.learning_rate]
        flag = f"the {c.edge} rate tried: widen the sweep" if c.edge else ""
        rows.append(
            {
                "n_layers": layers,
                "d_model": width,
                "learning_rate": c.learning_rate,
                "loss": loss,
                "tried": dict(c.tried),
                "edge": c.edge,
            }
        )
        tried = " ".join(f"{rate:g}" for rate, _ in c.tried)
        table.add_row(str(layers), str(width), f"{c.learning_rate:g}", f"{loss:.4f}", tried, flag)
    for layers, width in sorted(missing):
        table.add_row(str(layers), str(width), "", "", "", "no finished run")
    return rows, table


# ------------------------------------------------------------------------------ checkpoints


@dataclass(frozen=True)
class RunCheckpoints:
    """What is kept of one run, every file of it verified; the newest step first."""

    name: str
    path: str
    state: State
    kept: tuple[Kept, ...]

    @property
    def damaged(self) -> int:
        """How many of them are not what was saved."""
        return sum(kept.state == "damaged" for kept in self.kept)

    @property
    def resume(self) -> str:
        """Where the next attempt would go on from."""
        if self.state == "done":
            return "nothing: finished"
        parameters = [kept for kept in self.kept if kept.step is None]
        steps = [kept for kept in self.kept if kept.step is not None and kept.state != "unfinished"]
        if parameters:
            whole = parameters[0].state == "whole"
            return "parameters: evaluation is left" if whole else "refused: parameters are damaged"
        if not steps:
            return "the first step"
        return next((k.name for k in steps if k.state == "whole"), "refused: none is whole")


def read_checkpoints(directories: Sequence[RunDirectory]) -> list[RunCheckpoints]:
    """Verify the checkpoints and trained parameters of runs that have begun.

    Only reads, all of the files, and may be called while the runs are being trained.
    """
    out = []
    for directory in directories:
        if not directory.path.exists():
            continue
        kept = examine_run(directory.checkpoints, directory.parameters)
        state = directory.state()
        if state == "done":  # its checkpoints are dropped then, perhaps just now
            kept = [each for each in kept if each.step is None]
            if not kept:
                kept = [Kept(None, "damaged", (f"{directory.parameters} is missing",), 0, None)]
        out.append(RunCheckpoints(directory.path.name, str(directory.path), state, tuple(kept)))
    return out


def checkpoints_table(runs: Sequence[RunCheckpoints]) -> Table:
    """The checkpoints as people read them."""
    counts = [
        f"{n} {state}"
        for state in ("whole", "damaged", "unfinished")
        if (n := sum(kept.state == state for run in runs for kept in run.kept))
    ]
    table = Table(title=f"checkpoints of {len(runs)} runs: {', '.join(counts) or 'none'}")
    for column in ("run", "kept", "size", "saved", "state", "a resume uses"):
        right = column == "size"
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "kept")
    colours = {"whole": "green", "damaged": "red", "unfinished": "dim"}
    for run in runs:
        first = (run.name, run.resume)
        for kept in run.kept:
            when = "" if kept.saved is None else time.strftime("%F %T", time.localtime(kept.saved))
            words = f"{kept.state}: {few(kept.damage)}" if kept.damage else kept.state
            state = Text(words, style=colours[kept.state])
            size = byte_size(kept.bytes)
            table.add_row(Text(first[0]), kept.name, size, when, state, first[1])
            first = ("", "")
        if not run.kept:
            table.add_row(Text(run.name), "none", "", "", "", run.resume)
    return table


def checkpoints_dict(runs: Sequence[RunCheckpoints]) -> dict[str, Any]:
    """The checkpoints for programs; bytes, and seconds since 1970."""
    rows = [
        {
            "name": run.name,
            "path": run.path,
            "state": run.state,
            "resume": run.resume,
            "kept": [{"name": kept.name, **asdict(kept)} for kept in run.kept],
        }
        for run in runs
    ]
    return {"damaged": sum(run.damaged for run in runs), "runs": rows}
