import jax
import pytest


@pytest.fixture(autouse=True)
def compile_quickly():
    """These tests compile much and run little: leaving out XLA's optimisations halves them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
