"""The log may be lost: what a result needs is saved with the state, or its loss is an error."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_kit import tiny_run

from gqa_scaling.config import CheckpointConfig, Question, UserError
from gqa_scaling.data import open_store
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files import checkpoint
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.sweep import run as sweep
from gqa_scaling.training import loop

ADDED = ("logged_losses", "skipped_steps", "spikes_in_a_row")  # to a position, once


RUN = tiny_run(tokens=120 * 128, checkpoint=CheckpointConfig(every_steps=59))
SAVED = 118  # the last six of 120 losses are in the result, four of them from before that step


def trained(directory: RunDirectory) -> dict:
    loop.train(RUN, directory, open_store(RUN.data))
    return directory.result()["result"]


def train_and_copy(name: str, old: bool) -> None:
    """Train a run, and copy its directory at two moments: `interrupted` when its last checkpoint had
    been saved, and `judged` when its evaluation was about to begin.

    An `old` one is made as by a version that kept losses in the log alone.
    """
    directory = RunDirectory(Path(name))
    save, save_parameters, make = (
        checkpoint.Checkpoints.save,
        loop.save_parameters,
        loop.evaluator,
    )

    def copying_save(self: checkpoint.Checkpoints, step: int, state: object, known: dict) -> None:
        save(self, step, state, {k: v for k, v in known.items() if not (old and k in ADDED)})
        if step == SAVED:
            self.wait()
            shutil.copytree(directory.path, f"{name}-interrupted")

    def copying_evaluator(*args: object) -> Callable:
        evaluate = make(*args)
        judged = f"{name}-judged"

        def copying(parameters: object, *most: int) -> object:
            if not most:  # as it is called during training
                shutil.copytree(directory.path, judged)
            return evaluate(parameters, *most)

        return copying

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", copying_save)
        patch.setattr(loop, "evaluator", copying_evaluator)
        if old:
            patch.setattr(loop, "save_parameters", lambda path, x, *_: save_parameters(path, x))
        trained(directory)


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `new` and `old`, both finished, and their copies."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("corpus", "data"):
        (folder / name).symlink_to(trained / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_and_copy("new", old=False)
        train_and_copy("old", old=True)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A copy of one of these runs, whose log can be damaged."""
    for name in ("corpus", "data"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)

    def of(name: str, at: Path | None = None) -> RunDirectory:
        at = at or tmp_path / name
        shutil.copytree(folder / name, at)
        return RunDirectory(at)

    return of


@pytest.fixture
def expected(folder: Path) -> dict:
    return RunDirectory(folder / "new").result()["result"]


def delete(log: Path) -> None:
    log.unlink()


def cut_short(log: Path) -> None:
    """Behind the checkpoint, in the middle of a line."""
    text = log.read_bytes()
    log.write_bytes(text[: text.index(b'{"step": 4,') + 20])


def repeat(log: Path) -> None:
    """Lines that stand there twice, and lines of steps that the checkpoint has before it."""
    lines = log.read_text().splitlines(keepends=True)
    beyond = json.dumps({"step": 121, "time": 0.0, "learning/loss": 9.0}) + "\n"
    log.write_text("".join([*lines[:12], *lines[2:], *lines[-2:], beyond]))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("new-interrupted", delete),
        ("new-interrupted", cut_short),
        ("new-interrupted", repeat),
        ("new-judged", delete),
        ("old-interrupted", repeat),
        ("old-judged", repeat),
    ],
)
def test_the_result_is_the_same_whatever_became_of_the_log(
    copy: Callable, expected: dict, name: str, damage: Callable[[Path], None]
) -> None:
    directory = copy(name)
    damage(directory.metrics_file)
    assert json.dumps(trained(directory)) == json.dumps(expected)
    if name.endswith("interrupted"):
        steps = [line["step"] for line in directory.metrics()]
        assert steps[-2:] == [119, 120]  # lines from beyond the checkpoint are dropped
        assert steps.count(119) == 1


@pytest.mark.parametrize(("name", "step"), [("old-interrupted", 118), ("old-judged", 120)])
def test_a_log_that_alone_holds_the_losses_must_be_whole(
    copy: Callable, expected: dict, name: str, step: int
) -> None:
    directory = copy(name)
    log, kept = directory.metrics_file, directory.metrics_file.read_bytes()
    said = (
        f"{log} lacks step {{}}, but the losses up to step {step}, at which {directory.path} was "
        f"saved by an earlier version, are in that log alone: put it back from a copy, or remove "
        f"{directory.path} to train from the first step"
    )
    for damage, lacks in ((delete, 1), (cut_short, 4)):
        damage(log)
        before = log.read_bytes() if log.exists() else None
        with pytest.raises(UserError, match=f"^{re.escape(said.format(lacks))}$"):
            trained(directory)
        assert before == (log.read_bytes() if log.exists() else None)
        log.write_bytes(kept)
    assert len(directory.attempts()) == 1
    if name == "old-judged":  # both take the same way from here
        assert json.dumps(trained(directory)) == json.dumps(expected)


def test_a_sweep_leaves_such_a_run_to_its_user(copy: Callable) -> None:
    grid = Experiment("grid", (RUN,), Question(), "")
    directory = copy("old-interrupted", run_directory(Path("runs"), "grid", RUN).path)
    directory.metrics_file.unlink()
    with pytest.raises(
        UserError, match=r"metrics\.jsonl lacks step 1, but the losses up to step 118"
    ):
        sweep.run_sweep(grid, Path("runs"))
    assert directory.state() == "pending"  # no failure is recorded: the command ends with 2
