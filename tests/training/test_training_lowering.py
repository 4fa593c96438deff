"""The very step that `run` compiles also lowers for GPUs and TPUs, from a machine with neither."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from training_kit import tiny_run

from gqa_scaling.config import ModelConfig, ParallelConfig
from gqa_scaling.training.setup import set_up
from gqa_scaling.training.step import abstract_state, train_step


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_train_step_lowers(platform: str, dtype: str) -> None:
    model = ModelConfig(2, 128, 4, 2, vocab_size=264, dtype=dtype)
    parallel = ParallelConfig(remat="dots", accumulation=2)
    run = dataclasses.replace(
        tiny_run(), model=model, context_length=2048, batch_tokens=4096, tokens=8192,
        parallel=parallel, evaluation=dataclasses.replace(tiny_run().evaluation, tokens=2048),
    )  # fmt: skip
    setup = set_up(run)
    tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    traced = train_step(setup).trace(abstract_state(setup), tokens, tokens)
    lowered = traced.lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("bf16" in text) == (dtype == "bfloat16")
    assert "dot_general" in text
