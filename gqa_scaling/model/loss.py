"""Next-token cross-entropy in float32, never holding more logits than allowed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gqa_scaling.config import Implementation
from gqa_scaling.costs import LOGIT_BYTES
from gqa_scaling.devices.mesh import all_gather, axis_index, on_shards, pmax, psum, reduce_scatter
from gqa_scaling.model.einsum import einsum_f32
from gqa_scaling.model.transformer import Transformer

_X, _TABLE, _TOKENS = ("batch", "time", None), ("vocab", "embed"), ("batch", "time")


def next_token_loss(
    model: Transformer,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int | None = None,
    remat: str = "none",
    attention: Implementation = "blockwise",
) -> jax.Array:
    """Mean cross-entropy, in nats, of `targets_BT` after `inputs_BT`: a float32 scalar.

    `chunk` is how many tokens' logits exist at once on a device; None takes as many as fit into
    `LOGIT_BYTES`, all of them when they do. `remat` and `attention` go to the model.
    """
    hidden_BTD = model(inputs_BT, remat=remat, attention=attention)
    return _mean_nll(hidden_BTD, model.output_table(), targets_BT, chunk)


def per_position_nll(
    model: Transformer,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    *,
    attention: Implementation = "blockwise",
) -> jax.Array:
    """Cross-entropy of each target, in nats: float32 (B, T). For evaluation."""
    hidden_BTD = model(inputs_BT, attention=attention)
    return _nll(hidden_BTD, model.output_table(), targets_BT, None)


def _over_chunks(
    f: Callable, chunk: int | None, V: int, carry: Any, *xs_BT: jax.Array
) -> tuple[Any, jax.Array]:
    """`carry, y_N = f(carry, *xs_N)`, called on `chunk` of the B T tokens at a time; y as (B, T).

    By default as many tokens as V float32 logits for each fit into `LOGIT_BYTES`.
    """
    B, T = xs_BT[0].shape[:2]
    chunk = chunk or max(1, LOGIT_BYTES // (4 * V))
    xs = [x.reshape(B * T, *x.shape[2:]) for x in xs_BT]
    whole = B * T // chunk * chunk
    if chunk >= B * T:
        carry, y_N = f(carry, *xs)
        return carry, y_N.reshape(B, T, *y_N.shape[1:])
    cut = [x[:whole].reshape(-1, chunk, *x.shape[1:]) for x in xs]
    carry, y = jax.lax.scan(lambda carry, xs: f(carry, *xs), carry, cut)
    y_N = y.reshape(whole, *y.shape[2:])
    if whole < B * T:
        carry, last = f(carry, *(x[whole:] for x in xs))
        y_N = jnp.concatenate([y_N, last])
    return carry, y_N.reshape(B, T, *y_N.shape[1:])


def _nll_and_softmax(
    hidden_ND: jax.Array, table_VD: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """On shards: cross-entropy of N tokens, and on demand its gradient by the logits held here."""
    logits = einsum_f32("ND,VD->NV", hidden_ND, table_VD)
    first = axis_index("tensor") * len(table_VD)
    top = pmax(logits.max(-1, keepdims=True), "tensor")
    weights = jnp.exp(logits - top)
    total = psum(weights.sum(-1, keepdims=True), "tensor")
    hit = targets_N[:, None] - first == jnp.arange(logits.shape[-1])  # a gather, without one
    target_N = psum(jnp.where(hit, logits, 0).sum(-1), "tensor")
    return (top + jnp.log(total))[:, 0] - target_N, lambda: weights / total - hit


def _table_here(table_VD: jax.Array, dtype: Any) -> jax.Array:
    """On shards: rows of the vocabulary held here, whole."""
    return all_gather(table_VD.astype(dtype), 1, "fsdp", "context")


def _nll(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int | None
) -> jax.Array:
    def here(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        table_VD = _table_here(table_VD, hidden_BTD.dtype)

        def part(carry: None, hidden: jax.Array, targets: jax.Array) -> tuple[None, jax.Array]:
            return carry, _nll_and_softmax(hidden, table_VD, targets)[0]

        return _over_chunks(part, chunk, len(table_VD), None, hidden_BTD, targets_BT)[1]

    return on_shards(here, (_X, _TABLE, _TOKENS), _TOKENS, hidden_BTD, table_VD, targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mean_nll(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int | None
) -> jax.Array:
    return _nll(hidden_BTD, table_VD, targets_BT, chunk).mean()


def _forward(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The mean and, while each chunk's logits are at hand, both gradients: nothing is recomputed."""
    count = targets_BT.size

    def here(
        hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dtype = hidden_BTD.dtype
        table_VD = _table_here(table_VD, dtype)

        def part(carry: Any, hidden: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
            total, dtable_DV = carry
            nll, gradient = _nll_and_softmax(hidden, table_VD, targets)
            dlogits = (gradient() / count).astype(dtype)
            dtable_DV += einsum_f32("ND,NV->DV", hidden, dlogits)
            dhidden = psum(jnp.einsum("NV,VD->ND", dlogits, table_VD), "tensor")
            return (total + nll.sum(), dtable_DV), dhidden

        zero = jnp.zeros(()), jnp.zeros(table_VD.shape[::-1])
        (total, dtable_DV), dhidden = _over_chunks(
            part, chunk, len(table_VD), zero, hidden_BTD, targets_BT
        )
        dtable_DV = psum(reduce_scatter(dtable_DV, 0, "fsdp", "context"), "data")
        # summed now, or the whole gradient would lie in memory through the backward pass
        dhidden, dtable_DV = jax.lax.optimization_barrier((dhidden, dtable_DV))
        return psum(total, "data", "fsdp", "context"), dhidden, dtable_DV.T

    total, dhidden, dtable_VD = on_shards(
        here, (_X, _TABLE, _TOKENS), [(), _X, _TABLE], hidden_BTD, table_VD, targets_BT
    )
    return total / count, (dhidden, dtable_VD)


def _backward(
    chunk: int | None, gradients: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    dhidden, dtable_VD = gradients
    return (dhidden * scale).astype(dhidden.dtype), dtable_VD * scale, None


_mean_nll.defvjp(_forward, _backward)
