import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gqa_scaling.config import ModelConfig, ParallelConfig, UserError
from gqa_scaling.parallel import axis_sizes, constrain, make_mesh, shard_batch

MODEL = ModelConfig(2, 32, 8, 4, head_dim=8, d_ff=64, vocab_size=64)


@pytest.fixture(scope="module")
def meshes():
    env = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    script = Path(__file__).with_name("mesh_losses.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_initial_parameters_are_equal_to_the_bit_on_every_mesh(meshes):
    assert len({run["bits"] for run in meshes.values()}) == 1


def test_losses_agree_on_every_mesh(meshes):
    want = meshes["one device"]["losses"]
    assert want[1] < want[0]
    for name, run in meshes.items():
        assert run["losses"] == pytest.approx(want, abs=1e-5), name


def test_parameters_and_moments_are_split(meshes):
    for name, part in {"data 8": 1, "fsdp 8": 1 / 8, "data 2, fsdp 2, tensor 2": 1 / 4}.items():
        assert meshes[name]["gate"] == meshes[name]["moment"] == part
        assert meshes[name]["kept"]


@pytest.mark.parametrize(
    ("parallel", "batch", "devices", "sizes"),
    [
        (ParallelConfig(), 8, 8, (8, 1, 1, 1)),
        (ParallelConfig(fsdp=4), 16, 8, (2, 4, 1, 1)),
        (ParallelConfig(data=2, fsdp=2, tensor=2), 4, 8, (2, 2, 1, 2)),
        (ParallelConfig(tensor=4), 3, 4, (1, 1, 1, 4)),
    ],
)
def test_axis_sizes(parallel, batch, devices, sizes):
    assert axis_sizes(parallel, batch, MODEL, devices) == sizes


@pytest.mark.parametrize(
    ("parallel", "batch", "devices", "message"),
    [
        (ParallelConfig(context=2), 8, 8, "not built yet"),
        (ParallelConfig(tensor=8), 8, 8, "n_kv_heads=4: it may be 1, 2, 4"),
        (ParallelConfig(fsdp=3), 9, 3, "d_model=32: it may be 1, 2, 4, 8, 16, 32"),
        (ParallelConfig(fsdp=4), 8, 6, "must divide the 6 devices"),
        (ParallelConfig(data=3), 8, 8, "= 3 devices, but there are 8"),
        (ParallelConfig(), 6, 4, "6 sequences of a microbatch: it may be 1, 2, 3, 6"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(parallel, batch, devices, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        axis_sizes(parallel, batch, MODEL, devices)
    assert "\n" not in str(error.value)


def test_one_device_needs_no_mesh():
    x = np.arange(8).reshape(4, 2)
    assert (constrain(jax.numpy.asarray(x), "batch", "time") == x).all()
    mesh = make_mesh(ParallelConfig(data=jax.device_count()), 4 * jax.device_count(), MODEL)
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "context": 1, "tensor": 1}
    assert (np.asarray(shard_batch({"x": x}, mesh)["x"]) == x).all()
