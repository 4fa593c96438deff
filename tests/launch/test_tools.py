"""What SkyPilot and xpk themselves make of the renderings, offline.

Each lives in an environment of its own, as they and this package ask for other versions of the
same libraries: `make test-tools` makes both, in $GQA_SCALING_TOOLS/skypilot and .../xpk, and runs
this. xpk needs Python 3.12.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gqa_scaling.config import ModelConfig, RunConfig
from gqa_scaling.hardware import SLICES, hardware
from launch import skypilot, work, xpk
from launch.jobs import Job, group
from launch.submission import Study
from launch.targets import Target, sizes_up_to

pytestmark = pytest.mark.tools
HOSTILE = "experiments/$(touch pwned) `touch pwned` ' \" : - #$HOME $$.py"
OVERRIDES = ("--note", "${HOME} $(touch pwned) 'é", "--data.store", "gs://mine/data")


def tool(name, program):
    """The program of a tool's environment; what is missing is said with the command for it."""
    folder = Path(os.environ.get("GQA_SCALING_TOOLS", "tools"))
    path = (folder / name / "bin" / program).absolute()
    assert path.exists(), f"{path} is missing: make test-tools makes it"
    return str(path)


READ = """
import json, sys, sky
for path in sys.argv[1:]:
    task = sky.Task.from_yaml(path)
    (resources,) = task.resources
    print(json.dumps([task.name, task.run, task.num_nodes, task.envs, resources.to_yaml_config()]))
"""


@pytest.mark.parametrize(
    ("largest", "spot"), [("v5e-64", True), ("v5p-512", True), ("64xH100", False)]
)
def test_skypilot_reads_every_job_of_the_published_grid(largest, spot, grid, tmp_path, monkeypatch):
    python = tool("skypilot", "python")
    place = SLICES[largest]
    row = hardware(place.kind)
    target = Target("skypilot", place, row, spot, "gs://mine")
    study = Study(HOSTILE, "head_ladder", OVERRIDES, "gs://mine/runs")
    jobs = group(study.name, grid.runs, sizes_up_to(place), row, 24.0)
    monkeypatch.chdir(tmp_path)
    for step in skypilot.render(jobs, target, study):
        for path, text in step.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    paths = [str(study.folder / f"{job.name}.yaml") for job in jobs]
    done = subprocess.run(
        [python, "-c", READ, *paths],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tasks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [task[0] for task in tasks] == [job.name for job in jobs]
    for job, (_, script, nodes, envs, resources) in zip(jobs, tasks, strict=True):
        assert nodes == (1 if place.is_tpu else job.slice.hosts)
        platforms = "tpu,cpu" if place.is_tpu else "cuda,cpu"
        assert envs == {"GQA_SCALING_RUNS": "gs://mine/runs", "JAX_PLATFORMS": platforms}
        (accelerator,) = resources["accelerators"].items()
        kind = f"tpu-{job.slice.cloud_type}" if place.is_tpu else "H100"
        assert accelerator == (kind, 1 if place.is_tpu else job.slice.chips_per_host)
        assert resources["use_spot"] is spot
        recovery = resources["job_recovery"]
        assert (recovery["max_restarts_on_errors"], recovery["recover_on_exit_codes"]) == (
            0,
            [75, 143],
        )
        assert all(run.name in script for run in job.runs)


@pytest.mark.parametrize("name", ["v5e-8", "v5e-256", "v6e-64", "v5p-128"])
def test_xpk_makes_a_job_set_that_runs_the_job(name, tmp_path, monkeypatch):
    """Its manifest, and its container's own script in a real bash with a python that only tells."""
    program, place = tool("xpk", "xpk"), SLICES[name]
    row = hardware(place.kind)
    own = {"project": "p", "zone": "us-central1-a", "cluster": "c", "image": "gcr.io/p/i:1"}
    target = Target("xpk", place, row, False, "gs://mine", **own)
    config = RunConfig("L1-é.x", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
    study = Study(HOSTILE, "x", OVERRIDES, "gs://mine/runs")
    (step,) = xpk.render([Job("x-l1-0123abcd", place, (config,), 60.0)], target, study)
    offline = ["--dry-run", "--skip-validation", "--output-manifest-file", "manifest.yaml"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("PYTHONPATH", None)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [program, *step.command[1:], *offline], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    job_set = yaml.safe_load(Path("manifest.yaml").read_text())
    assert job_set["kind"] == "JobSet"
    assert job_set["metadata"]["name"] == "x-l1-0123abcd"
    assert "kueue.x-k8s.io/queue-name" in job_set["metadata"]["labels"]
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == xpk.MAX_RESTARTS
    assert job_set["spec"]["ttlSecondsAfterFinished"] == xpk.KEPT_SECONDS
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == max(1, place.chips // 4)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {75, 134, 137, 143} <= set(rule["onExitCodes"]["values"])
    assert not {0, 1, 2} & set(rule["onExitCodes"]["values"])
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == place.name.partition(":")[2]
    assert pod["terminationGracePeriodSeconds"] == xpk.SAVE_SECONDS
    (container,) = pod["containers"]
    assert container["image"] == "gcr.io/p/i:1"

    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    before = set(tmp_path.iterdir())
    shell = [part.replace("$$", "$") for part in container["command"]]  # as Kubernetes reads it
    # xpk looks every 5 s whether the command has ended
    shell[-1] = shell[-1].replace("sleep 5", "sleep 0.05")
    path = f"{tmp_path}:/usr/bin:/bin"
    ran = subprocess.run(shell, env={"PATH": path}, capture_output=True, text=True)
    assert set(tmp_path.iterdir()) == before
    (said,) = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
    assert work.parse(said[2:]) == (HOSTILE, ["L1-é.x"], list(OVERRIDES))
    assert ran.returncode == 0
