"""Forecasts from the command line: sealed, trained, scored, and what is refused."""

import json
import shlex

import pytest

from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import run_directory, runs_root
from gqa_scaling.sweep.run import Outcome

GRID = """
from gqa_scaling.config import ModelConfig, Question, RunConfig

QUESTION = Question(contexts=(4096,), losses=(2.0,))


def runs():
    return [
        RunConfig(
            name=f"L{layers}-d{width}-h4-kv{kv}",
            model=ModelConfig(layers, width, 4, kv, head_dim=8, vocab_size=264),
            context_length=32,
            batch_tokens=128,
            tokens=1280,
        )
        for layers, width in ((2, 32), (2, 48), (2, 64), (3, 96), (4, 128))
        for kv in (4, 1)
    ]
"""
NAME = "experiments.grid"
FEW = ("--refits", "100")
LARGE = ["L4-d128-h4-kv4", "L4-d128-h4-kv1"]


@pytest.fixture
def call(workplace, said, monkeypatch):
    """main([...]) beside experiments/grid.py, its small runs finished: (code, stdout, stderr)."""
    monkeypatch.setattr("gqa_scaling.devices.processes.join", lambda alone: None)
    (workplace / "experiments/grid.py").write_text(GRID)
    finish([run for run in load_experiment(NAME).runs if run.name not in LARGE])
    return said


def finish(runs) -> None:
    for run in runs:
        directory = run_directory(runs_root(), "grid", run)
        directory.begin(run, {})
        directory.add_attempt({"began": 4e9, "first_step": 0, "layout": {"device": "cpu"}})
        loss = 1.2 + (2e4 / n_exact(run.model)) ** 0.25 + 0.001 * (n_exact(run.model) % 5 - 2)
        judged = {run.evaluation_digest: {"loss": loss, "hash": "e"}}
        result = {"n_exact": n_exact(run.model), "tokens": training_tokens(run), "data": {}}
        directory.finish(result | {"evaluations": judged}, {})


def forecasts(workplace) -> list[dict]:
    files = sorted((workplace / "runs/grid/forecasts").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_a_forecast_is_sealed_trained_and_scored(call, workplace):
    code, out, err = call("forecast", NAME, *FEW)
    assert (code, err) == (0, "")
    assert "Forecasts for grid from grid (8 runs)" in out
    assert "sealed: runs/grid/forecasts/" in out
    (told,) = forecasts(workplace)
    assert [run["name"] for run in told["runs"]] == LARGE
    code, out, _ = call("status", NAME)
    assert (code, out.count("not finished")) == (0, 2)
    finish([run for run in load_experiment(NAME).runs if run.name in LARGE])
    code, out, _ = call("status", NAME, "--json")
    scored = json.loads(out)["forecasts"]
    assert (code, scored["finished"], scored["altered"]) == (0, 2, [])
    for row, said in zip(scored["runs"], told["runs"], strict=True):
        assert row["predicted_nats"] == said["predicted_nats"]
        assert row["inside"] == (said["low_nats"] <= row["observed_nats"] <= said["high_nats"])
    code, out, _ = call("report", NAME, *FEW, "--data", "--figures", "svg")
    assert code == 0
    assert "Forecasts sealed before training" in out
    page = (workplace / "runs/grid/report.html").read_text()
    assert page.count(LARGE[0]) > 1
    assert json.loads((workplace / "runs/grid/forecasts.json").read_text()) == scored
    assert (workplace / "runs/grid/figures/forecasts.svg").exists()
    code, _, err = call("forecast", NAME, *FEW)
    assert code == 2
    assert "all 10 runs of grid have begun: a forecast is made before" in err
    assert len(forecasts(workplace)) == 1


def test_runs_of_another_experiment_can_be_named(call, workplace):
    other = f"{NAME}:L4-d128-h4-kv1 --model.n-layers 6"
    code, out, _ = call("forecast", NAME, *FEW, "--runs", other, "--json")
    assert code == 0
    (run,) = json.loads(out)["runs"]
    (wanted,) = [
        run
        for run in load_experiment(NAME, ["--model.n-layers", "6"]).runs
        if run.name == "L4-d128-h4-kv1"
    ]
    assert (run["digest"], run["n_layers"]) == (wanted.digest, 6)
    for runs, said in (
        (f"{NAME}:L2-d32-h4-kv4", "L2-d32-h4-kv4 of grid began already"),
        (f"{NAME}:L9", "experiments.grid declares no run 'L9'"),
        ("experiments.grit", "unknown experiment 'experiments.grit'"),
        ("", "'' names no experiment"),
        (f"{NAME} '", "names no experiment"),
    ):
        code, _, err = call("forecast", NAME, *FEW, "--runs", runs)
        assert code == 2
        assert said in err
    code, _, err = call("forecast", "chen2025")
    assert (code, "forecast needs the finished runs of an experiment" in err) == (2, True)
    assert len(forecasts(workplace)) == 1


def test_a_forecast_that_was_altered_is_damage(call, workplace):
    call("forecast", NAME, *FEW)
    (file,) = (workplace / "runs/grid/forecasts").glob("*.json")
    file.write_text(file.read_text().replace('"low_nats": 1', '"low_nats": 0'))
    code, out, err = call("status", NAME)
    assert code == 1
    assert "is not what was sealed" in err
    assert "No forecast counts." in out
    code, out, _ = call("status", NAME, "--json")
    assert (code, len(json.loads(out)["forecasts"]["altered"])) == (1, 1)
    code, out, _ = call("report", NAME, *FEW, "--data", "--figures", "svg")
    assert "is not what was sealed" in " ".join(out.split())


@pytest.fixture
def sweep(monkeypatch):
    """Training replaced by a note of the forecasts that were there when it began."""
    seen = []

    def run_sweep(experiment, root):
        seen.append((experiment.runs, len(list((root / "grid/forecasts").glob("*.json")))))
        return Outcome(0, 0)

    monkeypatch.setattr("gqa_scaling.sweep.run.run_sweep", run_sweep)
    return seen


def test_run_seals_before_it_trains_and_only_once(call, workplace, sweep):
    code, out, _ = call("run", NAME, "--forecast", NAME)
    assert code == 0
    assert "Sealed in runs/grid/forecasts/" in out
    assert [files for _, files in sweep] == [1]
    call("run", NAME, "--forecast", NAME, "--only", LARGE[0])  # as after a kill
    assert [files for _, files in sweep] == [1, 1]
    call("run", NAME)
    finish([run for run in load_experiment(NAME).runs if run.name in LARGE])
    code, out, _ = call("run", NAME, "--forecast", NAME)
    assert (code, "all 10 runs are finished" in out) == (0, True)
    assert len(forecasts(workplace)) == 1


def test_what_cannot_be_forecast_is_not_trained(call, sweep):
    code, _, err = call("run", NAME, "--only", LARGE[0], "--tokens", "5120", "--forecast", NAME)
    assert code == 2
    assert "not the budget of the finished runs" in err
    assert sweep == []


def test_the_command_of_an_answer_seals_a_forecast(call, workplace, sweep):
    _, out, _ = call("frontier", NAME, *FEW, "--losses", "1.84")
    text = out[out.index("gqa-scaling run") :].split("\n\n")[0]
    _, *arguments = shlex.split(text.replace("\\\n", " "))
    code, *_ = call(*arguments)
    assert code == 0
    (told,) = forecasts(workplace)
    ((run,), files) = sweep[0]
    assert files == 1
    assert [said["digest"] for said in told["runs"]] == [run.digest]
    finish([run])
    code, out, _ = call("status", NAME, "--json")
    assert json.loads(out)["forecasts"]["finished"] == 1
