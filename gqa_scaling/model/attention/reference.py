"""Attention by all T x T scores, for comparison: as short as the equations, differentiated by JAX."""

import math

import jax
import jax.numpy as jnp

from gqa_scaling.context_sharding import HeadPattern
from gqa_scaling.model.attention.shard import MASKED, Operands, positions, sees
from gqa_scaling.model.einsum import einsum_f32


def forward(kind: HeadPattern, x: Operands) -> tuple[jax.Array]:
    """See `shard`; o_BTKGH alone."""
    _, T, _, _, H = x.q_BTKGH.shape
    t, s = positions(x.starts, T)[:, None], jnp.arange(x.k_BSKH.shape[1])
    visible = (s <= t) & sees(kind, x.offset_K[:, None, None, None], t, s)
    scores = einsum_f32("BTKGH,BSKH->BKGTS", x.q_BTKGH, x.k_BSKH) / math.sqrt(H)
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
    return (jnp.einsum("BKGTS,BSKH->BTKGH", weights.astype(x.v_BSKH.dtype), x.v_BSKH),)
