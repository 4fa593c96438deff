"""What is told of a run from its files alone, and how it is shown while it changes."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from gqa_scaling import cli
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import RunDirectory, run_directory, runs_root, write_json
from gqa_scaling.sweep import status
from gqa_scaling.sweep.status import RunStatus, read_status, useful_seconds
from gqa_scaling.sweep.views import status_table
from gqa_scaling.sweep.watch import watch, watch_table

START = 1_800_000_000.0  # when the first attempt began


def line(step: int, at: float = 0.0, seconds: float | None = 2.0, **apart: float) -> dict:
    """A logged step; `evaluation=6.0` are the seconds of evaluations since the attempt began."""
    speed = {} if seconds is None else {status.STEP_SECONDS: seconds, "perf/mfu": 0.4}
    speed |= {f"perf/{what}_seconds": spent for what, spent in apart.items()}
    return {"step": step, "time": START + at, "learning/loss": 3.0, **speed}


def attempt(first: int, at: float = 0.0) -> dict:
    return {"began": START + at, "first_step": first, "layout": {"device": "TPU v5e"}}


@pytest.fixture
def tiny(workplace):
    """Six runs of 10 steps each."""
    return load_experiment("experiments.tiny")


def directory(tiny, number: int = 0) -> RunDirectory:
    return run_directory(runs_root(), "tiny", tiny.runs[number])


def write(place: RunDirectory, attempts: list[dict], lines: list[dict]) -> None:
    place.path.mkdir(parents=True)
    for file, entries in ((place.attempts_file, attempts), (place.metrics_file, lines)):
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def finish(tiny, number: int, at: float = 100.0, loss: float = 2.5) -> None:
    evaluations = {tiny.runs[number].evaluation_digest: {"loss": loss}}
    place = directory(tiny, number)
    place.path.mkdir(parents=True, exist_ok=True)
    place.finish({"evaluations": evaluations}, {"finished": START + at})


def first(tiny) -> RunStatus:
    return read_status(runs_root(), tiny)[0]


# ------------------------------------------------------------------------------------- goodput


def test_useful_steps_are_those_that_no_later_attempt_took_again():
    assert useful_seconds([], []) == 0
    assert useful_seconds([attempt(0)], []) == 0
    assert useful_seconds([attempt(0)], [line(2, seconds=None)]) == 0  # no speed known yet
    assert useful_seconds([attempt(0)], [line(8)]) == 8 * 2.0
    # 0 to 5 at 2 s and 5 to 9 at 3 s; what the first had done beyond 5 was cut off the log
    lines = [line(4), line(5), line(8, seconds=3.0), line(9, seconds=3.0)]
    assert useful_seconds([attempt(0), attempt(5)], lines) == 5 * 2.0 + 4 * 3.0
    # the second attempt's checkpoint was damaged: the third went on from before it
    lines = [line(3), line(6, seconds=1.0)]
    assert useful_seconds([attempt(0), attempt(5), attempt(4)], lines) == 4 * 2.0 + 2 * 1.0
    # steps are logged now and then; a checkpoint need not be of a logged one
    lines = [line(100), line(200), line(300)]
    assert useful_seconds([attempt(0), attempt(250)], lines) == 300 * 2.0


def test_goodput_counts_what_lay_between_the_attempts(tiny):
    attempts = [attempt(0), attempt(5, at=30.0)]
    write(directory(tiny), attempts, [line(5, at=14.0), line(8, at=40.0, seconds=1.0)])
    row = first(tiny)
    assert (row.state, row.restarts, row.progress) == ("pending", 1, 0.8)
    assert row.goodput == (5 * 2.0 + 3 * 1.0) / 40.0  # to the last line of the log
    directory(tiny).add_attempt(attempt(8, at=90.0))
    assert first(tiny).goodput == 13.0 / 90.0  # a start is a sign of life as well
    directory(tiny).fail("ValueError: x", "ValueError")
    told = json.loads(directory(tiny).failure_file.read_text())
    write_json(directory(tiny).failure_file, told | {"time": START + 104.0})
    assert first(tiny).goodput == 13.0 / 104.0
    finish(tiny, 0, at=130.0)
    assert first(tiny).goodput == 13.0 / 130.0


def test_evaluation_and_saving_stand_beside_goodput(tiny):
    write(directory(tiny), [attempt(0)], [line(5, at=40.0, evaluation=8.0, checkpoint=2.0)])
    row = first(tiny)
    assert (row.goodput, row.evaluation, row.saving) == (10.0 / 40, 8.0 / 40, 2.0 / 40)
    again = line(8, at=100.0, seconds=1.0, evaluation=4.0)
    lines = [line(4, at=20.0, evaluation=6.0), line(5, at=40.0, evaluation=8.0, checkpoint=2.0)]
    write(directory(tiny, 1), [attempt(0), attempt(5, at=60.0)], [*lines, again])
    row = read_status(runs_root(), tiny)[1]
    assert (row.goodput, row.evaluation, row.saving) == (13.0 / 100, 12.0 / 100, 2.0 / 100)
    # what evaluating and saving take is to be expected of the steps that are left, too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "state", lambda self: "running")
        one, two, *_ = read_status(runs_root(), tiny)
    assert one.seconds_left == 5 * (2.0 + (8.0 + 2.0) / 5)
    assert two.seconds_left == 2 * (1.0 + 4.0 / 3)


def test_a_log_without_evaluation_and_saving_tells_neither(tiny):
    write(directory(tiny), [attempt(0)], [line(5, at=40.0)])
    row = first(tiny)
    assert (row.goodput, row.evaluation, row.saving) == (10.0 / 40, None, None)


def test_what_the_files_do_not_tell_is_none(tiny):
    row = first(tiny)
    assert (row.goodput, row.mfu, row.seconds_left, row.restarts) == (None, None, None, 0)
    old = {"step": 3, "learning/loss": 3.0, status.STEP_SECONDS: 1.0}  # without the time
    write(directory(tiny), [attempt(0)], [old])
    assert first(tiny).goodput is None


def test_time_left_is_of_running_runs(tiny, monkeypatch):
    write(directory(tiny), [attempt(0)], [line(4, at=9.0)])
    monkeypatch.setattr(RunDirectory, "state", lambda self: "running")
    assert (first(tiny).seconds_left, first(tiny).mfu) == (6 * 2.0, 0.4)
    monkeypatch.setattr(RunDirectory, "state", lambda self: "stale")
    assert first(tiny).seconds_left is None


def test_a_failure_is_named_by_its_kind_and_last_line(tiny):
    directory(tiny).path.mkdir(parents=True)
    for text, said in (
        ("Traceback\nValueError: one line\n", "ValueError: one line"),
        ("Traceback\nValueError: first\nand last line\n", "ValueError: and last line"),
    ):
        directory(tiny).fail(text, "ValueError")
        assert first(tiny).failure == said


# --------------------------------------------------------------------------------------- watch


def terminal(width: int = 100, height: int = 40) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False
    )


def printed(rows: list[RunStatus], width: int = 100, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(watch_table("tiny", rows, height))
    return console.file.getvalue()


FULL = RunStatus(
    name="L12-d1024-h16-kv4",
    state="running",
    step=480,
    steps=1000,
    loss=2.5,
    evaluation_loss=None,
    tokens_per_second=123456.0,
    mfu=0.412,
    restarts=2,
    goodput=0.934,
    evaluation=None,
    saving=None,
    seconds_left=26000.0,
    failure="",
    path="runs/x",
)


def test_all_columns_fit_100_characters():
    done = replace(FULL, state="done", evaluation_loss=2.6, seconds_left=None)
    text = printed([FULL, done])
    words = "L12-d1024-h16-kv4 running 48% 2.5000 123k 41% 2 93% 7 h 13 min"
    assert any(line.split() == words.split() for line in text.splitlines())
    words = "L12-d1024-h16-kv4 done 100% 2.5000 2.6000 123k 41% 2 93%"
    assert any(line.split() == words.split() for line in text.splitlines())


def test_what_the_time_went_to_is_shown_in_one_column():
    row = replace(FULL, goodput=0.734, evaluation=0.1234, saving=0.081)
    words = "L12-d1024-h16-kv4 running 48% 2.5000 123k 41% 2 73+12+8% 7 h 13 min"
    done = replace(row, state="done", evaluation_loss=2.6)
    assert any(line.split() == words.split() for line in printed([row, done]).splitlines())
    for shares, text in (((0.7, None, 0.08), "70+0+8%"), ((0.7, None, None), "70%")):
        changes = dict(zip(("goodput", "evaluation", "saving"), shares, strict=True))
        console = Console(file=io.StringIO(), width=120)
        console.print(status_table("tiny", [replace(row, **changes)]))
        assert f" {text} " in console.file.getvalue()


@pytest.mark.parametrize("width", [44, 80, 140])
def test_no_number_is_cut_however_narrow_the_terminal(width):
    rows = [
        replace(FULL, state="done", evaluation_loss=2.6543),
        replace(FULL, failure="out of room"),
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(status_table("tiny", rows))
    text = console.file.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for said in ("L12-d1024-h16-kv4", "2.5000", "2.6543", "93%", "out of room"):
        assert said in text


def test_columns_without_anything_in_them_are_left_out():
    text = printed([replace(FULL, mfu=None, restarts=0)])
    assert "goodput" in text
    for absent in ("MFU", "starts", "held-out"):
        assert absent not in text


@pytest.mark.parametrize("height", [12, 24])
def test_where_there_is_no_room_what_happens_is_shown(height):
    kinds = ["done"] * 50 + ["running"] * 2 + ["failed"] + ["pending"] * 50
    rows = [
        replace(FULL, name=f"run{i}", state=kind, failure="Bad: [/x]" if kind == "failed" else "")
        for i, kind in enumerate(kinds)
    ]
    text = printed(rows, height=height)
    assert len(text.splitlines()) < height
    for present in ("run50 ", "run51 ", "run52 failed: Bad: [/x]"):
        assert present in text
    shown = sum(line.startswith("run") and "93%" in line for line in text.splitlines())
    assert f"and {103 - shown} more: 50 done, {53 - shown} pending" in text


def test_what_is_done_is_read_once(tiny, monkeypatch):
    finish(tiny, 0)
    look, read = status.looks(runs_root(), tiny), []
    result = RunDirectory.result
    monkeypatch.setattr(RunDirectory, "result", lambda d: read.append(d.path) or result(d))
    first_look = look()
    finish(tiny, 1)
    states = [[row.state for row in rows] for rows in (first_look, look(), look())]
    assert states == [["done"] + ["pending"] * 5] + [["done"] * 2 + ["pending"] * 4] * 2
    assert read == [directory(tiny, number).path for number in (0, 1)]


def test_watching_ends_when_every_run_is_done_or_failed(tiny):
    for number in range(4):
        finish(tiny, number)
    left, read = [4, 5], []

    def pause(seconds: float) -> None:
        assert seconds == status.LOOK_SECONDS
        number = left.pop(0)
        if number == 4:
            finish(tiny, number)
        else:
            directory(tiny, number).path.mkdir(parents=True)
            directory(tiny, number).fail("RuntimeError: out of luck", "RuntimeError")

    console = terminal()
    with pytest.MonkeyPatch.context() as patch:
        result = RunDirectory.result
        patch.setattr(
            RunDirectory, "result", lambda self: (read.append(self.path), result(self))[1]
        )
        rows = watch(runs_root(), tiny, console, pause)
    assert left == []
    assert len(read) == len(set(read)) == 5  # results do not change
    assert [r.state for r in rows] == ["done"] * 5 + ["failed"]
    text = console.file.getvalue()
    assert "4 done, 2 pending" in text
    assert "5 done, 1 failed" in text
    assert "L2-h4 failed: RuntimeError: out of luck" in text


@pytest.mark.parametrize(("fails", "code"), [(False, 0), (True, 1)])
def test_the_exit_code_tells_whether_a_run_failed(tiny, monkeypatch, fails, code):
    for number in range(6):
        finish(tiny, number)
    if fails:  # as judging a trained model anew can
        directory(tiny).fail("RuntimeError: x", "RuntimeError")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    assert cli.main(["status", "experiments.tiny", "--watch"]) == code


@pytest.mark.parametrize(
    ("more", "said"),
    [((), "--watch needs a terminal"), (("--json",), "--watch is for people and --json")],
)
def test_watching_needs_somebody_who_watches(tiny, capsys, more, said):
    assert cli.main(["status", "experiments.tiny", "--watch", *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
