"""Forecasts on a disk and in a bucket: sealed once, before their runs begin, and told when altered."""

import json
import os

import pytest

from gqa_scaling.config import UserError
from gqa_scaling.files.forecasts import forecast_digests, read_forecasts, seal
from gqa_scaling.files.runs import directory_of
from gqa_scaling.files.storage import make_folder, sizes, write_atomic


@pytest.fixture(params=["disk", "bucket"])
def root(request, tmp_path):
    return tmp_path / "runs" if request.param == "disk" else request.getfixturevalue("bucket")


def said(*names: str, predicted: float = 2.5) -> dict:
    """A forecast of runs of these names, each with a digest of its own."""
    runs = [
        {
            "name": name,
            "digest": f"{i:012d}",
            "evaluation_digest": "e" * 12,
            "n_heads": 4,
            "n_kv_heads": 1,
            "n_layers": 2,
            "d_model": 32,
            "n": 20_000.0,
            "law": "separate",
            "beyond": "",
            "predicted_nats": predicted,
            "low_nats": predicted - 0.1,
            "high_nats": predicted + 0.1,
        }
        for i, name in enumerate(names)
    ]
    return {"level": 0.9, "evaluation_hash": "e", "corpus_hash": "c", "runs": runs}


def test_what_was_sealed_is_read_back_and_never_rewritten(root):
    first = seal(root, "grid", said("a", "b"))
    before = first.path.read_bytes()
    second = seal(root, "grid", said("a", predicted=2.6))
    assert first.path.read_bytes() == before
    assert second.path != first.path
    found = read_forecasts(root, "grid")
    assert [(each.path.name, each.said) for each in found] == [
        (each.path.name, each.said) for each in (first, second)
    ]
    assert forecast_digests(found) == {f"{0:012d}", f"{1:012d}"}
    assert read_forecasts(root, "other") == []


SIGNS = ("config.json", "claim.json", "metrics.jsonl", "attempts.jsonl", "checkpoints/8/state")


@pytest.mark.parametrize("sign", SIGNS)
def test_a_run_that_has_begun_is_refused_by_name(root, sign):
    directory = directory_of(root, "grid", "b", f"{1:012d}")
    file = directory.path / sign
    make_folder(file.parent)
    write_atomic(directory.path / ".claim.lock", "")  # what a claim that was given back leaves
    seal(root, "grid", said("a", "b"))
    write_atomic(file, "{}")
    with pytest.raises(UserError, match=r"^b of grid began already: .*; leave it out$"):
        seal(root, "grid", said("a", "b"))
    assert len(read_forecasts(root, "grid")) == 1
    # whatever it is called now
    with pytest.raises(UserError, match="renamed of grid began already"):
        seal(root, "grid", said("a", "renamed"))


def changed_number(whole: dict) -> None:
    whole["runs"][0]["predicted_nats"] += 1e-9


def dropped_run(whole: dict) -> None:
    del whole["runs"][1]


def earlier(whole: dict) -> None:
    whole["sealed"] -= 1.0


def added(whole: dict) -> None:
    whole["note"] = "mine"


def no_digest(whole: dict) -> None:
    del whole["sha256"]


@pytest.mark.parametrize("change", [changed_number, dropped_run, earlier, added, no_digest])
def test_a_forecast_that_was_altered_is_told_and_does_not_count(root, change):
    kept, other = seal(root, "grid", said("a", "b")), seal(root, "grid", said("c"))
    whole = json.loads(kept.path.read_text())
    change(whole)
    write_atomic(kept.path, json.dumps(whole))
    whole_one, altered = read_forecasts(root, "grid")
    assert (whole_one.path.name, whole_one.altered) == (other.path.name, "")
    assert (altered.path.name, altered.said) == (kept.path.name, {})
    assert "is not what was sealed" in altered.altered


def test_one_that_was_sealed_anew_under_the_old_name_is_told(tmp_path):
    kept, other = seal(tmp_path, "grid", said("a")), seal(tmp_path, "grid", said("a", predicted=3))
    os.replace(other.path, kept.path)
    (found,) = read_forecasts(tmp_path, "grid")
    assert found.altered


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"runs": 3}', "\0"])
def test_what_is_no_forecast_is_told(tmp_path, text):
    kept = seal(tmp_path, "grid", said("a"))
    kept.path.write_text(text)
    assert [each.altered != "" for each in read_forecasts(tmp_path, "grid")] == [True]


def test_a_kill_while_it_is_written_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        seal(tmp_path, "grid", said("a"))
    assert read_forecasts(tmp_path, "grid") == []
    assert sizes(tmp_path) == {}
