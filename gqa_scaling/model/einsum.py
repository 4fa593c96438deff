"""Matrix products: of low-precision operands with a float32 result, and of float32 as float32."""

import contextlib

import jax
import jax.numpy as jnp

from gqa_scaling.devices.mesh import platform


def full_precision(dtype: str) -> contextlib.AbstractContextManager:
    """What a model that computes in `dtype` is traced within, so that float32 is float32.

    By default accelerators round the float32 operands of products, TPUs to bfloat16 and GPUs to TF32,
    which has as few digits.
    """
    exact = dtype == "float32" and platform() != "cpu"
    return jax.default_matmul_precision("highest") if exact else contextlib.nullcontext()


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum(subscripts, a, b)`, accumulated and returned in float32."""

    def accumulated(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return accumulated(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype == jnp.float32:
        return accumulated(a, b)
    # XLA for CPUs compiles bf16 x bf16 -> float32 and then may refuse to run it.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=accumulated)
