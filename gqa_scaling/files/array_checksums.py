"""Checksums of arrays that are the same on every mesh: is what was restored what was saved?

For each array the sum of its words and the sum weighted by position, modulo 2^32. Integer sums do
not depend on order: each device sums what it holds, and only the sums travel. A single altered word
always changes the first one; words that changed places change the second.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # by the bytes of an element
# A state with more words than this, on a CPU, is summed by a compiled program, whose compilation
# (a second or two) then is repaid within a few saves.
MOST_BY_NUMPY = 2**23


@dataclass(frozen=True)
class ArrayChecksums:
    """The checksums of the arrays of a tree, perhaps still being computed on the devices."""

    names: tuple[str, ...]
    sums: Sequence[tuple[Any, Any]]

    def values(self) -> dict[str, str]:
        """{array: 16 hex digits}, when they are there."""
        pairs = jax.device_get(self.sums)
        return {n: f"{int(a):08x}{int(b):08x}" for n, (a, b) in zip(self.names, pairs, strict=True)}


def array_checksums(tree: PyTree) -> ArrayChecksums:
    """Start computing the checksums of every array of `tree`, which may be donated afterwards."""
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    if _is_small(leaves):
        return ArrayChecksums(names, [_sums_by_numpy(np.asarray(x)) for x in leaves])
    return ArrayChecksums(names, _sums(list(leaves)))


def _is_small(leaves: Sequence[jax.Array]) -> bool:
    """Whether all lies in the memory of this process, and is summed before a program is compiled."""
    on_one_cpu = all(
        len(x.devices()) == 1 and next(iter(x.devices())).platform == "cpu" for x in leaves
    )
    return on_one_cpu and sum(x.nbytes for x in leaves) <= 4 * MOST_BY_NUMPY


def _weights(index: Any) -> Any:
    """Odd weights of positions, uint32, scattered by the finaliser of MurmurHash3.

    By plain positions, swapped blocks that lie a power of two apart would nearly cancel.
    """
    index = (index ^ (index >> 16)) * np.uint32(0x85EBCA6B)
    index = (index ^ (index >> 13)) * np.uint32(0xC2B2AE35)
    return (index ^ (index >> 16)) | np.uint32(1)


def _sums_by_numpy(x: np.ndarray) -> tuple[int, int]:
    words = x.reshape(-1).view(WORDS[x.dtype.itemsize]).astype(np.uint32)
    weights = _weights(np.arange(words.size, dtype=np.uint32))
    return int(words.sum(dtype=np.uint32)), int((words * weights).sum(dtype=np.uint32))


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    def sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
        index = jnp.zeros(words.shape, jnp.uint32)
        for axis in range(words.ndim):
            stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
            index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
        weighted = words * _weights(index)
        return jnp.sum(words, dtype=jnp.uint32), jnp.sum(weighted, dtype=jnp.uint32)

    return [sums(x) for x in leaves]
