"""A disk that is full, read-only or limited: one line, exit code 2 within seconds, nothing lost."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_kit import small_state
from training_kit import tiny_run

from gqa_scaling.config import Question
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files import checkpoint, failures
from gqa_scaling.files.checkpoint import open_checkpoints
from gqa_scaling.files.checksums import examine_run
from gqa_scaling.files.runs import run_directory
from gqa_scaling.sweep import run as sweep
from gqa_scaling.training import loop

KIT = Path(__file__).with_name("disk_kit.py")
# Seconds, from the failure to the end, that no busy machine needs and every wait for a timeout of
# Orbax's exceeds; the process itself takes one or two.
LONG = 120


def broken(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(KIT), "break", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=LONG)


def test_a_limit_on_the_size_of_files_is_said_and_is_no_failure_of_the_run(workplace: Path) -> None:
    done = broken("step13", "1000", "run", "tiny.py", "--quiet")
    directory = run_directory("runs", "tiny", tiny_run())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"gqa-scaling: cannot use the disk ({directory.path}): File too large: raise the limit on the "
        "size of a file (ulimit -f), then give the same command again\n"
    )
    assert not directory.failure_file.exists()
    assert directory.state() == "pending"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "x"),
        ValueError("INTERNAL: Error writing local file: Read-only file system"),
    ],
)
def test_no_run_is_blamed_and_none_tried_after_it(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = []

    def train(run: object, *_: object, **__: object) -> None:
        tried.append(run)
        raise error

    monkeypatch.setattr(loop, "train", train)
    runs = (tiny_run("one"), tiny_run("two", seed=1))
    with pytest.raises(failures.DiskError) as caught:
        sweep.run_sweep(Experiment("tiny", runs, Question()), Path("runs"))
    assert failures.failure(caught.value) is caught.value
    assert tried == [runs[0]]
    assert [run_directory("runs", "tiny", run).state() for run in runs] == ["pending"] * 2


def test_a_folder_that_cannot_be_made_is_said_by_the_save_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by threads that wait minutes for it."""
    folder, state, make = tmp_path / "checkpoints", small_state(), os.mkdir

    def refuse(path: object, *more: object, **options: object) -> None:
        if str(path).startswith(str(folder / "2")):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    with open_checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
        checkpoints.wait()
        with pytest.raises(OSError, match="Read-only"):
            checkpoints.save(2, state, {"step": 2})
    assert [kept.state for kept in examine_run(folder, tmp_path / "parameters")] == ["whole"]


def test_what_a_save_raises_in_the_background_is_known_before_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "seal", full)

    def save_and_look() -> None:
        with open_checkpoints(tmp_path, keep=2) as checkpoints:
            checkpoints.save(1, small_state(), {"step": 1})
            while True:
                checkpoints.check()
                time.sleep(0.01)

    with pytest.raises(OSError, match="No space left") as caught:
        save_and_look()
    assert isinstance(failures.failure(caught.value), failures.DiskError)


# ------------------------------------------------------------------------------- real disks


def can_mount(*more: str) -> bool:
    """Whether this user may mount a small file system that only the test's processes see."""
    probe = "mount -t tmpfs tmpfs /mnt"
    try:
        return subprocess.run(["unshare", *more, "sh", "-c", probe], stderr=-3).returncode == 0
    except OSError:
        return False


STORIES = [
    *(("tmpfs", moment, "full") for moment in ("start", "claim", "config", "attempt", "step8")),
    *(("tmpfs", moment, "full") for moment in ("save5", "save10", "seal", "parameters")),
    *(("tmpfs", moment, "full") for moment in ("evaluation", "events", "result")),
    *(("ext4", moment, "read-only") for moment in ("config", "step8", "save10", "seal")),
    *(("ext4", moment, "read-only") for moment in ("parameters", "evaluation", "end")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moment", "how"), STORIES)
def test_a_disk_that_fails_at_any_moment_costs_no_more_than_time(
    workplace: Path, trained: Path, kind: str, moment: str, how: str
) -> None:
    root = os.geteuid() == 0
    mine = ["--mount"] if root else ["--mount", "--map-root-user"]
    if not can_mount(*mine) or (kind == "ext4" and not root):
        pytest.skip("mounting is not permitted here")
    files = trained.glob("runs/tiny/*/result.json")
    expected = [json.loads(file.read_text())["result"] for file in files]
    line = ["unshare", *mine, sys.executable, str(KIT), "story", kind, moment, how]
    done = subprocess.run(line, cwd=workplace, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["code"], found["said"].count("\n"), found["failures"]) == (2, 1, 0), found
    assert found["said"].startswith("gqa-scaling: ")
    assert "disk/runs" in found["said"]
    assert found["seconds"] < LONG
    assert found["again"] == [0, ""]
    assert found["result"] == json.dumps(expected, sort_keys=True)
