"""One run on several real processes: signals, errors, other numbers of devices."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_kit import tiny_run

from gqa_scaling.config import UserError
from gqa_scaling.data import open_store
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.devices.mesh import Piece, pieces_of
from gqa_scaling.devices.processes import HEARTBEAT_SECONDS, free_port, require_platform
from gqa_scaling.files.checksums import read_seal
from gqa_scaling.files.runs import RunDirectory

HERE = Path(__file__).parent
GRID = f"""
import os, sys
sys.path.append({str(HERE)!r})
from training_kit import disturb, tiny_run
if "DISTURB" in os.environ:
    disturb(os.environ["JAX_PROCESS_ID"], os.environ["DISTURB"])
def runs():
    return [tiny_run("job", tokens=100 * 128)]
"""


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "data"):
        (tmp_path / name).symlink_to(trained / name)
    (tmp_path / "grid.py").write_text(GRID)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    path = str(HERE.parents[1])
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **more}


def job(
    root: str, processes: int = 2, devices: int = 1, disturb: str | None = None, **options: int
):
    """`python -m launch local` on grid.py; options are fields of `parallel`."""
    layout = [x for name, value in options.items() for x in (f"--parallel.{name}", str(value))]
    command = [sys.executable, "-m", "launch", "local", "--processes", str(processes)]
    command += [
        "--devices-per-process",
        str(devices),
        "grid.py",
        "--quiet",
        "--root",
        root,
        *layout,
    ]
    more = {"DISTURB": disturb} if disturb else {}
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True)


def directory(root: str) -> RunDirectory:
    return RunDirectory(next(Path(root, "grid").glob("job-*")))


def losses(root: str) -> dict[int, float]:
    return {
        m["step"]: m["learning/loss"] for m in directory(root).metrics() if "learning/loss" in m
    }


def saved_steps(root: str) -> list[int]:
    steps = [p.name for p in directory(root).checkpoints.iterdir() if p.name.isdecimal()]
    return sorted(int(name) for name in steps)


def state(root: str) -> dict[str, str]:
    """Checksums of the trained parameters' bits, the same on every layout."""
    return read_seal(directory(root).parameters).arrays


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_accelerator_does_not_start_ends_with_2(folder: Path, processes: int) -> None:
    """No test has a ROCm device; jax alone would raise, and end with 1."""
    command = [sys.executable, "-m", "gqa_scaling", "run", "grid.py"]
    if processes > 1:
        command[2:4] = ["launch", "local", "--processes", str(processes)]
    told = environment(JAX_PLATFORMS="rocm,cpu")
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    assert done.returncode == 2
    said = "gqa-scaling: JAX_PLATFORMS='rocm,cpu' asks for rocm, but jax cannot start it ("
    assert said in done.stderr
    assert processes > 1 or len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not (folder / "runs").exists()


def test_a_job_does_not_fall_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As jax does where JAX_PLATFORMS=cuda,cpu and it sees no GPU."""
    for fine in ("", "cpu", "cpu,cuda"):
        monkeypatch.setenv("JAX_PLATFORMS", fine)
        require_platform()
    for platforms in ("cuda,cpu", "tpu,cpu", "tpu"):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        with pytest.raises(UserError, match="jax sees none here and would run on the cpu"):
            require_platform()


@pytest.mark.slow
def test_a_job_ended_again_and_again_learns_the_same(folder: Path) -> None:
    """SIGTERM, kill -9, SIGTERM, then undisturbed: equal to the bit to a job left alone."""
    done = job("calm")
    assert done.returncode == 0, done.stderr
    stopped = job("rough", disturb="1:TERM:12")
    assert stopped.returncode == 75, stopped.stderr
    both = [line for line in stopped.stderr.splitlines() if "job: saved step" in line]
    assert len(both) == 2
    assert len({line.removeprefix("[1] ") for line in both}) == 1  # at the same step
    first = saved_steps("rough")[-1]
    assert f"saved step {first} of 100" in both[0]
    killed = job("rough", disturb=f"0:KILL:{first + 8}")
    assert killed.returncode == 128 + signal.SIGKILL
    stopped = job("rough", disturb=f"0:TERM:{first + 12}")
    assert stopped.returncode == 75, stopped.stderr
    assert saved_steps("rough")[-1] > first
    done = job("rough")
    assert done.returncode == 0, done.stderr
    assert len(directory("rough").attempts()) == 4
    assert losses("rough") == losses("calm")
    assert state("rough") == state("calm")
    rough, calm = (json.dumps(directory(r).result()["result"]) for r in ("rough", "calm"))
    assert rough == calm


@pytest.mark.slow
def test_a_process_that_fails_takes_the_others_down_and_shows_why(folder: Path) -> None:
    failed = job("runs", disturb="1:ERROR:7")
    assert failed.returncode == 70
    assert "[1] RuntimeError: process 1 fails at step 7" in failed.stderr
    assert "launch: process 1 ended with 70; the job was ended" in failed.stderr
    assert "fails at step 7" in json.loads(directory("runs").failure_file.read_text())["traceback"]


@pytest.mark.slow
def test_a_job_whose_supervisor_is_killed_saves_and_stops(folder: Path) -> None:
    command = [sys.executable, "-m", "launch", "local", "grid.py", "--quiet"]
    slow = environment(DISTURB="0:SLOW:1")
    supervisor = subprocess.Popen(command, env=slow, stderr=subprocess.DEVNULL)
    while not list(folder.glob("runs/grid/job-*/metrics.jsonl")):
        time.sleep(0.1)
    supervisor.kill()
    supervisor.wait()
    while directory("runs").state() == "running":
        time.sleep(0.1)
    assert saved_steps("runs")
    assert directory("runs").result() is None


@pytest.mark.slow
@pytest.mark.parametrize("process", ["0", "1"])
@pytest.mark.parametrize("what", ["KILL", "ERROR"])
def test_without_a_supervisor_a_lost_peer_ends_the_others(
    folder: Path, process: str, what: str
) -> None:
    port, command = free_port(), [sys.executable, "-m", "gqa_scaling", "run", "grid.py", "--quiet"]
    peers = [
        subprocess.Popen(
            command,
            env=environment(
                JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(i),
                DISTURB=f"{process}:{what}:7",
            ),
            stderr=subprocess.DEVNULL,
        )
        for i in range(2)
    ]
    lost, other = peers[int(process)], peers[1 - int(process)]
    assert lost.wait() == (70 if what == "ERROR" else -signal.SIGKILL)
    began = time.monotonic()
    assert other.wait() == -signal.SIGABRT  # a shell says 134: start again
    print(f"ended {time.monotonic() - began:.1f} s later, heartbeat {HEARTBEAT_SECONDS} s")
    failure = directory("runs").failure_file
    assert failure.exists() == (what == "ERROR")  # a lost peer is nobody's failure
    if what == "ERROR":
        assert "fails at step 7" in json.loads(failure.read_text())["traceback"]


@pytest.mark.slow
def test_processes_at_different_runs_train_nothing_together(folder: Path) -> None:
    port, command = free_port(), [sys.executable, "-m", "gqa_scaling", "run", "grid.py", "--quiet"]
    joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    peers = [
        subprocess.Popen(
            [*command, *more],
            env=environment(**joined, JAX_PROCESS_ID=str(i)),
            stderr=-1,
            text=True,
        )
        for i, more in enumerate(([], ["--seed", "7"]))
    ]
    for peer in peers:
        assert "the processes of this job are at different runs" in peer.communicate()[1]
        assert peer.returncode == 75
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_proxy_does_not_keep_a_process_from_itself(folder: Path) -> None:
    command = [sys.executable, "-m", "gqa_scaling", "run", "grid.py", "--quiet"]
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://192.0.2.1:3128")
    done = subprocess.run(command, env=environment(**proxies), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_another_layout_goes_on_from_the_same_state(folder: Path) -> None:
    """8 devices in 2 processes to 4 devices in 1; the checkpoint is read back bit for bit."""
    assert job("calm", 1, 1).returncode == 0
    stopped = job("moved", 2, 4, disturb="0:TERM:20", fsdp=2, context=2, tensor=2)
    assert stopped.returncode == 75, stopped.stderr
    done = job("moved", 1, 4, fsdp=4)  # refused if the arrays' checksums differ
    assert done.returncode == 0, done.stderr
    meshes = [a["layout"]["mesh"] for a in directory("moved").attempts()]
    assert meshes[0] == {"data": 1, "fsdp": 2, "context": 2, "tensor": 2}
    assert meshes[1] == {"data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    a, b = losses("calm"), losses("moved")
    assert a.keys() == b.keys()
    first = directory("moved").attempts()[1]["first_step"]
    for step in range(1, first + 21):
        assert b[step] == pytest.approx(a[step], rel=1e-5), step


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_token_is_read_once_an_epoch(folder: Path, processes: int, context: int) -> None:
    data = TrainingData(open_store(tiny_run().data), 32, 4, seed=0)
    steps = data.chunks_per_epoch // 4
    seen: list[int] = []
    for step in range(steps):
        chunks = data.chunks(step)
        for process in range(processes):
            for rows, time_ in pieces(processes, process, context):
                block = data.batch(step, rows, time_)
                for row, tokens in zip(rows, block, strict=True):
                    seen += range(chunks[row] * 32 + time_.start, chunks[row] * 32 + time_.stop)
                    first = chunks[row] * 32 + time_.start
                    want = data.store.tokens("train", first, first + len(tokens))
                    assert np.array_equal(tokens, want)
    assert len(seen) == len(set(seen)) == steps * 4 * 32


def pieces(processes: int, process: int, context: int) -> list[Piece]:
    """What process i of n reads of a batch of 4 sequences of 32 on 4 x `context` devices."""
    share, size = 4 * context // processes, 32 // context
    out: dict[Piece, None] = {}
    for device in range(process * share, (process + 1) * share):
        row, at = divmod(device, context)
        part = slice(row, row + 1), slice(at * size, (at + 1) * size)
        out |= dict.fromkeys(pieces_of(part, 4, 32, context))
    return list(out)
