"""The SwiGLU feed-forward block with its backward pass written out.

Autodiff keeps four (B, T, F) arrays for each layer and, on a CPU, transposes the gradients of
the wide ones element by element, which took a third of a training step. Here two are kept, and
each weight gradient is a product in which only the narrow (B, T, D) operand is transposed.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down, in the dtype of x; weights and their gradients in float32."""
    return _forward(x_BTD, gate_DF, up_DF, down_FD)[0]


def _forward(x_BTD, gate_DF, up_DF, down_FD):
    gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF.astype(x_BTD.dtype))
    up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF.astype(x_BTD.dtype))
    hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
    y_BTD = jnp.einsum("BTF,FD->BTD", hidden_BTF, down_FD.astype(x_BTD.dtype))
    return y_BTD, (x_BTD, gate_BTF, up_BTF, gate_DF, up_DF, down_FD)


def _backward(residuals, dy_BTD):
    x_BTD, gate_BTF, up_BTF, gate_DF, up_DF, down_FD = residuals
    dtype = x_BTD.dtype
    sigmoid = jax.nn.sigmoid(gate_BTF)
    silu = gate_BTF * sigmoid
    dhidden = jnp.einsum("BTD,FD->BTF", dy_BTD, down_FD.astype(dtype))
    dgate = dhidden * up_BTF * (sigmoid + silu * (1 - sigmoid))
    dup = dhidden * silu
    dx = jnp.einsum("BTF,DF->BTD", dgate, gate_DF.astype(dtype))
    dx += jnp.einsum("BTF,DF->BTD", dup, up_DF.astype(dtype))

    def weight_gradient(narrow_BTD: jax.Array, wide_BTF: jax.Array) -> jax.Array:
        return jnp.einsum("BTD,BTF->DF", narrow_BTD, wide_BTF, preferred_element_type=gate_DF.dtype)

    ddown_DF = weight_gradient(dy_BTD, silu * up_BTF)
    return dx, weight_gradient(x_BTD, dgate), weight_gradient(x_BTD, dup), ddown_DF.T


swiglu.defvjp(_forward, _backward)
