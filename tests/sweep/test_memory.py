import dataclasses

import pytest
from published import MODEL
from published import published_run as run

from gqa_scaling import costs
from gqa_scaling.config import EvaluationConfig, ModelConfig, ParallelConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.sweep import memory


def test_remat_keeps_less():
    kept = [
        memory.training_bytes(run(parallel=ParallelConfig(remat=remat))).activations
        for remat in ("none", "dots", "full")
    ]
    assert kept == sorted(set(kept), reverse=True)


def test_training_bytes_on_one_device():
    total = costs.parameters(MODEL).total
    predicted = memory.training_bytes(run())
    assert predicted.state == 12 * total
    assert predicted.casts == 2 * costs.n_exact(MODEL)
    assert (predicted.gradients, predicted.accumulated, predicted.program) == (4 * total, 0, 0)
    hidden = 2 * 2 * 2**19 * 1280  # of each token, and its gradient, in bf16
    tables = (2 + 2 + 4 + 4) * 50304 * 1280  # in bf16, and its gradient, both twice
    assert predicted.output == tables + costs.LOGIT_BYTES + hidden
    assert predicted.total > predicted.state + predicted.gradients + predicted.activations


def test_the_moment_that_holds_most_counts():
    parts = dict.fromkeys([f.name for f in dataclasses.fields(memory.TrainingBytes)], 0)

    def total(**changes: float) -> int:
        return memory.TrainingBytes(**(parts | changes)).total

    kept = {"activations": 1000, "gradients": 100}
    assert total(**kept, output=500, layer=300, sums=1200) == 1500
    assert total(**kept, output=500, layer=450, sums=1200) == 1550
    assert total(**kept, output=500, layer=450, sums=1500) == 1600
    assert total(state=5, casts=6, accumulated=7, program=8) == 26
    assert total(state=5, output=500, gaps=0.2) == 605


def test_training_bytes_are_shared_by_the_right_axes():
    one = memory.training_bytes(run())
    data = memory.training_bytes(run(), devices=8)
    assert (data.state, data.gradients) == (one.state, one.gradients)
    assert data.activations == pytest.approx(one.activations / 8, rel=1e-6)
    fsdp = memory.training_bytes(run(parallel=ParallelConfig(fsdp=8, remat="full")), devices=8)
    full = memory.training_bytes(run(parallel=ParallelConfig(remat="full")), devices=8)
    assert fsdp.state == pytest.approx(one.state / 8, rel=1e-6)
    assert fsdp.activations == full.activations
    tensor = memory.training_bytes(run(parallel=ParallelConfig(tensor=2)), devices=8)
    assert tensor.state == one.state / 2
    assert data.activations < tensor.activations < 2 * data.activations  # D is not shared
    halves = memory.training_bytes(run(parallel=ParallelConfig(accumulation=2)))
    assert halves.accumulated == halves.gradients == one.gradients
    assert halves.activations == pytest.approx(one.activations / 2, rel=1e-6)
    wide = memory.training_bytes(run(model=dataclasses.replace(MODEL, dtype="float32")))
    assert (wide.state, wide.casts) == (one.state, 0)
    assert one.activations < wide.activations < 2 * one.activations  # logarithms are in fp32


def test_attention_holds_the_keys_of_whole_sequences():
    """As many as fit the batch: at 4 sequences of 128K over 4 x 64 devices, 128K on each."""

    def layer(context: int, ways: int) -> int:
        parallel = ParallelConfig(fsdp=256 // ways, context=ways)
        evaluation = EvaluationConfig(tokens=2**18)
        narrow = dataclasses.replace(MODEL, d_ff=64)  # so that attention, not the FFN, needs most
        r = run(model=narrow, context_length=context, parallel=parallel, evaluation=evaluation)
        return memory.training_bytes(r, devices=256).layer

    keys = 2 * 2 * 64 * (2 + 4 + 2)  # K and V of 2 KV heads: bf16, gradients in fp32, and in bf16
    assert layer(2**17, 64) - layer(2**15, 16) == keys * (2**17 - 2**15)


def test_a_pattern_holds_its_distant_keys_beside_the_others():
    """Of the layers, which use one memory in turn, the sparsest lays out most."""

    def layer(pattern: ContextSharding | None, **parallel) -> int:
        narrow = dataclasses.replace(MODEL, d_ff=64)  # so that attention, not the FFN, needs most
        r = run(
            model=dataclasses.replace(narrow, pattern=pattern), parallel=ParallelConfig(**parallel)
        )
        return memory.training_bytes(r).layer

    strided = ContextSharding(64, 16, stride=16)
    keys = 2**19 * 2 * 2 * 64  # values of K and V of 2 KV heads
    distant = (8192 - 1024) / 16 / 8192
    more = layer(strided) - layer(None)
    assert more == pytest.approx(keys * (2 + 4) * distant, rel=1e-6)
    hybrid = dataclasses.replace(strided, dense_layers="every 2")
    assert layer(hybrid) == layer(strided)
    half = dataclasses.replace(strided, dense_kv_heads=1)
    assert layer(half) - layer(None) == pytest.approx(more / 2, rel=1e-6)
    assert layer(ContextSharding(64, 16)) == layer(None)
    assert layer(strided, attention="reference") == layer(None, attention="reference")


def test_few_rows_on_a_device_fill_a_tile():
    model = dataclasses.replace(MODEL, d_model=1536, n_heads=24, n_kv_heads=8)
    parallel = ParallelConfig(fsdp=64, context=4)  # 6 of 1536 rows each
    predicted = memory.training_bytes(run(model=model, parallel=parallel), devices=256)
    total = costs.parameters(model).total
    assert predicted.state == pytest.approx(12 * total / 256 * 8 / 6, rel=1e-6)


def test_logits_of_a_small_batch_take_what_they_need():
    small = run(batch_tokens=64, context_length=64, tokens_per_param=20.0)
    values = {"logits": 4 * 50304, "hidden": 2 * 2 * 1280}
    assert memory.training_bytes(small).output == 12 * 50304 * 1280 + 64 * sum(values.values())


def test_heads_of_64_fill_rows_of_128_lanes_on_a_tpu():
    """And splash keeps a row for each sum of scores; a program takes room of its own."""
    many = {"n_heads": 64, "d_ff": 64}  # so that attention, not the FFN, needs most
    narrow, wide = (dataclasses.replace(MODEL, head_dim=size, **many) for size in (64, 128))

    def layer(model: ModelConfig, platform: str, **parallel: str) -> int:
        r = run(model=model, parallel=ParallelConfig(**parallel))
        return memory.training_bytes(r, 1, platform).layer

    blockwise = layer(wide, "tpu", attention="blockwise")
    tokens, unfilled = run().batch_tokens, 2 * 2 * 2 * 64  # rows of both gradients, of 2 KV heads
    assert layer(wide, "tpu") - layer(narrow, "tpu") == tokens * unfilled
    assert layer(narrow, "tpu") > blockwise - tokens * unfilled
    assert layer(wide, "cpu") == blockwise > layer(narrow, "cpu")
    assert memory.training_bytes(run(), 1, "tpu").program == memory.TPU_PROGRAM_BYTES


def test_scores_that_a_backward_pass_needs_are_kept_in_every_layer():
    def kept(**parallel: str) -> int:
        return memory.training_bytes(run(parallel=ParallelConfig(**parallel))).activations

    scores = 24 * 4 * 2**19 * 8192 * 8
    assert kept(attention="reference") - kept() == pytest.approx(scores)
    assert kept(attention="reference", remat="full") == kept(remat="full")


def test_disk():
    total = costs.parameters(MODEL).total
    assert memory.finished_bytes(run()) == 4 * total
    assert memory.checkpoint_bytes(run()) == (2 + 1) * 12 * total  # kept, and one being written
