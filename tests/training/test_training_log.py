"""The log may be lost: what a result needs is saved with the state, or its loss is an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_kit import tiny_run

from gqa_scaling.config import CheckpointConfig
from gqa_scaling.data import open_store
from gqa_scaling.files import checkpoint
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.training import loop

RUN = tiny_run(tokens=120 * 128, checkpoint=CheckpointConfig(every_steps=59))
SAVED = 118  # the last six of 120 losses are in the result, four of them from before that step


def trained(directory: RunDirectory) -> dict:
    loop.train(RUN, directory, open_store(RUN.data))
    return directory.result()["result"]


def train_and_copy() -> None:
    """Train the run in `whole`, and copy its directory at two moments: `interrupted` when its last
    checkpoint had been saved, and `judged` when its evaluation was about to begin."""
    directory = RunDirectory(Path("whole"))
    save, make = checkpoint.Checkpoints.save, loop.evaluator

    def copying_save(self: checkpoint.Checkpoints, step: int, state: object, known: dict) -> None:
        save(self, step, state, known)
        if step == SAVED:
            self.wait()
            shutil.copytree(directory.path, "interrupted")

    def copying_evaluator(*args: object) -> Callable:
        evaluate = make(*args)

        def copying(parameters: object, *most: int) -> object:
            if not most:  # as it is called during training
                shutil.copytree(directory.path, "judged")
            return evaluate(parameters, *most)

        return copying

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", copying_save)
        patch.setattr(loop, "evaluator", copying_evaluator)
        trained(directory)


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run and its copies."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("corpus", "data"):
        (folder / name).symlink_to(trained / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_and_copy()
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A copy of one of these runs, whose log can be damaged."""
    for name in ("corpus", "data"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)

    def of(name: str) -> RunDirectory:
        return RunDirectory(Path(shutil.copytree(folder / name, tmp_path / name)))

    return of


@pytest.fixture
def expected(folder: Path) -> dict:
    return RunDirectory(folder / "whole").result()["result"]


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
        ("interrupted", delete),
        ("interrupted", cut_short),
        ("interrupted", repeat),
        ("judged", delete),
    ],
)
def test_the_result_is_the_same_whatever_became_of_the_log(
    copy: Callable, expected: dict, name: str, damage: Callable[[Path], None]
) -> None:
    directory = copy(name)
    damage(directory.metrics_file)
    assert json.dumps(trained(directory)) == json.dumps(expected)
    if name == "interrupted":
        steps = [line["step"] for line in directory.metrics()]
        assert steps[-2:] == [119, 120]  # lines from beyond the checkpoint are dropped
        assert steps.count(119) == 1
