"""Looking up token embeddings in a table that is split over devices.

The partitioner would replicate the result or the gradient's updates, each as large as all
activations; here only the table moves, and its gradient is summed where it is kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gqa_scaling.devices.mesh import (
    all_gather,
    axis_index,
    axis_size,
    on_shards,
    psum,
    reduce_scatter,
)

_TABLE, _TOKENS, _X = ("vocab", "embed"), ("batch", "time"), ("batch", "time", None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """Rows of `table_VD` at `tokens_BT`, (B, T, D) in `dtype`; gradients are summed in float32."""
    return _forward(table_VD, tokens_BT, dtype)[0]


def _here(tokens_BT: jax.Array, V: int) -> tuple[jax.Array, jax.Array]:
    """On shards: rows of the V that lie here, and which tokens have one."""
    row_BT = tokens_BT - axis_index("tensor") * V
    mine_BT = (row_BT >= 0) & (row_BT < V)
    return jnp.where(mine_BT, row_BT, 0), mine_BT[..., None]


def _forward(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    def look_up(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        table_VD = all_gather(table_VD.astype(dtype), 1, "fsdp", "context")
        if axis_size("tensor") == 1:
            return table_VD[tokens_BT]
        row_BT, mine_BT1 = _here(tokens_BT, len(table_VD))
        return psum(jnp.where(mine_BT1, table_VD[row_BT], 0), "tensor")

    x_BTD = on_shards(look_up, (_TABLE, _TOKENS), _X, table_VD, tokens_BT)
    return x_BTD, (tokens_BT, len(table_VD))


def _backward(dtype: Any, residuals: Any, dx_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, V = residuals

    def add_up(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        rows = V // axis_size("tensor")
        row_BT, mine_BT1 = _here(tokens_BT, rows)
        dx_BTD = jnp.where(mine_BT1, dx_BTD.astype(jnp.float32), 0)
        dtable_VD = jnp.zeros((rows, dx_BTD.shape[-1])).at[row_BT].add(dx_BTD)
        return psum(reduce_scatter(dtable_VD, 1, "fsdp", "context"), "data")

    return on_shards(add_up, (_TOKENS, _X), _TABLE, tokens_BT, dx_BTD), None


embed.defvjp(_forward, _backward)
