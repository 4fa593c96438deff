"""Runs of several token budgets: one trunk, from which the decay of each branches off."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import tiny_run

from gqa_scaling.config import OptimizerConfig, Question, RunConfig
from gqa_scaling.costs import training_flops, training_steps
from gqa_scaling.data import open_store
from gqa_scaling.devices import processes
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.sweep import run as sweep
from gqa_scaling.sweep.status import read_checkpoints
from gqa_scaling.training import loop

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_tokens=4 * 128)
SHORT, MIDDLE, LONG = RUNS = tuple(
    tiny_run(f"D{steps}", tokens=steps * 128, optimizer=OPTIMIZER) for steps in (15, 30, 40)
)  # the decay begins after 12, 24 and 32 steps
GRID = Experiment("tiny", RUNS, Question())
ROOT = Path("runs")


def directory(run: RunConfig, root: Path = ROOT) -> RunDirectory:
    return run_directory(root, "tiny", run)


def result(run: RunConfig, root: Path = ROOT) -> str:
    whole = directory(run, root).result()
    assert whole is not None
    whole["result"]["config"]["data"].pop("store")
    return json.dumps(whole["result"], sort_keys=True)


def first_steps(run: RunConfig) -> list[int]:
    return [attempt["first_step"] for attempt in directory(run).attempts()]


def states(run: RunConfig) -> set[str]:
    folder = directory(run).checkpoints
    return {each.name for each in folder.iterdir()} if folder.exists() else set()


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each was trained by itself, from its first step."""
    work = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        for name in ("corpus", "data"):
            Path(name).symlink_to(trained / name)
        for run in RUNS:
            assert sweep.run_sweep(dataclasses.replace(GRID, runs=(run,)), ROOT).done == 1
            assert first_steps(run) == [0]
    return work / ROOT


@pytest.mark.usefixtures("workplace")
def test_branches_equal_runs_that_were_trained_alone(alone: Path) -> None:
    assert sweep.run_sweep(GRID, ROOT) == sweep.Outcome(3, 0)
    assert [first_steps(run) for run in RUNS] == [[0], [12], [24]]
    for run in RUNS:
        assert result(run) == result(run, alone)
        assert not states(run)  # nobody needs them any more
    (attempt,) = directory(LONG).result()["attempts"]
    assert attempt["branched_from"] == directory(MIDDLE).path.name
    assert attempt["flops_saved"] == 24 * training_flops(LONG) // training_steps(LONG)
    assert directory(LONG).metrics()[0]["step"] == 25


@pytest.mark.usefixtures("workplace")
def test_the_largest_budget_first_leaves_what_the_others_need(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.run_sweep(GRID.select("D40"), ROOT) == sweep.Outcome(1, 0)
    assert (
        "D40: begins at the first step: no run of a smaller budget has kept its state of step 24"
        in (capsys.readouterr().err)
    )
    assert states(LONG) == {"12", "24"}
    assert [kept.name for kept in read_checkpoints([directory(LONG)])[0].kept] == [
        "step 24",
        "step 12",
        "parameters",
    ]
    sweep.tidy(GRID, ROOT)
    assert states(LONG) == {"12", "24"}
    assert sweep.run_sweep(GRID, ROOT) == sweep.Outcome(3, 0)
    assert [first_steps(run) for run in RUNS] == [[12], [24], [0]]
    for run in RUNS:
        assert result(run) == result(run, alone)
        assert not states(run)


@pytest.mark.usefixtures("workplace")
def test_a_sweep_that_is_interrupted_anywhere_ends_as_one_that_was_not(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the state was kept, in the branch, and in the branch of the branch."""
    for steps in (13, 7, 20):
        asked = iter(range(steps + 1))
        with monkeypatch.context() as patch:
            patch.setattr(processes, "preempted", lambda asked=asked: next(asked, None) is None)
            with pytest.raises(processes.Preempted):
                sweep.run_sweep(GRID, ROOT)
    assert sweep.run_sweep(GRID, ROOT) == sweep.Outcome(3, 0)
    assert [first_steps(run) for run in RUNS] == [[0, 14], [12, 18], [24, 31]]
    for run in RUNS:
        assert result(run) == result(run, alone)
        assert not states(run)


@pytest.mark.usefixtures("workplace")
def test_a_state_that_is_damaged_is_named_and_not_used(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.run_sweep(GRID.select("D[13]*"), ROOT) == sweep.Outcome(2, 0)
    for file in (directory(MIDDLE).checkpoints / "24/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    capsys.readouterr()
    assert sweep.run_sweep(GRID, ROOT) == sweep.Outcome(3, 0)
    told = capsys.readouterr().err
    assert "24 is damaged" in told
    assert (
        "D40: goes on from step 12: no run of a smaller budget has kept its state of step 24"
        in told
    )
    (attempt,) = directory(LONG).attempts()
    assert attempt["first_step"] == 12
    assert "24 is damaged" in attempt["damaged_checkpoints"][0]
    assert result(LONG) == result(LONG, alone)


@pytest.mark.usefixtures("workplace")
def test_a_state_of_other_data_is_left_alone(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.run_sweep(GRID.select("D15"), ROOT) == sweep.Outcome(1, 0)
    text = directory(SHORT).config_file.read_text()
    known = open_store(SHORT.data).describe()["store_hash"]
    directory(SHORT).config_file.write_text(text.replace(known, "0" * 64))
    assert sweep.run_sweep(GRID.select("D30"), ROOT) == sweep.Outcome(1, 0)
    assert "D15 was trained on other data; its state of step 12 is left alone" in (
        capsys.readouterr().err
    )
    assert first_steps(MIDDLE) == [0]


@pytest.mark.usefixtures("workplace")
def test_a_run_waits_for_the_state_that_another_process_is_about_to_keep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for the result: while one process is in the decay, the other goes on with the trunk."""
    order: list[str] = []

    def train(run: RunConfig, directory: RunDirectory, *_: object, **__: object) -> None:
        order.append(run.name)
        directory.finish({"evaluations": {run.evaluation_digest: {"loss": 1.0}}}, {})

    def keep_the_state(seconds: float) -> None:
        order.append("pause")
        shutil.copytree(kept, directory(SHORT).checkpoints / "12", dirs_exist_ok=True)
        if order.count("pause") == 2:
            directory(SHORT).finish({"evaluations": {SHORT.evaluation_digest: {"loss": 1.0}}}, {})
            other.close()

    assert sweep.run_sweep(GRID.select("D15"), ROOT).done == 1
    kept = Path("kept")
    shutil.move(directory(SHORT).checkpoints / "12", kept)
    shutil.rmtree(directory(SHORT).path)
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(sweep.time, "sleep", keep_the_state)
    with contextlib.ExitStack() as other:
        assert other.enter_context(claim(directory(SHORT).claim_file))
        assert sweep.run_sweep(GRID.select("D[13]*"), ROOT) == sweep.Outcome(2, 0)
    assert order == ["pause", "D30", "pause"]


# ------------------------------------------------------------- other meshes, processes and storage


GRID_FILE = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from test_training_branches import RUNS

def runs():
    return list(RUNS[:2])
"""


@pytest.mark.usefixtures("workplace")
def test_in_a_bucket_branches_equal_runs_that_were_trained_alone(alone: Path, bucket: Path) -> None:
    root = bucket / "runs"
    assert sweep.run_sweep(GRID, root) == sweep.Outcome(3, 0)
    for run, first in zip(RUNS, (0, 12, 24), strict=True):
        assert [attempt["first_step"] for attempt in directory(run, root).attempts()] == [first]
        assert result(run, root) == result(run, alone)
        assert not directory(run, root).checkpoints.exists()


def command(root: str, *arguments: str, devices: int = 1, processes: int = 1) -> str:
    """What a `run` of the grid with two budgets says on stderr; it must end well."""
    Path("tiny.py").unlink(missing_ok=True)
    Path("tiny.py").write_text(GRID_FILE)
    start = [sys.executable, "-m", "gqa_scaling", "run"]
    if processes > 1:
        job = ["launch", "local", "--processes", str(processes)]
        start[2:] = [*job, "--devices-per-process", str(devices)]
    checkout = str(Path(__file__).parents[2])
    told = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": checkout}
    done = subprocess.run(
        [*start, "tiny.py", "--quiet", "--root", root, *arguments],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_a_branch_on_another_mesh_of_eight_devices_equals_the_run_alone() -> None:
    trunk = ("--parallel.fsdp", "2", "--parallel.tensor", "2")
    branch = ("--parallel.context", "4", "--parallel.fsdp", "2")
    command("runs", "--only", "D15", *trunk, devices=8)
    command("runs", "--only", "D30", *branch, devices=8)
    assert "begins at the first step" in command("alone", "--only", "D30", *branch, devices=8)
    assert [
        attempt["layout"]["mesh"]
        for run in (SHORT, MIDDLE)
        for attempt in directory(run).attempts()
    ] == [
        {"data": 2, "fsdp": 2, "context": 1, "tensor": 2},
        {"data": 1, "fsdp": 2, "context": 4, "tensor": 1},
    ]
    assert first_steps(MIDDLE) == [12]
    losses, evaluations = [], []
    for root in (ROOT, Path("alone")):
        rows = [m for m in directory(MIDDLE, root).metrics() if m["step"] > 12]
        losses.append([m["learning/loss"] for m in rows if "learning/loss" in m])
        evaluations.append(json.loads(result(MIDDLE, root))["evaluations"])
    assert len(losses[0]) == 18
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    (one,), (other,) = (each.values() for each in evaluations)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["loss_by_position"] == pytest.approx(other["loss_by_position"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
def test_branches_of_a_job_of_two_processes_equal_its_runs_alone() -> None:
    layout = ("--parallel.fsdp", "2")
    assert "begins at the first step" not in command("runs", *layout, processes=2)
    for name in ("D15", "D30"):
        command(f"alone-{name}", "--only", name, *layout, processes=2)
    assert [first_steps(run) for run in (SHORT, MIDDLE)] == [[0], [12]]
    for run in (SHORT, MIDDLE):
        assert result(run) == result(run, Path(f"alone-{run.name}"))
        assert not states(run)
