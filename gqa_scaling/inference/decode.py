"""Decoding: from tokens and a cache to the logits of what comes next.

`prefill` takes prompts into the cache, in chunks that bound its memory; `step` takes one token of
each sequence. Both are functions of plain arrays, and run two compiled programs: `read`, which does
all the work, and `write`, which puts what is new into the cache, in place (see `cache`).

    config = for_platform(config)
    with jax.set_mesh(serving_mesh(config)):
        parameters = random_parameters(config, seed=0)
        cache = empty_cache(config, batch=1, max_length=8192)
        logits_BV, cache = prefill(config, parameters, cache, prompts_BT)
        logits_BV, cache = step(config, parameters, cache, tokens_B)

The layers are the model's own (`model.transformer`), unstacked, and only their attention differs. What
they are multiplied with is laid out once, in the dtype that is computed in: on a CPU a product with
one row reads 17 GB/s of weights out of a stack of layers, 27 to 30 of separate ones, 1 where they are
cast on the way and 0.5 where they lie transposed, as the embedding does for the logits.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from gqa_scaling.config import ModelConfig, require
from gqa_scaling.context_sharding import kv_cache_values
from gqa_scaling.costs import VALUE_BYTES
from gqa_scaling.devices.layout import AXES, serving_tensor
from gqa_scaling.devices.mesh import axis_size, constrain, on_shards
from gqa_scaling.files.timings import CacheName
from gqa_scaling.hardware import GIB
from gqa_scaling.inference import cache as kv
from gqa_scaling.inference.cache import Heads, LayerCache
from gqa_scaling.model.einsum import einsum_f32, full_precision
from gqa_scaling.model.embedding import embed
from gqa_scaling.model.transformer import Layers, create, rms_norm, rope_tables
from gqa_scaling.units import byte_size, count

CHUNK = 512  # tokens of each prompt that are taken at once

New = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of new tokens, of each layer

_Q, _KV = ("batch", None, "kv_heads", None, None), ("batch", None, "kv_heads", None)


class Parameters(NamedTuple):
    """A model's parameters for decoding; of each layer as leaves, in the order of its stack's."""

    embedding_VD: jax.Array
    layers: tuple[tuple[jax.Array, ...], ...]
    final_norm_D: jax.Array
    output_DV: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "length_B"),
    meta_fields=("max_length",),
)
@dataclass(frozen=True)
class Cache:
    """What all layers hold of each sequence, and how many tokens those are."""

    layers: tuple[LayerCache, ...]
    length_B: jax.Array
    max_length: int


# ---------------------------------------------------------------------------- before it starts


def for_platform(config: ModelConfig) -> ModelConfig:
    """The model as it is computed here: on a CPU in float32, which it reads fastest."""
    on_cpu = jax.default_backend() == "cpu"
    return dataclasses.replace(config, dtype="float32") if on_cpu else config


def serving_mesh(config: ModelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices, by default all, over as much of `tensor` as the model allows, the rest over `data`.

    Heads, FFN and vocabulary are split over `tensor`, KV heads fewer than it are repeated, so that
    every device holds and reads an equal part of the weights and of the cache; sequences over `data`.
    """
    devices = jax.devices() if devices is None else devices
    tensor = serving_tensor(config, len(devices))
    return Mesh(np.array(devices).reshape(-1, 1, 1, tensor), AXES)


def copies_said(config: ModelConfig, mesh: Mesh, batch: int, max_length: int, dtype: str) -> str:
    """That devices keep copies of one cache, and of how much; "" where none does, or of less than a GiB.

    KV heads fewer than `tensor` are repeated. Split along the sequence instead, each device would keep
    and read a part, for one more exchange a layer: that is not built.
    """
    copies = mesh.shape["tensor"] // config.n_kv_heads
    values = kv_cache_values(config.layer_patterns, max_length, config.head_dim)
    held = batch / mesh.shape["data"] * values * VALUE_BYTES[dtype]
    if copies < 2 or held <= GIB:
        return ""
    return (
        f"each KV head's cache lies on {copies} devices, as {mesh.shape['tensor']} share "
        f"{count(config.n_kv_heads, 'KV head')}: {byte_size(held / config.n_kv_heads)} each; use "
        "fewer devices, or --cache int8"
    )


@functools.partial(jax.jit, static_argnums=0)
def lay_out(config: ModelConfig, state: nnx.State) -> Parameters:
    """The parameters of a `Transformer`, its `nnx.State`, for decoding in the dtype of `config`."""

    def of(x: Any, layer: int | None = None) -> jax.Array:
        value, names = x[...], x.get_metadata("out_sharding")
        if layer is not None:
            value, names = value[layer], names[1:]
        # norms stay as they are
        return constrain(value.astype(config.dtype) if value.ndim > 1 else value, *names)

    stack = jax.tree.leaves(state["layers"], is_leaf=lambda x: isinstance(x, nnx.Param))
    layers = [tuple(of(x, layer) for x in stack) for layer in range(config.n_layers)]
    table: Any = state["embedding_VD" if config.tie_embeddings else "output_VD"]
    output_DV = constrain(table[...].T.astype(config.dtype), None, "vocab")
    return Parameters(
        of(state["embedding_VD"]), tuple(layers), of(state["final_norm_D"]), output_DV
    )


@functools.partial(jax.jit, static_argnums=0)
def random_parameters(config: ModelConfig, seed: int = 0) -> Parameters:
    """Values of a model's size in the places of its parameters, for measuring what needs no training.

    Uniform ones, as normal ones take as long to draw as all that is then measured.
    """
    state = jax.eval_shape(lambda: nnx.state(create(config, 0)))
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    most = config.d_model**-0.5
    drawn = [
        jax.random.uniform(key, x.shape, minval=-most, maxval=most)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return lay_out(config, jax.tree.unflatten(tree, drawn))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(
    config: ModelConfig, batch: int, max_length: int, dtype: CacheName | None = None
) -> Cache:
    """A cache for `batch` sequences of up to `max_length` tokens, by default in the model's dtype.

    On a mesh `batch` must be a multiple of its `data` axis.
    """
    dtype = dtype or config.dtype
    layers = [
        kv.empty(groups, batch, max_length, config.head_dim, dtype)
        for groups in _groups(config, max_length)
    ]
    return Cache(tuple(layers), jnp.zeros(batch, jnp.int32), max_length)


# -------------------------------------------------------------------------------- token by token


def prefill(
    config: ModelConfig,
    parameters: Parameters,
    cache: Cache,
    prompts_BT: ArrayLike,
    count_B: ArrayLike | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, Cache]:
    """Logits (B, V) after the prompts, and the cache with them in it; the one given is used up.

    Prompt b is the first `count_B[b]` of its T tokens, None: all; what comes after them is padding.
    They go on from what the cache holds. Raises `UserError` for prompts of no tokens, or when they
    do not fit.
    """
    tokens_BT = np.asarray(prompts_BT, np.int32)
    B, T = tokens_BT.shape
    count = np.full(B, T, np.int32) if count_B is None else np.asarray(count_B, np.int32)
    require(bool(np.all(count > 0)), "every prompt must have at least one token")
    longest = int((np.asarray(cache.length_B) + count).max())
    require(
        longest <= cache.max_length,
        f"{longest} tokens do not fit into a cache for {cache.max_length}: create it with a larger "
        "max_length",
    )
    chunk = min(chunk, T)
    padded_BT = np.pad(tokens_BT, ((0, 0), (0, -T % chunk)))
    found = []
    for start in range(0, T, chunk):
        tokens, left = padded_BT[:, start : start + chunk], np.clip(count - start, 0, chunk)
        logits_BV, new = read(config, parameters, cache, tokens, left)
        cache = write(config, cache, new, left)
        found.append(logits_BV)
    if len(found) == 1:
        return found[0], cache
    # each sequence's are those of the chunk that its last token lies in
    return jnp.stack(found, axis=1)[np.arange(B), (count - 1) // chunk], cache


def step(
    config: ModelConfig, parameters: Parameters, cache: Cache, tokens_B: ArrayLike
) -> tuple[jax.Array, Cache]:
    """The logits (B, V), in float32, after one more token of each sequence, and the cache with it.

    The cache given is used up. That it has room is for the caller to see to.
    """
    tokens_B1 = jnp.asarray(tokens_B, jnp.int32)[:, None]
    ones_B = np.ones(len(tokens_B1), np.int32)
    logits_BV, new = read(config, parameters, cache, tokens_B1, ones_B)
    return logits_BV, write(config, cache, new, ones_B)


@functools.partial(jax.jit, static_argnums=0)
def read(
    config: ModelConfig,
    parameters: Parameters,
    cache: Cache,
    tokens_BT: jax.Array,
    count_B: jax.Array,
) -> tuple[jax.Array, New]:
    """Logits (B, V) after the first `count_B[b]` of T tokens of each sequence, and their keys and
    values, for `write`. Where none of a sequence's tokens count, its logits mean nothing."""
    with full_precision(config.dtype):
        hidden_BTD, new = hidden(config, parameters, cache, tokens_BT)
        last_B11 = jnp.maximum(count_B - 1, 0)[:, None, None]
        hidden_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
        return logits(parameters, hidden_B1D)[:, 0], new


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def write(config: ModelConfig, cache: Cache, new: New, count_B: jax.Array) -> Cache:
    """The cache with what was read of new tokens, of sequence b the first `count_B[b]` of them."""
    axes = (kv.SPLIT, _KV, _KV, ("batch",), ("batch",))

    def append(held: LayerCache, groups: tuple[Heads, ...], k: jax.Array, v: jax.Array) -> Any:
        def here(held: LayerCache, *xs: jax.Array) -> LayerCache:
            return kv.append(held, groups, *xs)

        return on_shards(here, axes, kv.SPLIT, held, k, v, cache.length_B, count_B)

    layers = zip(cache.layers, _groups(config, cache.max_length), new, strict=True)
    caches = tuple(append(held, groups, *kv_of_layer) for held, groups, kv_of_layer in layers)
    return Cache(caches, cache.length_B + count_B, cache.max_length)


def hidden(
    config: ModelConfig, parameters: Parameters, cache: Cache, tokens_BT: jax.Array
) -> tuple[jax.Array, New]:
    """Final hidden states (B, T, D) of tokens that come after those in the cache, and their keys and
    values of each layer; to be jitted."""
    graphdef, structure = _layer(config)
    positions_BT = cache.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    rope = rope_tables(positions_BT, config)
    x_BTD = embed(parameters.embedding_VD, tokens_BT, jnp.dtype(config.dtype))
    new: list[tuple[jax.Array, jax.Array]] = []

    def attention(
        held: LayerCache, groups: tuple[Heads, ...], q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        repeats = q.shape[2] // k.shape[2]
        if repeats > 1:
            k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        new.append((k, v))

        def here(held: LayerCache, *xs: jax.Array) -> jax.Array:
            return kv.attend(held, groups, *xs)

        axes = (kv.SPLIT, _Q, _KV, _KV, ("batch",))
        return on_shards(here, axes, _Q, held, q, k, v, cache.length_B)

    layers = zip(parameters.layers, cache.layers, _groups(config, cache.max_length), strict=True)
    for leaves, held, groups in layers:
        layer: Layers = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        x_BTD = layer(x_BTD, rope, functools.partial(attention, held, groups))
    return rms_norm(x_BTD, parameters.final_norm_D, config.norm_eps), tuple(new)


def logits(parameters: Parameters, hidden_BTD: jax.Array) -> jax.Array:
    """Logits of hidden states, (B, T, V) in float32, whole on every device along `tensor`."""
    logits_BTV = einsum_f32("BTD,DV->BTV", hidden_BTD, parameters.output_DV)
    return constrain(logits_BTV, "batch", None, None)


def _groups(config: ModelConfig, max_length: int) -> list[tuple[Heads, ...]]:
    """The heads of each layer, on a `tensor` axis larger than K repeated."""
    tensor = axis_size("tensor")
    repeats = max(1, tensor // config.n_kv_heads)
    whole = [tuple(np.repeat(np.array(layer), repeats)) for layer in config.layer_patterns]
    return [kv.grouped(layer, max_length, tensor) for layer in whole]


@functools.cache
def _layer(config: ModelConfig) -> tuple[nnx.GraphDef, Any]:
    """A layer without its parameters, and their tree."""
    graphdef, stack = jax.eval_shape(lambda: nnx.split(create(config, 0).layers))
    return graphdef, jax.tree.structure(stack)
