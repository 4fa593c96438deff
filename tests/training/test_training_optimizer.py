"""The published schedule and AdamW, against formulas written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gqa_scaling.config import ModelConfig, OptimizerConfig
from gqa_scaling.model.transformer import create
from gqa_scaling.training.optimizer import learning_rate_schedule, make_optimizer


def test_warmup_stable_decay() -> None:
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=2.0), 1000, 1)
    assert [float(rate(s)) for s in (0, 50, 100, 500, 799)] == pytest.approx([0, 1, 2, 2, 2])
    middle = 2 * (0.1 + 0.9 * (1 + np.cos(np.pi / 2)) / 2)
    assert float(rate(900)) == pytest.approx(middle)
    assert float(rate(1000)) == pytest.approx(0.2)


def test_cosine_decays_from_the_end_of_the_warmup() -> None:
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, schedule="cosine"), 1000, 1)
    assert [float(rate(s)) for s in (0, 100, 1000)] == pytest.approx([0, 2, 0.2])
    assert float(rate(550)) == pytest.approx(2 * (0.1 + 0.9 * 0.5))


def test_adamw_step_by_hand_with_decay_on_matrices_only() -> None:
    config = OptimizerConfig(learning_rate=0.01, warmup=0.0, decay=0.0, clip_norm=1.0)
    model = ModelConfig(2, 16, 2, 1, 8, vocab_size=32)
    parameters = jax.jit(lambda: nnx.state(create(model, 0)))()
    optimizer = make_optimizer(config, learning_rate_schedule(config, 100, 1))
    gradient = jax.tree.map(lambda x: jnp.full(x.shape, 3.0), parameters)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))
    updates, _ = update(gradient, parameters)
    # after clipping every entry is equal, so Adam's first step is the learning rate itself
    for path, update in nnx.to_flat_state(updates):
        value = dict(nnx.to_flat_state(parameters))[path][...]
        decay = 0.0 if "norm" in path[-1] else 0.1
        expected = -0.01 * (1 + decay * np.asarray(value))
        np.testing.assert_allclose(update[...], expected, rtol=1e-4)
