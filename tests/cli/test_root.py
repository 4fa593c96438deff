"""--root names the folder of the runs for everything that a command does, and for nothing else."""

import os
from pathlib import Path

import pytest

from gqa_scaling import cli
from gqa_scaling.cli import completion
from gqa_scaling.config import ModelConfig, RunConfig, UserError
from gqa_scaling.experiment import load
from gqa_scaling.experiment.learning_rates import learning_rate_choices
from gqa_scaling.files.runs import run_directory
from gqa_scaling.study import source
from gqa_scaling.sweep import display, run, workers

TINY = "experiments.tiny"
LOOKING_UP = """
from experiments.tiny import runs
from gqa_scaling.experiment.learning_rates import LearningRateSweep

LEARNING_RATES = LearningRateSweep("sweep", lambda: [r for r in runs() if r.model.n_heads == 4])
"""


def finish(run: RunConfig, experiment: str) -> None:
    directory = run_directory("elsewhere", experiment, run)
    directory.path.mkdir(parents=True)
    directory.finish({"evaluations": {run.evaluation_digest: {"loss": 2.0}}}, {})


def named(verb: str) -> list[str]:
    """What to give a verb that takes an experiment or a run of one; nothing where it takes neither."""
    parser = completion.verb_parsers(cli.parser_of((verb,)))[verb]
    if not completion.takes_an_experiment(parser):
        return []
    values = {
        "source": TINY,
        "experiment": TINY,
        "experiments": TINY,
        "first": "4,1",
        "second": "8,1",
    }
    words = []
    for each in parser._actions:
        if each.option_strings:
            words += [each.option_strings[0], "a"] if each.required else []
        else:
            of_a_run = ":NAME" in (each.help or "")
            words.append(f"{TINY}:a-run" if of_a_run else values.get(each.dest, "folder"))
    return words


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if named(verb)])
def test_every_verb_loads_its_experiment_by_it(workplace, monkeypatch, verb):
    told = []

    def load_experiment(spec: str, overrides: object = (), root: Path | None = None) -> None:
        told.append(root)
        raise UserError("enough")

    for module in (load, source):
        monkeypatch.setattr(module, "load_experiment", load_experiment)
    assert cli.main([verb, *named(verb), "--root", "elsewhere"]) == 2
    assert told == [Path("elsewhere")]
    assert os.environ["GQA_SCALING_RUNS"] == "runs"


def test_learning_rates_are_looked_up_there(workplace):
    Path("grid.py").write_text(LOOKING_UP)
    sweep = [run for run in load.load_experiment(TINY).runs if run.model.n_heads == 4]
    for each in sweep:
        finish(each, "sweep")
    notes = {
        root: {r.note for r in load.load_experiment("grid.py", root=root).runs}
        for root in (None, Path("elsewhere"))
    }
    assert all("has not finished" in note for note in notes[None])
    assert all("from sweep (1 tried" in note for note in notes[Path("elsewhere")])
    assert learning_rate_choices("sweep", sweep) == {}  # nothing is left of it


def test_workers_are_told(workplace, monkeypatch):
    told = []
    monkeypatch.setattr(run, "check", lambda *_: {})
    monkeypatch.setattr(display, "report_end", lambda *_: 0)
    monkeypatch.setattr(workers, "run_workers", lambda command, *_: told.append(command) or 0)
    command = ["run", TINY, "--workers", "2", "--quiet", "--seed", "3", "--root", "elsewhere"]
    assert cli.main(command) == 0
    assert told[0][3:] == ["run", TINY, "--quiet", "--root=elsewhere", "--seed", "3"]


def test_the_finished_runs_are_those_there(workplace, capsys):
    model = ModelConfig(1, 32, 1, 1, head_dim=8, vocab_size=264)
    one = RunConfig("L1-h1", model=model, context_length=32, batch_tokens=128, tokens=1280)
    finish(one, "tiny")
    assert cli.main(["run", TINY, "--only", "L1-h1", "--root", "elsewhere"]) == 0
    assert "all 1 runs are finished in elsewhere/tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["fit chen2025 --refits 100", "frontier chen2025 --refits 100", f"plan {TINY}"]
)
def test_what_needs_no_runs_needs_no_folder_for_them(workplace, capsys, command):
    Path("runs").touch()  # none can be made here
    assert cli.main(command.split()) == 0, capsys.readouterr().err
