"""The SwiGLU feed-forward block with its backward pass written out.

Autodiff keeps four (B, T, F) arrays for each layer and, on a CPU, transposes the gradients of
the wide ones element by element, which took a third of a training step. Here two are kept, and
each weight gradient is a product in which only the narrow (B, T, D) operand is transposed.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gqa_scaling.devices.mesh import columns_to_scatter, constrain, gathered
from gqa_scaling.model.einsum import einsum_f32

_IN, _OUT = ("embed", "mlp"), ("mlp", "embed")


@jax.custom_vjp
def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down, in the dtype of x; weights and their gradients in float32."""
    return _forward(x_BTD, gate_DF, up_DF, down_FD)[0]


def _forward(
    x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array
) -> tuple[jax.Array, Any]:
    dtype = x_BTD.dtype
    gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gathered(gate_DF, dtype, _IN))
    up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gathered(up_DF, dtype, _IN))
    hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
    y_BTD = jnp.einsum("BTF,FD->BTD", hidden_BTF, gathered(down_FD, dtype, _OUT))
    return y_BTD, (x_BTD, gate_BTF, up_BTF, gate_DF, up_DF, down_FD)


def _backward(residuals: Any, dy_BTD: jax.Array) -> tuple[jax.Array, ...]:
    x_BTD, gate_BTF, up_BTF, gate_DF, up_DF, down_FD = residuals
    dtype = x_BTD.dtype
    sigmoid = jax.nn.sigmoid(gate_BTF)
    silu = gate_BTF * sigmoid
    dhidden = jnp.einsum("BTD,FD->BTF", dy_BTD, gathered(down_FD, dtype, _OUT))
    dgate = dhidden * up_BTF * (sigmoid + silu * (1 - sigmoid))
    dup = dhidden * silu
    dx = jnp.einsum("BTF,DF->BTD", dgate, gathered(gate_DF, dtype, _IN))
    dx += jnp.einsum("BTF,DF->BTD", dup, gathered(up_DF, dtype, _IN))
    dgate_DF = _of_weight(x_BTD, dgate)
    dup_DF = _of_weight(x_BTD, dup)
    ddown_DF = _of_weight(dy_BTD, silu * up_BTF)
    return dx, dgate_DF, dup_DF, ddown_DF.T


def _of_weight(x_BTD: jax.Array, y_BTF: jax.Array) -> jax.Array:
    """The gradient of a (D, F) weight, summed over devices to where its rows lie."""
    D, F = x_BTD.shape[-1], y_BTF.shape[-1]
    wider = columns_to_scatter(D, F)
    if wider > F:
        y_BTF = jnp.pad(y_BTF, ((0, 0), (0, 0), (0, wider - F)))
    return constrain(constrain(einsum_f32("BTD,BTF->DF", x_BTD, y_BTF), *_IN)[:, :F], *_IN)


swiglu.defvjp(_forward, _backward)
