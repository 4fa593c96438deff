"""Claims: of all that look at a run one is at it, and a run that nobody is at is found free."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gqa_scaling.files import claims
from gqa_scaling.files.claims import RENEW_SECONDS, STALE_SECONDS, claim, waited_for
from gqa_scaling.files.runs import RunDirectory, read_json
from gqa_scaling.files.storage import write_atomic, write_json

NOW = 1_800_000_000.0  # what the clock is made to say


# -------------------------------------------------------------------------------------- states


def plant(directory: RunDirectory, **changes) -> None:
    """A claim of this very process, or with some of it changed."""
    holder = {"host": claims._host(), "pid": os.getpid(), "token": "t"}
    holder["born"] = claims._born(os.getpid())
    write_json(directory.claim_file, holder | changes)


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_states_follow_from_the_files(directory):
    assert directory.state() == "pending"
    directory.path.mkdir()
    assert directory.state() == "pending"
    plant(directory)
    assert directory.state() == "running"
    directory.fail("Traceback\nValueError: no\n", "ValueError")
    assert directory.state() == "running"  # a failed run that is being tried again
    plant(directory, pid=ended_pid())
    assert directory.state() == "failed"
    directory.failure_file.unlink()
    assert directory.state() == "stale"
    directory.claim_file.unlink()
    assert directory.state() == "pending"
    plant(directory)
    directory.finish({}, {})
    assert directory.state() == "done"


# -------------------------------------------------------------------------------------- claims


def taken(directory: RunDirectory) -> bool:
    with claim(directory.claim_file) as mine:
        return mine


def test_a_claim_is_held_and_given_back(directory):
    with claim(directory.claim_file) as mine:
        assert mine
        assert directory.state() == "running"
        assert read_json(directory.claim_file)["pid"] == os.getpid()
    assert not directory.claim_file.exists()
    assert directory.state() == "pending"


def test_a_claim_is_given_back_when_the_body_fails(directory):
    with pytest.raises(ZeroDivisionError), claim(directory.claim_file):
        raise ZeroDivisionError
    assert taken(directory)


def test_a_claim_of_a_live_process_is_not_taken_over(directory):
    with claim(directory.claim_file) as mine:
        held = directory.claim_file.read_bytes()
        assert mine
        assert not taken(directory)
        assert directory.claim_file.read_bytes() == held  # nor given back by the loser


def test_a_claim_of_another_users_live_process_is_not_taken_over(directory, monkeypatch):
    directory.path.mkdir()
    plant(directory)

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    assert not taken(directory)
    plant(directory, born="1")
    assert taken(directory)


def test_a_claim_of_a_dead_process_is_taken_over(directory):
    directory.path.mkdir()
    plant(directory, pid=ended_pid())
    assert directory.state() == "stale"
    assert taken(directory)


def test_a_claim_of_a_reused_pid_is_taken_over(directory):
    directory.path.mkdir()
    plant(directory, born="1")
    assert taken(directory)


HOLD = """
import sys
from pathlib import Path
from gqa_scaling.files.claims import claim
with claim(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_killed_claimant_loses_its_claim_even_before_its_parent_has_noticed(directory):
    command = [sys.executable, "-c", HOLD, str(directory.claim_file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "True\n"
        assert directory.state() == "running"
        assert not taken(directory)
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""  # closed by the kernel when it died; not yet waited for
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert directory.state() == "stale"
        assert taken(directory)


ELSEWHERE = {
    "another machine": "elsewhere",
    "another machine of this name": f"{os.uname().nodename} 0f8fad5b pid:[4026531836]",
    "an older version": os.uname().nodename,
}


@pytest.mark.parametrize("host", ELSEWHERE.values(), ids=ELSEWHERE)
def test_pids_of_other_hosts_say_nothing(directory, host):
    directory.path.mkdir()
    plant(directory, host=host, pid=ended_pid())
    assert directory.state() == "running"
    assert not taken(directory)


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="no PID namespaces here")
def test_pids_of_other_containers_of_this_machine_say_nothing(directory, monkeypatch):
    directory.path.mkdir()
    plant(directory, pid=ended_pid())
    assert directory.state() == "stale"
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")  # as another container sees it
    assert directory.state() == "running"
    assert not taken(directory)


AGES = [(STALE_SECONDS - 1, False), (STALE_SECONDS + 1, True)]


@pytest.fixture
def now(monkeypatch):
    """Make every clock say NOW, that of the disk as well."""
    monkeypatch.setattr(claims.time, "time", lambda: NOW)
    monkeypatch.setattr(claims, "_touched", lambda guard: NOW)


@pytest.mark.parametrize(("age", "free"), [*AGES, *((-age, free) for age, free in AGES)])
def test_another_machines_claim_is_stale_when_not_renewed(directory, now, age, free):
    directory.path.mkdir()
    plant(directory, host="elsewhere", pid=ended_pid())
    os.utime(directory.claim_file, (NOW - age, NOW - age))
    assert directory.state() == ("stale" if free else "running")
    assert taken(directory) == free


@pytest.mark.parametrize(("age", "free"), AGES)
@pytest.mark.parametrize("ahead", [-1e6, 1e6])
def test_claims_are_judged_by_the_clock_of_their_disk(directory, monkeypatch, ahead, age, free):
    directory.path.mkdir()
    plant(directory, host="elsewhere", pid=ended_pid())
    on_disk = NOW + ahead  # this machine's own clock is wrong by days
    os.utime(directory.claim_file, (on_disk - age, on_disk - age))
    monkeypatch.setattr(claims.time, "time", lambda: NOW)
    monkeypatch.setattr(claims, "_touched", lambda guard: on_disk)
    assert taken(directory) == free


def test_the_disks_clock_dates_what_is_touched(tmp_path):
    file = tmp_path / "guard"
    file.touch()
    os.utime(file, (1.0, 1.0))
    with open(file, "w") as guard:
        os.utime(file, (1.0, 1.0))
        assert claims._touched(guard) == file.stat().st_mtime > 1.0


WHOLE = {"host": "elsewhere", "pid": 7, "born": "1", "token": "t"}
GARBAGE = {
    "cut short": b'{"host": "els',
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(100),
    "a list": b"[]",
    "a number": b"7",
    "nothing": b"null",
    "brackets": b"[" * 100_000,
    "no fields": b"{}",
    "a field less": json.dumps({**WHOLE, "token": None}).encode(),
    "words for a number": json.dumps({**WHOLE, "pid": "seven"}).encode(),
    "truth for a number": json.dumps({**WHOLE, "pid": True}).encode(),
    "everybody": json.dumps({**WHOLE, "pid": 0}).encode(),
    "a group": json.dumps({**WHOLE, "pid": -7}).encode(),
    "a host that clears the screen": json.dumps({**WHOLE, "host": "h\n\x1b[2J"}).encode(),
    "no such number": json.dumps({**WHOLE, "pid": 10**30}).encode(),
    "our own": json.dumps({**WHOLE, "host": claims._host(), "pid": 10**30}).encode(),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_claim_is_waited_for_no_longer_than_a_holder_needs_to_see_it(
    directory, now, content
):
    directory.path.mkdir()
    directory.claim_file.write_bytes(content)
    for age, free in ((2 * RENEW_SECONDS - 1, False), (2 * RENEW_SECONDS + 1, True)):
        os.utime(directory.claim_file, (NOW - age, NOW - age))
        assert directory.state() == ("stale" if free else "running")
        assert f"its claim {directory.claim_file} is damaged" in waited_for(directory.claim_file)
        assert taken(directory) == free


@pytest.mark.parametrize("lost", ["damaged", "gone"])
def test_a_holder_whose_claim_is_lost_stops(directory, monkeypatch, capsys, lost):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.001)
    told = threading.Event()
    monkeypatch.setattr(claims._thread, "interrupt_main", told.set)
    with claim(directory.claim_file) as mine:
        assert mine
        if lost == "gone":  # who took it over has given it back
            directory.claim_file.unlink()
        else:
            write_atomic(directory.claim_file, "[]")
        until(told.is_set)
    assert f"its claim is {lost}, stopping" in capsys.readouterr().err
    if lost == "damaged":
        assert directory.claim_file.read_text() == "[]"  # given back by nobody


def test_what_is_waited_for_is_said_with_its_end(directory, now):
    directory.path.mkdir()
    assert waited_for(directory.claim_file) is None
    plant(directory)
    assert waited_for(directory.claim_file) is None  # a process here, whose progress is shown
    plant(directory, host="node7 0f8fad5b pid:[4026531836]", pid=123)
    os.utime(directory.claim_file, (NOW, NOW))
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW + STALE_SECONDS))
    assert waited_for(directory.claim_file) == (
        f"process 123 of node7 is at it; it is taken over at {end} "
        "unless the claim is renewed before"
    )


def until(condition) -> None:
    """Wait for another thread; the limit only ends a test that would fail anyway."""
    for _ in range(60_000):
        if condition():
            return
        threading.Event().wait(0.005)
    pytest.fail("nothing happened")


def test_a_held_claim_is_renewed(directory, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.001)
    with claim(directory.claim_file):
        os.utime(directory.claim_file, (1.0, 1.0))
        until(lambda: directory.claim_file.stat().st_mtime > 1.0)


def test_renewing_survives_a_disk_that_is_away_for_a_moment(directory, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.001)
    read, tried = claims._read, threading.Event()

    def away(file: Path) -> None:
        tried.set()
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with claim(directory.claim_file):
        monkeypatch.setattr(claims, "_read", away)
        until(tried.is_set)
        os.utime(directory.claim_file, (1.0, 1.0))
        monkeypatch.setattr(claims, "_read", read)
        until(lambda: directory.claim_file.stat().st_mtime > 1.0)


def test_a_claim_taken_over_by_somebody_else_is_not_given_back(directory):
    with claim(directory.claim_file):
        plant(directory, host="elsewhere", token="theirs")
    assert read_json(directory.claim_file)["token"] == "theirs"


RACE = """
import sys
from pathlib import Path
from gqa_scaling.files.claims import claim
for line in sys.stdin:
    with claim(Path(line.strip())) as mine:
        print(int(mine), flush=True)
        sys.stdin.readline()
    print("released", flush=True)
"""


def test_two_processes_never_hold_one_claim(tmp_path):
    command = [sys.executable, "-c", RACE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    dead, wins = ended_pid(), [0, 0]
    with subprocess.Popen(command, **pipes) as a, subprocess.Popen(command, **pipes) as b:
        for round_ in range(150):
            directory = RunDirectory(tmp_path / str(round_))
            if round_ % 2:  # a stale claim to be taken over, in turn with none at all
                directory.path.mkdir()
                plant(directory, pid=dead)
            order = (a, b) if round_ % 4 < 2 else (b, a)
            for process in order:
                process.stdin.write(f"{directory.claim_file}\n")
            held = [int(p.stdout.readline()) for p in (a, b)]
            assert sum(held) == 1, f"round {round_}: {sum(held)} processes hold the claim"
            wins = [n + h for n, h in zip(wins, held, strict=True)]
            for process in order:
                process.stdin.write("\n")
            assert [p.stdout.readline() for p in (a, b)] == ["released\n"] * 2
            assert not directory.claim_file.exists()
        for process in (a, b):
            process.stdin.close()
    assert min(wins) > 0, "they never raced"
