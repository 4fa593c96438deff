"""Run by test_model_sparse_attention.py with 8 virtual devices: errors over a mesh, as JSON.

Errors are against one device and natural order.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.layout import AXES, zigzag
from gqa_scaling.model.attention import attend


def error(context: int, tensor: int, T: int, pattern: tuple, q_heads: int | None = None) -> float:
    """Largest error of output and gradients, whose values are about 1."""
    K, n_kv = q_heads or len(pattern), len(pattern)
    shapes = [(2, T, K, 2, 8), (2, T, n_kv, 8), (2, T, n_kv, 8), (2, T, K, 2, 8)]
    keys = jax.random.split(jax.random.key(T), 4)
    xs = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

    def both(q, k, v, weight):
        o, pull_back = jax.vjp(lambda *x: attend(*x, (pattern,)), q, k, v)
        return o, *pull_back(weight)

    want = jax.jit(both)(*xs)
    order = zigzag(np.arange(T), context)
    devices = np.array(jax.devices()[: context * tensor]).reshape(1, 1, context, tensor)
    with jax.set_mesh(Mesh(devices, AXES)):
        got = jax.jit(both)(*(x[:, order] for x in xs))
    got = [np.asarray(x)[:, np.argsort(order)] for x in got]
    return max(float(jnp.abs(a - b).max()) for a, b in zip(got, want, strict=True))


def refused(*case) -> str:
    try:
        error(*case)
    except ValueError as e:
        return str(e)
    return ""


def heads(*offsets, sinks=0):
    return tuple(HeadPattern(8, 2, 4, offset, sinks) for offset in offsets)


out = {
    "context 4": error(4, 1, 128, heads(0, 2)),
    "context 2, tensor 2": error(2, 2, 128, heads(0, 1, 2, 3)),
    "dense heads too": error(2, 2, 96, (*heads(0), None, *heads(2), None)),
    "repeated heads": error(1, 4, 100, heads(0, 2), 4),
    "sinks": error(2, 1, 160, heads(1, 3, sinks=2)),
    "odd parts": refused(2, 1, 100, heads(0, 2)),
    "odd heads": refused(1, 2, 96, (*heads(0), None)),
}
print(json.dumps(out))
