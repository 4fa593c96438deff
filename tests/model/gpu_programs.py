"""Compiles programs for NVIDIA GPUs that are not there: run by test_gpu_programs.py.

    python gpu_programs.py < {"compute": [9, 0], "programs": [...]} > [...]

Needs the compiler of `make test-slow` on the path, no GPU and no CUDA. Prints for each program what
its machine code has: the atomic operations, and how many kernels are Triton's.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from gqa_scaling.config import ModelConfig, ParallelConfig, RunConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.model.embedding import embed
from gqa_scaling.training.step import abstract_step

# What the compiler is told of an A100 or H100, by their data sheets: shared memory of a block and of a core.
MEMORY = {8: (166912, 167936), 9: (232448, 233472)}
KIND = {8: "NVIDIA A100-SXM4-80GB", 9: "NVIDIA H100 80GB HBM3"}
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.4
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {} shared_memory_per_core: {}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2000000000000 l2_cache_size: 41943040 device_memory_size: 85899345920
  cuda_compute_capability {{ major: {} minor: {} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{}"
"""


def device(major, minor):
    target = TARGET.format(*MEMORY[major], major, minor, KIND[major])
    found = topologies.get_topology_desc(
        "one", platform="cuda", target_config=target, topology="1x1x1"
    )
    return found.devices[0]


def embedding_gradient(gpu, rows, width):
    """Of a table that nothing shares."""
    here = jax.sharding.SingleDeviceSharding(gpu)

    def loss(table, tokens):
        return jnp.sum(embed(table, tokens, jnp.bfloat16).astype(jnp.float32) ** 2)

    table = jax.ShapeDtypeStruct((rows, width), "float32", sharding=here)
    tokens = jax.ShapeDtypeStruct((4, 512), "int32", sharding=here)
    return jax.jit(jax.grad(loss)).lower(table, tokens)


def step(gpu, dtype, head_dim, pattern):
    """The training step of a model for bytes."""
    sharding = ContextSharding(64, 2, stride=4, dense_layers="every 2") if pattern else None
    model = ModelConfig(
        2, 256, 4, 2, head_dim=head_dim, vocab_size=264, dtype=dtype, pattern=sharding, qk_norm=True
    )
    parallel = ParallelConfig(attention="triton", remat="dots", accumulation=2)
    run = RunConfig("a", model, 1024, batch_tokens=4096, tokens=8192, parallel=parallel)
    lower, arguments, mesh = abstract_step(run, [gpu])
    with jax.set_mesh(mesh):
        return lower.lower(*arguments)


def found(lowered):
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder})
        code = "".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    atomics = set(re.findall(r"\b(?:atom|red)\.[a-z0-9._]+", code))
    kernels = compiled.as_text().count('custom_call_target="__gpu$xla.gpu.triton"')
    return {"atomics": sorted(atomics), "kernels": kernels}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    gpu = device(*asked["compute"])
    makers = {"embedding": embedding_gradient, "step": step}
    print(json.dumps([found(makers[name](gpu, *given)) for name, *given in asked["programs"]]))
