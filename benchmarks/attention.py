"""Attention forward and backward, side by side: reference, blockwise and jax.nn's own.

    python benchmarks/attention.py

Times are the least of several runs, for one layer of a scanned stack of four, float32 on a CPU
and bfloat16 elsewhere. On a busy machine trust the processor time, which counts all cores.
"""

import time

import jax
import jax.numpy as jnp

from gqa_scaling.model.attention import attend
from gqa_scaling.parallel import keep_host_memory

SHAPES = [(16, 128, 2, 2, 16), (8, 256, 2, 2, 16), (8, 512, 1, 4, 64), (2, 2048, 1, 4, 64)]
LAYERS, REPEATS = 4, 8


def jax_nn(q, k, v):
    B, T, K, G, H = q.shape
    return jax.nn.dot_product_attention(q.reshape(B, T, K * G, H), k, v, is_causal=True).reshape(
        q.shape
    )


IMPLEMENTATIONS = {
    "reference": lambda q, k, v: attend(q, k, v, implementation="reference"),
    "blockwise": lambda q, k, v: attend(q, k, v, implementation="blockwise"),
    "jax.nn": jax_nn,
}


def measure(attention, shape):
    """Seconds to compile; milliseconds a layer on the clock and on all cores."""
    B, T, K, _, H = shape
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], shape, dtype)
    k, v = (jax.random.normal(key, (B, T, K, H), dtype) for key in keys[1:])

    def loss(q, k, v):
        layer = lambda x, _: (attention(x, k, v), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(layer, q, None, length=LAYERS)[0].astype(jnp.float32) ** 2)

    start = time.perf_counter()
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    compiled = time.perf_counter() - start
    clock, cores = [], []
    for _ in range(REPEATS):
        start, start_cores = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(q, k, v))
        clock.append(time.perf_counter() - start)
        cores.append(time.process_time() - start_cores)
    return compiled, min(clock) / LAYERS * 1e3, min(cores) / LAYERS * 1e3


if __name__ == "__main__":
    if jax.default_backend() == "cpu":
        keep_host_memory()
    print(f"{'B,T,K,G,H':>18} {'':10} {'compile s':>10} {'ms':>8} {'core ms':>8}")
    for shape in SHAPES:
        for name, attention in IMPLEMENTATIONS.items():
            row = "{:10.2f} {:8.1f} {:8.1f}".format(*measure(attention, shape))
            print(f"{','.join(map(str, shape)):>18} {name:10} {row}", flush=True)
