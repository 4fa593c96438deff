"""Compiles splash attention, forward and backward, for one TPU chip that is not there.

    python tpu_splash.py < [{"kind": "v5e", "T": 8192, "K": 1, "G": 8, "H": 64, "sparse": true}, ...]

Prints one JSON list. Needs libtpu and the environment of `pods.compiler_environment`.
"""

import json
import sys
import time

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gqa_scaling.context_sharding import strided
from gqa_scaling.model.splash import metadata_bytes, splash_attend


def found(kind, T, K, G, H, sparse, dtype="bfloat16"):
    device = topologies.get_topology_desc(f"{kind}:2x2", platform="tpu").devices[0]
    pattern = strided().layer(0, 1, K) if sparse else (None,) * K

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def both(q, k, v, do):
        o, pull_back = jax.vjp(lambda *x: splash_attend(*x, pattern), q, k, v)
        return o, *pull_back(do)

    q, k = array(1, T, K, G, H), array(1, T, K, H)
    began = time.time()
    lowered = jax.jit(both).lower(q, k, k, q)
    traced = time.time()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "kernels": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
        "tracing": traced - began,
        "compiling": time.time() - traced,
        "metadata": max(metadata_bytes(T, head) for head in pattern),
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    print(json.dumps([found(**case) for case in json.load(sys.stdin)]))
