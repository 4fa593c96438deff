import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def over_meshes(*arguments):
    """mesh_attention.py's answer, in a process that has 8 devices."""
    script = Path(__file__).with_name("mesh_attention.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *arguments],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mesh_changes_neither_output_nor_gradients():
    found = over_meshes()
    assert {case: error for case, error in found["errors"].items() if not error < 2e-5} == {}
    assert found["bfloat16"] < 0.05

    # zig-zag order: 64 rows of tiles, walked up to the diagonal forward and backward, alike for all
    walked = np.array(found["tiles"])
    assert walked.sum() == 2 * 64 * 65 / 2
    assert walked.max() / walked.mean() <= 1.1

    assert "multiple of the pattern's block=8" in found["refused"]["parts"]
    assert "tensor=2 cuts 2 KV heads into parts that differ" in found["refused"]["heads"]
    assert "parts of a multiple of 16 positions" in found["refused"]["kernel"]


@pytest.mark.slow
def test_no_mesh_changes_the_kernels():
    errors = over_meshes("every")["errors"]
    assert {case: error for case, error in errors.items() if not error < 2e-5} == {}
    assert sum("splash" in case for case in errors) == 5
