"""How a sweep goes on, live, and how it ended: all of it is read from the run directories."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gqa_scaling import costs
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.failures import failures_are_fine
from gqa_scaling.files.storage import is_remote
from gqa_scaling.hardware import HARDWARE
from gqa_scaling.sweep.status import REMOTE_LOOK_SECONDS, RunStatus, looks, read_status
from gqa_scaling.units import count, duration, quantity

Show = Callable[[list[RunStatus]], None]


@contextmanager
def live_display(experiment: Experiment, root: Path) -> Iterator[None]:
    """Show run k of n, step, loss, tokens/s and time left while the body trains.

    Everything shown is read from the run directories, so it covers every process at work. Without
    a terminal a line is printed for each run that ends.
    """
    console = Console(stderr=True)
    seconds = REMOTE_LOOK_SECONDS if is_remote(root) else 0.5 if console.is_terminal else 1.0
    stop = threading.Event()

    def watch() -> None:
        with failures_are_fine(), ExitStack() as stack:  # whoever trains will say so
            show = _lines()
            if console.is_terminal:
                show = _bar(experiment, stack.enter_context(_progress(console)))
            look = looks(root, experiment)
            show(look())
            while not stop.wait(seconds):
                show(look())
            show(look())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(12),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[details]}", style="cyan", markup=False),
    )
    return Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)


def _bar(experiment: Experiment, progress: Progress) -> Show:
    """Shows how much of the grid's work is done, what is trained now, and the time left."""
    cpu, began = HARDWARE["cpu"], time.monotonic()
    weights = [  # relative lengths of the runs
        cpu.seconds(costs.training_flops(r), costs.training_steps(r)) for r in experiment.runs
    ]
    task = progress.add_task(experiment.name, total=sum(weights), details="starting")
    before: list[float] = []  # the work that was done when this began

    def show(rows: list[RunStatus]) -> None:
        done = sum(w * r.progress for w, r in zip(weights, rows, strict=True))
        before[:] = before or [done]
        elapsed, left = time.monotonic() - began, ""
        if done > before[0] and elapsed > 5:
            seconds = (sum(weights) - done) * elapsed / (done - before[0])
            left = f"{duration(seconds)} left  "
        progress.update(task, completed=done, details=left + _describe(rows))

    return show


def _lines() -> Show:
    """Prints a line for each run that has ended since the first look."""
    ended: set[str] | None = None

    def show(rows: list[RunStatus]) -> None:
        nonlocal ended
        done = {r.name for r in rows if r.state == "done"}
        for r in rows:
            if ended is not None and r.name in done - ended:
                speed = f", {r.tokens_per_second:,.0f} tok/s" if r.tokens_per_second else ""
                loss = r.evaluation_loss
                held_out = "" if loss is None else f", held-out loss {loss:.4f} nats"
                print(f"[{len(done)}/{len(rows)}] {r.name} done{held_out}{speed}", file=sys.stderr)
        ended = done

    return show


def _describe(rows: list[RunStatus]) -> str:
    active = [r for r in rows if r.state == "running"]
    parts = [f"run {sum(r.state == 'done' for r in rows) + bool(active)} of {len(rows)}"]
    for r in active[:2]:
        speed = f" {quantity(r.tokens_per_second)} tok/s" if r.tokens_per_second else ""
        loss = f" loss {r.loss:.3f}" if r.loss is not None else " starting"
        parts.append(f"{r.name} step {r.step}/{r.steps}{loss}{speed}")
    return "  ".join(parts)


def report_end(experiment: Experiment, root: Path) -> int:
    """Say on stderr which runs failed and why; 1 when there are any, else 0."""
    rows = read_status(root, experiment)
    failed = [r for r in rows if r.failure and r.state != "damaged"]
    for r in rows:
        if r.state == "damaged":
            print(f"{r.name}: {r.failure}", file=sys.stderr)
    for r in failed:
        print(f"{r.name} failed: {r.failure} (whole traceback in {r.path})", file=sys.stderr)
    if failed:
        print(f"{count(len(failed), 'run')} failed; try again with --retry-failed", file=sys.stderr)
    return 1 if failed else 0
