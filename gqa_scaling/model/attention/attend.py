"""Causal grouped-query attention, dense or after a pattern for each KV head of each layer.

q_BTKGH on k_BSKH and v_BSKH: query head (k, g) reads KV head k; softmax in float32, scores scaled
by 1/sqrt(H). What is common to all implementations is here: which heads are computed together,
the choice between the kinds of layers of a scanned stack, keys of other devices, and where
gradients go. The work itself is done by `blockwise` and `sparse` (XLA, any platform), `splash` (TPU)
and `triton` (GPU), all of one form (`shard`); the first two by `turns` where one core is alone.

On a mesh positions are in zig-zag order over `context` (`layout.zigzag`): K and V, which are small,
are gathered, and each device answers its own queries.
"""

import functools
import importlib
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqa_scaling.config import Implementation
from gqa_scaling.context_sharding import HeadPattern, LayerPattern
from gqa_scaling.devices.kernel_limits import DENSE, KERNEL_PLATFORM, kernel_limit
from gqa_scaling.devices.layout import zigzag
from gqa_scaling.devices.mesh import all_gather, axis_index, axis_size, on_shards, reduce_scatter
from gqa_scaling.model.attention import blockwise, reference, sparse, turns
from gqa_scaling.model.attention.shard import Operands, Upstream

_Q = ("batch", "time", "kv_heads", None, None)
_KV = ("batch", "time", "kv_heads", None)
_LSE = ("batch", "kv_heads", None, "time")  # positions last: no padding to a TPU's 128 lanes


def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    patterns: tuple[LayerPattern, ...] | None = None,
    layer: jax.Array | int = 0,
    *,
    implementation: Implementation = "blockwise",
    interpret: bool = False,
) -> jax.Array:
    """Causal attention: position t reads those s <= t that its pattern shows. o_BTKGH in q's dtype.

    `patterns` (static) has one entry for each layer, with one for each KV head of k, None for a
    dense one; `layer` (traced) says which of them holds here. None: dense. Where q has more KV
    heads than k, for a `tensor` axis larger than K, those of k and v are repeated.

    "reference" builds all T x T scores; "blockwise" walks over tiles in XLA on any platform,
    "splash" (TPU) and "triton" (GPU) are kernels, which `interpret` runs anywhere, slowly; "cudnn"
    (GPU) is dense only. All but the reference keep O(T) memory, forward and backward.
    Raises `ValueError` where arrays, patterns and mesh do not fit each other, or
    `kernel_limits.kernel_limit` names what a kernel cannot take.
    """
    known = typing.get_args(Implementation)
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(known)}")
    (B, T, K, _, H), n_kv = q_BTKGH.shape, k_BSKH.shape[2]
    if not k_BSKH.shape == v_BSKH.shape == (B, T, n_kv, H):
        raise ValueError(
            f"keys {k_BSKH.shape} and values {v_BSKH.shape} must both be ({B}, {T}, KV heads, {H}) "
            f"for queries {q_BTKGH.shape}"
        )
    dtypes = {str(x.dtype) for x in (q_BTKGH, k_BSKH, v_BSKH)}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        raise ValueError(
            f"queries, keys and values are {', '.join(sorted(dtypes))}: they must all be bfloat16 "
            "or all float32; cast them"
        )
    patterns = ((None,) * n_kv,) if patterns is None else patterns
    if K % n_kv or {len(heads) for heads in patterns} != {n_kv}:
        heads = " and ".join(str(n) for n in sorted({len(heads) for heads in patterns}))
        raise ValueError(f"patterns of {heads} heads for {n_kv} KV heads, queries for {K}")
    if n_kv < K:
        k_BSKH, v_BSKH = (jnp.repeat(x, K // n_kv, axis=2) for x in (k_BSKH, v_BSKH))
        patterns = tuple(tuple(np.repeat(np.array(heads), K // n_kv)) for heads in patterns)

    plan = _plan(patterns, T, implementation, interpret)
    if implementation in KERNEL_PLATFORM:
        kinds = dict.fromkeys(kind for group in plan.groups for kind in group.kinds)
        dtype, context = str(q_BTKGH.dtype), axis_size("context")
        reason = kernel_limit(implementation, kinds, T=T, context=context, head_dim=H, dtype=dtype)
        if reason:
            raise ValueError(
                f"implementation={implementation!r} {reason}: change it, or take another one"
            )
    qkv = q_BTKGH, k_BSKH, v_BSKH
    if implementation == "cudnn":
        return on_shards(_cudnn, (_Q, _KV, _KV), _Q, *qkv)
    layer = jnp.asarray(layer, jnp.int32)
    if implementation == "reference":
        here = functools.partial(_reference, plan)
        return on_shards(here, (_Q, _KV, _KV, ()), _Q, *qkv, layer)
    return _attend(*qkv, layer, plan)


@dataclass(frozen=True)
class _Group:
    """KV heads that are computed together, as they are of one kind in each layer."""

    heads: tuple[int, ...]  # of those that a device holds
    kinds: tuple[HeadPattern, ...]  # without their offsets; DENSE for what hides nothing
    kind_of: tuple[int, ...]  # the kind in each layer


@dataclass(frozen=True)
class _Plan:
    """The patterns of all layers, told apart by what is data and what is structure, and what
    computes them."""

    groups: tuple[_Group, ...]
    offsets: tuple[tuple[int, ...], ...]  # of each layer's heads, on all devices
    implementation: Implementation
    interpret: bool

    def function(self, name: str, kind: HeadPattern) -> Callable:
        """The function called `name`, forward or backward, for heads of one kind (see `shard`).

        An implementation is the module of its name, loaded when it is asked for.
        """
        if self.implementation == "blockwise":
            return functools.partial(turns.run, blockwise if kind == DENSE else sparse, name)
        module = importlib.import_module(f"{__package__}.{self.implementation}")
        function = getattr(module, name)
        if self.implementation not in KERNEL_PLATFORM:
            return function
        return functools.partial(function, interpret=self.interpret)


def _plan(
    patterns: tuple[LayerPattern, ...], T: int, implementation: Implementation, interpret: bool
) -> _Plan:
    """Heads are grouped by what is common to all layers.

    Raises `ValueError` where the devices along `tensor` would hold heads of other kinds.
    """

    def kind(head: HeadPattern | None) -> HeadPattern:
        return DENSE if head is None or not head.hides(T) else replace(head, offset=0)

    columns = [tuple(map(kind, column)) for column in zip(*patterns, strict=True)]
    parts = axis_size("tensor")
    here = columns[: len(columns) // parts]
    if here * parts != columns:
        raise ValueError(
            f"tensor={parts} cuts {len(columns)} KV heads into parts that differ in the kinds of "
            "their heads: all must have the same, in the same order"
        )
    groups = []
    for column in dict.fromkeys(here):
        heads = tuple(h for h, other in enumerate(here) if other == column)
        kinds = tuple(dict.fromkeys(column))
        groups.append(_Group(heads, kinds, tuple(map(kinds.index, column))))
    offsets = tuple(tuple(head.offset if head else 0 for head in heads) for heads in patterns)
    return _Plan(tuple(groups), offsets, implementation, interpret)


# ------------------------------------------------------------------------ on one device's shards


def _join(x_BSKH: jax.Array) -> jax.Array:
    """On shards: keys or values of all devices, in natural order."""
    C, x = axis_size("context"), all_gather(x_BSKH, 1, "context")
    if C == 1:
        return x
    parts = x.reshape(x.shape[0], 2 * C, -1, *x.shape[2:])
    return parts[:, np.argsort(zigzag(np.arange(2 * C), C))].reshape(x.shape)


def _share(dx_BSKH: jax.Array, dtype: Any) -> jax.Array:
    """On shards: the transpose of `_join`, each device's sum of the gradients for its positions.

    They travel in the dtype of K and V, which the sum has in the end: kernels return each device's
    part as numbers of that dtype, so that nothing is lost but in the sums on the way.
    """
    C, dx_BSKH = axis_size("context"), dx_BSKH.astype(dtype)
    if C > 1:
        parts = dx_BSKH.reshape(dx_BSKH.shape[0], 2 * C, -1, *dx_BSKH.shape[2:])
        dx_BSKH = parts[:, zigzag(np.arange(2 * C), C)].reshape(dx_BSKH.shape)
    return reduce_scatter(dx_BSKH, 1, "context")


def _starts(T: int) -> jax.Array:
    """On shards: where in the sequence the equal runs of the T positions held here begin."""
    C = axis_size("context")
    if C == 1:
        return jnp.zeros(1, jnp.int32)
    i = axis_index("context")
    return jnp.stack([i, 2 * C - 1 - i]).astype(jnp.int32) * (T // 2)


def _heads(x_BTK: jax.Array, heads: tuple[int, ...]) -> jax.Array:
    """Some KV heads, in any order, without a gather."""
    if heads == tuple(range(x_BTK.shape[2])):
        return x_BTK
    return jnp.concatenate([x_BTK[:, :, h : h + 1] for h in heads], axis=2)


def _by_group(
    plan: _Plan, layer: jax.Array, f: Callable, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """On shards: `f(kind, operands, *others)` for the heads of each group, in its kind in this layer.

    The arrays are queries, keys of all devices, values and others; all of them, also those that `f`
    returns, have KV heads as their third axis.
    """
    T, K = arrays[0].shape[1:3]
    offsets = jnp.array(plan.offsets, jnp.int32)[layer]
    offset_K = lax.dynamic_slice_in_dim(offsets, axis_index("tensor") * K, K)
    outputs = []
    for group in plan.groups:
        q, k, v, *others = (_heads(x, group.heads) for x in arrays)
        operands = Operands(q, k, v, offset_K[np.array(group.heads)], _starts(T))
        branches = [functools.partial(f, kind) for kind in group.kinds]
        if len(branches) == 1:
            outputs.append(branches[0](operands, *others))
        else:
            kind = jnp.array(group.kind_of, jnp.int32)[layer]
            outputs.append(lax.switch(kind, branches, operands, *others))
    order = tuple(np.argsort([h for group in plan.groups for h in group.heads]).tolist())
    return tuple(_heads(jnp.concatenate(xs, axis=2), order) for xs in zip(*outputs, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layer: jax.Array, plan: _Plan
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, layer, plan)[0]


def _forward(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layer: jax.Array, plan: _Plan
) -> tuple[jax.Array, Any]:
    def of_kind(kind: HeadPattern, x: Operands) -> tuple[jax.Array, jax.Array]:
        return plan.function("forward", kind)(kind, x)

    def here(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> Any:
        o, lse = _by_group(plan, layer, of_kind, q, _join(k), _join(v))
        return o, lse.transpose(0, 2, 3, 1)

    qkv = q_BTKGH, k_BSKH, v_BSKH
    o_BTKGH, lse_BKGT = on_shards(here, (_Q, _KV, _KV, ()), [_Q, _LSE], *qkv, layer)
    return o_BTKGH, (*qkv, o_BTKGH, lse_BKGT, layer)


def _backward(
    plan: _Plan, residuals: Any, do_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    def of_kind(kind: HeadPattern, x: Operands, *upstream: jax.Array) -> tuple[jax.Array, ...]:
        return plan.function("backward", kind)(kind, x, Upstream(*upstream))

    def here(
        q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array, lse: jax.Array, layer: Any, do: Any
    ) -> Any:
        arrays = q, _join(k), _join(v), o, lse.transpose(0, 3, 1, 2), do
        dq, dk, dv = _by_group(plan, layer, of_kind, *arrays)
        return dq, _share(dk, k.dtype), _share(dv, v.dtype)

    axes = (_Q, _KV, _KV, _Q, _LSE, (), _Q)
    return *on_shards(here, axes, [_Q, _KV, _KV], *residuals, do_BTKGH), None


_attend.defvjp(_forward, _backward)


def _reference(plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, layer: Any) -> jax.Array:
    return _by_group(plan, layer, reference.forward, q, _join(k), _join(v))[0]


def _cudnn(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """On shards: NVIDIA's fused kernel, through JAX, which checks the device when it is traced."""
    B, T, K, G, H = q_BTKGH.shape
    q_BTNH = q_BTKGH.reshape(B, T, K * G, H)
    o_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, is_causal=True, implementation="cudnn"
    )
    return o_BTNH.reshape(q_BTKGH.shape)
