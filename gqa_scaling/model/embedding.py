"""Looking up token embeddings in a table that is split over devices.

The partitioner would replicate the result or the gradient's updates, each as large as all
activations; here only the table moves, and its gradient is summed where it is kept.

On GPUs the gradient of a small table is a matrix product with ones where a token has that row. A
scatter adds by atomic operations there: their order, and so the last bits, differ each time, and
jaxlib 0.10.2 to 0.11.0 writes most of them as loops that try again (xla issue 46225), hundreds of
times slower where many tokens share a row, as with bytes all do: for an A100 always, for an H100 in
those programs where it does not use additions of vectors.
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

# Rows of a table whose gradient is a product on GPUs: it takes as many FLOPs as the logits, and its
# ones, written to memory for all tokens, stay smaller than the activations of a layer.
PRODUCT_UP_TO = 1024

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


def _by_scatter(V: int, tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
    """On shards: for each of the V rows that lie here the sum of its tokens' gradients, float32."""
    row_BT, mine_BT1 = _here(tokens_BT, V)
    dx_BTD = jnp.where(mine_BT1, dx_BTD.astype(jnp.float32), 0)
    return jnp.zeros((V, dx_BTD.shape[-1])).at[row_BT].add(dx_BTD)


def _by_product(V: int, tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
    """The same."""
    here_V = jnp.arange(V) + axis_index("tensor") * V
    return jnp.einsum(
        "BTV,BTD->VD",
        (tokens_BT[..., None] == here_V).astype(dx_BTD.dtype),
        dx_BTD,
        precision=jax.lax.Precision.HIGHEST,  # of float32: no TF32
        preferred_element_type=jnp.float32,
    )


def _backward(dtype: Any, residuals: Any, dx_BTD: jax.Array) -> tuple[jax.Array, None]:
    tokens_BT, V = residuals

    rows = V // axis_size("tensor")

    def add_up(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        scatter, product = (functools.partial(f, rows) for f in (_by_scatter, _by_product))
        on_gpu = {"cuda": product, "rocm": product} if rows <= PRODUCT_UP_TO else {}
        dtable_VD = jax.lax.platform_dependent(tokens_BT, dx_BTD, default=scatter, **on_gpu)
        return psum(reduce_scatter(dtable_VD, 1, "fsdp", "context"), "data")

    return on_shards(add_up, (_TOKENS, _X), _TABLE, tokens_BT, dx_BTD), None


embed.defvjp(_forward, _backward)
