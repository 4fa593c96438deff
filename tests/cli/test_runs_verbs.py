"""show, diff, disk and clean, from the command line."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_scaling.config import CheckpointConfig, RunConfig
from gqa_scaling.costs import n_exact, parameters, training_flops
from gqa_scaling.experiment.branches import at_budgets
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.sweep import space

TINY = "experiments.tiny"
LAYOUT = {
    "mesh": {"data": 2, "tensor": 4},
    "processes": 2,
    "device": "TPU v5e",
    "attention": "splash",
}


@pytest.fixture
def call(said, monkeypatch):
    monkeypatch.setenv("GQA_SCALING_CACHE", "cache")
    return said


def runs(*fields: str) -> tuple[RunConfig, ...]:
    return load_experiment(TINY, fields).runs


def directory(run: RunConfig) -> RunDirectory:
    return run_directory("runs", "tiny", run)


def begin(run: RunConfig) -> RunDirectory:
    """A run with a log, a checkpoint and compiled programs beside it."""
    place = directory(run)
    place.begin(run, {})
    for name in ("checkpoints/5/state", "metrics.jsonl"):
        (place.path / name).parent.mkdir(parents=True, exist_ok=True)
        (place.path / name).write_text("{}\n" * 100)
    return place


def finish(run: RunConfig, loss: float = 2.5, hash: str = "e", keep: bool = False) -> RunDirectory:
    place = begin(run)
    (place.parameters / "d").mkdir(parents=True)
    (place.parameters / "d/0").write_text("weights")
    aside = place.path / "aside"
    place.checkpoints.rename(aside)
    judged = {run.evaluation_digest: {"loss": loss, "hash": hash}}
    place.finish({"evaluations": judged}, {"training_seconds": 61.0})
    if keep:  # as a kill between the two leaves it
        aside.rename(place.checkpoints)
    return place


def files() -> set[str]:
    return {
        os.path.join(parent, name) for parent, _, names in os.walk("runs") for name in names
    } - {str(path) for path in Path("runs").rglob(".claim.lock")}


# -------------------------------------------------------------------------------------- show


def test_show_of_a_run_that_has_not_begun(call):
    run = runs()[0]
    code, out, err = call("show", f"{TINY}:L1-h1", "--json")
    told = json.loads(out)
    assert (code, err) == (0, "")
    assert (told["name"], told["state"], told["digest"]) == ("L1-h1", "pending", run.digest)
    assert (told["n_exact"], told["training_flops"]) == (n_exact(run.model), training_flops(run))
    assert told["n_total"] == parameters(run.model).total
    assert told["differs"] == ["model.head_dim", "model.vocab_size", "tokens"]
    assert (told["layout"]["ran"], told["layout"]["attention"]) == (False, "blockwise")
    values = {field["name"]: field for field in told["config"]}
    assert values["model.head_dim"]["default"] == 64
    assert values["parallel.remat"]["defines"] is False
    assert not Path("runs").exists()
    _, out, _ = call("show", f"{TINY}:L1-h1")
    assert " *  model.head_dim " in out
    assert "would run on 1 x cpu, attention blockwise" in out


def test_show_takes_fields_and_hardware(call):
    _, out, _ = call(
        "show", f"{TINY}:L1-h4", "--hardware", "v5e-4", "--parallel.tensor=4", "--json"
    )
    told = json.loads(out)
    assert told["layout"]["mesh"] == {"data": 1, "fsdp": 1, "context": 1, "tensor": 4}
    assert "parallel.tensor" in told["differs"]
    code, _, err = call("show", f"{TINY}:L1-h4", "--hardware", "v5e-4", "--parallel.data", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "L1-h4 on 4 x v5e: " in err


def test_show_of_a_run_as_it_was_run(call):
    run = runs()[1]
    place = finish(run, loss=2.25)
    for first in (0, 5):
        place.add_attempt({"began": 1.0, "first_step": first, "layout": LAYOUT})
    for source in (f"{TINY}:L1-h2", str(place.path)):
        _, out, _ = call("show", source, "--json")
        told = json.loads(out)
        assert (told["state"], told["loss"], told["restarts"]) == ("done", 2.25, 1)
        assert told["layout"]["mesh"] == {"data": 2, "fsdp": 1, "context": 1, "tensor": 4}
        assert told["layout"]["ran"] is True
        assert told["declared"] == []
    _, out, _ = call("show", f"{TINY}:L1-h2")
    assert "ran on 8 x TPU v5e (data 2 x tensor 4), attention splash, 2 processes" in out
    _, out, _ = call("show", f"{TINY}:L1-h2", "--parallel.remat", "full", "--json")
    assert json.loads(out)["declared"] == ["parallel.remat"]  # the same digest, another layout


def test_show_marks_a_table_that_is_left_out_by_default(call):
    pattern = ("--model.pattern.block", "8", "--model.pattern.local", "16")
    _, out, _ = call("show", f"{TINY}:L1-h2", *pattern, "--json")
    differs = json.loads(out)["differs"]
    assert {"model.pattern.block", "model.pattern.local", "model.pattern.stride"} <= set(differs)


# -------------------------------------------------------------------------------------- diff


def test_diff_of_two_runs(call):
    a, b = runs()[:2]
    finish(a, loss=2.5)
    finish(b, loss=2.25)
    _, out, _ = call("diff", f"{TINY}:L1-h1", str(directory(b).path), "--json")
    told = json.loads(out)
    assert (
        told["fields"]
        == [
            {"field": "name", "values": [["L1-h1"], ["L1-h2"]], "defines": False},
            {"field": "model.n_heads", "values": [[1], [2]], "defines": True},
        ][1:]
    )
    (pair,) = told["pairs"]
    assert (pair["losses"], pair["difference"]) == ([2.5, 2.25], -0.25)
    _, out, _ = call("diff", f"{TINY}:L1-h1", f"{TINY}:L1-h2")
    assert "-250.0" in out


def test_diff_of_two_grids(call):
    other = "--tokens 2560"
    for run in runs()[:2]:
        finish(run, loss=2.5)
    finish(runs("--tokens", "2560")[0], loss=2.0)
    finish(runs("--tokens", "2560")[1], loss=2.0, hash="other targets")
    fewer = f"{TINY}:L1-h1,L1-h2 {other}"
    _, out, _ = call("diff", TINY, fewer, "--json")
    told = json.loads(out)
    assert [each["field"] for each in told["fields"]] == [
        "model.n_layers",
        "model.n_heads",
        "tokens",
    ]
    assert told["only"] == [["L1-h4", "L2-h1", "L2-h2", "L2-h4"], []]
    assert [pair["difference"] for pair in told["pairs"]] == [-0.5, None]
    _, out, _ = call("diff", TINY, fewer)
    assert f"only in {TINY}: 4 runs: L1-h4, " in out
    assert "other held-out targets are not compared" in out


def test_diff_finds_a_model_under_another_name(call):
    a = runs()[0]
    finish(a)
    there = RunDirectory(Path("copied/renamed"))
    there.begin(replace(a, name="renamed", checkpoint=CheckpointConfig(7)), {})
    finish_it = {"evaluations": {a.evaluation_digest: {"loss": 2.5, "hash": "e"}}}
    there.finish(finish_it, {})
    _, out, _ = call("diff", TINY, "copied", "--json")
    (pair,) = json.loads(out)["pairs"]
    assert (pair["names"], pair["difference"]) == (["L1-h1", "renamed"], 0.0)
    assert list(pair["differs"]) == ["checkpoint.every_steps"]


def test_diff_takes_no_loose_fields(call):
    code, _, err = call("diff", TINY, TINY, "--seed", "1")
    assert (code, "in quotes with their experiment" in err) == (2, True)
    code, _, err = call("diff", TINY, ".")
    assert (code, err) == (
        2,
        "gqa-scaling: . is neither a run nor a folder of runs: no config.json\n",
    )


# ---------------------------------------------------------------------------- disk and clean


def spread() -> dict[str, RunDirectory]:
    """Runs of all sorts: one finished, one whose checkpoints a kill left, one begun, one begun with
    other fields, one of these finished, and compiled programs."""
    a, b, c, *_ = runs()
    d, e, *_ = runs("--tokens", "2560")
    found = {"done": finish(a), "left": finish(b, keep=True), "begun": begin(c)}
    found |= {"other": begin(d), "other done": finish(e)}
    for folder in ("runs/.compiled", "cache/tokens/0123", "cache/compiled"):
        Path(folder).mkdir(parents=True)
        Path(folder, "a-cache").write_text("compiled")
    return found


def test_disk_says_what_lies_where(call):
    spread()
    _, out, _ = call("disk", "--json")
    told = json.loads(out)
    kinds = {(each["place"], each["kind"]): each["files"] for each in told["places"]}
    assert kinds[("tiny", "checkpoints")] == 3
    assert kinds[("tiny", "trained models")] == 3
    assert kinds[(".compiled", "compiled programs")] == 1
    assert kinds[("cache/tokens", "copies of tokens")] == 1
    in_runs = sum(Path(name).stat().st_size for name in files())
    assert told["bytes"] == in_runs + 2 * len("compiled")
    _, out, _ = call("disk")
    assert "results and logs" in out


def test_clean_shows_a_plan_and_removes_nothing_unasked(call):
    spread()
    before = files()
    code, out, err = call("clean", TINY)
    assert (code, err) == (
        2,
        "gqa-scaling: no terminal to ask at: --yes removes what is listed\n",
    )
    assert "no result is touched" in out
    _, out, _ = call("clean", TINY, "--json")
    assert json.loads(out)["removed"] == []
    assert files() == before


def test_clean_removes_what_nobody_needs_and_nothing_else(call):
    places = spread()
    before = files()
    _, out, _ = call("clean", TINY, "--yes", "--json")
    told = json.loads(out)
    gone = {str(places["other"].path), str(places["left"].checkpoints), "runs/.compiled"}
    assert set(told["removed"]) == gone | {"cache/compiled", "cache/tokens/0123"}
    assert files() == {name for name in before if not name.startswith(tuple(gone))}
    assert not list(Path("cache").rglob("*cache"))
    assert not Path("runs", space.ASIDE).exists()
    assert call("clean", TINY)[:2] == (0, "nothing can go\n")


def test_clean_without_an_experiment_keeps_every_run(call):
    places = spread()
    call("clean", "--yes")
    assert (places["other"].path / "metrics.jsonl").exists()
    call("clean", TINY, f"{TINY} --tokens 2560", "--yes")
    assert (places["other"].path / "metrics.jsonl").exists()


def test_clean_leaves_what_is_running(call):
    places = spread()
    before = files()
    with claim(places["other"].claim_file), claim(places["left"].claim_file):
        _, out, _ = call("clean", TINY, "--yes", "--json")
        told = json.loads(out)
        # the finished run whose checkpoints are still there is being tidied up by its own process
        assert all(not name.startswith(str(places["other"].path)) for name in told["removed"])
        assert places["left"].checkpoints.exists()
        assert Path("runs/.compiled/a-cache").exists()
    assert files() == before


def test_clean_leaves_the_tokens_that_unfinished_runs_of_any_experiment_read(call):
    a, b, *_ = runs()
    run_directory("runs", "another", a).begin(a, {"store_hash": "0123"})
    done = finish(b)
    assert done.path.exists()
    for name in ("0123", "4567"):
        Path("cache/tokens", name).mkdir(parents=True)
        Path("cache/tokens", name, "a-copy").write_text("tokens")
    _, out, _ = call("clean", TINY, "--yes", "--json")
    told = json.loads(out)
    assert told["removed"] == ["cache/tokens/4567"]
    assert told["stays"] == ["cache/tokens/0123 stays: unfinished runs of another read it"]


def test_clean_leaves_states_that_larger_budgets_begin_with(call):
    place, digest = spread()["left"], runs()[1].digest
    found, notes = space.removals(Path("runs"), {"tiny": {digest}}, ["checkpoints"], {digest})
    assert (found, notes) == (
        [],
        ["checkpoints of 1 finished run stay: larger token budgets begin with them"],
    )
    assert place.checkpoints.exists()
    small, _ = at_budgets(runs()[2], (20.0, 40.0))
    finish(small, keep=True)
    found, notes = space.removals(Path("runs"), {}, ["checkpoints"])  # what there is is not said
    assert [each.run for each in found] == [str(place.path)]
    assert "name their experiment to know" in notes[0]
    # so are those that the experiment declares with other fields, such as another seed
    assert (
        "name their experiment to know"
        in space.removals(Path("runs"), {"tiny": {digest}}, ["checkpoints"])[1][0]
    )


def test_clean_leaves_folders_of_others(call):
    for name in ("exported", f"exported-{runs()[0].digest[::-1]}"):
        other = Path("runs/tiny", name)
        (other / "checkpoints").mkdir(parents=True)
        for file in ("config.json", "result.json", "model.safetensors", "checkpoints/state"):
            (other / file).write_text("{}")
    before = files()
    assert call("clean", TINY, "--yes") == (0, "nothing can go\n", "")
    assert files() == before


def test_clean_removes_a_run_of_the_longest_name(call):
    place = begin(replace(runs()[0], name="x" * 242, seed=9))
    code, _, err = call("clean", TINY, "--what", "digests", "--yes")
    assert (code, err) == (0, "")
    assert not place.path.exists()


def test_clean_takes_no_run_that_began_since_the_plan_was_made(call):
    places = spread()
    found, _ = space.removals(Path("runs"), {"tiny": {run.digest for run in runs()}}, space.KINDS)
    place = places["other"]
    judged = {runs("--tokens", "2560")[0].evaluation_digest: {"loss": 2.0}}
    place.finish({"evaluations": judged}, {})  # it was finished meanwhile
    with claim(places["left"].claim_file):
        done = {each.path: gone for each, gone in space.remove(Path("runs"), found)}
    assert done[str(place.path)] is False
    assert done[str(places["left"].checkpoints)] is False
    assert place.result_file.exists()


def test_a_clean_holds_no_claim_that_it_has_removed(call, monkeypatch):
    spread()
    alone, remove = [], space.remove_folder

    def watched(path: Path) -> None:
        alone.append(threading.active_count())  # nobody renews what is aside
        remove(path)

    before = threading.active_count()
    monkeypatch.setattr(space, "remove_folder", watched)
    code, _, _ = call("clean", TINY, "--what", "digests", "--yes")
    assert (code, alone) == (0, [before])


def test_a_clean_that_is_killed_leaves_runs_whole_or_gone_and_the_next_ends_it(call, monkeypatch):
    places = spread()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(space, "remove_folder", killed)
        code, _, _ = call("clean", TINY, "--what", "digests", "--yes")
    assert code == 130
    assert not places["other"].path.exists()
    found, _ = space.removals(Path("runs"), {}, ["leftovers"])
    assert [each.path for each in found] == [f"runs/{space.ASIDE}"]
    _, out, _ = call("status", TINY, "--json")
    assert json.loads(out)["beside"] == []
    call("clean", "--yes")
    assert not Path("runs", space.ASIDE).exists()


def test_clean_refuses_other_kinds_and_folders_that_are_not_there(call):
    code, _, err = call("clean", "--what", "checkpoint", "--yes")
    assert (code, "did you mean checkpoints?" in err) == (2, True)
    code, _, err = call("clean", "--root", "nowhere", "--yes")
    assert (code, "there is no folder nowhere" in err) == (2, True)
