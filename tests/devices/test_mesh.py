import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from eight_devices import on_eight_devices
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from gqa_scaling.config import ModelConfig, ParallelConfig, RunConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices.layout import attention_implementation, axis_sizes, zigzag
from gqa_scaling.devices.mesh import (
    AXES,
    BatchLayout,
    columns_to_scatter,
    constrain,
    make_mesh,
    platform,
)

MODEL = ModelConfig(2, 32, 8, 4, head_dim=8, d_ff=64, vocab_size=64)
SHARDED = replace(MODEL, pattern=ContextSharding(16, 1, stride=4, dense_kv_heads=1))
MESHES = ("1x1x1x1", "8x1x1x1", "2x2x2x1", "1x2x2x2", "1x1x8x1", "1x1x1x8")


def trained_on_meshes(*arguments: object) -> dict:
    """mesh_losses.py's answer. It does not depend on what XLA optimises, but the bits of initial
    weights do on its code generator: the one that users have gives the same on every mesh."""
    script = Path(__file__).with_name("mesh_losses.py")
    return on_eight_devices(script, *arguments, XLA_FLAGS="")[0]


def check(meshes: dict[str, dict]) -> None:
    """Equal to the bit at first, equal losses after, state split as it was."""
    one = meshes[MESHES[0]]
    assert one["losses"][-1] < one["losses"][0]
    for name, run in meshes.items():
        assert run["bits"] == one["bits"], name
        assert run["losses"] == pytest.approx(one["losses"], rel=1e-5), name
        split = int(np.prod([int(n) for n in name.split("x")[1:]]))
        assert run["gate"] == run["moment"] == 1 / split, name
        assert run["kept"], name


@pytest.fixture(scope="module")
def hybrid():
    return trained_on_meshes(6, 32, 2, "hybrid")


def test_every_mesh_trains_alike(hybrid):
    assert tuple(hybrid) == MESHES
    check(hybrid)


@pytest.mark.slow
@pytest.mark.parametrize("n_kv_heads", [8, 2, 1])
def test_twenty_steps_agree_on_every_mesh(n_kv_heads):
    check(trained_on_meshes(20, 32, n_kv_heads))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(), ("hybrid",)], ids=["dense", "hybrid"])
def test_a_long_context_over_eight_devices(kind):
    check(trained_on_meshes(3, 8192, 1, *kind))


def run(parallel: ParallelConfig, batch_size: int, model=MODEL, context_length=64) -> RunConfig:
    tokens = batch_size * context_length
    return RunConfig("r", model, context_length, tokens, tokens=tokens, parallel=parallel)


@pytest.mark.parametrize(
    ("parallel", "batch", "devices", "sizes"),
    [
        (ParallelConfig(), 8, 8, (8, 1, 1, 1)),
        (ParallelConfig(fsdp=4), 16, 8, (2, 4, 1, 1)),
        (ParallelConfig(data=2, fsdp=2, tensor=2), 4, 8, (2, 2, 1, 2)),
        (ParallelConfig(tensor=4), 3, 4, (1, 1, 1, 4)),
        (ParallelConfig(tensor=8), 1, 8, (1, 1, 1, 8)),
        (ParallelConfig(context=8, tensor=2), 1, 16, (1, 1, 8, 2)),
    ],
)
def test_axis_sizes(parallel, batch, devices, sizes):
    assert axis_sizes(run(parallel, batch), devices) == sizes


SIX = ModelConfig(2, 32, 12, 6, head_dim=8, d_ff=64, vocab_size=64)


@pytest.mark.parametrize(
    ("run", "devices", "message"),
    [
        (run(ParallelConfig(tensor=3), 8), 3, "n_heads=8: it may be 1, 2, 4, 8"),
        (run(ParallelConfig(tensor=4), 8, SIX), 4, "n_heads=12: it may be 1, 2, 3, 6, 12"),
        (run(ParallelConfig(context=64), 8), 64, "context_length=64, as each device holds two"),
        (run(ParallelConfig(context=2), 8, MODEL, 33), 2, "it may be 1"),
        (run(ParallelConfig(fsdp=3), 9), 3, "d_model=32: it may be 1, 2, 4, 8, 16, 32"),
        (run(ParallelConfig(fsdp=8, context=8), 8), 64, "fsdp=8 x context=8 = 64 must divide d"),
        (run(ParallelConfig(fsdp=4), 8), 6, "must divide the 6 devices"),
        (run(ParallelConfig(data=3), 8), 8, "= 3 devices, but there are 8"),
        (run(ParallelConfig(), 6), 4, "6 sequences of a microbatch: it may be 1, 2, 3, 6"),
        (run(ParallelConfig(context=4), 8, SHARDED), 4, "parts of 8, which must be a multiple of"),
        (run(ParallelConfig(tensor=2), 8, SHARDED), 2, "must divide pattern.dense_kv_heads=1"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(run, devices, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        axis_sizes(run, devices)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "platform", "asked", "got"),
    [
        (MODEL, "cpu", "auto", "blockwise"),
        (MODEL, "tpu", "auto", "splash"),
        (replace(MODEL, head_dim=64), "gpu", "auto", "cudnn"),
        (replace(MODEL, head_dim=64, dtype="float32"), "gpu", "auto", "triton"),
        (replace(SHARDED, head_dim=64), "gpu", "auto", "triton"),
        (replace(MODEL, head_dim=80, dtype="float32"), "gpu", "auto", "blockwise"),
        (MODEL, "tpu", "blockwise", "blockwise"),
        (MODEL, "cpu", "splash", "splash needs a TPU, and this is a CPU"),
        (MODEL, "tpu", "cudnn", "cudnn needs a GPU, and this is a TPU"),
        (SHARDED, "gpu", "cudnn", "is dense only, and the model has a pattern"),
        (replace(MODEL, head_dim=24), "gpu", "triton", "needs a head_dim of 16, 32, 64 or 128"),
        (replace(MODEL, head_dim=96), "gpu", "auto", "cudnn"),
        (replace(MODEL, head_dim=144), "gpu", "auto", "blockwise"),
        (replace(SHARDED, head_dim=64), "tpu", "auto", "splash"),
    ],
)
def test_the_attention_of_a_platform(model, platform, asked, got):
    config = run(ParallelConfig(attention=asked), 8, model)
    if "needs" in got or "only" in got:
        with pytest.raises(UserError, match=got):
            attention_implementation(config, platform)
    else:
        assert attention_implementation(config, platform) == got


@given(context=st.integers(1, 16), part=st.integers(1, 5))
def test_zigzag_gives_every_device_the_same_work(context, part):
    held = zigzag(np.arange(2 * context * part), context).reshape(context, -1)
    assert sorted(held.ravel()) == list(range(2 * context * part))
    assert len(set((held + 1).sum(axis=1))) == 1  # keys that a causal mask lets it read


def test_one_device_needs_no_mesh():
    x = np.arange(8).reshape(4, 2)
    assert (constrain(jax.numpy.asarray(x), "batch", "time") == x).all()
    mesh = make_mesh(run(ParallelConfig(data=jax.device_count()), 4 * jax.device_count()))
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "context": 1, "tensor": 1}
    layout = BatchLayout(mesh, 4, 1)
    inputs, targets = layout.place([x[rows.start : rows.stop] for rows, _ in layout.pieces])
    assert (np.asarray(inputs) == x[:, :1]).all()
    assert (np.asarray(targets) == x[:, 1:]).all()


@pytest.mark.parametrize(
    ("sizes", "D", "F", "columns"),
    [
        (
            (4, 1, 64, 1),
            2048,
            5472,
            5632,
        ),  # 4 x 43 tiles would be summed whole, 4 x 44 are scattered
        ((4, 16, 4, 1), 1536, 4096, 4096),
        ((1, 8, 1, 1), 256, 704, 768),
        ((1, 32, 1, 1), 256, 704, 704),  # 1,024 would be half as many again
        ((4, 1, 32, 2), 2048, 5472, 5472),
        ((8, 1, 1, 1), 2048, 5472, 5472),  # nothing is scattered
    ],
)
def test_gradients_get_columns_up_to_whole_parts(sizes, D, F, columns):
    with use_abstract_mesh(jax.sharding.AbstractMesh(sizes, AXES)):
        assert columns_to_scatter(D, F) == columns


@pytest.mark.parametrize(("platform", "columns"), [("tpu", 768), ("cpu", 768), ("gpu", 704)])
def test_gradients_get_no_columns_on_gpus(platform, columns):
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh((1, 8, 1, 1), AXES, abstract_device=device)
    with use_abstract_mesh(mesh):
        assert columns_to_scatter(256, 704) == columns


def test_the_platform_is_that_of_the_mesh_also_where_it_is_only_compiled_for():
    assert platform() == jax.default_backend()
    tpu = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=tpu)):
        assert platform() == "tpu"
