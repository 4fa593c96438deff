"""Run by test_model_attention.py with 8 virtual devices: attention over a context axis, as JSON.

Errors are against the reference on one device and in natural order; `blocks` counts the tiles of
keys that each shard really walked over.
"""

import functools
import json
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gqa_scaling.devices.layout import AXES, zigzag
from gqa_scaling.model.attention import attend as attention
from gqa_scaling.model.attention import blockwise

blocks: Counter[int] = Counter()


def counted(start, stop, body, carry):
    def one(i, carry):
        jax.debug.callback(lambda shard: blocks.update([int(shard)]), jax.lax.axis_index("context"))
        return body(i, carry)

    return jax.lax.fori_loop(start, stop, one, carry)


def error(context: int, tensor: int, T: int, K: int, implementation: str, dtype=jnp.float32):
    """Largest errors of output and gradients, relative to the largest value of each."""
    shapes = [(2, T, K, 2, 8), (2, T, K, 8), (2, T, K, 8), (2, T, K, 2, 8)]
    keys = jax.random.split(jax.random.key(T), 4)
    xs = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

    def both(implementation, q, k, v, weight):
        f = functools.partial(attention.attend, implementation=implementation)
        o, pull_back = jax.vjp(f, q, k, v)
        return o, *pull_back(weight.astype(o.dtype))

    want = jax.jit(functools.partial(both, "reference"))(*xs)
    order = zigzag(np.arange(T), context)
    devices = np.array(jax.devices()[: context * tensor]).reshape(1, 1, context, tensor)
    with jax.set_mesh(Mesh(devices, AXES)):
        mixed = [x[:, order].astype(dtype) for x in xs]
        got = jax.jit(functools.partial(both, implementation))(*mixed)
    got = [np.asarray(x, np.float32)[:, np.argsort(order)] for x in got]
    return max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))


out = {
    "reference": error(4, 2, 24, 2, "reference"),
    "n_kv 1": error(8, 1, 64, 1, "blockwise"),
    "n_kv 2": error(4, 2, 40, 2, "blockwise"),
    "odd parts": error(2, 1, 52, 1, "blockwise"),
    "bfloat16": error(8, 1, 64, 1, "blockwise", jnp.bfloat16),
}
blockwise._block = lambda T: 8
out["small tiles"] = error(4, 2, 128, 2, "blockwise")
blockwise.lax = SimpleNamespace(**{**vars(jax.lax), "fori_loop": counted})
error(8, 1, 512, 1, "blockwise")
jax.effects_barrier()
out["blocks"] = [blocks[i] for i in range(8)]
print(json.dumps(out))
