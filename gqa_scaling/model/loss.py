"""Next-token cross-entropy in float32, never holding more logits than needed."""

import functools
import math

import jax
import jax.numpy as jnp

from gqa_scaling.model.transformer import Transformer

LOGIT_BYTES = 64 * 2**20  # float32 logits held at once, on each device


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

    `chunk` is how many positions' logits exist at once; None takes as many as fit in 64 MiB.
    """
    hidden_BTD = model(inputs_BT, remat=remat, attention=attention)
    table_VD = model.output_table().astype(hidden_BTD.dtype)
    return _mean_nll(hidden_BTD, table_VD, targets_BT, chunk or _chunk(targets_BT.shape, table_VD))


def per_position_nll(
    model: Transformer, inputs_BT: jax.Array, targets_BT: jax.Array, *, attention: str = "auto"
) -> jax.Array:
    """Cross-entropy of each target, in nats: float32 (B, T). For evaluation only."""
    hidden_BTD = model(inputs_BT, attention=attention)
    table_VD = model.output_table().astype(hidden_BTD.dtype)
    return _nll(hidden_BTD, table_VD, targets_BT, _chunk(targets_BT.shape, table_VD))


def _chunk(shape: tuple[int, int], table_VD: jax.Array) -> int:
    batch, time = shape
    devices = max(1, jax.sharding.get_abstract_mesh().size)
    return min(time, max(1, LOGIT_BYTES * devices // (4 * batch * table_VD.shape[0])))


def _over_chunks(f, chunk, carry, *xs_BT):
    """`carry, ys_BT = f(carry, *xs)` over slices of `chunk` positions, joined again."""
    T = xs_BT[0].shape[1]
    whole = T // chunk * chunk
    if chunk >= T:
        return f(carry, *xs_BT)
    cut = [
        jnp.moveaxis(x[:, :whole].reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0) for x in xs_BT
    ]
    carry, ys = jax.lax.scan(lambda c, x: f(c, *x), carry, cut)
    join = lambda y: jnp.moveaxis(y, 0, 1).reshape(y.shape[1], whole, *y.shape[3:])
    ys = jax.tree.map(join, ys)
    if whole < T:
        carry, last = f(carry, *(x[:, whole:] for x in xs_BT))
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), ys, last)
    return carry, ys


def _logits(hidden_BTD, table_VD):
    return jnp.einsum("BTD,VD->BTV", hidden_BTD, table_VD, preferred_element_type=jnp.float32)


def _hit(targets_BT, V):
    return targets_BT[..., None] == jnp.arange(V)


def _nll(hidden_BTD, table_VD, targets_BT, chunk):
    def f(carry, h, t):
        logits = _logits(h, table_VD)
        picked = jnp.where(_hit(t, table_VD.shape[0]), logits, 0).sum(-1)
        return carry, jax.nn.logsumexp(logits, axis=-1) - picked

    return _over_chunks(f, chunk, (), hidden_BTD, targets_BT)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mean_nll(hidden_BTD, table_VD, targets_BT, chunk):
    return _nll(hidden_BTD, table_VD, targets_BT, chunk).mean()


def _mean_nll_fwd(hidden_BTD, table_VD, targets_BT, chunk):
    n = math.prod(targets_BT.shape)
    V = table_VD.shape[0]

    def f(carry, h, t):
        total, dtable = carry
        logits = _logits(h, table_VD)
        m = logits.max(-1, keepdims=True)
        e = jnp.exp(logits - m)
        z = e.sum(-1, keepdims=True)
        hit = _hit(t, V)
        picked = jnp.where(hit, logits, 0).sum(-1)
        total += (m[..., 0] + jnp.log(z[..., 0]) - picked).sum()
        dlogits = ((e / z - hit) / n).astype(h.dtype)
        dh = jnp.einsum("BTV,VD->BTD", dlogits, table_VD)
        dtable += jnp.einsum("BTD,BTV->DV", h, dlogits, preferred_element_type=jnp.float32)
        return (total, dtable), dh

    carry = (jnp.zeros(()), jnp.zeros(table_VD.shape[::-1], jnp.float32))
    (total, dtable), dh = _over_chunks(f, chunk, carry, hidden_BTD, targets_BT)
    return total / n, (dh, dtable.T.astype(table_VD.dtype))


def _mean_nll_bwd(chunk, res, g):
    dh, dtable = res
    return (dh * g).astype(dh.dtype), (dtable * g).astype(dtable.dtype), None


_mean_nll.defvjp(_mean_nll_fwd, _mean_nll_bwd)
