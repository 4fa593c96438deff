"""Next-token cross-entropy in float32, never holding more logits than allowed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gqa_scaling.model.product import product
from gqa_scaling.model.transformer import Transformer

LOGIT_BYTES = 64 * 2**20  # of float32 logits at once, on each device


def next_token_loss(
    model: Transformer,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    *,
    chunk: int | None = None,
    remat: str = "none",
    attention: str = "auto",
) -> jax.Array:
    """Mean cross-entropy, in nats, of `targets_BT` after `inputs_BT`: a float32 scalar.

    `chunk` is how many positions' logits exist at once; None takes as many as fit into
    `LOGIT_BYTES`, all of them when they do. `remat` and `attention` go to the model.
    """
    hidden_BTD = model(inputs_BT, remat=remat, attention=attention)
    table_VD = model.output_table()
    chunk = chunk or _chunk(targets_BT, table_VD)
    return _mean_nll(hidden_BTD, table_VD, targets_BT, chunk)


def per_position_nll(
    model: Transformer, inputs_BT: jax.Array, targets_BT: jax.Array, *, attention: str = "auto"
) -> jax.Array:
    """Cross-entropy of each target, in nats: float32 (B, T). For evaluation."""
    hidden_BTD = model(inputs_BT, attention=attention)
    table_VD = model.output_table()
    return _nll(hidden_BTD, table_VD, targets_BT, _chunk(targets_BT, table_VD))


def _chunk(targets_BT: jax.Array, table_VD: jax.Array) -> int:
    """Positions whose logits for the whole batch fit into the allowance of all devices."""
    (B, T), V = targets_BT.shape, table_VD.shape[0]
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    return min(T, max(1, devices * LOGIT_BYTES // (4 * B * V)))


def _over_chunks(f: Callable, chunk: int, carry: Any, *xs_BT: jax.Array) -> tuple[Any, jax.Array]:
    """`carry, y_BT = f(carry, *xs_BT)`, called on slices of `chunk` positions, y joined again."""
    B, T = xs_BT[0].shape[:2]
    if chunk >= T:
        return f(carry, *xs_BT)
    whole = T // chunk * chunk
    cut = [jnp.moveaxis(x[:, :whole].reshape(B, -1, chunk, *x.shape[2:]), 1, 0) for x in xs_BT]
    carry, ys = jax.lax.scan(lambda carry, xs: f(carry, *xs), carry, cut)
    y_BT = jnp.moveaxis(ys, 0, 1).reshape(B, whole, *ys.shape[3:])
    if whole < T:
        carry, last = f(carry, *(x[:, whole:] for x in xs_BT))
        y_BT = jnp.concatenate([y_BT, last], axis=1)
    return carry, y_BT


def _nll_and_softmax(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """(B, T) cross-entropy, and its gradient by the logits on demand."""
    logits = product("BTD,VD->BTV", hidden_BTD, table_VD.astype(hidden_BTD.dtype))
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    hit = targets_BT[..., None] == jnp.arange(logits.shape[-1])  # a gather would split badly
    nll_BT = (top + jnp.log(total))[..., 0] - jnp.where(hit, logits, 0).sum(-1)
    return nll_BT, lambda: weights / total - hit


def _nll(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    def part(carry: None, hidden: jax.Array, targets: jax.Array) -> tuple[None, jax.Array]:
        return carry, _nll_and_softmax(hidden, table_VD, targets)[0]

    return _over_chunks(part, chunk, None, hidden_BTD, targets_BT)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mean_nll(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    return _nll(hidden_BTD, table_VD, targets_BT, chunk).mean()


def _forward(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The mean and, while each chunk's logits are at hand, both gradients: nothing is recomputed."""
    dtype = hidden_BTD.dtype
    table = table_VD.astype(dtype)

    def part(carry: Any, hidden: jax.Array, targets: jax.Array) -> tuple[Any, jax.Array]:
        total, dtable_DV = carry
        nll, gradient = _nll_and_softmax(hidden, table_VD, targets)
        dlogits = (gradient() / targets_BT.size).astype(dtype)
        dtable_DV += product("BTD,BTV->DV", hidden, dlogits)
        return (total + nll.sum(), dtable_DV), jnp.einsum("BTV,VD->BTD", dlogits, table)

    zero = jnp.zeros(()), jnp.zeros(table.shape[::-1])
    (total, dtable_DV), dhidden = _over_chunks(part, chunk, zero, hidden_BTD, targets_BT)
    return total / targets_BT.size, (dhidden, dtable_DV.T)


def _backward(
    chunk: int, gradients: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    dhidden, dtable_VD = gradients
    return (dhidden * scale).astype(dhidden.dtype), dtable_VD * scale, None


_mean_nll.defvjp(_forward, _backward)
