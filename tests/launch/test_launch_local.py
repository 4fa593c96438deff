"""The supervisor of a job's processes, with processes that do not need jax."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from launch.cli import main
from launch.local import supervise

RANKS = [{"RANK": str(i)} for i in range(3)]


def command(body: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import os, sys, time, signal\nrank = os.environ['RANK']\n{body}",
    ]


def test_all_done_is_0() -> None:
    assert supervise(command("pass"), RANKS) == 0


def test_the_first_failure_ends_the_others_at_once_and_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    body = "if rank == '1': sys.exit('boom')\ntime.sleep(600)"
    assert supervise(command(body), RANKS) == 1
    said = capsys.readouterr().err
    assert "[1] boom\n" in said
    assert "launch: process 1 ended with 1; the job was ended\n" in said


def test_a_lost_process_is_told_by_its_signal() -> None:
    body = "if rank == '2': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)"
    assert supervise(command(body), RANKS) == 128 + signal.SIGKILL


def test_sigterm_is_passed_on_and_75_comes_back(tmp_path: Path) -> None:
    ready = [tmp_path / str(i) for i in range(3)]
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"open({str(tmp_path)!r} + '/' + rank, 'w').close()\ntime.sleep(600)"
    )

    def stop_when_all_listen() -> None:
        while not all(path.exists() for path in ready):
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_all_listen, daemon=True).start()
    assert supervise(command(body), RANKS) == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("local", "--processes", "0", "experiments.smoke"),
            "--processes 0 must be 1 to 256",
        ),
        (("local", "--devices-per-process", "0", "x"), "--devices-per-process 0 must be"),
        (("local",), "name an experiment"),
        (("nowhere",), "invalid choice: 'nowhere'"),
        (("local", "--processes", "two", "x"), "invalid int value: 'two'"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
