"""Where a grid stands, from the files on disk alone."""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gqa_scaling import costs
from gqa_scaling.experiment import Experiment
from gqa_scaling.grid import learning_rate_choices
from gqa_scaling.runs import State, read_json, run_directory

ORDER: tuple[State, ...] = ("done", "running", "stale", "failed", "pending")
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
    out = []
    for run in experiment.runs:
        directory = run_directory(root, experiment.name, run)
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
        out.append(
            RunStatus(
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
        )
    return out


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
