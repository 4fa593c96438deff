from pathlib import Path

import numpy as np
import pytest
from eight_devices import on_eight_devices


def over_meshes(*arguments):
    """mesh_attention.py's answer."""
    return on_eight_devices(Path(__file__).with_name("mesh_attention.py"), *arguments)[0]


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
