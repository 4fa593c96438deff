"""Finished runs as data, from the command line."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.costs import n_exact
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.experiment.starts import require_parent
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import run_directory
from gqa_scaling.inference.trained import open_trained
from gqa_scaling.study.histories import histories
from gqa_scaling.study.results import flags
from gqa_scaling.study.source import read_source
from gqa_scaling.sweep.run import check

GRID = """
from gqa_scaling.config import ModelConfig, Question, RunConfig

QUESTION = Question(contexts=(512,), losses=(3.5,), baseline=(2, 1))


def runs():
    return [
        RunConfig(
            name=f"L{layers}-h{heads}",
            model=ModelConfig(layers, 32, heads, 1, head_dim=8, vocab_size=264),
            context_length=32,
            batch_tokens=128,
            tokens=1280,
        )
        for layers in (1, 2, 4, 8)
        for heads in (2, 4)
    ]
"""


@pytest.fixture
def grid(workplace):
    """experiments.grid, all of whose runs but the last are finished, on the same data."""
    (workplace / "experiments" / "grid.py").write_text(GRID)
    for run in load_experiment("experiments.grid").runs[:-1]:
        finish(run)
    return workplace


def finish(run):
    """A result that was begun after all that is sealed here, with losses by position."""
    directory = run_directory("runs", "grid", run)
    directory.begin(run, {"store_hash": "s"})
    began = {"began": 1.8e9 + 1e9, "first_step": 0, "layout": {"device": "cpu"}}
    directory.add_attempt(began | {"commit": "abc"})
    n = n_exact(run.model)
    loss = (1e6 / n) ** 0.1 + run.model.n_heads / 100
    judged = {"loss": loss, "hash": "e", "loss_by_position": [loss + 0.1, loss - 0.1]}
    gained = 0.1 * run.model.n_layers  # the largest have learned to copy
    judged |= {"loss_of_first_reading": loss, "loss_of_second_reading": loss - gained}
    result = {"config": run.to_dict(), "digest": run.digest, "n_exact": n, "tokens": 1280}
    known = {"data": {"store_hash": "s"}, "evaluations": {run.evaluation_digest: judged}}
    lines = [{"step": 1, "learning/loss": 3.0}, {"step": 2, "learning/loss": 2.8}]
    lines.append({"step": 3, "learning/loss": 2.7})
    lines.append({"step": 2, "evaluation/loss": 2.9, "evaluation/gained_by_rereading": gained / 2})
    directory.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    directory.finish(result | known, {})


def test_a_table_of_finished_runs_tells_what_is_not(grid, capsys):
    assert cli.main(["results", "experiments.grid"]) == 0
    said = capsys.readouterr().out
    assert "L4-h4" in said
    assert "Not finished: L8-h4." in said
    assert re.search(r"L4-h4 .* 0\.200 +0\.400\n", said)  # gained by context, by rereading


def test_runs_that_copy_and_runs_that_do_not_are_told_apart(grid):
    (said,) = [
        flag for flag in flags(read_source("experiments.grid", (), None).results) if "copy" in flag
    ]
    assert said.startswith("3 of 7 runs learned to copy")
    for alike in ("L[12]-*", "L[48]-*", "not-copying"):
        left = read_source("experiments.grid", (), None, (alike,)).results
        assert not any("learned to copy" in flag for flag in flags(left))
    assert left.name.tolist() == ["L4-h2", "L4-h4", "L8-h2"]


def test_runs_that_do_not_copy_are_left_out_of_a_csv_too(grid):
    kept = grid / "studies" / "grid.csv"
    assert cli.main(["results", "experiments.grid", "--output", str(kept)]) == 0
    kept.with_suffix(".jsonl").unlink()
    left = read_source(str(kept), (), None, ("not-copying",)).results
    assert left.name.tolist() == ["L4-h2", "L4-h4", "L8-h2"]
    assert left.gained_by_rereading.tolist() == pytest.approx([0.4, 0.4, 0.8])


def test_whether_a_sparse_run_copies_is_not_told(grid):
    """Its heads may not reach what they would copy."""
    name = grid / "sparse.csv"
    columns = "n_heads,n_kv_heads,loss,n_layers,d_model,context_length,gained_by_rereading"
    dense, sparse = "2,1,3.0,2,64,64,0.1,,", "2,1,3.1,2,64,64,-0.1,16,1"
    name.write_text("\n".join([columns + ",pattern_block,pattern_local", dense, sparse]))
    results = read_source(str(name), (), None).results
    assert results.gained_by_rereading.tolist() == [0.1, -0.1]
    left = read_source(str(name), (), None, ("not-copying",)).results
    assert left.density.tolist() == results.density[1:].tolist() != [1.0]
    with pytest.raises(UserError, match=r"--without not-copying names no run: of no dense one"):
        read_source("chen2025", (), None, ("not-copying",))


def test_what_is_kept_answers_as_the_runs_do(grid, capsys):
    """And the record beside it has what made each of them."""
    kept = grid / "studies" / "grid.csv"
    assert cli.main(["results", "experiments.grid", "--output", str(kept)]) == 0
    capsys.readouterr()
    floors = []
    for source in ("experiments.grid", str(kept)):
        assert cli.main(["fit", source, "--refits", "100", "--json"]) == 0
        floors.append(json.loads(capsys.readouterr().out)["E_nats"])
    assert floors[0] == floors[1]
    names = [row["name"] for row in csv.DictReader(kept.read_text().splitlines())]
    study, *results = map(json.loads, kept.with_suffix(".jsonl").read_text().splitlines())
    assert study["question"]["contexts"] == [512]
    assert [each["result"]["config"]["name"] for each in results] == names
    assert results[0]["result"]["data"]["store_hash"] == "s"
    assert cli.main(["results", str(kept)]) == 0
    assert "abc: 7" in capsys.readouterr().out
    told = histories(read_source(str(kept), (), None), "")
    assert set(told.curves) == set(names)
    assert told.curves["L4-h4"] == ((128, 256, 384), (3.0, 2.8, 2.7))
    assert told.config["context_length"] == 32
    assert read_source(str(kept), (), None).kept.rereading["L4-h4"] == ((256,), (0.2,))


def test_a_kept_study_is_kept_again_whole_or_in_part(grid, capsys):
    assert cli.main(["results", "experiments.grid", "--output", "grid.csv"]) == 0
    assert cli.main(["results", "grid.csv", "--output", "again.csv"]) == 0
    for ending in ("csv", "jsonl"):
        assert Path(f"again.{ending}").read_text() == Path(f"grid.{ending}").read_text()
    assert cli.main(["results", "grid.csv", "--without", "L1-*", "--output", "part.csv"]) == 0
    assert "5 runs: part.csv and part.jsonl" in capsys.readouterr().out
    part = read_source("part.csv", (), None)
    assert part.results.name.tolist() == ["L2-h2", "L2-h4", "L4-h2", "L4-h4", "L8-h2"]
    assert set(part.kept.curves) == set(part.results.name)
    for same in ("part.csv", "./part.csv", str(Path("part.csv").resolve())):
        assert cli.main(["results", "part.csv", "--without", "L2-*", "--output", same]) == 2
        assert f"--output {same} is what is read: name another file" in capsys.readouterr().err


def test_a_kept_study_is_asked_and_scored_as_its_experiment(grid, capsys):
    """Its question, its sealed forecasts and its losses by position are kept with it."""
    assert cli.main(["forecast", "experiments.grid", "--refits", "100"]) == 0
    finish(load_experiment("experiments.grid").runs[-1])
    assert cli.main(["results", "experiments.grid", "--output", "grid.csv"]) == 0
    capsys.readouterr()
    told = []
    for source in ("experiments.grid", "grid.csv"):
        assert cli.main(["results", source]) == 0
        told.append(capsys.readouterr().out.split("\n\n")[-1])
        study = read_source(source, (), None)
        assert study.question.baseline == (2, 1)
        assert study.results.positions["L8-h4"][0] > study.results.positions["L8-h4"][1]
    assert told[0] == told[1]
    assert "1 of the finished run inside" in told[0]
    whole = Path("grid.jsonl").read_text()
    without = [json.loads(line) | {"attempts": None} for line in whole.splitlines()[1:]]
    lines = [whole.splitlines()[0], *map(json.dumps, without)]
    Path("grid.jsonl").write_text("".join(line + "\n" for line in lines))
    assert cli.main(["results", "grid.csv"]) == 0
    assert "sealed too late" in capsys.readouterr().out  # nobody knows when it began
    Path("grid.jsonl").write_text(whole)
    seal = Path("grid.jsonl").read_text().replace('"predicted_nats": ', '"predicted_nats": 1')
    Path("grid.jsonl").write_text(seal)
    assert cli.main(["results", "grid.csv"]) == 0
    assert "it was altered since and does not count" in capsys.readouterr().out


def keep_and_lose(grid, name="grid.csv"):
    """The study in files, and its run directories gone."""
    assert cli.main(["results", "experiments.grid", "--output", name]) == 0
    shutil.rmtree("runs")


def test_a_kept_study_goes_on_on_another_machine(grid, capsys):
    """Its runs are done there, with all that was known of them, and only the last is left to train."""
    assert cli.main(["forecast", "experiments.grid", "--refits", "100"]) == 0
    before = run_directory("runs", "grid", load_experiment("experiments.grid").runs[0]).result()
    keep_and_lose(grid)
    assert cli.main(["restore", "grid.csv"]) == 0
    told = capsys.readouterr().out
    assert "runs/grid: 7 finished runs put back, without parameters, and 1 sealed forecast" in told
    runs = load_experiment("experiments.grid").runs
    assert run_directory("runs", "grid", runs[0]).result() == before
    assert cli.main(["status", "experiments.grid", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["runs"]
    assert [row["state"] for row in told] == ["done"] * 7 + ["pending"]
    assert told[0]["goodput"] is None  # what its time went to is not kept
    assert cli.main(["checkpoints", "experiments.grid"]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert set(histories(read_source("experiments.grid", (), None), "").curves) == {
        run.name for run in runs[:-1]
    }
    assert cli.main(["results", "experiments.grid", "--output", "again.csv"]) == 0
    for ending in ("csv", "jsonl"):
        assert Path(f"again.{ending}").read_text() == Path(f"grid.{ending}").read_text()
    finish(runs[-1])
    capsys.readouterr()
    assert cli.main(["results", "experiments.grid"]) == 0
    assert "1 of the finished run inside" in capsys.readouterr().out


def test_putting_back_leaves_what_has_begun_and_completes_what_was_interrupted(grid, capsys):
    keep_and_lose(grid)
    first, second, third, *_, last = load_experiment("experiments.grid").runs[:-1]
    here = run_directory("runs", "grid", first)
    here.begin(first, {"store_hash": "another"})
    assert cli.main(["restore", "grid.csv"]) == 0
    told = capsys.readouterr().out
    assert "6 finished runs put back, without parameters\nleft as they are, having" in told
    assert "begun there: L1-h2\n" in told
    assert here.state() == "pending"
    assert here.data() == {"store_hash": "another"}
    killed = ((second, ("result",)), (third, ("result", "config", "attempts", "curves")))
    for run, lost in killed:
        directory = run_directory("runs", "grid", run)
        for name in lost:
            getattr(directory, f"{name}_file").unlink()
        (directory.path / ".curves.json.1f").write_text("{")
        assert directory.begun() == ("curves" not in lost)
    trained = run_directory("runs", "grid", last)  # put back half, and then trained here
    trained.result_file.unlink()
    trained.metrics_file.write_text('{"step": 1}\n')
    assert cli.main(["restore", "grid.csv"]) == 0
    told = capsys.readouterr().out
    assert "2 finished runs put back" in told
    assert "begun there: L1-h2, L2-h4, L4-h2, L4-h4 and 1 more" in told
    assert not trained.result_file.exists()


def test_a_run_that_is_being_trained_is_not_put_back(grid):
    keep_and_lose(grid)
    first = load_experiment("experiments.grid").runs[0]
    directory = run_directory("runs", "grid", first)
    directory.path.mkdir(parents=True)
    with claim(directory.claim_file) as mine:
        assert mine
        assert cli.main(["restore", "grid.csv"]) == 0
        assert directory.state() == "running"
    assert not directory.begun()
    assert cli.main(["restore", "grid.csv"]) == 0
    assert directory.state() == "done"


def test_what_needs_parameters_says_that_none_were_kept(grid, capsys):
    keep_and_lose(grid)
    assert cli.main(["restore", "grid.csv"]) == 0
    run = load_experiment("experiments.grid").runs[0]
    directory = run_directory("runs", "grid", run)
    for command in (
        ["generate", str(directory.path), "--prompt", "a"],
        ["export", str(directory.path), "out"],
        ["judge", str(directory.path)],
    ):
        assert cli.main(command) == 2
        told = capsys.readouterr().err
        assert "was put back from a kept study, without its parameters: remove it and train" in told
    other = load_experiment("experiments.grid", ["--evaluation.tokens", "64"])
    with pytest.raises(
        UserError, match=r"^7 runs of grid \(L1-h2, L1-h4, L2-h2, L2-h4, \.\.\.\) were"
    ):
        check(other, Path("runs"))
    child = replace(run, start_from=f"grid/{directory.path.name}", name="child")
    with pytest.raises(UserError, match="was put back from a kept study, without its parameters"):
        require_parent(child, directory, "t")
    directory.metrics_file.write_text('{"step": 1}\n')  # trained here since
    assert open_trained(directory.path).run == run


def test_a_kept_study_is_not_replaced_by_less(grid, capsys):
    keep_and_lose(grid)
    finish(load_experiment("experiments.grid").runs[0])
    before = Path("grid.csv").read_text(), Path("grid.jsonl").read_text()
    assert cli.main(["results", "experiments.grid", "--output", "grid.csv"]) == 2
    told = capsys.readouterr().err
    assert (
        "--output grid.csv keeps 6 runs that would be lost (L1-h4, L2-h2, L2-h4, L4-h2 and 2"
        in told
    )
    assert (Path("grid.csv").read_text(), Path("grid.jsonl").read_text()) == before
    assert cli.main(["restore", "grid.csv"]) == 0
    assert cli.main(["results", "experiments.grid", "--output", "grid.csv"]) == 0


def test_what_cannot_be_put_back_is_refused(grid, capsys):
    keep_and_lose(grid)
    for source in ("experiments.grid", "chen2025", "other.csv"):
        assert cli.main(["restore", source]) == 2
        told = capsys.readouterr().err
        assert f"{source} cannot be put back among the runs: that takes FILE.csv with" in told
    record = Path("grid.jsonl")
    whole = record.read_text()
    for name in ("", "..", "a/b", "/elsewhere"):
        record.write_text(whole.replace('"experiment": "grid"', f'"experiment": "{name}"'))
        assert cli.main(["restore", "grid.csv"]) == 2
        assert f"experiment='{name}' does not name a folder" in capsys.readouterr().err
    record.write_text(whole)
    digest = load_experiment("experiments.grid").runs[3].digest
    record.write_text(record.read_text().replace(digest, "0123456789ab"))
    assert cli.main(["restore", "grid.csv"]) == 2
    assert "L2-h4 was kept with digest 0123456789ab" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("grid.csv", "L2-h4,", "L2-h5,", "grid.jsonl is not the record of grid.csv: they differ in L2-h4"),
        ("grid.jsonl", '"loss": ', '"loss": 1', "they differ in L1-h2"),
        ("grid.jsonl", '"n_heads": 2', '"n_heads": "2"', "grid.jsonl line 2 is damaged (model.n_heads"),
        ("grid.jsonl", '"schema": 1}', '"schema": 7}', "has schema 7, this version reads 1"),
        ("grid.jsonl", '"contexts": [512]', '"contexts": []', "line 1 is damaged (contexts must name"),
        ("grid.jsonl", '{"experiment"', '{"experiments"', "line 1 is damaged (experiment is missing)"),
    ],
)  # fmt: skip
def test_a_record_of_other_runs_is_refused(grid, capsys, file, old, new, told):
    assert cli.main(["results", "experiments.grid", "--output", "grid.csv"]) == 0
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))
    assert cli.main(["fit", "grid.csv"]) == 2
    assert told in capsys.readouterr().err
    Path("grid.jsonl").unlink()
    assert cli.main(["fit", "grid.csv", "--refits", "100"]) == 0


def test_only_a_table_of_runs_is_replaced(grid, capsys):
    (grid / "mine.csv").write_text("a,b\n")
    assert cli.main(["results", "experiments.grid", "--output", "mine.csv"]) == 2
    assert "mine.csv is another file" in capsys.readouterr().err
    assert (grid / "mine.csv").read_text() == "a,b\n"
    assert cli.main(["results", "experiments.grid", "--output", "mine.txt"]) == 2
    assert "must end with .csv" in capsys.readouterr().err
    Path("new.jsonl").write_text("mine\n")
    assert cli.main(["results", "experiments.grid", "--output", "new.csv"]) == 2
    assert "new.jsonl is another file" in capsys.readouterr().err
    assert Path("new.jsonl").read_text() == "mine\n"
    Path("new.jsonl").unlink()
    for _ in range(2):
        assert cli.main(["results", "experiments.grid", "--output", "new.csv"]) == 0


def test_a_sweep_of_learning_rates_is_kept_too(grid, capsys):
    """Nothing is fitted to it, so that runs may differ in their learning rate alone."""
    swept = GRID.replace(
        "tokens=1280,", "tokens=1280, optimizer=OptimizerConfig(learning_rate=rate),"
    )
    swept = swept.replace("-h{heads}", "-h{heads}-{rate}").replace("(2, 4)", "(2,)")
    swept = swept.replace("for layers", "for rate in (0.01, 0.02)\n        for layers")
    swept = swept.replace("import ModelConfig", "import ModelConfig, OptimizerConfig")
    (grid / "experiments" / "rates.py").write_text(swept)
    for i, run in enumerate(load_experiment("experiments.rates").runs):
        directory = run_directory("runs", "rates", run)
        directory.begin(run, {"store_hash": "s"})
        judged = {run.evaluation_digest: {"loss": 3.0 + i / 100}}
        result = {"config": run.to_dict(), "n_exact": n_exact(run.model), "tokens": 1280}
        directory.finish(result | {"data": {"store_hash": "s"}, "evaluations": judged}, {})
    kept = grid / "sweep.csv"
    for _ in range(2):  # what was written may be replaced
        assert cli.main(["results", "experiments.rates", "--output", str(kept)]) == 0
    rows = list(csv.DictReader(kept.read_text().splitlines()))
    assert len(rows) == 8
    assert {row["learning_rate"] for row in rows} == {"0.01", "0.02"}
    capsys.readouterr()
    assert cli.main(["results", "experiments.rates"]) == 0
    assert " rate " in capsys.readouterr().out
    assert cli.main(["fit", "experiments.rates"]) == 2
    assert "have the same shape, seed and tokens" in capsys.readouterr().err
