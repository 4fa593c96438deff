"""Where a grid stands, read from the files of its runs alone: progress, goodput and checkpoints."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.checksums import StoredCheckpoint, examine_run
from gqa_scaling.files.runs import RunDirectory, State, evaluation_in, run_directories
from gqa_scaling.files.storage import together

ORDER: tuple[State, ...] = ("done", "running", "stale", "failed", "pending", "damaged")
STEP_SECONDS = "perf/step_time_seconds"
# What evaluating and saving took since the attempt began.
EVALUATION_SECONDS, CHECKPOINT_SECONDS = "perf/evaluation_seconds", "perf/checkpoint_seconds"
LOOK_SECONDS, REMOTE_LOOK_SECONDS = 2.0, 10.0  # a look asks a bucket several times for every run

Line = dict[str, Any]  # of metrics.jsonl or attempts.jsonl


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far one run is, its last losses in nats, how well its time is used, and why it failed.

    Where one of its files is damaged, `failure` says which and the remedy, and nothing else is told.
    `restarts` are the attempts at training after the first. `mfu` is None where the vendor states no
    peak of the hardware, as of a CPU. `goodput`, `evaluation` and `saving` are
    shares of the time since the first attempt began, spent on steps that count, on evaluations
    between them and on saving checkpoints; None where the files do not tell. `seconds_left` is what
    a running run needs to its last step.
    """

    name: str
    state: State
    step: int
    steps: int
    loss: float | None = None
    evaluation_loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    restarts: int = 0
    goodput: float | None = None
    evaluation: float | None = None
    saving: float | None = None
    seconds_left: float | None = None
    failure: str = ""
    path: str

    @property
    def progress(self) -> float:
        """Share of the steps taken."""
        return 1.0 if self.state == "done" else self.step / self.steps


def read_status(root: Path, experiment: Experiment) -> list[RunStatus]:
    """The status of every run of the experiment, in its order."""

    def status(run: RunConfig, directory: RunDirectory) -> RunStatus:
        try:
            return _status(run, directory)
        except UserError as error:
            return RunStatus(
                name=run.name,
                state="damaged",
                step=0,
                steps=costs.training_steps(run),
                failure=str(error),
                path=str(directory.path),
            )

    directories = run_directories(root, experiment.name, experiment.runs)
    pairs = zip(experiment.runs, directories, strict=True)
    return together(lambda pair: status(*pair), pairs)


def looks(root: Path, experiment: Experiment) -> Callable[[], list[RunStatus]]:
    """`read_status` for one who looks again and again: what is done is read once."""
    done: dict[str, RunStatus] = {}

    def look() -> list[RunStatus]:
        left = tuple(run for run in experiment.runs if run.name not in done)
        read = {row.name: row for row in read_status(root, replace(experiment, runs=left))}
        rows = [done.get(run.name) or read[run.name] for run in experiment.runs]
        done.update({row.name: row for row in rows if row.state == "done"})
        return rows

    return look


def _status(run: RunConfig, directory: RunDirectory) -> RunStatus:
    state, steps = directory.state(), costs.training_steps(run)
    last, attempts = directory.last_metrics("learning/loss"), directory.attempts()
    loss, failure, ended = None, "", last.get("time")
    if state == "done":
        result = directory.result()
        assert result is not None
        evaluation = evaluation_in(result, run.evaluation_digest)
        loss = evaluation["loss"] if evaluation else None
        ended = (result.get("timing") or {}).get("finished")
    if state in ("failed", "done"):  # judging a trained model anew can fail as well
        told = directory.failure()
        if told is not None:
            said = (told["traceback"].strip().splitlines() or [""])[-1]
            failure = said if told["kind"] in said else f"{told['kind']}: {said}"
            if told["kind"] == UserError.__name__:  # the line is for people as it is
                failure = said.rpartition(f"{UserError.__name__}: ")[2]
            ended = told["time"] if state == "failed" else ended
    return RunStatus(
        name=run.name,
        state=state,
        step=steps if state == "done" else last.get("step", 0),
        steps=steps,
        loss=last.get("learning/loss"),
        evaluation_loss=loss,
        tokens_per_second=last.get("perf/per_device_tokens_per_sec"),
        mfu=last.get("perf/mfu"),
        restarts=max(0, len(attempts) - 1),
        **_time_use(directory, attempts, last, ended),
        seconds_left=_seconds_left(attempts, last, steps) if state == "running" else None,
        failure=failure,
        path=str(directory.path),
    )


# ------------------------------------------------------------------------- what the time went to


def _time_use(
    directory: RunDirectory, attempts: list[Line], last: Line, ended: float | None
) -> dict[str, float | None]:
    """What the time of a run went to, as `RunStatus` has it; {} where the files do not tell. One that
    is not done ends for now with its last sign of life; one that was put back has no log."""
    if not attempts or ended is None or (not last and directory.is_restored()):
        return {}
    seconds = max(ended, attempts[-1]["began"]) - attempts[0]["began"]
    if seconds <= 0:
        return {}
    # The last line tells all of a single attempt, unless it was logged just after a trace.
    last_is_enough = len(attempts) == 1 and (not last or STEP_SECONDS in last)
    lines = ([last] if last else []) if last_is_enough else directory.metrics()

    def share(tag: str) -> float | None:
        told = [line[tag] for _, line in _steps_that_count(attempts, lines) if tag in line]
        return sum(told) / seconds if told else None

    return {
        "goodput": useful_seconds(attempts, lines) / seconds,
        "evaluation": share(EVALUATION_SECONDS),
        "saving": share(CHECKPOINT_SECONDS),
    }


def useful_seconds(attempts: list[Line], lines: list[Line]) -> float:
    """Seconds spent on steps that count, which are those that no later attempt took again.

    Each step counts as the mean step of its attempt. That leaves starting, compiling, evaluating and
    saving out. `lines` are those of metrics.jsonl in their order; of a single attempt the last will do.
    """
    counted = _steps_that_count(attempts, lines)
    return sum((count * line[STEP_SECONDS] for count, line in counted), 0.0)


def _steps_that_count(attempts: list[Line], lines: list[Line]) -> Iterator[tuple[int, Line]]:
    """For each attempt how many of its steps no later one took again, and the last line of these."""
    firsts = [attempt["first_step"] for attempt in attempts]
    for i, first in enumerate(firsts):
        until = min(firsts[i + 1 :], default=math.inf)
        kept = [line for line in lines if first < line["step"] <= until and STEP_SECONDS in line]
        if kept:
            yield min(until, lines[-1]["step"]) - first, kept[-1]


def _seconds_left(attempts: list[Line], last: Line, steps: int) -> float | None:
    """Seconds to the last step, when evaluating and saving go on as in this attempt."""
    if STEP_SECONDS not in last or not attempts:
        return None
    taken = last["step"] - attempts[-1]["first_step"]
    apart = last.get(EVALUATION_SECONDS, 0.0) + last.get(CHECKPOINT_SECONDS, 0.0)
    return (steps - last["step"]) * (last[STEP_SECONDS] + (apart / taken if taken > 0 else 0.0))


# ------------------------------------------------------------------------------- checkpoints


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
        if state == "done":  # but for what it keeps for branches they are dropped, perhaps just now
            kept = [each for each in kept if each.step is None or each.state == "whole"]
            if not directory.is_restored() and all(each.step is not None for each in kept):
                kept += [
                    StoredCheckpoint(
                        None, "damaged", (f"{directory.parameters} is missing",), 0, None
                    )
                ]
        out.append(RunCheckpoints(directory.path.name, str(directory.path), state, tuple(kept)))
    return out
