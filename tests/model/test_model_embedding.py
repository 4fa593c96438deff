"""The gradient of the embedding, as it is summed on CPUs and as it is summed on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_scaling.model import embedding

SUMS = {"scatter": embedding._by_scatter, "product": embedding._by_product}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("add_up", SUMS.values(), ids=SUMS)
def test_sums_are_those_of_numpy(add_up, dtype):
    """Exact: of whole numbers, many of one row, and some of no row that lies here."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.3, (3, 50)), 12).astype(np.int32)
    dx = rng.integers(-9, 9, (3, 50, 5))
    expected = np.zeros((13, 5))
    np.add.at(expected, tokens, dx)
    found = add_up(10, jnp.array(tokens), jnp.array(dx, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected[:10])


@pytest.mark.parametrize(("V", "scatters"), [(264, 0), (4096, 1)])
def test_small_tables_are_not_scattered_on_gpus(V, scatters):
    table = jax.ShapeDtypeStruct((V, 64), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def loss(table, tokens):
        return jnp.sum(embedding.embed(table, tokens, jnp.bfloat16).astype(jnp.float32) ** 2)

    traced = jax.jit(jax.grad(loss)).trace(table, tokens)
    for platform, expected in {"cuda": scatters, "tpu": 1, "cpu": 1}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count('"stablehlo.scatter"') == expected, platform
