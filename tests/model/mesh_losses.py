"""Run by test_parallel.py with 8 virtual devices: trains two steps on several meshes, prints JSON."""

import hashlib
import json

import jax
import numpy as np
import optax
from flax import nnx

from gqa_scaling.config import ModelConfig, ParallelConfig
from gqa_scaling.model.loss import next_token_loss
from gqa_scaling.model.transformer import create
from gqa_scaling.parallel import create_sharded, make_mesh, shard_batch

CONFIG = ModelConfig(
    2, 32, 4, 2, head_dim=8, d_ff=64, vocab_size=48, dtype="float32", tie_embeddings=False
)
MESHES = {
    "data 8": ParallelConfig(),
    "fsdp 8": ParallelConfig(fsdp=8),
    "data 2, fsdp 2, tensor 2": ParallelConfig(fsdp=2, tensor=2),
}
tokens = np.random.default_rng(0).integers(48, size=(8, 17))
tx = optax.adamw(1e-2)
graphdef = nnx.graphdef(create(CONFIG, 0))


def init():
    params = nnx.state(create(CONFIG, 0))
    return params, tx.init(params)


@jax.jit
def step(state, x, y):
    params, moments = state
    loss, gradient = jax.value_and_grad(lambda p: next_token_loss(nnx.merge(graphdef, p), x, y))(
        params
    )
    updates, moments = tx.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments), loss


def run(state, x, y):
    bits = hashlib.sha256()
    for leaf in jax.tree.leaves(state[0]):
        bits.update(np.asarray(leaf).tobytes())
    shard = max(leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state))
    gate = state[0]["layers"]["gate_DF"][...]
    moment = state[1][0].mu["layers"]["gate_DF"][...]
    losses = []
    for _ in range(2):
        state, loss = step(state, x, y)
        losses.append(float(loss))
    kept = state[0]["layers"]["gate_DF"][...].sharding.is_equivalent_to(gate.sharding, gate.ndim)
    return {
        "bits": bits.hexdigest(),
        "losses": losses,
        "gate": gate.addressable_shards[0].data.size / gate.size,
        "moment": moment.addressable_shards[0].data.size / moment.size,
        "largest": shard,
        "kept": kept,
    }


out = {"one device": run(jax.jit(init)(), tokens[:, :-1], tokens[:, 1:])}
for name, parallel in MESHES.items():
    mesh = make_mesh(parallel, 8, CONFIG)
    with jax.set_mesh(mesh):
        x, y = shard_batch((tokens[:, :-1], tokens[:, 1:]), mesh)
        out[name] = run(create_sharded(init, mesh), x, y)
print(json.dumps(out))
