"""Files of a run that a disk or an editor has damaged: each is named, and what helps."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input_kit import ANY, TINY, files, finished, shape

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.checksums import COMMIT_NOTES, SEAL_NAME, seal


def inner(**changes: object) -> Callable[[bytes], bytes]:
    """The same in a result's own table."""
    return lambda content: shape(result=json.loads(shape(**changes)(_result(content))))(content)


def _result(content: bytes) -> bytes:
    return json.dumps(json.loads(content)["result"]).encode()


def judged(value: object) -> Callable[[bytes], bytes]:
    """The same with every evaluation replaced."""

    def change(content: bytes) -> bytes:
        evaluations = json.loads(content)["result"]["evaluations"]
        return inner(evaluations=dict.fromkeys(evaluations, value))(content)

    return change


def damage(file: Path, kind: str, changes: dict[str, Callable[[bytes], bytes]]) -> None:
    """Damage a file in one of `ANY` ways or these, or have a folder in its place."""
    if kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes((ANY | changes)[kind](file.read_bytes()))


RESULTS = ANY | {
    "result-list": shape(result=[]),
    "result-absent": shape(result=...),
    "timing-list": shape(timing=[1]),
    "attempts-table": shape(attempts={"a": 1}),
    "attempts-numbers": shape(attempts=[1]),
    "evaluations-absent": inner(evaluations=...),
    "evaluations-list": inner(evaluations=[1]),
    "data-text": inner(data="x"),
    "evaluation-number": judged(2.5),
    "loss-absent": judged({"hash": "e"}),
    "loss-text": judged({"loss": "2.5"}),
    "loss-true": judged({"loss": True}),
    "loss-null": judged({"loss": None}),
    "loss-list": judged({"loss": [2.5]}),
    "loss-huge": judged({"loss": 10**400}),
    "loss-nan": judged({"loss": float("nan")}),
    "loss-infinite": judged({"loss": float("inf")}),
    "positions-number": judged({"loss": 2.5, "loss_by_position": 3}),
    "hash-list": judged({"loss": 2.5, "hash": []}),
}


VERBS = ("frontier", "report", "suggest", "run", "learning-rates")


@pytest.mark.parametrize(
    ("verb", "kind"),
    [(verb, kind) for verb in ("status", "fit") for kind in RESULTS]
    + [(verb, kind) for verb in VERBS for kind in ("cut", "result-list", "loss-text")],
)
def test_damaged_results(refused, workplace, verb, kind):
    place = finished(workplace)[0]
    place.result_file.write_bytes(RESULTS[kind](place.result_file.read_bytes()))
    err = refused(
        f"{place.result_file} is damaged (", verb, TINY, code=1 if verb == "status" else 2
    )
    assert f"remove it, and the run makes it anew from {place.parameters}" in err


def test_status_goes_on_where_a_file_is_damaged(workplace, capsys):
    done, _, failed, *_, last = finished(workplace)
    done.result_file.write_text("[]")
    failed.failure_file.write_text("[]")
    last.claim_file.mkdir(parents=True)
    assert cli.main(("status", TINY, "--json")) == 1
    out, err = capsys.readouterr()
    states = [row["state"] for row in json.loads(out)["runs"]]
    assert states == ["damaged", "done", "damaged", "pending", "pending", "damaged"]
    assert err.count("\n") == 3
    last.claim_file.rmdir()
    done.result_file.unlink()
    failed.failure_file.unlink()
    assert cli.main(("status", TINY)) == 0


@pytest.mark.parametrize(
    "kind", [*ANY, "kind-absent", "traceback-list", "time-text", "folder"]
)  # fmt: skip
def test_damaged_failures(refused, workplace, kind):
    file = finished(workplace)[2].failure_file
    changes = {
        "kind-absent": shape(kind=...),
        "traceback-list": shape(traceback=[]),
        "time-text": shape(time="now"),
    }
    damage(file, kind, changes)
    if kind == "folder":
        refused(f"{file} cannot be read: Is a directory", "status", TINY, code=1)
        return
    err = refused(f"{file} is damaged (", "status", TINY, code=1)
    assert "remove it, and the run is tried again" in err


LINE_KINDS = [k for k in ANY if k not in ("twice", "cut", "zeros", "utf16", "deep")]


@pytest.mark.parametrize("kind", [*LINE_KINDS, "began-text", "layout-list", "device-absent"])
def test_damaged_attempts(refused, workplace, kind):
    file = finished(workplace)[1].attempts_file
    line = file.read_bytes().strip()
    changes = {
        "began-text": shape(began="now"),
        "layout-list": shape(layout=[]),
        "device-absent": shape(layout={}),
    }
    file.write_bytes((ANY | changes)[kind](line) + b"\n" + line + b"\n")
    err = refused(f"{file} line 1 is damaged (", "status", TINY, code=1)
    assert "remove that line from the file" in err


@pytest.mark.parametrize(
    "kind", [*LINE_KINDS, "step-absent", "step-text", "loss-text", "time-list"]
)
def test_damaged_logs(refused, workplace, kind):
    file = finished(workplace)[2].metrics_file
    line = file.read_bytes().splitlines()[0]
    changes = {
        "step-absent": shape(step=...),
        "step-text": shape(step="5"),
        "loss-text": shape(**{"learning/loss": "3"}),
        "time-list": shape(time=[]),
    }
    wrong = (ANY | changes)[kind](line)
    file.write_bytes(b"\n".join([line, wrong, b'{"step": 6}', b'{"step": 7, "lear']))
    err = refused(f"{file} line 2 is damaged (", "status", TINY, code=1)
    assert "remove that line from the file" in err


def test_a_log_whose_last_line_is_cut_short_is_no_damage(workplace, capsys):
    place = finished(workplace)[2]
    with place.metrics_file.open("ab") as file:
        file.write(b'{"step": 6, "\xc3')
    assert cli.main(("status", TINY)) == 0
    assert [line["step"] for line in place.metrics()] == [5, 5, 5]


@pytest.mark.parametrize(
    "kind", [*ANY, "config-list", "config-absent", "data-list", "schema-text", "folder"]
)  # fmt: skip
def test_damaged_configs(workplace, kind):
    """Only a run that goes on reads its config; it changes nothing then."""
    place = finished(workplace)[2]
    file, run = place.config_file, load_experiment(TINY).runs[2]
    changes = {
        "config-list": shape(config=[]),
        "config-absent": shape(config=...),
        "data-list": shape(data=[]),
        "schema-text": shape(schema="1"),
    }
    damage(file, kind, changes)
    before = files(workplace)
    with pytest.raises(UserError) as caught:
        place.begin(run, {"store_hash": "s"})
    words = "cannot be read: Is a directory" if kind == "folder" else "is damaged ("
    assert str(caught.value).startswith(f"{file} {words}")
    assert kind == "folder" or "remove it, and the run writes it anew" in str(caught.value)
    assert files(workplace) == before


@pytest.mark.parametrize("changed", [{"config": {"name": "a"}}, {"schema": 99}])
def test_configs_of_another_version(workplace, changed):
    place = finished(workplace)[2]
    place.config_file.write_bytes(shape(**changed)(place.config_file.read_bytes()))
    with pytest.raises(UserError, match=r"config\.json(: missing field model| has schema 99)"):
        place.config()


@pytest.mark.parametrize("kind", [k for k in ANY if k != "twice"])
def test_damaged_checksums(workplace, capsys, kind):
    """`checkpoints` counts it as damage, of that step, and shows the others."""
    first, second = finished(workplace)[:2]
    for place in (first, second):
        place.parameters.mkdir()
        (place.parameters / "a").write_text("a")
        seal(place.parameters, {"a": "00"})
        for note in COMMIT_NOTES:
            (place.parameters / note).write_text("")
    file = first.parameters / SEAL_NAME
    file.write_bytes(ANY[kind](file.read_bytes()))
    before = files(workplace)
    assert cli.main(("checkpoints", TINY, "--json")) == 1
    out, err = capsys.readouterr()
    kept = [each["kept"][0] for each in json.loads(out)["runs"][:2]]
    assert [each["state"] for each in kept] == ["damaged", "whole"]
    assert kept[0]["damage"] == ["checksums.json is altered"]
    assert err == ""
    assert files(workplace) == before
