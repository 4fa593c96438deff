"""Compiles splash attention, forward and backward, for TPU chips that are not there.

    python tpu_splash.py < [{"kind": "v5e", "T": 8192, "K": 1, "G": 8, "H": 64}, ...]

T queries on each device of a context axis of size `context`, keys of all, in a scan over two layers
that are sparse, each with its own offsets, or dense, as the data say: as layers of a model are.
Prints one JSON list. Needs libtpu and the environment of `pods.compiler_environment`.
"""

import json
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kernel_attention import attention, both, on_mesh

from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices import kernel_limits
from gqa_scaling.model.attention import splash

SPARSE = ContextSharding(64, 16, stride=16).layers(1, 1)[0][0]


def switched(f):
    """`f` of dense heads or of sparse ones, as the data say."""

    def call(*xs, interpret):
        *arrays, _, (offset_K, dense), starts = xs

        def of(kind):
            return lambda arrays: f(*arrays, kind, offset_K, starts, interpret=interpret)

        return lax.cond(dense, of(None), of(SPARSE), arrays)

    return call


def layers(starts, q, k, v, offset_KL, dense_KL):
    """The last of several layers, each of which takes the output of the one before for queries."""
    kernels = SimpleNamespace(forward=switched(splash.forward), backward=switched(splash.backward))
    attend = attention(kernels, None, starts, interpret=False)

    def layer(q, data):
        return attend(q, k, v, data), None

    return lax.scan(layer, q, (offset_KL.T, dense_KL[0]))[0]


def found(kind, T, K, G, H, context=1, dtype="bfloat16"):
    devices = topologies.get_topology_desc(f"{kind}:2x2", platform="tpu").devices[:context]
    mesh = Mesh([[[[d] for d in devices]]], ("data", "fsdp", "context", "tensor"))

    def array(shape, *axes, dtype=dtype):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def step(q, k, v, do, offset_KL, dense_KL):
        return both(on_mesh(layers, mesh), q, k, v, do, offset_KL, dense_KL)

    q, k = array((1, T * context, K, G, H), None, "context"), array((1, T * context, K, H))
    data = array((K, 2), dtype=jnp.int32), array((K, 2), dtype=bool)
    began = time.time()
    lowered = jax.jit(step).lower(q, k, k, q, *data)
    traced = time.time()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    shape = {"parts": 1 if context == 1 else 2, "S": T * context}
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "tracing": traced - began,
        "compiling": time.time() - traced,
        "metadata": max(kernel_limits.metadata_bytes(T, head, **shape) for head in (SPARSE, None)),
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps([found(**case) for case in json.load(sys.stdin)]))
