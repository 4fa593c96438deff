"""Arguments of `python -m launch` that are refused."""

import pytest
from bad_input_kit import HUGE, TINY

from launch import cli as launch


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("required: TARGET", ""),
        ("invalid choice: 'moon'", "moon v5e-8 experiments.tiny"),
        ("required: slice, experiment", "slurm --dry-run"),
        ("v5e-7", "skypilot v5e-7 experiments.tiny --bucket gs://mine --dry-run"),
        ("v5e-" + HUGE, f"skypilot v5e-{HUGE} experiments.tiny --bucket gs://mine --dry-run"),
        ("0xH100", "slurm 0xH100 experiments.tiny --dry-run"),
        ("--hours nan", "slurm 8xH100 experiments.tiny --hours nan --dry-run"),
        ("--hours 0", "slurm 8xH100 experiments.tiny --hours 0 --dry-run"),
        ("--hours -1", "slurm 8xH100 experiments.tiny --hours -1 --dry-run"),
        ("mfu=2.0", "slurm 8xH100 experiments.tiny --mfu 2 --dry-run"),
        ("price=inf", "slurm 8xH100 experiments.tiny --price inf --dry-run"),
        ("bucket", "skypilot v5e-8 experiments.tiny --dry-run"),
        ("bucket", "skypilot v5e-8 experiments.tiny --bucket /mnt/x --dry-run"),
        ("unknown experiment 'experiments.none'", "slurm 8xH100 experiments.none --dry-run"),
        ("unknown field --sed", "slurm 8xH100 experiments.tiny --dry-run --sed 1"),
        ("n_layers=" + HUGE, f"slurm 8xH100 experiments.tiny --dry-run --model.n-layers {HUGE}"),
        ("seed=4294967296", "slurm 8xH100 experiments.tiny --dry-run --seed 4294967296"),
        ("matches none", "slurm 8xH100 experiments.tiny --dry-run --only none"),
    ],
)
def test_launches(refused, said, arguments):
    refused(said, *arguments.split(), main=launch.main)


def test_launch_takes_no_runs_folder_for_the_working_directory(refused, monkeypatch):
    monkeypatch.setenv("GQA_SCALING_RUNS", "")
    refused("the folder of the runs is ''", "slurm", "8xH100", TINY, "--dry-run", main=launch.main)
