"""Real processes on this machine, each with its own devices: one job, as on a pod.

python -m launch local --processes 2 --devices-per-process 4 experiments.smoke --parallel.fsdp 2
"""

import argparse
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import IO

from gqa_scaling.config import require
from launch.work import PREEMPTED

MOST = 256  # processes

ABOUT = "one job of several processes on this machine, as on a pod"


def add(parser: argparse.ArgumentParser) -> None:
    """The target's arguments; those it does not know go to `gqa-scaling run`."""
    parser.add_argument("--processes", type=int, default=2, help="how many (default: 2)")
    parser.add_argument(
        "--devices-per-process",
        type=int,
        default=1,
        help="CPU devices, or GPUs of this machine, that each sees (default: 1)",
    )
    parser.add_argument(
        "run",
        nargs=argparse.REMAINDER,
        metavar="EXPERIMENT ...",
        help="what gqa-scaling run takes: an experiment, its selection and overrides",
    )
    parser.set_defaults(launch=launch)


def launch(args: argparse.Namespace) -> int:
    """Run the job and return its exit code: 75 when preempted and saved, else the first failure's."""
    n, devices = args.processes, args.devices_per_process
    require(0 < n <= MOST, f"--processes {n} must be 1 to {MOST}: all of them are on this machine")
    require(devices > 0, f"--devices-per-process {devices} must be greater than 0")
    require(bool(args.run), "name an experiment, such as experiments.smoke")
    from gqa_scaling.devices.processes import free_port

    port, command = free_port(), [sys.executable, "-m", "gqa_scaling", "run", *args.run]
    return supervise(command, [_environment(i, n, devices, port) for i in range(n)])


def _environment(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    first = process * devices
    mine = [gpus[i] if i < len(gpus) and gpus[i] else str(i) for i in range(first, first + devices)]
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "GQA_SCALING_SUPERVISOR": str(os.getpid()),
        "JAX_PROCESS_ID": str(process),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "CUDA_VISIBLE_DEVICES": ",".join(mine),
    }


def supervise(command: list[str], environments: list[dict[str, str]]) -> int:
    """Run `command` once in each environment; the first to fail takes the others down at once.

    SIGTERM is passed on, for the job to save and stop. What the processes write is shown, marked
    by process but for the first. Returns 75 when any was preempted and none failed, the code of
    the first that failed, or 128 + N where signal N ended it.
    """
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=None if i == 0 else subprocess.PIPE,
            stderr=None if i == 0 else subprocess.PIPE,
        )
        for i, environment in enumerate(environments)
    ]

    def pass_on(*_: object) -> None:
        for child in children:
            if child.poll() is None:
                child.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    with ThreadPoolExecutor(3 * len(children)) as threads:
        for i, child in enumerate(children):
            for pipe, to in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                if pipe is not None:
                    threads.submit(_show_marked, i, pipe, to)
        process_of = {threads.submit(child.wait): i for i, child in enumerate(children)}
        preempted, failed = False, None
        try:
            for ended in as_completed(process_of):
                if ended.result() not in (0, PREEMPTED):
                    failed = ended
                    break
                preempted |= ended.result() == PREEMPTED
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
            signal.signal(signal.SIGTERM, before)
    if failed is None:
        return PREEMPTED if preempted else 0
    code = 128 - failed.result() if failed.result() < 0 else failed.result()
    process = process_of[failed]
    print(f"launch: process {process} ended with {code}; the job was ended", file=sys.stderr)
    return code


def _show_marked(process: int, pipe: IO[bytes], to: IO[str]) -> None:
    """Copy what a process writes, each line with its number, until it ends."""
    with pipe:
        for line in pipe:
            to.write(f"[{process}] {line.decode(errors='replace')}")
            to.flush()
