"""Processes of this machine that share a grid, each on its own cores of the CPU."""

import os
import signal
import subprocess

from gqa_scaling.config import require
from gqa_scaling.hardware import cores


def run_workers(command: list[str], workers: int, runs: int) -> int:
    """Run `command` in up to `workers` processes that share `runs` unfinished runs by claims.

    Each gets its share of the CPU's cores, the same whatever is left to do: small models run
    faster side by side on one core each than one after another on all. Returns the largest exit
    code, 128 + N for a process ended by signal N. An interruption ends all of them; SIGTERM has them
    save and stop.
    """
    all_cores = cores()
    shares = [all_cores[i::workers] or all_cores for i in range(min(workers, runs))]
    mine = ["--parent", str(os.getpid()), "--cores"]
    processes = [subprocess.Popen([*command, *mine, ",".join(map(str, share))]) for share in shares]

    def pass_on(*_: object) -> None:
        for p in processes:
            p.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    try:
        return max(128 - code if code < 0 else code for code in [p.wait() for p in processes])
    finally:
        for p in processes:
            p.terminate()
        for p in processes:
            p.wait()


def be_worker(share: str, parent: int) -> None:
    """Stay on these cores, and end when the parent does; before jax starts its threads.

    Where the system cannot bind a process to cores (macOS), the workers share them freely.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [int(core) for core in share.split(",")])
    from gqa_scaling.devices.processes import end_with

    end_with(parent)


def check_worker() -> None:
    """Workers share CPU cores; an accelerator would be claimed whole by each of them."""
    import jax

    require(
        jax.default_backend() == "cpu",
        f"--workers shares the cores of a CPU, but jax runs on {jax.default_backend()}; run "
        "without it, or show one accelerator to each process: CUDA_VISIBLE_DEVICES=i ... --shard i/n",
    )
