"""A few sequences or KV heads after the others, where a single core of a CPU does all the work.

A core computes fastest what its own cache holds. Tiles of all heads and sequences together are
several times as large; where many cores share them each has its part, but one alone fetches them
from memory between any two products. With as many `--workers` as cores each process has one, and there
a turn takes as many as make up a tile that stays.
"""

from types import ModuleType
from typing import Any

import jax
from jax import lax

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.devices.mesh import platform
from gqa_scaling.hardware import cores
from gqa_scaling.model.attention.shard import Operands

SCORES = 2**17  # of a turn's tile: half a MiB in float32, which the caches of most cores hold


def run(module: ModuleType, name: str, kind: HeadPattern, x: Operands, *more: Any) -> Any:
    """`module.forward` or `module.backward` (see `shard`): by turns on one core of a CPU, else of all
    heads at once. One core takes all at once too where a tile of all is no larger than two of a turn's.

    The module also has `least_scores(kind, x, most)`: how many scores the smallest tile has of one KV
    head of one sequence, where no tile shall have more than `most`.
    """
    function = getattr(module, name)
    if platform() != "cpu" or len(cores()) > 1:
        return function(kind, x, *more)
    (B, _, K), least = x.q_BTKGH.shape[:3], module.least_scores(kind, x, SCORES)
    if B * K * least <= 2 * SCORES:
        return function(kind, x, *more, most=SCORES)
    k = _part(K, SCORES // least)
    b = _part(B, SCORES // (K * least)) if k == K else 1

    def cut(x_BSK: jax.Array) -> jax.Array:
        _, S, _, *rest = x_BSK.shape
        x = x_BSK.reshape(B // b, b, S, K // k, k, *rest)
        return x.transpose(0, 3, 1, 2, *range(4, x.ndim)).reshape(-1, b, S, k, *rest)

    def joined(turns: jax.Array) -> jax.Array:
        _, _, S, _, *rest = turns.shape
        x = turns.reshape(B // b, K // k, b, S, k, *rest)
        return x.transpose(0, 2, 3, 1, *range(4, x.ndim)).reshape(B, S, K, *rest)

    def turn(part: Any) -> Any:
        (q, keys, values), offset, others = part
        return function(kind, Operands(q, keys, values, offset, x.starts), *others, most=SCORES)

    offsets = jax.numpy.tile(x.offset_K.reshape(-1, k), (B // b, 1))
    arrays, others = jax.tree.map(cut, ((x.q_BTKGH, x.k_BSKH, x.v_BSKH), more))
    return jax.tree.map(joined, lax.map(turn, (arrays, offsets, others)))


def _part(whole: int, most: int) -> int:
    """The largest divisor of `whole` that is at most `most`, at least 1."""
    return max(n for n in range(1, whole + 1) if whole % n == 0 and n <= max(1, most))
