"""Killed at any moment, then the same command: the result is the same to the byte."""

import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import result_of, tiny_run

from gqa_scaling.config import Question
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.runs import run_directory
from gqa_scaling.sweep.run import run_sweep

TINY = Path(__file__).with_name("training_kit.py")


def killed_then_continued(*moments: str) -> str:
    for moment in moments:
        assert subprocess.run([sys.executable, str(TINY), moment]).returncode == -9
        assert run_directory("runs", "tiny", tiny_run()).state() == "stale"
    tiny = Experiment("tiny", (tiny_run(),), Question())
    assert run_sweep(tiny, Path("runs")).exit_code == 0
    return result_of(Path("runs"))


@pytest.mark.usefixtures("workplace")
def test_killed_inside_a_save_and_in_evaluation(trained: Path) -> None:
    assert killed_then_continued("save", "evaluation") == result_of(trained / "runs")


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    "moment", ["compilation", "save", "evaluation", "step3", "step13", "step24"]
)
def test_killed_at_each_moment(trained: Path, moment: str) -> None:
    assert killed_then_continued(moment) == result_of(trained / "runs")
