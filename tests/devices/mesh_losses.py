"""Run by test_mesh.py with 8 virtual devices: trains on several meshes and prints JSON.

python mesh_losses.py STEPS CONTEXT_LENGTH N_KV_HEADS [hybrid]
"""

import functools
import hashlib
import json
import sys

import jax
import numpy as np

from gqa_scaling.config import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.training.setup import set_up
from gqa_scaling.training.step import initial_state, train_step

MESHES = ((1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2), (1, 1, 8, 1), (1, 1, 1, 8))
VOCABULARY = 64


def run_config(
    n_kv_heads: int, context_length: int, mesh: tuple[int, ...], hybrid: bool
) -> RunConfig:
    block = 2 if context_length <= 1024 else 64
    pattern = ContextSharding(block, 2, stride=4, dense_layers="0") if hybrid else None
    long = context_length > 1024
    rows = 2 if long else 16
    return RunConfig(
        name="mesh",
        model=ModelConfig(
            2 + hybrid,
            32,
            8,
            n_kv_heads,
            head_dim=8,
            d_ff=64,
            vocab_size=VOCABULARY,
            dtype="float32",
            pattern=pattern,
        ),
        context_length=context_length,
        batch_tokens=rows * context_length,
        tokens=100 * rows * context_length,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.0),
        parallel=ParallelConfig(*mesh, accumulation=2, remat="full" if long else "none"),
    )


def train(run: RunConfig, steps: int) -> dict:
    sizes = run.parallel
    devices = sizes.data * sizes.fsdp * sizes.context * sizes.tensor
    setup = set_up(run, jax.devices()[:devices])
    mesh = setup.mesh
    layout = parallel.BatchLayout(mesh, run.batch_size, run.context_length)
    tokens = np.random.default_rng(0).integers(
        VOCABULARY, size=(4, run.batch_size, run.context_length + 1), dtype=np.int32
    )
    with jax.set_mesh(mesh):
        state = parallel.create_sharded(functools.partial(initial_state, setup), mesh)
        bits = hashlib.sha256()
        for leaf in jax.tree.leaves(state[0]):
            bits.update(np.asarray(leaf).tobytes())
        step = train_step(setup)
        gate = state[0]["layers"]["gate_DF"][...]
        moment = state[1][1][0].mu["layers"]["gate_DF"][...]
        out = {
            "bits": bits.hexdigest(),
            "gate": gate.addressable_shards[0].data.size / gate.size,
            "moment": moment.addressable_shards[0].data.size / moment.size,
            "losses": [],
        }
        for i in range(steps):
            pieces = [
                tokens[i % 4, rows.start : rows.stop, time.start : time.stop + 1]
                for rows, time in layout.pieces
            ]
            state, metrics = step(state, *layout.place(pieces))
            out["losses"].append(float(metrics.loss))
        new = state[0]["layers"]["gate_DF"][...]
        out["kept"] = new.sharding.is_equivalent_to(gate.sharding, gate.ndim)
    return out


steps, context_length, n_kv = map(int, sys.argv[1:4])
hybrid = sys.argv[4:] == ["hybrid"]
meshes = MESHES if context_length <= 1024 else (MESHES[0], MESHES[4])
runs = {mesh: run_config(n_kv, context_length, mesh, hybrid) for mesh in meshes}
print(json.dumps({"x".join(map(str, mesh)): train(run, steps) for mesh, run in runs.items()}))
