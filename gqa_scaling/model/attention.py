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
from gqa_scaling.layout import zigzag
from gqa_scaling.model import blockwise, sparse_attention
from gqa_scaling.model.product import product
from gqa_scaling.parallel import all_gather, axis_index, axis_size, on_shards, reduce_scatter

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
    K, n_kv = q_BTKGH.shape[2], k_BSKH.shape[2]
    repeats = K // n_kv
    if patterns is not None and {len(heads) for heads in patterns} != {n_kv}:
        raise ValueError(f"patterns of {len(patterns[0])} heads for {n_kv} KV heads")
    if repeats > 1:
        k_BSKH, v_BSKH = (jnp.repeat(x, repeats, axis=2) for x in (k_BSKH, v_BSKH))
    if patterns is None:
        patterns = ((None,) * n_kv,)
    if implementation == "cudnn":
        return _cudnn(q_BTKGH, k_BSKH, v_BSKH, patterns)

    T = q_BTKGH.shape[1]  # of the whole sequence: this is outside `on_shards`
    groups = _groups(tuple(tuple(np.repeat(heads, repeats)) for heads in patterns), T)
    if len(groups) > 1 and any(len(g.heads) % axis_size("tensor") for g in groups):
        counts = [len(g.heads) for g in groups]
        raise ValueError(
            f"tensor={axis_size('tensor')} must divide the heads of each kind, here {counts}"
        )
    layer, outputs = jnp.asarray(layer, jnp.int32), []
    for group in groups:
        qkv = [_heads(x, group.heads) for x in (q_BTKGH, k_BSKH, v_BSKH)]
        if implementation == "reference":
            here = functools.partial(_reference, group)
            outputs.append(on_shards(here, (_Q, _KV, _KV, ()), _Q, *qkv, layer))
        else:
            outputs.append(_attend(*qkv, layer, group, _Kernels(implementation, interpret)))
    order = np.argsort([h for g in groups for h in g.heads])
    return _heads(jnp.concatenate(outputs, axis=2), tuple(order.tolist()))


@dataclass(frozen=True)
class _Group:
    """KV heads that are computed together, as they are of one kind in each layer."""

    heads: tuple[int, ...]
    kinds: tuple[HeadPattern | None, ...]  # without their offsets; None is dense
    kind_of: tuple[int, ...]  # the kind in each layer
    offsets: tuple[tuple[int, ...], ...]  # of each layer's heads


def _groups(patterns: tuple[LayerPattern, ...], T: int) -> list[_Group]:
    """The KV heads by their kinds in all layers; what hides nothing from T queries is dense."""

    def kind(head: HeadPattern | None) -> HeadPattern | None:
        if head is None or head.window >= T or head.stride == 1:
            return None
        return replace(head, offset=0)

    columns: dict[Any, list[int]] = {}
    for h, column in enumerate(zip(*patterns, strict=True)):
        columns.setdefault(tuple(map(kind, column)), []).append(h)
    out = []
    for column, heads in columns.items():
        kinds = tuple(dict.fromkeys(column))
        offsets = tuple(tuple(getattr(layer[h], "offset", 0) for h in heads) for layer in patterns)
        out.append(_Group(tuple(heads), kinds, tuple(map(kinds.index, column)), offsets))
    return out


def _heads(x_BTK: jax.Array, heads: tuple[int, ...]) -> jax.Array:
    """Some KV heads, in any order, without a gather."""
    if heads == tuple(range(x_BTK.shape[2])):
        return x_BTK
    return jnp.concatenate([x_BTK[:, :, h : h + 1] for h in heads], axis=2)


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


def _offsets(group: _Group, layer: jax.Array, K: int) -> jax.Array:
    """On shards: the offsets of the K heads held here, in this layer."""
    offsets = jnp.array(group.offsets, jnp.int32)[layer]
    return lax.dynamic_slice_in_dim(offsets, axis_index("tensor") * K, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    layer: jax.Array,
    group: _Group,
    kernels: "_Kernels",
) -> jax.Array:
    return _forward(q_BTKGH, k_BSKH, v_BSKH, layer, group, kernels)[0]


def _forward(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    layer: jax.Array,
    group: _Group,
    kernels: "_Kernels",
) -> tuple[jax.Array, Any]:
    def here(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> Any:
        qkv, where = (q, _join(k), _join(v)), _where(group, layer, q)
        o, lse = _of_kind(group, layer, kernels.forward, *qkv, *where)
        return o, lse.transpose(0, 2, 3, 1)

    qkv = q_BTKGH, k_BSKH, v_BSKH
    o_BTKGH, lse_BKGT = on_shards(here, (_Q, _KV, _KV, ()), [_Q, _LSE], *qkv, layer)
    return o_BTKGH, (*qkv, o_BTKGH, lse_BKGT, layer)


def _backward(
    group: _Group, kernels: "_Kernels", residuals: Any, do_BTKGH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    def here(
        q: jax.Array, k: jax.Array, v: jax.Array, o: jax.Array, lse: jax.Array, layer: Any, do: Any
    ) -> Any:
        known = q, _join(k), _join(v), o, lse.transpose(0, 3, 1, 2), do
        dq, dk, dv = _of_kind(group, layer, kernels.backward, *known, *_where(group, layer, q))
        return dq, _share(dk).astype(k.dtype), _share(dv).astype(v.dtype)

    axes = (_Q, _KV, _KV, _Q, _LSE, (), _Q)
    return *on_shards(here, axes, [_Q, _KV, _KV], *residuals, do_BTKGH), None


_attend.defvjp(_forward, _backward)


def _where(group: _Group, layer: jax.Array, q_BTKGH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """On shards: the offsets of the heads held here, and where their queries begin."""
    return _offsets(group, layer, q_BTKGH.shape[2]), _starts(q_BTKGH.shape[1])


def _of_kind(group: _Group, layer: jax.Array, f: Callable, *arrays: jax.Array) -> Any:
    """`f(kind, *arrays)` for the group's kind in this layer."""
    branches = [functools.partial(f, kind) for kind in group.kinds]
    if len(branches) == 1:
        return branches[0](*arrays)
    return lax.switch(jnp.array(group.kind_of, jnp.int32)[layer], branches, *arrays)


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
            from gqa_scaling.model import splash

            return splash
        from gqa_scaling.model import pallas_attention

        return pallas_attention


def _reference(
    group: _Group, q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, layer: jax.Array
) -> jax.Array:
    """On shards: by all T x T scores, for comparison."""
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    k_BSKH, v_BSKH = _join(k_BSKH), _join(v_BSKH)
    offset_K, starts = _where(group, layer, q_BTKGH)
    queries = (starts[:, None] + jnp.arange(T // len(starts))).reshape(-1)
    t, s = queries[:, None], jnp.arange(k_BSKH.shape[1])

    def visible(kind: HeadPattern | None, offset_K: jax.Array) -> jax.Array:
        causal = jnp.broadcast_to(t >= s, (len(offset_K), len(t), len(s)))
        if kind is None:
            return causal
        i, j = t // kind.block, s // kind.block
        offsets = offset_K[:, None, None]
        return causal & ((i - j < kind.local) | is_distant(j, kind.stride, offsets, kind.sinks))

    visible_KTS = _of_kind(group, layer, visible, offset_K)
    scores_BKGTS = product("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH) / math.sqrt(H)
    weights = jax.nn.softmax(jnp.where(visible_KTS[:, None], scores_BKGTS, _MASKED), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)


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
