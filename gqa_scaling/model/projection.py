"""Projections by attention's weights, whose backward pass keeps the weights as they are stored.

Autodiff would keep, of every layer until its backward pass, the weight as it was used: gathered.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gqa_scaling.devices.mesh import axis_size, constrain, gathered
from gqa_scaling.model.einsum import einsum_f32

Axes = tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(x: jax.Array, weight: jax.Array, subscripts: str, axes: Axes) -> jax.Array:
    """`einsum(subscripts, x, weight)` in the dtype of x; weights and their gradients in float32.

    `axes` names the axes of the weight. On a `tensor` axis larger than K each group is cut into
    parts that count as KV heads, in the result or in x.
    """
    return _forward(x, weight, subscripts, axes)[0]


def _repeats(weight: jax.Array, axes: Axes) -> int:
    """Parts that each group is cut into."""
    if "group" not in axes:
        return 1
    return -(-axis_size("tensor") // weight.shape[axes.index("kv_heads")])


def _whole(weight: jax.Array, dtype: Any, axes: Axes) -> jax.Array:
    weight, repeats = gathered(weight, dtype, axes), _repeats(weight, axes)
    if repeats == 1:
        return weight
    k = axes.index("kv_heads")
    K, G = weight.shape[k : k + 2]
    weight = weight.reshape(*weight.shape[:k], K * repeats, G // repeats, *weight.shape[k + 2 :])
    return constrain(weight, *("kv_heads" if i == k else None for i in range(weight.ndim)))


def _forward(x: jax.Array, weight: jax.Array, subscripts: str, axes: Axes) -> tuple[jax.Array, Any]:
    whole = _whole(weight, x.dtype, axes)
    if axes[0] != "embed":
        return jnp.einsum(subscripts, x, whole), (x, weight)
    # As one wide axis: where this result is kept for the backward pass, a TPU would fill the heads
    # of size 64 up to 128 lanes.
    flat = jnp.einsum("BTD,DN->BTN", x, whole.reshape(len(whole), -1))
    return flat.reshape(*x.shape[:2], *whole.shape[1:]), (x, weight)


def _backward(
    subscripts: str, axes: Axes, residuals: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    (of_x, of_weight), of_y = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    dx = jnp.einsum(f"{of_y},{of_weight}->{of_x}", dy, _whole(weight, x.dtype, axes))
    dweight = einsum_f32(f"{of_x},{of_y}->{of_weight}", x, dy)
    if _repeats(weight, axes) > 1:  # joined before the reshape, which no sharding survives
        dweight = constrain(dweight, *("embed" if axis == "embed" else None for axis in axes))
        dweight = dweight.reshape(weight.shape)
    return dx, constrain(dweight, *axes)


project.defvjp(_forward, _backward)
