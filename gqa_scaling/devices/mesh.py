"""How arrays lie over devices: the mesh, one table from axis names to mesh axes, and helpers.

Every parameter names its axes ("embed", "mlp", ...); `RULES` says over which mesh axes each is
split. Inside `jax.set_mesh(mesh)` the model constrains its activations by the same names, and
with no mesh set it runs on one device, unchanged. What must not be left to the partitioner
(attention, embedding, loss) runs `on_shards`, with its collectives written out.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gqa_scaling.config import RunConfig, require
from gqa_scaling.devices.compilation_cache import run_once_options
from gqa_scaling.devices.host_memory import keep_host_memory
from gqa_scaling.devices.layout import AXES, axis_sizes, zigzag
from gqa_scaling.fields import round_up

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": "context",
    "embed": ("fsdp", "context"),
    "kv_heads": "tensor",
    "group": "tensor",  # where the KV heads are too few
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "head_dim": None,
}

TILE_ROWS, LANES = 8, 128  # of a tile of float32 in a TPU's memory
PARTS = 8  # tiles; found by compiling (docs/pods.md)

Piece = tuple[range, range]  # sequences and positions of a batch


def make_mesh(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`, by default all of all processes.

    Several slices, joined by a slow network, are laid along `data`. Raises `UserError` as
    `axis_sizes` does, and when `data` is no multiple of the slices.
    """
    if devices is None:
        devices = jax.devices()
        if jax.default_backend() == "cpu":
            keep_host_memory()  # also where nothing said so before jax started
    sizes = axis_sizes(run, len(devices))
    slices = len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES)
    data, *rest = sizes
    require(
        data % slices == 0,
        f"data={data} must be a multiple of the {slices} slices: only gradients may cross the "
        "network between slices",
    )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES)


def axis_size(*axes: str) -> int:
    """How many devices lie along mesh axes, together; 1 when no mesh is set."""
    shape = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([shape.get(axis, 1) for axis in axes]))


def platform() -> str:
    """What is computed on, "cpu", "gpu" or "tpu": the mesh, or what jax runs on where none is set."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def partition_spec(
    axes: tuple[str | None, ...], shape: tuple[int, ...] = (), mesh: Any = None
) -> PartitionSpec:
    """Axis names as mesh axes, after `RULES`; None leaves an axis whole.

    A mesh axis serves once: given the array's `shape` and the `mesh`, the first axis that it
    divides.
    """
    out: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for i, axis in enumerate(axes):
        to = RULES[axis] if axis else None
        names = (to,) if isinstance(to, str) else to or ()
        ways = np.prod([mesh.shape[n] for n in names], dtype=int) if shape else 1
        free = not used & set(names) and (not shape or shape[i] % ways == 0)
        out.append(to if free else None)
        used |= set(names) if free else set()
    return PartitionSpec(*out)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x`, split as `RULES` says for its axis names. Does nothing when no mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))


def gathered(weight: jax.Array, dtype: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight of one layer in `dtype`, whole but for heads and FFN, for use now.

    Left alone, the partitioner may move the activations instead, which are larger.
    """
    return constrain(
        weight.astype(dtype), *(None if axis in ("embed", "group") else axis for axis in axes)
    )


def columns_to_scatter(D: int, F: int) -> int:
    """How many columns the (D, F) gradient of a weight must have for its sum to be scattered: F or more.

    Compilers for TPUs scatter a sum over devices only where each part of it is a multiple of PARTS
    tiles; otherwise every device gets all of it, which takes twice the bytes. More than an eighth of
    columns are not added: they cost FLOPs. GPUs need none.
    """
    ways = axis_size("fsdp", "context")
    if ways == 1 or axis_size("tensor") > 1 or platform() == "gpu":
        return F
    rows_of_tiles = -(-D // ways // TILE_ROWS)
    wider = round_up(F, LANES * PARTS // math.gcd(PARTS, rows_of_tiles))
    return wider if 8 * wider <= 9 * F else F


def on_shards(f: Callable, inputs: Sequence[Sequence[str | None]], outputs: Any, *xs: Any) -> Any:
    """`f(*xs)`, each device on the parts it holds; `f` sees and returns local arrays.

    `inputs` names the axes of each array, `outputs` those of the result or, in a list, results. A tree
    counts as one array: those in it have these as their first axes.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return f(*xs)
    in_specs = tuple(partition_spec(tuple(axes)) for axes in inputs)
    several = isinstance(outputs, list)
    specs = tuple(partition_spec(tuple(axes)) for axes in (outputs if several else [outputs]))
    out_specs = specs if several else specs[0]
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*xs)


def psum(x: Any, *axes: str) -> Any:
    """On shards: the sum over mesh axes."""
    return lax.psum(x, axes) if axis_size(*axes) > 1 else x


def pmax(x: jax.Array, *axes: str) -> jax.Array:
    """On shards: the maximum over mesh axes."""
    return lax.pmax(x, axes) if axis_size(*axes) > 1 else x


def all_gather(x: jax.Array, dimension: int, *axes: str) -> jax.Array:
    """On shards: the parts along mesh axes joined along a dimension."""
    if axis_size(*axes) == 1:
        return x
    return lax.all_gather(x, axes, axis=dimension, tiled=True)


def reduce_scatter(x: jax.Array, dimension: int, *axes: str) -> jax.Array:
    """On shards: the sum over mesh axes, of which each device keeps its part of a dimension."""
    if axis_size(*axes) == 1:
        return x
    return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)


def axis_index(axis: str) -> jax.Array | int:
    """On shards: where this device stands along a mesh axis."""
    return lax.axis_index(axis) if axis_size(axis) > 1 else 0


def shardings(tree: Any, mesh: Mesh) -> Any:
    """For every array of `tree` (also abstract) its `NamedSharding` on `mesh`.

    An `nnx.Variable`, or an optimizer moment shaped like one, is split by its axis names,
    anything else is replicated. Fits `out_shardings` and abstract restore.
    """

    def of(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            names = leaf.get_metadata("out_sharding", ())
            return leaf.replace(NamedSharding(mesh, partition_spec(names, leaf.shape, mesh)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def abstract(shapes: Any, mesh: Mesh) -> Any:
    """Abstract arrays with their `shardings`: what restoring and compiling need to know."""

    def of(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(of, shapes, shardings(shapes, mesh))


def create_sharded(build: Callable[[], Any], mesh: Mesh) -> Any:
    """The pytree that `build()` returns, each device computing just the part it holds."""
    with jax.set_mesh(mesh):
        options = run_once_options(mesh.devices.flat[0].platform)
        out = shardings(jax.eval_shape(build), mesh)
        return jax.jit(build, out_shardings=out, compiler_options=options)()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How (B, T) tokens are split: sequences over data and fsdp, positions over context."""
    return NamedSharding(mesh, partition_spec(("batch", "time")))


def pieces_of(part: Any, rows: int, time: int, context: int) -> list[Piece]:
    """A device's part of a (rows, time) batch in zig-zag order, as contiguous natural pieces.

    `part` is the pair of slices, of sequences and of positions, that jax gives as a device's index.
    """
    mine, positions = range(rows)[part[0]], range(time)[part[1]]
    if context == 1:
        return [(mine, positions)]
    size = time // (2 * context)
    held = zigzag(np.arange(2 * context), context)[positions.start // size : positions.stop // size]
    return [(mine, range(int(p) * size, int(p + 1) * size)) for p in held]


@dataclass(frozen=True)
class BatchLayout:
    """Which tokens of a batch of `rows` sequences of `time` positions lie on which device.

    Positions are in zig-zag order over `context`. Each process reads `pieces`, no more, and
    `place` makes global arrays of them.
    """

    mesh: Mesh
    rows: int
    time: int

    @functools.cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The (sequences, positions) that this process's devices hold, in natural order, once."""
        indices = batch_sharding(self.mesh).addressable_devices_indices_map((self.rows, self.time))
        return tuple(dict.fromkeys(p for part in indices.values() for p in self._pieces(part)))

    def _pieces(self, part: Any) -> list[Piece]:
        return pieces_of(part, self.rows, self.time, self.mesh.shape["context"])

    def place(self, tokens: Sequence[np.ndarray]) -> tuple[jax.Array, jax.Array]:
        """Global inputs and targets, (rows, time), of the `pieces`, each with one token more."""
        held = dict(zip(self.pieces, tokens, strict=True))
        sharding, shape = batch_sharding(self.mesh), (self.rows, self.time)

        def of(shift: slice) -> jax.Array:
            def tokens_of(part: Any) -> np.ndarray:
                return np.concatenate([held[p][:, shift] for p in self._pieces(part)], axis=1)

            return jax.make_array_from_callback(shape, sharding, tokens_of)

        return of(slice(None, -1)), of(slice(1, None))
