"""Compiles splash attention, forward and backward, for TPU chips that are not there.

    python tpu_splash.py < [{"kind": "v5e", "T": 8192, "K": 1, "G": 8, "H": 64}, ...]

T queries on each device of a context axis of size `context`, in a scan over two layers, a sparse and
a dense one, as the data say: as layers of a model are. Prints one JSON list. Needs libtpu and the
environment of `pods.compiler_environment`.
"""

import json
import sys
import time

import jax
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from masked_attention import both

from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices import kernel_limits
from gqa_scaling.devices.layout import AXES
from gqa_scaling.model.attention import attend


def found(kind, T, K, G, H, context=1, dtype="bfloat16"):
    devices = topologies.get_topology_desc(f"{kind}:2x2", platform="tpu").devices[:context]
    mesh = Mesh([[[[d] for d in devices]]], AXES)
    sparse = ContextSharding(64, 16, stride=16).layers(1, K)[0]
    patterns = sparse, (None,) * K

    def layers(q, k, v, layer_L):
        """The last of several layers, each of which takes the output of the one before."""

        def layer(q, layer):
            return attend(q, k, v, patterns, layer, implementation="splash"), None

        return lax.scan(layer, q, layer_L)[0]

    def step(layer_L, *xs):
        return both(lambda *qkv: layers(*qkv, layer_L), *xs)

    def array(shape, *axes, dtype=dtype):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    S = T * context
    q, k = array((1, S, K, G, H), None, "context"), array((1, S, K, H), None, "context")
    began = time.time()
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(array((2,), dtype="int32"), q, k, k, q)
        traced = time.time()
        compiled = lowered.compile()
    memory = compiled.memory_analysis()
    shape = {"parts": 1 if context == 1 else 2, "S": S}
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "tracing": traced - began,
        "compiling": time.time() - traced,
        "metadata": max(
            kernel_limits.metadata_bytes(T, kind, **shape) for kind in (sparse[0], None)
        ),
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps([found(**case) for case in json.load(sys.stdin)]))
