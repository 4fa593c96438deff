import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # training_kit.py, also run as a process of its own


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For modules that need no speed: the compiler leaves most optimizations out."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
