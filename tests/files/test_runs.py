import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gqa_scaling.config import DataConfig, ModelConfig, RunConfig, UserError
from gqa_scaling.files import runs
from gqa_scaling.files.runs import (
    RENEW_SECONDS,
    STALE_SECONDS,
    RunDirectory,
    claim,
    read_json,
    run_directory,
    runs_root,
    waited_for,
    write_atomic,
    write_json,
)

NOW = 1_800_000_000.0  # what the clock is made to say


def run(name: str = "a", **changes) -> RunConfig:
    fields = {"model": ModelConfig(2, 32, 4, 2), "tokens": 2560} | changes
    return RunConfig(name=name, context_length=64, batch_tokens=256, **fields)


def attempt(first: int) -> dict:
    return {"began": NOW, "first_step": first, "layout": {"device": "cpu"}}


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "a-0123456789ab")


def listed(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# -------------------------------------------------------------------------------- atomic files


def test_write_atomic_replaces_the_file_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "result.json"
    write_atomic(file, "old\n")
    write_atomic(file, "new Größe\n")
    assert file.read_text(encoding="utf-8") == "new Größe\n"
    assert listed(tmp_path) == ["result.json"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    file, seen = tmp_path / "result.json", []
    file.write_text("old")
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append(file.read_text())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(file, "new")
    assert seen == ["old"]
    assert file.read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    file = tmp_path / "result.json"
    file.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert listed(tmp_path) == ["result.json"]


def test_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(file, "half \ud800")
    assert file.read_text() == "old"
    assert listed(tmp_path) == ["result.json"]


@pytest.mark.parametrize("content", [b'{"schema": 1', b"", b"\xff\xfe\x00", b"\x00" * 100])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        read_json(tmp_path / "result.json")


# ------------------------------------------------------------------------ config and its refusal


def test_config_survives_begin(directory):
    directory.begin(run(), {"hash": "abc"})
    assert directory.config() == run()
    stored = read_json(directory.config_file)
    assert stored["digest"] == run().digest
    assert stored["data"] == {"hash": "abc"}


def test_begin_again_refuses_another_config_and_changes_nothing(directory):
    directory.begin(run(), {"hash": "abc"})
    before = directory.config_file.read_bytes()
    with pytest.raises(UserError, match=r"another config: model\.n_heads: 4 -> 8; seed: 0 -> 1"):
        directory.begin(run(model=ModelConfig(2, 32, 8, 2), seed=1), {"hash": "abc"})
    assert directory.config_file.read_bytes() == before


def test_begin_again_refuses_other_data_and_changes_nothing(directory):
    directory.begin(run(), {"hash": "abc", "tokens": 7})
    before = directory.config_file.read_bytes()
    with pytest.raises(UserError, match=r"other data \(hash differ\)"):
        directory.begin(run(), {"hash": "abd", "tokens": 7})
    assert directory.config_file.read_bytes() == before


def test_begin_again_takes_what_does_not_define_the_result(directory):
    directory.begin(run(data=DataConfig(corpus="/here/texts")), {"hash": "abc"})
    moved = run("renamed", data=DataConfig(corpus="/there/texts", store="/fast"), note="later")
    directory.begin(moved, {"hash": "abc"})
    assert directory.config() == moved


def test_another_schema_is_refused(directory):
    directory.begin(run(), {})
    write_json(directory.config_file, read_json(directory.config_file) | {"schema": 99})
    with pytest.raises(UserError, match="has schema 99"):
        directory.config()


def test_run_directory_is_found_by_its_digest_under_any_name(tmp_path):
    here = run_directory(tmp_path, "exp", run("first"))
    assert here.path == tmp_path / "exp" / f"first-{run().digest}"
    here.path.mkdir(parents=True)
    assert run_directory(tmp_path, "exp", run("second")) == here
    assert run_directory(tmp_path, "exp", run("second", seed=1)) != here
    assert run_directory(tmp_path, "other", run("second")) != here


def test_runs_root(monkeypatch):
    monkeypatch.delenv("GQA_SCALING_RUNS", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("GQA_SCALING_RUNS", "elsewhere")
    assert runs_root() == Path("elsewhere")


# ---------------------------------------------------------------------------- metrics, attempts


def log(directory: RunDirectory, text: str) -> None:
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.metrics_file.write_text(text)


def test_no_metrics_yet(directory):
    assert directory.metrics() == []
    assert directory.last_metrics("loss") == {}
    directory.truncate_metrics(5)
    assert not directory.metrics_file.exists()


def test_a_last_line_cut_short_is_left_out_at_every_length(directory):
    whole = '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'
    first, second = (json.loads(line) for line in whole.splitlines())
    end_of_first = whole.index("\n") + 1
    for length in range(len(whole) + 1):
        log(directory, whole[:length])
        expected = [first] * (length >= end_of_first - 1) + [second] * (length >= len(whole) - 1)
        assert directory.metrics() == expected
        assert directory.last_metrics("loss") == (expected[-1] if expected else {})


def test_damage_before_the_last_line_is_named(directory):
    log(directory, '{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is damaged"):
        directory.metrics()


def test_truncated_metrics_end_at_the_step_and_can_be_continued(directory):
    log(directory, '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    directory.truncate_metrics(2)
    with open(directory.metrics_file, "a") as file:
        file.write('{"step": 3}\n')
    assert directory.metrics_file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    directory.truncate_metrics(0)
    assert directory.metrics() == []


def test_truncating_mends_a_missing_newline(directory):
    log(directory, '{"step": 1}')
    directory.truncate_metrics(1)
    assert directory.metrics_file.read_text() == '{"step": 1}\n'


def test_last_metrics_reads_the_end_of_a_long_file(directory):
    lines = [json.dumps({"step": i, "loss": i / 7, "pad": "x" * 90}) for i in range(500)]
    log(directory, "\n".join([*lines, '{"step": 500, "evaluation": 1}', '{"step": 501, "lo']))
    assert directory.last_metrics("loss")["step"] == 499
    assert directory.last_metrics("evaluation") == {"step": 500, "evaluation": 1}
    assert directory.last_metrics("absent") == {}


def test_attempts_are_added(directory):
    directory.path.mkdir()
    assert directory.attempts() == []
    directory.add_attempt(attempt(1))
    directory.add_attempt(attempt(8))
    assert directory.attempts() == [attempt(1), attempt(8)]


def test_finish_writes_the_result_and_drops_what_only_an_unfinished_run_needs(directory):
    directory.begin(run(), {})
    directory.add_attempt(attempt(1))
    directory.fail("Traceback\nValueError: no\n", "ValueError")
    for kept in ("checkpoints", "parameters"):
        (directory.path / kept / "5").mkdir(parents=True)
    assert directory.result() is None
    directory.finish({"evaluations": {}}, {"seconds": 1.0})
    whole = directory.result()
    assert whole == {
        "schema": 1,
        "result": {"evaluations": {}},
        "timing": {"seconds": 1.0},
        "attempts": [attempt(1)],
    }
    assert listed(directory.path) == [
        "attempts.jsonl",
        "config.json",
        "parameters",
        "result.json",
    ]


# -------------------------------------------------------------------------------------- states


def plant(directory: RunDirectory, **changes) -> None:
    """A claim of this very process, or with some of it changed."""
    holder = {"host": runs.socket.gethostname(), "pid": os.getpid(), "token": "t"}
    holder["born"] = runs._born(os.getpid())
    write_json(directory.claim_file, holder | changes)


def ended_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_states_follow_from_the_files(directory):
    assert directory.state() == "pending"
    directory.begin(run(), {})
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
    with claim(directory) as mine:
        return mine


def test_a_claim_is_held_and_given_back(directory):
    with claim(directory) as mine:
        assert mine
        assert directory.state() == "running"
        assert read_json(directory.claim_file)["pid"] == os.getpid()
    assert not directory.claim_file.exists()
    assert directory.state() == "pending"


def test_a_claim_is_given_back_when_the_body_fails(directory):
    with pytest.raises(ZeroDivisionError), claim(directory):
        raise ZeroDivisionError
    assert taken(directory)


def test_a_claim_of_a_live_process_is_not_taken_over(directory):
    with claim(directory) as mine:
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
from gqa_scaling.files.runs import RunDirectory, claim
with claim(RunDirectory(Path(sys.argv[1]))) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_killed_claimant_loses_its_claim_even_before_its_parent_has_noticed(directory):
    command = [sys.executable, "-c", HOLD, str(directory.path)]
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


AGES = [(STALE_SECONDS - 1, False), (STALE_SECONDS + 1, True)]


@pytest.fixture
def now(monkeypatch):
    """Make every clock say NOW, that of the disk as well."""
    monkeypatch.setattr(runs.time, "time", lambda: NOW)
    monkeypatch.setattr(runs, "_touched", lambda guard: NOW)


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
    monkeypatch.setattr(runs.time, "time", lambda: NOW)
    monkeypatch.setattr(runs, "_touched", lambda guard: on_disk)
    assert taken(directory) == free


def test_the_disks_clock_dates_what_is_touched(tmp_path):
    file = tmp_path / "guard"
    file.touch()
    os.utime(file, (1.0, 1.0))
    with open(file, "w") as guard:
        os.utime(file, (1.0, 1.0))
        assert runs._touched(guard) == file.stat().st_mtime > 1.0


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
    "our own": json.dumps({**WHOLE, "host": runs.socket.gethostname(), "pid": 10**30}).encode(),
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
        assert f"its claim {directory.claim_file} is damaged" in waited_for(directory)
        assert taken(directory) == free


def test_a_holder_whose_claim_is_damaged_stops(directory, monkeypatch, capsys):
    monkeypatch.setattr(runs, "RENEW_SECONDS", 0.001)
    told = threading.Event()
    monkeypatch.setattr(runs._thread, "interrupt_main", told.set)
    with claim(directory) as mine:
        assert mine
        write_atomic(directory.claim_file, "[]")
        until(told.is_set)
    assert "its claim is damaged, stopping" in capsys.readouterr().err
    assert directory.claim_file.read_text() == "[]"  # given back by nobody


def test_what_is_waited_for_is_said_with_its_end(directory, now):
    directory.path.mkdir()
    assert waited_for(directory) is None
    plant(directory)
    assert waited_for(directory) is None  # a process here, whose progress is shown
    plant(directory, host="node7", pid=123)
    os.utime(directory.claim_file, (NOW, NOW))
    end = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(NOW + STALE_SECONDS))
    assert waited_for(directory) == (
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
    monkeypatch.setattr(runs, "RENEW_SECONDS", 0.001)
    with claim(directory):
        os.utime(directory.claim_file, (1.0, 1.0))
        until(lambda: directory.claim_file.stat().st_mtime > 1.0)


def test_renewing_survives_a_claim_file_that_is_away_for_a_moment(directory, monkeypatch):
    monkeypatch.setattr(runs, "RENEW_SECONDS", 0.001)
    tried = threading.Event()
    renew = os.utime

    def utime(path: Path, *times: object) -> None:
        try:
            renew(path, *times)
        finally:
            tried.set()

    with claim(directory):
        monkeypatch.setattr(os, "utime", utime)
        aside = directory.claim_file.rename(directory.path / "aside")
        tried.clear()
        until(tried.is_set)
        renew(aside, (1.0, 1.0))
        aside.rename(directory.claim_file)
        until(lambda: directory.claim_file.stat().st_mtime > 1.0)


def test_a_claim_taken_over_by_somebody_else_is_not_given_back(directory):
    with claim(directory):
        plant(directory, host="elsewhere", token="theirs")
    assert read_json(directory.claim_file)["token"] == "theirs"


RACE = """
import sys
from pathlib import Path
from gqa_scaling.files.runs import RunDirectory, claim
for line in sys.stdin:
    with claim(RunDirectory(Path(line.strip()))) as mine:
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
                process.stdin.write(f"{directory.path}\n")
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
