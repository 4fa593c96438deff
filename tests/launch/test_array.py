"""Array tasks as SLURM starts, signals and requeues them, with submitit's local executor instead."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from submitit import LocalExecutor

from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.hardware import SLICES
from launch import slurm
from launch.jobs import Job
from launch.slurm import ArrayTask, array_tasks
from launch.submission import Study
from launch.work import Work

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def executor(tmp_path, monkeypatch):
    """Its tasks find this checkout as those of a cluster do, which start in it."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    executor = LocalExecutor(tmp_path / "tasks")
    executor.update_parameters(timeout_min=30)
    return executor


def task(*bodies):
    start = "import os, signal, sys, time\n"
    return ArrayTask(tuple((sys.executable, "-S", "-c", start + b) for b in bodies), {})


def children(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def the_child(pid, other_than=0):
    """The one child of a process, once there is one."""
    while True:
        found = [child for child in children(pid) if child != other_than]
        if found:
            return found[0]
        time.sleep(0.02)


def until(condition):
    while not condition():
        time.sleep(0.02)


def test_a_bug_is_not_started_again(executor, tmp_path):
    body = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\nsys.exit(1)"
    job = executor.submit(task(body))
    assert "ended with exit code 1" in str(job.exception())
    assert (tmp_path / "starts").read_text() == "x"


def test_a_process_that_always_dies_is_not_started_for_ever(executor, tmp_path):
    body = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\nos.kill(os.getpid(), 9)"
    job = executor.submit(replace(task(body), lost_restarts=1))
    assert "ended with exit code 137" in str(job.exception())
    assert (tmp_path / "starts").read_text() == "xx"
    assert task(body).lost_restarts == 3


def saving(folder):
    """The body of a task that waits for SIGTERM, saves then and wants to be started again."""
    return textwrap.dedent(
        f"""
        def save(*_):
            open({str(folder / "saved")!r}, "w").close()
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        open({str(folder / "ready")!r}, "w").close()
        time.sleep(600)
        """
    )


def test_before_the_time_limit_it_saves_and_is_requeued(executor, tmp_path):
    saved = tmp_path / "saved"
    done = f"if os.path.exists({str(saved)!r}): sys.exit(0)\n"
    job = executor.submit(task(done + saving(tmp_path)))
    until((tmp_path / "ready").exists)
    os.kill(the_child(int(job.job_id)), signal.SIGUSR2)
    job.result()
    assert saved.exists()


def test_a_run_that_does_not_save_in_time_is_requeued_all_the_same(monkeypatch):
    monkeypatch.setattr(slurm, "_work", Work([]))
    waited = []
    monkeypatch.setattr(Work, "wait", lambda self, seconds: waited.append(seconds))
    assert task("").checkpoint().function == task("")
    assert waited == [75]


def test_after_sigterm_it_saves_and_leaves_the_rest_to_slurm(executor, tmp_path):
    """scancel sends the same signal as a preemption: only SLURM knows whether to start again."""
    job = executor.submit(task(saving(tmp_path)))
    until((tmp_path / "ready").exists)
    process = the_child(int(job.job_id))
    os.kill(process, signal.SIGTERM)
    until((tmp_path / "saved").exists)
    until(lambda: not children(process))
    assert job.state == "RUNNING"
    os.kill(process, signal.SIGKILL)
    until(lambda: job.state != "RUNNING")
    assert not list(tmp_path.glob("tasks/*_result.pkl"))


TWELVE = """
from gqa_scaling.config import *

def runs():
    return [
        RunConfig(
            name=f"d{d}-h{h}-seed{seed}",
            model=ModelConfig(1, d, h, 1, head_dim=8, vocab_size=264, dtype="float32"),
            data=DataConfig(corpus="text", tokenizer="bytes", heldout_fraction=0.2, allow_repeats=True),
            context_length=32,
            batch_tokens=256,
            tokens=256 * (1500 if seed == 0 and d == 32 else 40),
            evaluation=EvaluationConfig(tokens=512),
            checkpoint=CheckpointConfig(every_steps=100),
            seed=seed,
        )
        for seed in (0, 1, 2)
        for d in (32, 64)
        for h in (1, 2)
    ]
"""


@pytest.mark.slow
def test_two_of_twelve_are_killed_and_all_results_are_those_of_an_undisturbed_sweep(
    executor, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(100):
        words = f"document {i} says that {i} times {i} is {i * i}. " * 8
        (tmp_path / f"text/{i}.txt").write_text(words)
    (tmp_path / "twelve.py").write_text(TWELVE)
    gqa = [sys.executable, "-m", "gqa_scaling"]
    subprocess.run([*gqa, "prepare", "twelve.py", "--workers", "1"], check=True)

    study = Study("twelve.py", "twelve", (), str(tmp_path / "array"))
    runs = load_experiment("twelve.py").runs
    jobs = [Job(run.name, SLICES["1xH100"], (run,), 60.0) for run in runs]
    on_cpu = {"GQA_SCALING_RUNS": study.root, "JAX_PLATFORMS": "cpu"}
    tasks = [replace(each, environment=on_cpu) for each in array_tasks(jobs, study)]
    long = [i for i, run in enumerate(runs) if run.tokens == max(r.tokens for r in runs)]
    assert len(tasks) == 12
    assert len(long) == 2

    first, second = (executor.submit(tasks[i]) for i in long)

    def trains(run):
        folder = tmp_path / f"array/twelve/{run.name}-{run.digest}/checkpoints"
        return lambda: len(list(folder.glob("[0-9]*"))) > 1

    until(trains(runs[long[0]]))
    os.kill(the_child(int(first.job_id)), signal.SIGUSR2)  # as SLURM before the time limit
    until(trains(runs[long[1]]))
    os.kill(the_child(the_child(int(second.job_id))), signal.SIGKILL)
    first.result()
    second.result()
    others = [task for i, task in enumerate(tasks) if i not in long]
    for wave in (others[:5], others[5:]):
        for job in [executor.submit(each) for each in wave]:
            job.result()

    undisturbed = {**os.environ, "GQA_SCALING_RUNS": str(tmp_path / "sweep")}
    subprocess.run([*gqa, "run", "twelve.py", "--quiet"], check=True, env=undisturbed)

    def results(root):
        paths = sorted((tmp_path / root).glob("twelve/*/result.json"))
        return {path.parent.name: json.loads(path.read_text()) for path in paths}

    array, sweep = results("array"), results("sweep")
    assert len(array) == 12
    assert {name: r["result"] for name, r in array.items()} == {
        name: r["result"] for name, r in sweep.items()
    }
    assert sorted(len(r["attempts"]) for r in array.values()) == [1] * 10 + [2] * 2
    again = subprocess.run(
        [sys.executable, "-m", "launch", "slurm", "1xH100", "twelve.py", "--yes"],
        env={**os.environ, "GQA_SCALING_RUNS": study.root},
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout) == (0, "")
    assert "12 runs: 0 to launch, 12 finished" in again.stderr
