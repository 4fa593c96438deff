"""The forward and backward functions of a kernel module, as attention that can be differentiated."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from masked_attention import masked, operands, visible

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.layout import AXES, zigzag


def starts_of(i, T, context):
    """Where the runs of a device's T queries begin; `i` says which device, traced or not."""
    if context == 1:
        return jnp.array([0])
    return jnp.array([i, 2 * context - 1 - i]) * (T // 2)


def attention(kernels, kind, starts, interpret=True):
    """attend(q, k, v, offset_K) -> o; gradients of k and v are of these queries alone."""

    def forward(q, k, v, offset_K, starts):
        o, lse = kernels.forward(q, k, v, kind, offset_K, starts, interpret=interpret)
        assert o.dtype == q.dtype
        assert lse.shape == q.shape[:-1]
        return o, (q, k, v, o, lse, offset_K, starts)

    def backward(residuals, do):
        *arrays, offset_K, starts = residuals
        gradients = kernels.backward(*arrays, do, kind, offset_K, starts, interpret=interpret)
        return *(x.astype(do.dtype) for x in gradients), None, None

    attend = jax.custom_vjp(lambda *x: forward(*x)[0])
    attend.defvjp(forward, backward)
    return lambda q, k, v, offset_K: attend(q, k, v, offset_K, starts)


def in_turn(kernels, kind, context):
    """attend(q, k, v, offset_K) -> o in natural order: the devices of a context axis in turn."""

    def attend(q, k, v, offset_K):
        T = q.shape[1] // context
        order = zigzag(np.arange(q.shape[1]), context)
        parts = jnp.moveaxis(q[:, order].reshape(q.shape[0], context, T, *q.shape[2:]), 1, 0)

        def device(x):
            i, q = x
            return attention(kernels, kind, starts_of(i, T, context))(q, k, v, offset_K)

        if context == 1:
            return device((0, q))
        o = jnp.moveaxis(jax.lax.map(device, (jnp.arange(context), parts)), 0, 1)
        return o.reshape(q.shape)[:, np.argsort(order)]

    return attend


def on_mesh(attend, mesh):
    """f(q, k, v, *rest) of whole arrays: `attend(starts, q, k, v, *rest)` of the parts that each
    device holds, queries in zig-zag order, keys whole along `context`. Rest begins with KV heads."""
    context = mesh.shape["context"]
    q_axes, k_axes = PartitionSpec(None, "context", "tensor"), PartitionSpec(None, None, "tensor")

    def everywhere(q, k, v, *rest):
        def here(q, *others):
            i = jax.lax.axis_index("context")
            return attend(starts_of(i, q.shape[1], context), q, *others)

        specs = (q_axes, k_axes, k_axes, *(PartitionSpec("tensor") for _ in rest))
        out = jax.shard_map(here, mesh=mesh, in_specs=specs, out_specs=q_axes, check_vma=False)
        return out(q, k, v, *rest)

    return everywhere


def masks(kind, offsets, T):
    """Whether a head's query t sees its key s, at [head, t, s]."""
    heads = [kind and dataclasses.replace(kind, offset=offset) for offset in offsets]
    return np.stack([visible(head, T) for head in heads])


def both(attend, *operands):
    """Output and gradients."""
    q, k, v, weight, *rest = operands
    o, pull_back = jax.vjp(lambda *x: attend(*x, *rest), q, k, v)
    return o, *pull_back(weight)


def differences(kernels, kind, offsets, shape, context=1, seed=0, dtype="float32"):
    """Largest differences of output and gradients to the masked reference, in float32, for
    (B, T, G, H) of `shape`; the offsets are traced. Of values above 1, such as the gradient of a sink
    that all queries see, relative ones."""
    B, T, G, H = shape
    xs = [x.astype(dtype) for x in operands(B, T, len(offsets), G, H, seed)]
    got = jax.jit(lambda *x: both(in_turn(kernels, kind, context), *x))(*xs, jnp.array(offsets))
    xs = [x.astype("float32") for x in xs]
    want = jax.jit(lambda *x: both(masked, *x))(*xs, masks(kind, offsets, T))
    pairs = [(x.astype("float32"), y) for x, y in zip(got, want, strict=True)]
    return [float((jnp.abs(x - y) / jnp.maximum(1, jnp.abs(y))).max()) for x, y in pairs]


def assert_equals_masked(*case):
    np.testing.assert_array_less(differences(*case), [2e-6, 2e-5, 2e-5, 2e-5])


@st.composite
def kinds_and_offsets(draw, blocks):
    """A kind of head, dense ones too, and the offsets of one to three of them."""
    K = draw(st.integers(1, 3))
    if draw(st.integers(0, 7)) == 0:
        return None, (0,) * K
    stride = draw(st.none() | st.integers(1, 9))
    kind = HeadPattern(draw(blocks), draw(st.integers(1, 6)), stride, sinks=draw(st.integers(0, 4)))
    offset = st.integers(0, stride - 1) if stride else st.just(0)
    return kind, tuple(draw(st.lists(offset, min_size=K, max_size=K)))


MESHES = {
    "context 2": {"context": 2, "T": 256},
    "context 4": {"context": 4, "T": 512},
    "tensor 2": {"tensor": 2, "T": 160},
    "context 4, tensor 2": {"context": 4, "tensor": 2, "T": 512},
    "repeated heads": {"context": 2, "tensor": 4, "T": 256, "repeats": 2},
    "dense": {"context": 2, "tensor": 2, "T": 256, "dense": True},
}


def mesh_difference(kernels, T, context=1, tensor=1, repeats=1, dense=False):
    """The largest difference between a mesh of devices in zig-zag order and the reference."""
    kind = None if dense else HeadPattern(16, 3, 4, sinks=1)
    offsets = jnp.arange(4)[: max(2, tensor // repeats)]
    K = len(offsets)
    q, k, v, weight = operands(1, T, K, 2 * repeats, 16)
    want = jax.jit(lambda *x: both(masked, *x))(q, k, v, weight, masks(kind, offsets.tolist(), T))

    def attend(q, k, v, offset_K):
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        q_repeated = q.reshape(1, T, K * repeats, 2, 16)
        o = on_mesh(here, mesh)(q_repeated, k, v, jnp.repeat(offset_K, repeats))
        return o.reshape(q.shape)

    def here(starts, *xs):
        return attention(kernels, kind, starts)(*xs)

    order = zigzag(np.arange(T), context)
    devices = np.array(jax.devices()[: context * tensor]).reshape(1, 1, context, tensor)
    mesh = Mesh(devices, AXES)
    o, dq, dk, dv = jax.jit(lambda *x: both(attend, *x))(
        q[:, order], k, v, weight[:, order], offsets
    )
    got = *(np.asarray(x)[:, np.argsort(order)] for x in (o, dq)), dk, dv
    return float(np.max([np.abs(x - y).max() for x, y in zip(got, want, strict=True)]))


def mesh_errors(module, cases):
    """{name: mesh_difference}, on 8 virtual devices in a process of their own."""
    done = subprocess.run(
        [sys.executable, __file__, module],
        input=json.dumps(cases),
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    kernels = importlib.import_module(f"gqa_scaling.model.{sys.argv[1]}")
    asked = json.load(sys.stdin)
    print(json.dumps({name: mesh_difference(kernels, **case) for name, case in asked.items()}))
