"""The very step that `run` compiles also lowers for GPUs and TPUs, from a machine with neither."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from training_kit import tiny_run

from gqa_scaling.config import ModelConfig, ParallelConfig, UserError
from gqa_scaling.model import einsum
from gqa_scaling.training import setup as setups
from gqa_scaling.training.setup import Setup, set_up
from gqa_scaling.training.step import _compiler_options, abstract_state, train_step


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_train_step_lowers(platform: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 as float32, which no accelerator does by default."""
    model = ModelConfig(2, 128, 4, 2, vocab_size=264, dtype=dtype)
    parallel = ParallelConfig(remat="dots", accumulation=2)
    run = dataclasses.replace(
        tiny_run(), model=model, context_length=2048, batch_tokens=4096, tokens=8192,
        parallel=parallel, evaluation=dataclasses.replace(tiny_run().evaluation, tokens=2048),
    )  # fmt: skip
    setup = set_up(run)
    computed_on = {"cuda": "gpu"}.get(platform, platform)
    monkeypatch.setattr(Setup, "platform", computed_on)
    monkeypatch.setattr(einsum, "platform", lambda: computed_on)
    tokens = jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    traced = train_step(setup).trace(abstract_state(setup), tokens, tokens)
    lowered = traced.lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    assert ("bf16" in text) == (dtype == "bfloat16")
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) > 20
    exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
    assert all(exact) if dtype == "float32" else sum(exact) <= 1  # the embedding's gradient


def test_tpu_programs_keep_sums_in_the_loop_over_microbatches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_run()
    twice = dataclasses.replace(run, parallel=ParallelConfig(accumulation=2))
    assert _compiler_options(set_up(twice)) is None
    monkeypatch.setattr(Setup, "platform", "tpu")
    assert _compiler_options(set_up(run)) is None
    assert _compiler_options(set_up(twice)) == {
        "xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"
    }


def test_a_run_under_flags_that_spoil_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setups, "overlap_fault", lambda *of: f"{of} is wrong")
    with pytest.raises(UserError, match=r"\('cpu', 'blockwise', 1\) is wrong"):
        set_up(tiny_run())
