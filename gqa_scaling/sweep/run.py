"""Carrying a grid out: which runs are left, training them, and showing how it goes."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data import TokenStore, open_store
from gqa_scaling.devices.layout import check_layout
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.runs import RunDirectory, claim, run_directory, waited_for
from gqa_scaling.files.storage import (
    cache_folder,
    check_writable,
    failure,
    failures_are_fine,
    is_remote,
    make_folder,
)
from gqa_scaling.hardware import HARDWARE, cores
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import check_epochs, check_profile, check_steps
from gqa_scaling.sweep.status import REMOTE_LOOK_SECONDS, RunStatus, read_status
from gqa_scaling.units import byte_size, duration, quantity

FAILED, TRAINING, EVALUATION, CLEANING = range(4)
LONGEST_PAUSE = 32  # seconds between two looks at runs in a bucket that others are at


@dataclass(frozen=True)
class Outcome:
    """How many runs are done and how many failed, now or before."""

    done: int
    failed: int

    @property
    def exit_code(self) -> int:
        return 1 if self.failed else 0


def check(experiment: Experiment, root: Path) -> dict[str, TokenStore]:
    """Open every token store and check every run against it, the devices, and the disk's room or
    that the bucket can be written to.

    Raises UserError before anything is trained or compiled.
    """
    import jax

    from gqa_scaling.data.loader import heldout_chunks
    from gqa_scaling.devices.processes import is_leader, require_platform
    from gqa_scaling.training.loop import check_data

    require_platform()
    stores: dict[str, TokenStore] = {}
    need = 0
    for run in experiment.runs:
        path = run.data.store_path
        if path not in stores:
            stores[path] = open_store(run.data)
            stores[path].verify()
        check_layout(run, jax.device_count(), jax.default_backend())
        check_steps(run)
        check_profile(run)
        check_epochs(run, stores[path].train_tokens)
        check_data(run, stores[path])
        heldout_chunks(
            stores[path], run.context_length, run.evaluation.tokens, run.evaluation_context
        )
        if run_directory(root, experiment.name, run).state() != "done":
            need = max(need, memory.checkpoint_bytes(run) + memory.finished_bytes(run))
    if is_remote(root):
        if is_leader():
            check_writable(root)
        return stores
    make_folder(root)
    free = shutil.disk_usage(root).free
    require(
        free >= need,
        f"{root} has {byte_size(free)} free and the largest run needs {byte_size(need)} for its "
        "checkpoints; make room or set GQA_SCALING_RUNS",
    )
    return stores


def run_sweep(experiment: Experiment, root: Path) -> Outcome:
    """Train every run that is not done; those that another process is at are waited for.

    A run that fails is recorded with its traceback and the next one starts; it is not tried again
    until `forget_failures`. In a job of several processes all of them call this and a failure is
    raised, as the others cannot go on. Raises UserError for what the user can mend, OSError for a
    disk or a bucket that cannot be used, when no later run could do better, and Preempted once all
    is saved.
    """
    from gqa_scaling.devices import processes
    from gqa_scaling.training.loop import keep_compiled

    stores = check(experiment, root)
    keep_compiled(cache_folder() / "compiled" if is_remote(root) else root / ".compiled")
    left, done, failed = list(experiment.runs), 0, 0
    longest = LONGEST_PAUSE if is_remote(root) else 1
    pause, told = 1, set[str]()
    while left:
        elsewhere = []
        for run in left:
            _stop_if_told(run)
            directory = run_directory(root, experiment.name, run)
            with claim(directory) if processes.is_leader() else nullcontext(False) as mine:
                if not processes.leaders(mine):
                    elsewhere.append(run)
                elif _bring_to_end(run, directory, stores[run.data.store_path]):
                    done += 1
                else:
                    failed += 1
        pause = min(2 * pause, longest) if elsewhere == left else 1
        left = elsewhere
        if processes.is_leader():
            for run in left:
                _say_once_who_holds(run, run_directory(root, experiment.name, run), told)
        for _ in range(pause if left else 0):
            _stop_if_told(left[0])
            time.sleep(1)
    return Outcome(done, failed)


def _say_once_who_holds(run: RunConfig, directory: RunDirectory, told: set[str]) -> None:
    """Print what a run of another machine, or one with a damaged claim, is waited for."""
    if run.name not in told:
        said = waited_for(directory)
        if said is not None:
            print(f"waiting for {run.name}: {said}", file=sys.stderr)
            told.add(run.name)


def _stop_if_told(run: RunConfig) -> None:
    """Raise Preempted if this job is to stop; all its processes must ask equally often."""
    from gqa_scaling.devices import processes

    if processes.preempted():
        raise processes.Preempted(f"stopped before {run.name}")


def _bring_to_end(run: RunConfig, directory: RunDirectory, store: TokenStore) -> bool:
    """Train or judge one run as far as it is not; whether it then has its result."""
    from gqa_scaling.devices import processes
    from gqa_scaling.training.loop import reevaluate, train

    left = processes.leaders(_left_to_do(run, directory))
    if left == FAILED:
        return False
    try:
        if left == TRAINING:
            train(run, directory, store)
        elif left == EVALUATION:
            reevaluate(run, directory, store)
        elif processes.is_leader():
            directory.clean()
    except (UserError, processes.Preempted):
        raise
    except Exception as error:
        away = failure(error, directory.path)
        if away is not None:
            raise away from None
        if processes.several() and _may_be_a_peers(error):
            processes.wait_to_end()
        directory.fail(traceback.format_exc(), type(error).__name__)
        if processes.several():
            raise
        return False
    return True


def _may_be_a_peers(error: Exception) -> bool:
    """Whether a collective failed, as it does when another process is gone."""
    import jax

    own = "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and not own


def _left_to_do(run: RunConfig, directory: RunDirectory) -> int:
    if directory.failure_file.exists():
        return FAILED
    whole = directory.result()
    if whole is None:
        return TRAINING
    return CLEANING if run.evaluation_digest in whole["result"]["evaluations"] else EVALUATION


def forget_failures(experiment: Experiment, root: Path) -> None:
    """Have the runs that failed tried again."""
    for run in experiment.runs:
        run_directory(root, experiment.name, run).failure_file.unlink(missing_ok=True)


def pending(experiment: Experiment, root: Path) -> list[RunConfig]:
    """The runs that have no result, or none under the current evaluation."""
    out = []
    for run in experiment.runs:
        whole = run_directory(root, experiment.name, run).result()
        if whole is None or run.evaluation_digest not in whole["result"]["evaluations"]:
            out.append(run)
    return out


def run_workers(command: list[str], workers: int, runs: int) -> int:
    """Run `command` in up to `workers` processes that share `runs` unfinished runs by claims.

    Each gets its share of the CPU's cores, the same whatever is left to do: small models run
    faster side by side on one core each than one after another on all. Returns the largest exit
    code, 128 + N for a process ended by signal N. An interruption ends all of them; SIGTERM has them
    save and stop.
    """
    all_cores = cores()
    shares = [all_cores[i::workers] or all_cores for i in range(min(workers, runs))]
    mine = ["--parent", str(os.getpid()), "--cores"]
    processes = [subprocess.Popen([*command, *mine, ",".join(map(str, share))]) for share in shares]

    def pass_on(*_: object) -> None:
        for p in processes:
            p.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    try:
        return max(128 - code if code < 0 else code for code in [p.wait() for p in processes])
    finally:
        for p in processes:
            p.terminate()
        for p in processes:
            p.wait()


def be_worker(share: str, parent: int) -> None:
    """Stay on these cores, and end when the parent does; before jax starts its threads.

    Where the system cannot bind a process to cores (macOS), the workers share them freely.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in share.split(",")])
    from gqa_scaling.devices.processes import end_with

    end_with(parent)


def check_worker() -> None:
    """Workers share CPU cores; an accelerator would be claimed whole by each of them."""
    import jax

    require(
        jax.default_backend() == "cpu",
        f"--workers shares the cores of a CPU, but jax runs on {jax.default_backend()}; run "
        "without it, or show one accelerator to each process: CUDA_VISIBLE_DEVICES=i ... --shard i/n",
    )


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
        print(f"{len(failed)} runs failed; try them again with --retry-failed", file=sys.stderr)
    return 1 if failed else 0


# --------------------------------------------------------------------------------- display


class _Details(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["details"], style="cyan", no_wrap=True, overflow="ellipsis")


@contextmanager
def live_display(experiment: Experiment, root: Path) -> Iterator[None]:
    """Show run k of n, step, loss, tokens/s and time left while the body trains.

    Everything shown is read from the run directories, so it covers every process at work. Without
    a terminal a line is printed for each run that ends.
    """
    console = Console(stderr=True)
    stop = threading.Event()

    def watch() -> None:
        with failures_are_fine():  # whoever trains will say so
            (_show_bar if console.is_terminal else _print_lines)(experiment, root, console, stop)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _predicted_seconds(experiment: Experiment) -> list[float]:
    """Relative lengths of the runs; only their ratios are used."""
    cpu = HARDWARE["cpu"]
    return [cpu.seconds(costs.training_flops(r), costs.training_steps(r)) for r in experiment.runs]


def _describe(rows: list[RunStatus]) -> str:
    active = [r for r in rows if r.state == "running"]
    parts = [f"run {sum(r.state == 'done' for r in rows) + bool(active)} of {len(rows)}"]
    for r in active[:2]:
        speed = f" {quantity(r.tokens_per_second)} tok/s" if r.tokens_per_second else ""
        loss = f" loss {r.loss:.3f}" if r.loss is not None else " starting"
        parts.append(f"{r.name} step {r.step}/{r.steps}{loss}{speed}")
    return "  ".join(parts)


def _show_bar(experiment: Experiment, root: Path, console: Console, stop: threading.Event) -> None:
    weights, began = _predicted_seconds(experiment), time.monotonic()
    start = None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(12),
        TextColumn("{task.percentage:>3.0f}%"),
        _Details(),
    )
    with Progress(
        *columns, console=console, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        task = progress.add_task(experiment.name, total=sum(weights), details="starting")
        while True:
            last = stop.is_set()
            rows = read_status(root, experiment)
            work = sum(w * r.progress for w, r in zip(weights, rows, strict=True))
            start = work if start is None else start
            elapsed, left = time.monotonic() - began, ""
            if work > start and elapsed > 5:
                seconds = (sum(weights) - work) * elapsed / (work - start)
                left = f"{duration(seconds)} left  "
            progress.update(task, completed=work, details=left + _describe(rows))
            if last:
                return
            stop.wait(REMOTE_LOOK_SECONDS if is_remote(root) else 0.5)


def _print_lines(
    experiment: Experiment, root: Path, console: Console, stop: threading.Event
) -> None:
    before = {r.name for r in read_status(root, experiment) if r.state == "done"}
    while True:
        last = stop.is_set()
        rows = read_status(root, experiment)
        done = {r.name for r in rows if r.state == "done"}
        for r in rows:
            if r.name in done - before:
                speed = f", {r.tokens_per_second:,.0f} tok/s" if r.tokens_per_second else ""
                loss = (
                    ""
                    if r.evaluation_loss is None
                    else f", held-out loss {r.evaluation_loss:.4f} nats"
                )
                print(f"[{len(done)}/{len(rows)}] {r.name} done{loss}{speed}", file=sys.stderr)
        before = done
        if last:
            return
        stop.wait(REMOTE_LOOK_SECONDS if is_remote(root) else 1.0)
