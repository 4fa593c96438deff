"""The status of a grid on a terminal, again and again until no run is left to wait for."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.storage import is_remote
from gqa_scaling.sweep import views
from gqa_scaling.sweep.status import LOOK_SECONDS, REMOTE_LOOK_SECONDS, RunStatus, looks
from gqa_scaling.sweep.views import Cell, known, table
from gqa_scaling.units import duration, quantity

ENDED = ("done", "failed", "damaged")
FIRST_SHOWN = ("damaged", "failed", "stale", "running", "pending", "done")


def watch(
    root: Path,
    experiment: Experiment,
    console: Console,
    pause: Callable[[float], None] = time.sleep,
) -> list[RunStatus]:
    """Show the status, again and again, until no run is left to wait for; it is returned."""
    seconds = REMOTE_LOOK_SECONDS if is_remote(root) else LOOK_SECONDS
    look = looks(root, experiment)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = look()
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
    room = max(1, height - 7 - len(failures))  # title, head, last line, cursor
    chosen = sorted(range(len(rows)), key=lambda i: FIRST_SHOWN.index(rows[i].state))[:room]
    shown = [rows[i] for i in sorted(chosen)]
    columns: dict[str, Cell[RunStatus]] = {
        "run": lambda r: r.name,
        "state": views.coloured_state,
        "done": lambda r: f"{r.progress:.0%}",
        "training\nloss\n(nats)": views.loss,
        "held-out\nloss\n(nats)": views.evaluation_loss,
        "tokens/s\nper\ndevice": lambda r: known(r.tokens_per_second, quantity),
        "MFU": lambda r: known(r.mfu, "{:.0%}".format),
        "re-\nstarts": lambda r: str(r.restarts or ""),
        "goodput\n+ eval\n+ saving": views.time_use,
        "left": lambda r: known(r.seconds_left, duration),
    }
    filled = {name: cell for name, cell in columns.items() if any(map(cell, shown))}
    whole = columns.keys() - {"run"}
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}
    body = table(filled, shown, whole=whole, overflow="fold", **look)
    hidden = [r for i, r in enumerate(rows) if i not in chosen]
    more = [Text(f"and {len(hidden)} more: {views.status_counts(hidden)}", "dim")] if hidden else []
    said = [
        Text(
            f"{r.name} {'' if r.state == 'damaged' else 'failed: '}{r.failure}",
            "red",
            no_wrap=True,
            overflow="ellipsis",
        )
        for r in failures
    ]
    return Group(Text(views.status_title(experiment, rows), "bold"), body, *more, *said)
