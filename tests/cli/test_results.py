"""Finished runs as data, from the command line."""

import csv
import json

import pytest

from gqa_scaling import cli
from gqa_scaling.costs import n_exact
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import run_directory

GRID = """
from gqa_scaling.config import ModelConfig, RunConfig


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
        directory = run_directory("runs", "grid", run)
        directory.begin(run, {"store_hash": "s"})
        began = {"began": 1.8e9, "first_step": 0, "layout": {"device": "cpu"}}
        directory.add_attempt(began | {"commit": "abc"})
        n = n_exact(run.model)
        judged = {run.evaluation_digest: {"loss": (1e6 / n) ** 0.1 + run.model.n_heads / 100}}
        result = {"config": run.to_dict(), "n_exact": n, "tokens": 1280}
        directory.finish(result | {"data": {"store_hash": "s"}, "evaluations": judged}, {})
    return workplace


def test_a_table_of_finished_runs_tells_what_is_not(grid, capsys):
    assert cli.main(["results", "experiments.grid"]) == 0
    said = capsys.readouterr().out
    assert "L4-h4" in said
    assert "Not finished: L8-h4." in said


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
    records = [json.loads(line) for line in kept.with_suffix(".jsonl").read_text().splitlines()]
    assert [record["result"]["config"]["name"] for record in records] == names
    assert {record["attempts"][0]["commit"] for record in records} == {"abc"}
    assert records[0]["result"]["data"]["store_hash"] == "s"


def test_only_a_table_of_runs_is_replaced(grid, capsys):
    (grid / "mine.csv").write_text("a,b\n")
    assert cli.main(["results", "experiments.grid", "--output", "mine.csv"]) == 2
    assert "mine.csv is another file" in capsys.readouterr().err
    assert (grid / "mine.csv").read_text() == "a,b\n"
    assert cli.main(["results", "experiments.grid", "--output", "mine.txt"]) == 2
    assert "must end with .csv" in capsys.readouterr().err
    for _ in range(2):
        assert cli.main(["results", "experiments.grid", "--output", "new.csv"]) == 0
