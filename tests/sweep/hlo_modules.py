"""Run by test_hlo.py with 8 virtual devices: what the parser finds in small programs, as JSON."""

import json

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from gqa_scaling.sweep.hlo import Program

MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
P = PartitionSpec


def layers(w_LDD, x_BD):
    """5 layers: weights gathered over a, a product, its sum over b."""

    def layer(x, w):
        w = lax.all_gather(w, "a", axis=0, tiled=True)
        return jnp.tanh(lax.psum(x @ w, "b")), None

    return lax.scan(layer, x_BD, w_LDD)[0]


def exchanges(w_LDD, x_BD):
    x = lax.psum_scatter(x_BD, "a", scatter_dimension=0, tiled=True)
    x = lax.all_to_all(x, "b", 1, 0, tiled=True)
    around = [(i, (i + 1) % 4) for i in range(4)]

    def outer(x, w):
        def inner(j, x):
            return jnp.sin(lax.ppermute(x, "a", around)) + w.sum()

        return lax.fori_loop(0, 3, inner, x), None

    return lax.scan(outer, x, w_LDD)[0]


def triangle(w_LDD, x_BD):
    """Row i of 5 takes i + 1 products."""

    def row(x, i):
        return lax.fori_loop(0, i + 1, lambda j, x: jnp.tanh(x @ x.T @ x), x), None

    return lax.scan(row, x_BD, jnp.arange(5))[0]


def cases():
    for function, turns in ((layers, 1), (exchanges, 1), (triangle, 3)):
        specs = (P(None, "a", None), P("b", None))
        arguments = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec))
            for shape, spec in zip(((5, 64, 64), (16, 64)), specs, strict=True)
        ]
        mapped = jax.shard_map(
            function, mesh=MESH, in_specs=specs, out_specs=P("b", None), check_vma=False
        )
        text = jax.jit(mapped).lower(*arguments).compile().as_text()
        yield function.__name__, Program(text, turns)


out = {
    name: {
        "flops": program.flops,
        "exact": program.exact,
        "devices": program.devices,
        "collectives": sorted(
            [c.kind, c.array.dtype, list(c.array.dims), c.devices, c.received, c.turns]
            for c in program.collectives
        ),
    }
    for name, program in cases()
}
print(json.dumps(out))
