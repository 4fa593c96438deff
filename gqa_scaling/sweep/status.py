"""Where a grid stands, from the files on disk alone."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.experiment.grid import learning_rate_choices
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.checksums import StoredCheckpoint, abridged, examine_run
from gqa_scaling.files.runs import RunDirectory, State, run_directory
from gqa_scaling.files.storage import is_remote
from gqa_scaling.units import byte_size, duration, quantity

ORDER: tuple[State, ...] = ("done", "running", "stale", "failed", "pending", "damaged")
ENDED = ("done", "failed", "damaged")
STEP_SECONDS = "perf/step_time_seconds"
EVALUATION_SECONDS = "perf/evaluation_seconds"  # both: since the attempt began
CHECKPOINT_SECONDS = "perf/checkpoint_seconds"
REQUESTS = 16  # to a bucket at once
LOOK_SECONDS, REMOTE_LOOK_SECONDS = 2.0, 10.0  # a look asks a bucket several times for every run
COLOURS = {"done": "green", "running": "cyan", "stale": "yellow", "failed": "red"}
COLOURS |= {"pending": "dim", "damaged": "red"}


@dataclass(frozen=True)
class RunStatus:
    """One run: how far it is, its last loss in nats, how well its time is used, why it failed.

    Of a run one of whose files is damaged nothing is told but which file, and the remedy, in
    `failure`.
    `mfu` is None where the peak of the hardware is not known. `goodput`, `evaluation` and `saving` are
    shares of the time since the first attempt began: of steps, of evaluations between them and of
    saving checkpoints. `seconds_left` is for a running one, to the last step.
    """

    name: str
    state: State
    step: int
    steps: int
    loss: float | None
    evaluation_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    attempts: int
    goodput: float | None
    evaluation: float | None
    saving: float | None
    seconds_left: float | None
    failure: str
    path: str

    @property
    def restarts(self) -> int:
        return max(0, self.attempts - 1)

    @property
    def progress(self) -> float:
        """Share of the steps taken."""
        return 1.0 if self.state == "done" else self.step / self.steps


def read_status(root: Path, experiment: Experiment) -> list[RunStatus]:
    """The status of every run of the experiment, in its order."""

    def status(run: RunConfig) -> RunStatus:
        directory = run_directory(root, experiment.name, run)
        steps = costs.training_steps(run)
        try:
            return _status(run, directory, steps)
        except UserError as error:
            return RunStatus(
                name=run.name,
                state="damaged",
                step=0,
                steps=steps,
                loss=None,
                evaluation_loss=None,
                tokens_per_second=None,
                mfu=None,
                attempts=0,
                goodput=None,
                evaluation=None,
                saving=None,
                seconds_left=None,
                failure=str(error),
                path=str(directory.path),
            )

    if not is_remote(root):
        return [status(run) for run in experiment.runs]
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(status, experiment.runs))


def _status(run: RunConfig, directory: RunDirectory, steps: int) -> RunStatus:
    state = directory.state()
    last, attempts = directory.last_metrics("learning/loss"), directory.attempts()
    step = steps if state == "done" else last.get("step", 0)
    loss, failure, ended = None, "", last.get("time")
    if state == "done":
        result = directory.result()
        assert result is not None
        evaluation = result["result"]["evaluations"].get(run.evaluation_digest)
        loss = evaluation["loss"] if evaluation else None
        ended = (result.get("timing") or {}).get("finished")
    if state in ("failed", "done"):  # judging a trained model anew can fail as well
        told = directory.failure()
        if told is not None:
            said = (told["traceback"].strip().splitlines() or [""])[-1]
            failure = said if told["kind"] in said else f"{told['kind']}: {said}"
            ended = told["time"] if state == "failed" else ended
    on_cpu = bool(attempts) and attempts[-1]["layout"]["device"] == "cpu"  # its peak is a guess
    return RunStatus(
        run.name,
        state,
        step,
        steps,
        last.get("learning/loss"),
        loss,
        last.get("perf/per_device_tokens_per_sec"),
        None if on_cpu else last.get("perf/mfu"),
        len(attempts),
        *_shares(directory, attempts, last, ended),
        _seconds_left(attempts, last, steps) if state == "running" else None,
        failure,
        str(directory.path),
    )


def _seconds_left(attempts: list[dict[str, Any]], last: dict[str, Any], steps: int) -> float | None:
    """Until the last step, when evaluating and saving go on as in this attempt."""
    if STEP_SECONDS not in last or not attempts:
        return None
    taken = last["step"] - attempts[-1]["first_step"]
    apart = last.get(EVALUATION_SECONDS, 0.0) + last.get(CHECKPOINT_SECONDS, 0.0)
    return (steps - last["step"]) * (last[STEP_SECONDS] + (apart / taken if taken > 0 else 0.0))


def _shares(
    directory: RunDirectory,
    attempts: list[dict[str, Any]],
    last: dict[str, Any],
    ended: float | None,
) -> tuple[float | None, float | None, float | None]:
    """Goodput, and what evaluating and saving took, as shares of the time since the first attempt
    began; None where the files do not tell.

    A run that is not done ends for now with its last sign of life.
    """
    if not attempts or ended is None:
        return None, None, None
    seconds = max(ended, attempts[-1]["began"]) - attempts[0]["began"]
    if seconds <= 0:
        return None, None, None
    once = len(attempts) == 1 and (not last or STEP_SECONDS in last)  # not just after a trace
    lines = ([last] if last else []) if once else directory.metrics()

    def share(tag: str) -> float | None:
        told = [line[tag] for _, line in _counted(attempts, lines) if tag in line]
        return sum(told) / seconds if told else None

    goodput = useful_seconds(attempts, lines) / seconds
    return goodput, share(EVALUATION_SECONDS), share(CHECKPOINT_SECONDS)


def useful_seconds(attempts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> float:
    """Seconds spent on steps that count: those of each attempt that no later one took again, each
    for the mean time of that attempt's steps. That leaves starting, compiling, evaluating and
    saving out; in logs of earlier versions evaluating and saving are part of the mean.

    `lines` are those of metrics.jsonl in their order; of a single attempt the last will do.
    """
    return sum((count * line[STEP_SECONDS] for count, line in _counted(attempts, lines)), 0.0)


def _counted(
    attempts: list[dict[str, Any]], lines: list[dict[str, Any]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each attempt how many of its steps no later one took again, and the last line of these."""
    firsts = [attempt["first_step"] for attempt in attempts]
    for i, first in enumerate(firsts):
        until = min(firsts[i + 1 :], default=math.inf)
        kept = [line for line in lines if first < line["step"] <= until and STEP_SECONDS in line]
        if kept:
            yield min(until, lines[-1]["step"]) - first, kept[-1]


def _counts(rows: Sequence[RunStatus]) -> str:
    return ", ".join(f"{n} {s}" for s in ORDER if (n := sum(r.state == s for r in rows)))


def _title(experiment: str, rows: Sequence[RunStatus]) -> str:
    return f"{experiment}: {len(rows)} runs, {_counts(rows)}"


def _goodput(row: RunStatus) -> str:
    """What the time went to: goodput, evaluation and saving as '81+12+3%', or '81%' alone."""
    if row.goodput is None:
        return ""
    apart = (row.evaluation, row.saving)
    shares = (row.goodput, *((x or 0.0 for x in apart) if any(apart) else ()))
    return "+".join(f"{100 * share:.0f}" for share in shares) + "%"


def status_table(experiment: str, rows: list[RunStatus]) -> Table:
    """The status as people read it."""
    table = Table(title=_title(experiment, rows))
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for column in (
        "step",
        "training\nloss\n(nats)",
        "held-out\nloss\n(nats)",
        "tokens/s\nper\ndevice",
        "goodput\n+ evaluation\n+ saving",
        "attempts",
    ):
        table.add_column(column, justify="right")
    for r in rows:
        table.add_row(
            r.name,
            Text(r.state, style=COLOURS[r.state]),
            f"{r.step:,}/{r.steps:,}",
            "" if r.loss is None else f"{r.loss:.4f}",
            "" if r.evaluation_loss is None else f"{r.evaluation_loss:.4f}",
            "" if r.tokens_per_second is None else f"{r.tokens_per_second:,.0f}",
            _goodput(r),
            str(r.attempts),
        )
        if r.failure:
            table.add_row("", Text(r.failure[:70], style="red"), end_section=True)
    return table


def watch(
    root: Path,
    experiment: Experiment,
    console: Console,
    pause: Callable[[float], None] = time.sleep,
) -> list[RunStatus]:
    """Show the status, again and again, until no run is left to wait for; it is returned."""
    seconds = REMOTE_LOOK_SECONDS if is_remote(root) else LOOK_SECONDS
    done: dict[str, RunStatus] = {}  # their results, which may be large, are read once
    with Live(console=console, auto_refresh=False) as live:
        while True:
            left = tuple(run for run in experiment.runs if run.name not in done)
            read = {r.name: r for r in read_status(root, replace(experiment, runs=left))}
            rows = [done.get(run.name) or read[run.name] for run in experiment.runs]
            done = {r.name: r for r in rows if r.state == "done"}
            live.update(watch_table(experiment.name, rows, console.height), refresh=True)
            if all(r.state in ENDED for r in rows):
                return rows
            pause(seconds)


def watch_table(experiment: str, rows: Sequence[RunStatus], height: int) -> Group:
    """The status while it changes, in at most `height` lines where names are short.

    Columns that are still empty are left out, and runs for which there is no room are counted: first
    those that are done, then those that have not begun.
    """
    failures = [r for r in rows if r.failure][: height // 4]
    order = ("damaged", "failed", "stale", "running", "pending", "done")
    room = max(1, height - 7 - len(failures))  # title, head, last line, cursor
    chosen = sorted(range(len(rows)), key=lambda i: order.index(rows[i].state))[:room]
    shown = [rows[i] for i in sorted(chosen)]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    columns = {
        "run": [r.name for r in shown],
        "state": [Text(r.state, style=COLOURS[r.state]) for r in shown],
        "done": [f"{r.progress:.0%}" for r in shown],
        "training\nloss\n(nats)": ["" if r.loss is None else f"{r.loss:.4f}" for r in shown],
        "held-out\nloss\n(nats)": [
            "" if r.evaluation_loss is None else f"{r.evaluation_loss:.4f}" for r in shown
        ],
        "tokens/s\nper\ndevice": [
            "" if r.tokens_per_second is None else quantity(r.tokens_per_second) for r in shown
        ],
        "MFU": ["" if r.mfu is None else f"{r.mfu:.0%}" for r in shown],
        "re-\nstarts": [str(r.restarts or "") for r in shown],
        "goodput\n+ eval\n+ saving": [_goodput(r) for r in shown],
        "left": ["" if r.seconds_left is None else duration(r.seconds_left) for r in shown],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    for name in filled:
        words = name in ("run", "state")
        justify = "left" if words else "right"
        table.add_column(name, justify=justify, no_wrap=name != "run", overflow="fold")
    for cells in zip(*filled.values(), strict=True):
        table.add_row(*cells)
    hidden = [r for i, r in enumerate(rows) if i not in chosen]
    more = [Text(f"and {len(hidden)} more: {_counts(hidden)}", style="dim")] if hidden else []
    said = [
        Text(f"{r.name} {'' if r.state == 'damaged' else 'failed: '}{r.failure}", style="red")
        for r in failures
    ]
    for line in said:
        line.no_wrap, line.overflow = True, "ellipsis"
    return Group(Text(_title(experiment, rows), style="bold"), table, *more, *said)


def status_dict(experiment: str, rows: list[RunStatus]) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "counts": {s: sum(r.state == s for r in rows) for s in ORDER},
        "runs": [asdict(r) for r in rows],
    }


def learning_rate_table(root: Path, experiment: Experiment) -> tuple[list[dict[str, Any]], Table]:
    """The best learning rate of each size of a sweep, for programs and for people."""
    choices = learning_rate_choices(experiment.name, experiment.runs, root)
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
    kept: tuple[StoredCheckpoint, ...]

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
                kept = [
                    StoredCheckpoint(
                        None, "damaged", (f"{directory.parameters} is missing",), 0, None
                    )
                ]
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
            words = f"{kept.state}: {abridged(kept.damage)}" if kept.damage else kept.state
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
