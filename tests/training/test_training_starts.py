"""Runs that start from the trained parameters of another."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from training_kit import tiny_run

from gqa_scaling.config import ModelConfig, OptimizerConfig, Question, RunConfig, UserError
from gqa_scaling.data import open_store
from gqa_scaling.devices import processes
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.experiment.starts import start_of
from gqa_scaling.files.checkpoint import load_parameters
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.sweep import run as sweep
from gqa_scaling.training import loop
from gqa_scaling.training.setup import set_up

PARENT = tiny_run()
CHILD = dataclasses.replace(
    PARENT,
    name="child",
    start_from=start_of(PARENT, "tiny"),
    model=dataclasses.replace(PARENT.model, rope_theta=1e4),
    context_length=64,
    tokens=12 * 128,
    optimizer=OptimizerConfig(learning_rate=1e-3),
    evaluation=dataclasses.replace(PARENT.evaluation, contexts=(16,)),
)


def grid(*runs: RunConfig) -> Experiment:
    return Experiment("tiny", runs, Question())


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a prepared corpus and the finished parent."""
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def child() -> RunDirectory:
    return run_directory("runs", "tiny", CHILD)


@pytest.mark.usefixtures("work")
def test_the_first_state_is_the_parents_parameters_and_a_fresh_optimizer() -> None:
    setup = set_up(CHILD)
    parameters, moments = loop.first_state(setup, child())
    saved = load_parameters(run_directory("runs", "tiny", PARENT).parameters, setup.parameters)
    for found, wanted in zip(*map(jax.tree.leaves, (parameters, saved)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    fresh = set_up(dataclasses.replace(CHILD, start_from=None))
    for found, wanted in zip(
        *map(jax.tree.leaves, (moments, loop.first_state(fresh, child())[1])), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.usefixtures("work")
def test_an_interrupted_child_ends_as_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.run_sweep(grid(PARENT, CHILD), Path("runs")) == sweep.Outcome(2, 0)
    whole = child().result()["result"]
    assert whole["config"]["start_from"] == CHILD.start_from
    first = child().metrics()[0]["learning/loss"]
    scratch = run_directory("runs", "tiny", PARENT).metrics()[0]["learning/loss"]
    assert first < 0.8 * scratch  # it knows what its parent has learnt
    shutil.rmtree(child().path)
    asked = iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr(processes, "preempted", lambda: next(asked) > 8)
        with pytest.raises(processes.Preempted):
            sweep.run_sweep(grid(PARENT, CHILD), Path("runs"))
    assert 0 < child().metrics()[-1]["step"] < 12
    assert sweep.run_sweep(grid(PARENT, CHILD), Path("runs")) == sweep.Outcome(2, 0)
    assert [attempt["first_step"] > 0 for attempt in child().attempts()] == [False, True]
    assert child().result()["result"] == whole


@pytest.mark.usefixtures("work")
def test_a_child_is_trained_once_its_parent_is(monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(PARENT, name="other", seed=7)
    late = dataclasses.replace(CHILD, start_from=start_of(other, "tiny"))
    order = []

    def train(run: RunConfig, directory: RunDirectory, *_: object, **__: object) -> None:
        order.append(run.name)
        if run.name == "other" and len(order) == 1:
            raise ValueError("no")
        directory.finish({"evaluations": {run.evaluation_digest: {"loss": 1.0}}}, {})

    monkeypatch.setattr(loop, "train", train)
    assert sweep.run_sweep(grid(late, other), Path("runs")) == sweep.Outcome(0, 2)
    assert order == ["other"]
    sweep.forget_failures(grid(late, other), Path("runs"))
    assert sweep.run_sweep(grid(late, other), Path("runs")) == sweep.Outcome(2, 0)
    assert order == ["other", "other", "child"]


@pytest.mark.usefixtures("work")
def test_all_that_follow_a_run_that_failed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataclasses.replace(PARENT, name="first", seed=7)
    second = dataclasses.replace(CHILD, name="second", start_from=start_of(first, "tiny"))
    third = dataclasses.replace(CHILD, name="third", start_from=start_of(second, "tiny"))

    def train(*_: object, **__: object) -> None:
        raise ValueError("no")

    def sleep(_: float) -> None:
        raise AssertionError("nothing is to be waited for")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert sweep.run_sweep(grid(first, second, third), Path("runs")) == sweep.Outcome(0, 3)


@pytest.mark.usefixtures("work")
def test_a_parent_that_is_not_finished_is_missed_in_one_line() -> None:
    other = dataclasses.replace(PARENT, name="other", seed=7)
    late = dataclasses.replace(CHILD, start_from=start_of(other, "tiny"))
    with pytest.raises(
        UserError, match=r"child starts from tiny/other-.* is not finished \(pending\)"
    ):
        sweep.run_sweep(grid(late), Path("runs"))
    with pytest.raises(UserError, match=r"child starts from .* train that run first"):
        loop.train(late, run_directory("runs", "tiny", late), open_store(late.data))
    assert not (run_directory("runs", "tiny", late).path / "metrics.jsonl").exists()


@pytest.mark.usefixtures("work")
def test_a_parent_elsewhere_is_held_against_its_own_config() -> None:
    large = dataclasses.replace(CHILD, model=ModelConfig(2, 32, 4, 2, head_dim=4, vocab_size=264))
    with pytest.raises(UserError, match=r"another architecture \(model.d_model: 16 -> 32"):
        sweep.check(grid(large), Path("runs"))
    directory = run_directory("runs", "tiny", PARENT)
    text = directory.config_file.read_text()
    known = open_store(PARENT.data).describe()["tokenizer_hash"]
    directory.config_file.write_text(text.replace(known, "0" * 64))
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        sweep.check(grid(CHILD), Path("runs"))
