"""Attention over meshes of 8 virtual devices, against the masked reference, as JSON.

    python mesh_attention.py [every]

`errors` are the largest ones of output and gradients; `tiles` counts the tiles of keys that each
device of a context axis really walked over; `refused` is what was said of what does not fit. "every"
adds the kernels on every mesh, which take minutes.
"""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
from jax.sharding import Mesh
from masked_attention import both, masked, operands

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.layout import AXES, zigzag
from gqa_scaling.model.attention import attend, blockwise, turns

tiles: Counter[int] = Counter()


def error(
    context: int,
    tensor: int,
    T: int,
    heads: tuple,
    B: int = 2,
    repeats: int = 1,
    H: int = 8,
    dtype: str = "float32",
    **how,
) -> float:
    """Values are about 1. A KV head serves `repeats` of the heads of q."""
    q, k, v, do = operands(B, T, len(heads), 2 * repeats, H)

    def on_mesh(q, k, v, do):
        q, do = (x.reshape(B, T, len(heads) * repeats, 2, H) for x in (q, do))
        o, dq, *dkv = both(lambda *x: attend(*x, (heads,), **how), q, k, v, do)
        whole = B, T, len(heads), 2 * repeats, H
        return o.reshape(whole), dq.reshape(whole), *dkv

    order = zigzag(np.arange(T), context)
    devices = np.array(jax.devices()[: context * tensor]).reshape(1, 1, context, tensor)
    with jax.set_mesh(Mesh(devices, AXES)):
        mixed = [x[:, order].astype(dtype) for x in (q, k, v, do)]
        got = jax.jit(on_mesh)(*mixed)
    got = [np.asarray(x, np.float32)[:, np.argsort(order)] for x in got]
    pairs = zip(got, masked(q, k, v, heads, do), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def refused(*case, **how) -> str:
    try:
        error(*case, **how)
    except ValueError as e:
        return str(e)
    return ""


def heads(*offsets: int | None, block: int = 8, local: int = 2, sinks: int = 0) -> tuple:
    """Heads with stripes at these offsets, None for dense ones."""
    return tuple(None if o is None else HeadPattern(block, local, 4, o, sinks) for o in offsets)


def counted(start, stop, body, carry):
    def one(i, carry):
        jax.debug.callback(lambda shard: tiles.update([int(shard)]), jax.lax.axis_index("context"))
        return body(i, carry)

    return jax.lax.fori_loop(start, stop, one, carry)


def kernel(name: str) -> dict:
    return {"implementation": name, "interpret": True, "H": 16, "B": 1}


KERNELS = {
    "context 4": (4, 1, 512, heads(0, 1, block=16, local=3, sinks=1)),
    "tensor 2": (1, 2, 160, heads(0, 1, block=16, local=3, sinks=1)),
    "context 4, tensor 2": (4, 2, 512, heads(0, 1, block=16, local=3, sinks=1)),
    "dense": (2, 2, 256, (None, None)),
}


def main(every: bool) -> dict:
    dense, two = (None,), (None, None)
    errors = {
        "reference": error(4, 2, 24, two, implementation="reference"),
        "context 8": error(8, 1, 64, dense),
        "odd parts": error(2, 1, 52, dense),
        "stripes, context 4": error(4, 1, 128, heads(0, 2)),
        "stripes, context 2, tensor 2": error(2, 2, 128, heads(0, 1, 2, 3)),
        "dense heads too": error(2, 2, 96, heads(0, None, 2, None)),
        "repeated heads": error(1, 4, 100, heads(0, 2), repeats=2),
        "sinks": error(2, 1, 160, heads(1, 3, sinks=2)),
        "triton": error(2, 2, 256, heads(0, 1, block=16, local=3, sinks=1), **kernel("triton")),
    }
    if every:
        for name in ("triton", "splash"):
            errors |= {f"{name}, {case}": error(*k, **kernel(name)) for case, k in KERNELS.items()}
            repeated = heads(0, 1, block=16, local=3)
            found = error(2, 4, 256, repeated, repeats=2, **kernel(name))
            errors[f"{name}, repeated heads"] = found
    bfloat16 = error(8, 1, 64, dense, dtype="bfloat16")
    said = {
        "parts": refused(2, 1, 100, heads(0, 2)),
        "heads": refused(1, 2, 96, heads(0, None)),
        "kernel": refused(2, 1, 48, dense, **kernel("triton")),
    }
    several, turns.cores = turns.cores, lambda: [0]
    turns.SCORES = 1  # one head of one sequence after the other
    errors["one core"] = error(4, 2, 128, (None,) * 4)
    errors["one core, stripes"] = error(2, 2, 128, heads(0, 1, 2, 3))
    turns.cores = several
    blockwise._block = lambda *_: 8
    errors["small tiles"] = error(4, 2, 128, two)
    blockwise.lax = SimpleNamespace(**{**vars(jax.lax), "fori_loop": counted})
    error(8, 1, 512, dense)
    jax.effects_barrier()
    walked = [tiles[i] for i in range(8)]
    return {"errors": errors, "bfloat16": bfloat16, "refused": said, "tiles": walked}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:] == ["every"])))
