"""AdamW and its learning-rate schedule, as published (Chen et al. 2025, appendix)."""

from typing import Any

import jax
import optax

from gqa_scaling.config import OptimizerConfig


def learning_rate_schedule(
    config: OptimizerConfig, steps: int, batch_tokens: int
) -> optax.Schedule:
    """Learning rate by steps taken before: linear warmup from 0, constant, cosine to `final_fraction`.

    With schedule "cosine" the decay takes all steps after the warmup.
    """
    warmup, decay = config.phases(steps, batch_tokens)
    peak = config.learning_rate
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(warmup, 1)),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, max(decay, 1), alpha=config.final_fraction),
        ],
        boundaries=[warmup, steps - decay],
    )


def is_matrix(path: tuple[Any, ...], _: jax.Array) -> bool:
    """Whether weight decay acts on a parameter: on matrices, not on norm scales."""
    return "norm" not in jax.tree_util.keystr(path)


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Gradient clipping by global norm, then AdamW at the learning rates of the schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda tree: jax.tree_util.tree_map_with_path(is_matrix, tree),
        ),
    )
