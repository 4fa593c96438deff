"""What XLA makes of our programs for NVIDIA GPUs, from a machine without one."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gqa_scaling.devices.compiler_flags import NATIVE_ATOMICS

COMPILER = os.environ.get("GQA_SCALING_GPU_COMPILER")
AFFECTED = metadata.version("jaxlib") in ("0.10.2", "0.11.0")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="make test-slow brings the compiler for GPUs"),
]


def compiled(compute, *programs, flags=""):
    # nothing can be timed, as choosing among kernels wants
    flags = f"--xla_gpu_autotune_level=0 {flags}"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("gpu_programs.py")],
        input=json.dumps({"compute": compute, "programs": programs}),
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": COMPILER, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def retries(program):
    return any(".cas." in name for name in program["atomics"])


def test_gradients_of_small_tables_have_no_atomic_additions_and_large_ones_no_loops():
    """Where the flag of `compiler_flags` is set; without it both would try again and again."""
    small, large, odd = ("embedding", 264, 64), ("embedding", 4096, 64), ("embedding", 4096, 1)
    for compute in ([8, 0], [9, 0]):
        plain = compiled(compute, small, large, odd)
        assert plain[0]["atomics"] == []
        assert [retries(program) for program in plain] == [False, AFFECTED, AFFECTED]
        flagged = compiled(
            compute, small, large, odd, flags=f"--xla_backend_extra_options={NATIVE_ATOMICS}"
        )
        assert not any(map(retries, flagged))


@pytest.mark.parametrize("compute", [[8, 0], [9, 0]], ids=["A100", "H100"])
def test_training_steps_compile_and_add_in_one_order(compute):
    """With our own kernels: forward, once more for remat, and two for the gradients."""
    programs = [("step", "bfloat16", H, pattern) for H in (64, 128) for pattern in (False, True)]
    for found in compiled(compute, *programs):
        assert found["atomics"] == []
        assert found["kernels"] >= 3
