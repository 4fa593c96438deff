"""What a step takes, and what evaluating and saving take apart from it, by a clock made here."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from training_kit import tiny_run

from gqa_scaling.config import CheckpointConfig, EvaluationConfig
from gqa_scaling.data import open_store
from gqa_scaling.files.checkpoint import Checkpoints
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.training import loop
from gqa_scaling.training.profiler import Profiler

COMPILING, STEP, TRACED, EVALUATION, SAVE, TRACE = 64.0, 0.25, 2.0, 4.0, 0.5, 16.0
TOKENS, STEPS = 128, 24  # of tiny_run


class Device:
    """A clock, and a device that takes known times: the host goes on until it needs a result."""

    def __init__(self) -> None:
        self.now = self.idle_from = 0.0

    def clock(self) -> float:
        return self.now

    def dispatch(self, seconds: float) -> float:
        """When the result will be there."""
        self.idle_from = max(self.now, self.idle_from) + seconds
        return self.idle_from

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)

    def do(self, seconds: float) -> None:
        """Dispatch something that needs all before it, and wait for it."""
        self.wait(self.dispatch(seconds))


@dataclasses.dataclass
class Pending:
    """A number that is there at some time."""

    value: object
    at: float
    device: Device

    def __float__(self) -> float:
        self.device.wait(self.at)
        return float(self.value)


@pytest.fixture
def device(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """Steps, evaluations, saves and traces that take the times above on a device."""
    device, taken, traced = Device(), [], []

    def slow_steps(*args: object) -> Callable:
        real = make_step(*args)

        def step(*state_and_batch: object) -> tuple:
            taken.append(None)
            seconds = COMPILING if len(taken) <= 2 else TRACED if traced else STEP
            at = device.dispatch(seconds)
            state, metrics = real(*state_and_batch)
            loss, norm = (Pending(x, at, device) for x in metrics[:2])
            return state, metrics._replace(loss=loss, gradient_norm=norm)

        return step

    def slow_evaluator(*args: object) -> Callable:
        real = make_evaluator(*args)
        return lambda parameters, *most: (device.do(EVALUATION), real(parameters, *most))[1]

    make_step, make_evaluator, save = loop.train_step, loop.evaluator, Checkpoints.save
    monkeypatch.setattr(loop, "train_step", slow_steps)
    monkeypatch.setattr(loop, "evaluator", slow_evaluator)
    monkeypatch.setattr(Checkpoints, "save", lambda *args: (device.do(SAVE), save(*args))[1])

    def begin(self: Profiler) -> None:
        device.do(TRACE)
        traced.append(None)
        self._trace = traced

    def end(self: Profiler) -> None:
        if self._trace:
            device.do(TRACE)
            traced.clear()
        self._trace = None

    monkeypatch.setattr(Profiler, "_begin", begin)
    monkeypatch.setattr(Profiler, "_end", end)
    return device


def train(device: Device, name: str, **changes: object) -> tuple[dict[int, dict], dict]:
    """The logged lines of a run by step, evaluations aside, and its timing."""
    run, directory = tiny_run(**changes), RunDirectory(Path(name))
    loop.train(run, directory, open_store(run.data), clock=device.clock)
    lines = {line["step"]: line for line in directory.metrics() if "learning/loss" in line}
    return lines, directory.result()["timing"]


def test_steps_evaluations_and_saves_are_timed_each_by_itself(device: Device) -> None:
    lines, timing = train(
        device,
        "often",
        evaluation=EvaluationConfig(tokens=1024, every_steps=2),
        checkpoint=CheckpointConfig(every_steps=3),
    )
    assert list(lines) == list(range(1, STEPS + 1))
    for step, line in lines.items():  # an evaluation after step 2 is told from step 3 on
        assert line.get("perf/evaluation_seconds", 0) == (step - 1) // 2 * EVALUATION
        assert line.get("perf/checkpoint_seconds", 0) == (step - 1) // 3 * SAVE
        if step > 2:  # the first two compile
            assert line["perf/step_time_seconds"] == STEP
            assert line["perf/per_device_tokens_per_sec"] == TOKENS / STEP
    assert timing["step_time_seconds"] == STEP
    assert timing["training_seconds"] == STEPS * STEP
    assert timing["evaluation_seconds"] == 11 * EVALUATION  # the one after the last step is not in
    assert timing["checkpoint_seconds"] == 7 * SAVE


def test_a_trace_is_no_part_of_a_step(device: Device) -> None:
    never = EvaluationConfig(tokens=1024, every_steps=STEPS)
    lines, timing = train(device, "traced", profile="8:12", evaluation=never)
    for step, line in lines.items():
        if step <= 7:
            continue
        mean = line.get("perf/step_time_seconds")
        if step <= 12:  # traced steps are slow, and told as they are
            slow = step - 7
            assert mean == (5 * STEP + slow * TRACED) / (5 + slow)
        else:  # measured anew, two steps later
            assert mean == (STEP if step > 14 else None)
    assert timing["step_time_seconds"] == STEP
    assert timing["profiling_seconds"] == 2 * TRACE
    assert "evaluation_seconds" not in timing  # there was none between steps
