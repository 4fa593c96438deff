"""How arrays lie over devices: the mesh, one table from axis names to mesh axes, and helpers.

Every parameter names its axes ("embed", "mlp", ...); `RULES` says over which mesh axes each is
split. Inside `jax.set_mesh(mesh)` the model constrains its activations by the same names, and
with no mesh set it runs on one device, unchanged.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_scaling.config import ModelConfig, ParallelConfig
from gqa_scaling.layout import AXES, axis_sizes

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "context",
    "embed": ("fsdp", "context"),
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "group": None,
    "head_dim": None,
}


def make_mesh(parallel: ParallelConfig, batch_size: int, model: ModelConfig) -> Mesh:
    """The mesh over all devices of all processes. Raises `UserError` as `axis_sizes` does."""
    if jax.default_backend() == "cpu":
        keep_host_memory()
    sizes = axis_sizes(parallel, batch_size, model, jax.device_count())
    return Mesh(mesh_utils.create_device_mesh(sizes, allow_split_physical_axes=True), AXES)


def partition_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Axis names as mesh axes, after `RULES`; None leaves an axis whole."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, split as `RULES` says for its axis names. Does nothing when no mesh is set."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """For every array of `tree` (also abstract) its `NamedSharding` on `mesh`.

    An `nnx.Variable`, or an optimizer moment shaped like one, is split by its axis names,
    anything else is replicated. Fits `out_shardings` and abstract restore.
    """

    def of(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            names = leaf.get_metadata("out_sharding", ())
            return leaf.replace(NamedSharding(mesh, partition_spec(names)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def create_sharded(build: Callable[[], Any], mesh: Mesh) -> Any:
    """The pytree that `build()` returns, each device computing just the part it holds."""
    with jax.set_mesh(mesh):
        return jax.jit(build, out_shardings=shardings(jax.eval_shape(build), mesh))()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How (B, T) tokens are split: sequences over data and fsdp, positions over context."""
    return NamedSharding(mesh, partition_spec(("batch", "time")))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Host arrays (B, T), equal on every process, as global arrays on `mesh`."""
    sharding = batch_sharding(mesh)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)


def keep_host_memory() -> None:
    """Have glibc keep freed memory for the next step; other C libraries are left alone.

    By default each large buffer goes back to the system when freed and is faulted in anew, page
    by page, at the next step: that made elementwise work on a CPU five times slower.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # <malloc.h>
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)
