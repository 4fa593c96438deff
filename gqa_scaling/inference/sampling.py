"""Which token comes next: the likeliest, or one drawn at random from a seed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gqa_scaling.config import require
from gqa_scaling.fields import between
from gqa_scaling.model.attention.shard import MASKED

MOST_TEMPERATURE = 100.0
LEAST_TEMPERATURE = 1e-30  # below, float32 overflows; from far above down the likeliest is drawn


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` 0 takes the likeliest, 1 draws as the model says.

    Of the `top_k` likeliest, and then of the fewest that hold `top_p` of what those have; None: of all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        between("temperature", self.temperature, 0, MOST_TEMPERATURE)
        require(self.top_k is None or self.top_k > 0, f"top_k={self.top_k} must be greater than 0")
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"top_p={self.top_p} must be greater than 0 and at most 1",
        )


GREEDY = Sampling()


def choose(
    sampling: Sampling, logits_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array
) -> jax.Array:
    """The next token of each sequence, (B,) int32; `sampling` is static.

    What is drawn depends on a sequence's own logits, seed and position alone, not on the sequences
    beside it.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / max(sampling.temperature, LEAST_TEMPERATURE)
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, MASKED)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # what the likelier ones hold
        kept_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf)
        least_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, MASKED)

    def draw(logits_V: jax.Array, seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), logits_V)

    return jax.vmap(draw)(logits_BV, seed_B, position_B).astype(jnp.int32)
