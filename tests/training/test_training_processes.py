"""Real processes: workers that share a grid, and a mesh of several devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_kit import tiny_run, write_corpus

from gqa_scaling.files.runs import RunDirectory, run_directory

GRID = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
from training_kit import tiny_run
def runs():
    return [tiny_run(f"seed{{i}}", seed=i) for i in range(3)]
"""


def gqa_scaling(
    folder: Path, *arguments: str, devices: int = 1
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "gqa_scaling", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "grid.py").write_text(GRID)
    assert gqa_scaling(tmp_path, "prepare", "grid.py").returncode == 0
    return tmp_path


def results(folder: Path) -> list[tuple[RunDirectory, dict]]:
    directories = [
        RunDirectory(f.parent) for f in sorted((folder / "runs/grid").glob("*/result.json"))
    ]
    return [(d, d.result()) for d in directories]


@pytest.mark.slow
def test_workers_train_each_run_once(folder: Path) -> None:
    done = gqa_scaling(folder, "run", "grid.py", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert [len(d.attempts()) for d, _ in results(folder)] == [1, 1, 1]
    again = gqa_scaling(folder, "run", "grid.py", "--workers", "2")
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout == "grid: all 3 runs are finished in runs/grid\n"
    status = gqa_scaling(folder, "status", "grid.py", "--json")
    assert json.loads(status.stdout)["counts"]["done"] == 3


@pytest.mark.slow
def test_a_mesh_of_four_devices_gives_the_same_losses(folder: Path) -> None:
    """Of training, and of evaluation at every position, also where each device holds two parts."""
    run = tiny_run("seed0")
    only = ("run", "grid.py", "--only", "seed0")
    split = ("--parallel.fsdp", "2", "--parallel.tensor", "2")
    losses, positions, meshes = [], [], []
    for i, layout in enumerate(((), split, ("--parallel.context", "4"))):
        done = gqa_scaling(folder, *only, "--root", f"runs{i}", *layout, devices=4 if layout else 1)
        assert done.returncode == 0, done.stderr
        directory = run_directory(folder / f"runs{i}", "grid", run)
        steps = [m for m in directory.metrics() if "learning/loss" in m]  # others are measurements
        losses.append([m["learning/loss"] for m in steps])
        result = directory.result()["result"]
        positions.append(result["evaluations"][run.evaluation_digest]["loss_by_position"])
        meshes.append(result["layout"]["mesh"])
    assert meshes[1] == {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    assert meshes[2] == {"data": 1, "fsdp": 1, "context": 4, "tensor": 1}
    assert max(positions[0]) - min(positions[0]) > 0.1  # an order that is wrong would show
    for i in (1, 2):
        assert losses[i] == pytest.approx(losses[0], rel=1e-4)
        assert positions[i] == pytest.approx(positions[0], rel=1e-3)
