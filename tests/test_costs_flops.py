"""The predicted FLOPs against the matrix products in the jaxpr of a training step."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gqa_scaling import costs
from gqa_scaling.config import ModelConfig
from gqa_scaling.model.loss import next_token_loss
from gqa_scaling.model.transformer import create

sys.path.append(str(Path(__file__).parent / "model"))

from jaxpr_flops import count_dot_flops

BATCH, CONTEXT = 2, 48
MODELS = {
    "MHA": ModelConfig(2, 64, 4, 4, head_dim=16, vocab_size=128),
    "GQA, untied": ModelConfig(3, 64, 8, 2, head_dim=16, vocab_size=96, tie_embeddings=False),
    "MQA, own d_ff": ModelConfig(4, 96, 4, 1, head_dim=32, vocab_size=50, d_ff=100, qk_norm=True),
    "GQA, fp32": ModelConfig(1, 32, 16, 4, head_dim=8, vocab_size=300, dtype="float32"),
    "MQA, untied": ModelConfig(2, 128, 2, 1, head_dim=64, vocab_size=64, tie_embeddings=False),
}


def counted(config: ModelConfig, remat: str, chunk: int | None = None) -> float:
    """FLOPs for one token of the `dot_general`s of forward and backward, nothing computed."""
    graph, state = nnx.split(nnx.eval_shape(lambda: create(config, 0)))
    tokens = jax.ShapeDtypeStruct((BATCH, CONTEXT), jnp.int32)

    def loss(state, inputs, targets):
        model = nnx.merge(graph, state)
        options = {"remat": remat, "attention": "reference", "chunk": chunk}
        return next_token_loss(model, inputs, targets, **options)

    return count_dot_flops(jax.value_and_grad(loss), state, tokens, tokens) / (BATCH * CONTEXT)


@pytest.mark.parametrize("name", MODELS)
def test_model_flops_are_those_of_the_jaxpr(name):
    """Dense attention multiplies every query by every key, so nothing is saved by causality."""
    predicted = costs.training_flops_per_token(MODELS[name], CONTEXT, causal=False)
    assert predicted == pytest.approx(counted(MODELS[name], "none"), rel=0.02)


def test_cutting_the_output_head_into_chunks_costs_nothing():
    config = MODELS["GQA, untied"]
    whole = counted(config, "none")
    assert counted(config, "none", chunk=16) == whole
    assert counted(config, "none", chunk=20) == whole  # 20, 20 and 8 positions


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", ["MHA", "MQA, own d_ff"])
def test_hardware_flops_are_those_of_the_jaxpr(name, remat):
    config = MODELS[name]
    predicted = costs.hardware_flops_per_token(config, CONTEXT, remat, full_attention=True)
    assert predicted == pytest.approx(counted(config, remat), rel=0.02)
