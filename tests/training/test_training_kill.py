"""kill -9 at any moment, then the same command: the result is the same to the byte."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import tiny_run, write_corpus

from gqa_scaling.data import prepare
from gqa_scaling.files.runs import run_directory

TINY = Path(__file__).with_name("training_kit.py")


def start(folder: Path, *moment: str) -> int:
    return subprocess.run([sys.executable, str(TINY), *moment], cwd=folder).returncode


def result_bytes(folder: Path) -> bytes:
    file = run_directory(folder / "runs", "tiny", tiny_run()).result_file
    return json.dumps(json.loads(file.read_text())["result"], sort_keys=True).encode()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(tiny_run().data, show=False)
    assert start(folder) == 0
    return folder, result_bytes(folder)


def killed_then_continued(folder: Path, undisturbed: Path, *moments: str) -> bytes:
    for name in ("corpus", "data"):
        (folder / name).symlink_to(undisturbed / name)
    for moment in moments:
        assert start(folder, moment) == -9
        assert run_directory(folder / "runs", "tiny", tiny_run()).state() == "stale"
    assert start(folder) == 0
    return result_bytes(folder)


def test_killed_inside_a_save_and_in_evaluation(
    tmp_path: Path, undisturbed: tuple[Path, bytes]
) -> None:
    folder, expected = undisturbed
    assert killed_then_continued(tmp_path, folder, "save", "evaluation") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["compilation", "save", "evaluation", "step3", "step13", "step24"]
)
def test_killed_at_each_moment(
    tmp_path: Path, undisturbed: tuple[Path, bytes], moment: str
) -> None:
    folder, expected = undisturbed
    assert killed_then_continued(tmp_path, folder, moment) == expected
