"""Causal grouped-query attention, dense or after a pattern for each KV head of each layer.

q_BTKGH on k_BSKH and v_BSKH: query head (k, g) reads KV head k; softmax in float32, scores scaled
by 1/sqrt(H). What is common to all implementations is here: which heads are computed together,
the choice between the kinds of layers of a scanned stack, keys of other devices, and where
gradients go. The work itself is done by `blockwise` and `sparse_attention` (XLA, any platform),
`splash` (TPU) and `pallas_attention` (GPU).

On a mesh positions are in zig-zag order over `context` (`layout.zigzag`): K and V, which are small,
are gathered, and each device answers its own queries.
"""

import functools
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gqa_scaling.config import Implementation
from gqa_scaling.context_sharding import HeadPattern, LayerPattern, is_distant
from gqa_scaling.devices.layout import zigzag
from gqa_scaling.devices.mesh import all_gather, axis_index, axis_size, on_shards, reduce_scatter
from gqa_scaling.model.attention import blockwise
from gqa_scaling.model.attention import sparse as sparse_attention
from gqa_scaling.model.product import product

_MASKED = -1e30  # finite, so that exp(masked - masked) is no NaN
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
    Raises `ValueError` where patterns and heads or mesh do not fit, or a kernel cannot take them.
    """
    known = typing.get_args(Implementation)
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r} must be one of {', '.join(known)}")
    (T, K), n_kv = q_BTKGH.shape[1:3], k_BSKH.shape[2]
    patterns = ((None,) * n_kv,) if patterns is None else patterns
    if K % n_kv or {len(heads) for heads in patterns} != {n_kv}:
        heads = " and ".join(str(n) for n in sorted({len(heads) for heads in patterns}))
        raise ValueError(f"patterns of {heads} heads for {n_kv} KV heads, queries for {K}")
    if n_kv < K:
        k_BSKH, v_BSKH = (jnp.repeat(x, K // n_kv, axis=2) for x in (k_BSKH, v_BSKH))
        patterns = tuple(tuple(np.repeat(np.array(heads), K // n_kv)) for heads in patterns)
    if implementation == "cudnn":
        return _cudnn(q_BTKGH, k_BSKH, v_BSKH, patterns)

    layer, stack = jnp.asarray(layer, jnp.int32), _stack(patterns, T)
    if implementation == "reference":
        here = functools.partial(_reference, stack)
        return on_shards(here, (_Q, _KV, _KV, ()), _Q, q_BTKGH, k_BSKH, v_BSKH, layer)
    return _attend(q_BTKGH, k_BSKH, v_BSKH, layer, stack, _Kernels(implementation, interpret))


@dataclass(frozen=True)
class _Group:
    """KV heads that are computed together, as they are of one kind in each layer."""

    heads: tuple[int, ...]  # of those that a device holds
    kinds: tuple[HeadPattern | None, ...]  # without their offsets; None is dense
    kind_of: tuple[int, ...]  # the kind in each layer


@dataclass(frozen=True)
class _Stack:
    """The patterns of all layers, told apart by what is data and what is structure."""

    groups: tuple[_Group, ...]
    offsets: tuple[tuple[int, ...], ...]  # of each layer's heads, on all devices


def _stack(patterns: tuple[LayerPattern, ...], T: int) -> _Stack:
    """What hides nothing from T queries is dense.

    Raises `ValueError` where the devices along `tensor` would hold heads of other kinds.
    """

    def kind(head: HeadPattern | None) -> HeadPattern | None:
        return replace(head, offset=0) if head is not None and head.hides(T) else None

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
    offsets = tuple(tuple(getattr(head, "offset", 0) for head in heads) for heads in patterns)
    return _Stack(tuple(groups), offsets)


# ------------------------------------------------------------------------ on one device's shards


def _join(x_BSKH: jax.Array) -> jax.Array:
    """On shards: keys or values of all devices, in natural order."""
    C, x = axis_size("context"), all_gather(x_BSKH, 1, "context")
    if C == 1:
        return x
    parts = x.reshape(x.shape[0], 2 * C, -1, *x.shape[2:])
    return parts[:, np.argsort(zigzag(np.arange(2 * C), C))].reshape(x.shape)


def _share(dx_BSKH: jax.Array) -> jax.Array:
    """On shards: the transpose of `_join`, each device's sum of the gradients for its positions."""
    C = axis_size("context")
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
    stack: _Stack, layer: jax.Array, f: Callable, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """On shards: `f(kind, *arrays, offset_K, starts)` for the heads of each group, in its kind in
    this layer. All arrays, also those that `f` returns, have KV heads as their third axis."""
    T, K = arrays[0].shape[1:3]
    offsets = jnp.array(stack.offsets, jnp.int32)[layer]
    offset_K = lax.dynamic_slice_in_dim(offsets, axis_index("tensor") * K, K)
    outputs = []
    for group in stack.groups:
        mine = *(_heads(x, group.heads) for x in arrays), offset_K[np.array(group.heads)]
        branches = [functools.partial(f, kind) for kind in group.kinds]
        if len(branches) == 1:
            outputs.append(branches[0](*mine, _starts(T)))
        else:
            kind = jnp.array(group.kind_of, jnp.int32)[layer]
            outputs.append(lax.switch(kind, branches, *mine, _starts(T)))
    order = tuple(np.argsort([h for group in stack.groups for h in group.heads]).tolist())
    return tuple(_heads(jnp.concatenate(xs, axis=2), order) for xs in zip(*outputs, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    layer: jax.Array,
    stack: _Stack,
    kernels: "_Kernels",
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, layer, stack, kernels)[0]


def _forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    layer: jax.Array,
    stack: _Stack,
    kernels: "_Kernels",
) -> tuple[jax.Array, Any]:
    def here(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> Any:
        o, lse = _by_group(stack, layer, kernels.forward, q, _join(k), _join(v))
        return o, lse.transpose(0, 2, 3, 1)

    qkv = q_BTKGH, k_BSKH, v_BSKH
    o_BTKGH, lse_BKGT = on_shards(here, (_Q, _KV, _KV, ()), [_Q, _LSE], *qkv, layer)
    return o_BTKGH, (*qkv, o_BTKGH, lse_BKGT, layer)


def _backward(
    stack: _Stack, kernels: "_Kernels", residuals: Any, do_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    def here(
        q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array, lse: jax.Array, layer: Any, do: Any
    ) -> Any:
        known = q, _join(k), _join(v), o, lse.transpose(0, 3, 1, 2), do
        dq, dk, dv = _by_group(stack, layer, kernels.backward, *known)
        return dq, _share(dk).astype(k.dtype), _share(dv).astype(v.dtype)

    axes = (_Q, _KV, _KV, _Q, _LSE, (), _Q)
    return *on_shards(here, axes, [_Q, _KV, _KV], *residuals, do_BTKGH), None


_attend.defvjp(_forward, _backward)


# ------------------------------------------------------------------------------ implementations


@dataclass(frozen=True)
class _Kernels:
    """How heads of one kind are computed on one device's shards, forward and backward.

    The T queries held here are one or two equal runs of the sequence, which begin at `starts`, k
    and v hold all S keys in natural order, and `kind` is a pattern whose offsets are `offset_K`.
    """

    implementation: Implementation
    interpret: bool

    def forward(
        self,
        kind: HeadPattern | None,
        q_BTKGH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        offset_K: jax.Array,
        starts: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """o_BTKGH in q's dtype and the log-sum-exp of the scores, lse_BTKG in float32."""
        qkv = q_BTKGH, k_BSKH, v_BSKH
        if self.implementation == "blockwise":
            if kind is None:
                return blockwise.forward(*qkv, starts)
            return sparse_attention.forward(*qkv, kind, offset_K, starts)
        return self._module().forward(*qkv, kind, offset_K, starts, interpret=self.interpret)

    def backward(
        self,
        kind: HeadPattern | None,
        q_BTKGH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        o_BTKGH: jax.Array,
        lse_BTKG: jax.Array,
        do_BTKGH: jax.Array,
        offset_K: jax.Array,
        starts: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dq_BTKGH, and dk_BSKH and dv_BSKH of all keys, from the queries held here."""
        known = q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, lse_BTKG, do_BTKGH
        if self.implementation == "blockwise":
            if kind is None:
                return blockwise.backward(*known, starts)
            return sparse_attention.backward(*known, kind, offset_K, starts)
        return self._module().backward(*known, kind, offset_K, starts, interpret=self.interpret)

    def _module(self) -> ModuleType:
        if self.implementation == "splash":
            from gqa_scaling.model.attention import splash

            return splash
        from gqa_scaling.model.attention import triton as pallas_attention

        return pallas_attention


def _reference(
    stack: _Stack, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layer: jax.Array
) -> jax.Array:
    """On shards: by all T x T scores, for comparison."""

    def of_kind(
        kind: HeadPattern | None,
        q_BTKGH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        offset_K: jax.Array,
        starts: jax.Array,
    ) -> tuple[jax.Array]:
        T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
        t = (starts[:, None] + jnp.arange(T // len(starts))).reshape(-1, 1)
        s = jnp.arange(k_BSKH.shape[1])
        visible = t >= s
        if kind is not None:
            i, j = t // kind.block, s // kind.block
            distant = is_distant(j, kind.stride, offset_K[:, None, None, None], kind.sinks)
            visible &= (i - j < kind.local) | distant
        scores = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) / math.sqrt(H)
        weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1)
        return (jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH),)

    return _by_group(stack, layer, of_kind, q_BTKGH, _join(k_BSKH), _join(v_BSKH))[0]


def _cudnn(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, patterns: tuple[LayerPattern, ...]
) -> jax.Array:
    """NVIDIA's fused kernel, through JAX. It checks device and dtype when it is traced."""
    if any(head is not None for heads in patterns for head in heads):
        raise ValueError("implementation='cudnn' is dense only: take triton for a pattern")
    if axis_size("context") > 1:
        raise ValueError("implementation='cudnn' needs context=1: take triton, or another axis")

    def here(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        B, T, K, G, H = q.shape
        o = jax.nn.dot_product_attention(
            q.reshape(B, T, K * G, H), k, v, is_causal=True, implementation="cudnn"
        )
        return o.reshape(q.shape)

    return on_shards(here, (_Q, _KV, _KV), _Q, q_BTKGH, k_BSKH, v_BSKH)
