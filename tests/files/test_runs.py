"""The run directory: what is written is read, damage is named, nothing else is taken for a run's."""

import json
import os
from pathlib import Path

import pytest

from gqa_scaling.config import DataConfig, ModelConfig, RunConfig, UserError
from gqa_scaling.files.runs import (
    RunDirectory,
    read_json,
    run_directories,
    run_directory,
    runs_root,
)
from gqa_scaling.files.storage import write_atomic, write_json

NOW = 1_800_000_000.0  # what the clock is made to say


def run(name: str = "a", **changes) -> RunConfig:
    fields = {"model": ModelConfig(2, 32, 4, 2), "tokens": 2560} | changes
    return RunConfig(name=name, context_length=64, batch_tokens=256, **fields)


def attempt(first: int) -> dict:
    return {"began": NOW, "first_step": first, "layout": {"device": "cpu"}}


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


def test_many_run_directories_are_those_that_are_found_one_by_one(tmp_path):
    runs = [run(name, seed=seed) for seed, name in enumerate(("own", "other", "twice", "absent"))]
    own, other, twice, _ = (each.digest for each in runs)
    names = ["own", "aaa"], ["older"], ["bbb", "aab"]
    for digest, given in zip((own, other, twice), names, strict=True):
        for name in given:
            (tmp_path / "exp" / f"{name}-{digest}").mkdir(parents=True)
    found = run_directories(tmp_path, "exp", runs)
    assert found == [run_directory(tmp_path, "exp", each) for each in runs]
    shown = [directory.path.name.partition("-")[0] for directory in found]
    assert shown == ["own", "older", "aab", "absent"]
    assert run_directories(tmp_path, "none", runs[:1])[0].path.name == f"own-{own}"


def test_runs_root(monkeypatch):
    monkeypatch.delenv("GQA_SCALING_RUNS", raising=False)
    assert runs_root() == Path("runs")
    monkeypatch.setenv("GQA_SCALING_RUNS", "elsewhere")
    assert runs_root() == Path("elsewhere")
    assert runs_root("named") == Path("named")


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
