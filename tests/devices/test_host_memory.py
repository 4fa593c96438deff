import platform
import subprocess
import sys

import pytest

from gqa_scaling.devices import host_memory

# What a step's large temporaries do where `gqa-scaling run` trains: page faults of eight calls.
COUNT = """
import resource, sys
from gqa_scaling.cli import main
from gqa_scaling.sweep import run

def faults_of_large_temporaries(*_):
    import jax, jax.numpy as jnp

    @jax.jit
    def step(x, turns):
        return jax.lax.fori_loop(0, turns, lambda _, y: y + 1, x)[::4096].sum()

    x = jnp.ones(24 * 2**20)  # 96 MiB, and as much for what the loop carries
    def faults(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            step(x, 1).block_until_ready()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(16)
    print(faults(8))
    raise SystemExit

run.run_sweep = faults_of_large_temporaries
main(["run", "experiments.tiny", "--quiet", "--only", "L1-h1"])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_large_temporaries_are_not_faulted_in_again(workplace):
    """Where the memory goes back to the system, each of the eight calls makes 24,576 faults.

    Where it is kept there are none, once the free blocks are large enough: here and there a small
    array breaks one of them.
    """
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 8 * 24_576 / 3


@pytest.mark.parametrize(
    ("platforms", "device", "expected"),
    [
        ("", None, True),
        ("", "nvidia0", False),
        ("", "accel0", False),
        ("", "nvidiactl", True),  # a driver without a device
        ("cpu", "nvidia0", True),
        ("cuda,cpu", None, False),
    ],
)
def test_whether_the_cpu_computes_is_told_before_jax_starts(
    tmp_path, monkeypatch, platforms, device, expected
):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(host_memory, "DEVICES", tmp_path)
    if device:
        (tmp_path / device).touch()
    assert host_memory.computes_on_cpu() is expected
