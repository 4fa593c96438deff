"""What a job does on a host, with children that need no jax."""

import fnmatch
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import work
from launch.work import Work, commands, exactly, meaning, parse


def child(body: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{body}"]


def test_each_run_is_a_command_of_its_own():
    todo = commands("experiments.x", ["a", "b"], ["--seed", "1"])
    start = [sys.executable, "-m", "gqa_scaling", "run", "experiments.x", "--only"]
    assert todo == [[*start, "[a]", "--seed", "1"], [*start, "[b]", "--seed", "1"]]


def test_a_pattern_matches_its_run_and_no_longer_name():
    names = ["h1-kv1", "h1-kv16", "1.2B-h1-kv1", "h1-kv1-seed1", "H1-kv1", "h1.kv+_1"]
    for name in names:
        pattern = exactly(name)  # as Experiment.select reads it
        assert [n for n in names if fnmatch.fnmatchcase(n, pattern) or pattern in n] == [name]


def test_the_command_line_reads_back():
    assert parse(["x.py", "a", "b"]) == ("x.py", ["a", "b"], [])
    assert parse(["x.py", "a", "--", "--note", "--"]) == ("x.py", ["a"], ["--note", "--"])
    assert parse(["--", "a", "--", "--seed", "1"]) == ("--", ["a"], ["--seed", "1"])


@pytest.mark.parametrize(
    ("ended", "code"),
    [(0, 0), (1, 1), (2, 2), (70, 70), (74, 74), (75, 75), (134, 134), (137, 137), (143, 143)]
    + [(-6, 134), (-9, 137), (-15, 143), (-11, 1), (127, 1), (139, 1), (42, 1)],
)
def test_every_end_has_a_meaning(ended, code):
    assert meaning(ended) == code


@pytest.mark.parametrize(
    ("codes", "code", "begun"),
    [((0, 0, 0), 0, 3), ((0, 1, 0), 1, 3), ((2, 0), 2, 1), ((1, 75, 0), 75, 2), ((134, 0), 134, 1)]
    # one of several processes: the job starts again where runs are left, and ends where they failed before
    + [((70, 0), 75, 1), ((1, 70, 0), 75, 2), ((1, 1), 1, 2), ((0, 70), 1, 2)],
)
def test_a_failed_run_leaves_the_others_and_a_stopped_job_ends(tmp_path, codes, code, begun):
    bodies = [
        f"open({str(tmp_path / str(i))!r}, 'w')\nsys.exit({each})" for i, each in enumerate(codes)
    ]
    assert Work([child(body) for body in bodies]).run() == code
    assert len(list(tmp_path.iterdir())) == begun


@pytest.mark.parametrize(
    ("codes", "code", "waited"),
    [
        ((74, 0, 0), 0, 60),
        ((74, 74, 1, 0), 1, 360),
        ((74, 74, 74, 74), 1, 1260),  # and the other run is not begun
        ((74, 134), 134, 60),
    ],
)
def test_a_run_whose_bucket_is_away_is_given_again(codes, code, waited, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(work.time, "sleep", slept.append)
    ends, begun = tmp_path / "ends", tmp_path / "begun"
    ends.write_text("".join(f"{each}\n" for each in codes))
    body = f"open({str(begun)!r}, 'a').write('x')\nleft = open({str(ends)!r}).readlines()\n"
    body += f"open({str(ends)!r}, 'w').writelines(left[1:])\nsys.exit(int(left[0]))"
    assert Work([child(body)] * 2).run() == code
    assert sum(slept) == waited
    assert begun.read_text() == "x" * len(codes)


def test_a_job_that_waits_for_its_bucket_can_be_stopped(monkeypatch):
    job = Work([child("sys.exit(74)")])
    monkeypatch.setattr(work.time, "sleep", job.stop)
    assert job.run() == 75


def test_after_a_stop_no_run_begins():
    job = Work([child("sys.exit('never')")])
    job.stop()
    assert job.run() == 75


def test_sigterm_is_passed_on_and_75_comes_back(tmp_path):
    """As an engine sees it: the process that it started is told to stop."""
    ready, body = tmp_path / "ready", "signal.signal(15, lambda *_: sys.exit(75))\n"
    body += f"open({str(tmp_path / 'ready')!r}, 'w').close()\ntime.sleep(60)"
    driver = (
        "import signal, sys\nfrom launch.work import Work\n"
        f"job = Work([{child(body)!r}])\nsignal.signal(signal.SIGTERM, job.stop)\nsys.exit(job.run())"
    )
    process = subprocess.Popen([sys.executable, "-c", driver])
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 75


def test_a_signal_handler_may_wait_for_the_run(tmp_path, monkeypatch):
    """Popen.wait would hang there: the handler interrupts one that holds its lock."""
    ready = tmp_path / "ready"
    body = f"signal.signal(15, lambda *_: sys.exit(75))\nopen({str(ready)!r}, 'w')\ntime.sleep(60)"
    job, seen = Work([child(body)]), []

    def handler(*_):
        job.stop()
        job.wait()
        seen.append(job.stopped)

    before = signal.signal(signal.SIGUSR2, handler)

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR2)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert job.run() == 75
    finally:
        thread.join()
        signal.signal(signal.SIGUSR2, before)
    assert seen == [True]


def test_a_run_that_does_not_end_is_waited_for_no_longer_than_was_said():
    job = Work([])
    job._child = subprocess.Popen(child("time.sleep(600)"))
    job.wait(0)
    assert job._child.poll() is None
    job._child.kill()
    job.wait(600)
    assert job._child.wait() == -9


def test_it_needs_nothing_but_python(tmp_path):
    """A host may have a broken environment; the message of that is the run's."""
    done = subprocess.run([sys.executable, "-S", work.__file__, "x.py"], cwd=tmp_path)
    assert done.returncode == 0
    assert Path(work.__file__).name == "work.py"
