"""Llama-3's heads against the cost-optimal ones at 128K: the published pair (Chen et al. 2025, section 5).

    gqa-scaling plan experiments.llama3_vs_optimal --hardware v5p --devices 64
    gqa-scaling run experiments.llama3_vs_optimal
    gqa-scaling prepare experiments.llama3_vs_optimal@small
    gqa-scaling run experiments.llama3_vs_optimal@small --workers 2    # minutes of a CPU

1.2B parameters with (32, 8) heads and 1.8B with (8, 1), which are to reach one loss at 128K. Each is
trained on 20B tokens at 4K; another run goes on from its parameters, with a fresh optimizer, on 1B
tokens at 128K and a maximum learning rate of 1e-5. Needles are asked for at up to 128K. On a pod of
64 chips (fsdp x context). The corpus and the tokenizer are those of head_ladder.

@small goes the same way with models of 80 to 120 thousand parameters on bytes of Python's standard library:
heads (8, 2) against (2, 1) of a model half as large again, 128 tokens of context, then a tenth as many
tokens more at 1,024 with RoPE's theta from 10,000 to 100,000. Too small to decide by.
"""

from dataclasses import replace

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    NeedleTask,
    OptimizerConfig,
    ParallelConfig,
    Question,
    RunConfig,
)
from gqa_scaling.experiment.scales import FULL
from gqa_scaling.experiment.starts import start_of

VARIANTS = ("small",)
QUESTION = Question(contexts=(131072,), baseline=(32, 8))
PAIR = {  # <- what is compared
    "1.2B-h32-kv8": ModelConfig(36, 1536, 32, 8),
    "1.8B-h8-kv1": ModelConfig(36, 2048, 8, 1),
}
SHORT, LONG = 4096, 131072
LENGTHS = (1024, 2048, 4096, 8192)  # of texts with a needle; the long runs are asked at LONG too


def short(name: str, model: ModelConfig) -> RunConfig:
    """The first 20B tokens, at 4K."""
    return RunConfig(
        name=f"{name}-4K",
        model=model,
        data=FULL.data,
        context_length=SHORT,
        batch_tokens=2**19,
        tokens=20_000_000_000,
        optimizer=OptimizerConfig(learning_rate=2e-4),
        evaluation=EvaluationConfig(
            tokens=2**22, longest_context=LONG, needles=NeedleTask(lengths=LENGTHS)
        ),
        parallel=ParallelConfig(fsdp=64, remat="dots"),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def long(name: str, parent: RunConfig) -> RunConfig:
    """1B tokens more, at 128K: a batch holds 4 sequences, which 16 chips share each."""
    return replace(
        parent,
        name=f"{name}-128K",
        start_from=start_of(parent, "llama3_vs_optimal"),
        context_length=LONG,
        tokens=1_000_000_000,
        optimizer=replace(parent.optimizer, learning_rate=1e-5),
        evaluation=replace(
            parent.evaluation, contexts=(SHORT, 32768), needles=NeedleTask(lengths=(*LENGTHS, LONG))
        ),
        parallel=ParallelConfig(fsdp=4, context=16, remat="full"),
        checkpoint=CheckpointConfig(every_steps=200),
    )


SMALL = ModelConfig(3, 48, 8, 2, head_dim=8, vocab_size=264, rope_theta=10_000.0, dtype="float32")
SMALL_PAIR = {
    "48-h8-kv2": SMALL,
    "64-h2-kv1": replace(SMALL, d_model=64, n_heads=2, n_kv_heads=1),
}


def small_short(name: str, model: ModelConfig) -> RunConfig:
    return replace(
        short(name, model),
        name=f"{name}-short",
        data=DataConfig(corpus="stdlib", tokenizer="bytes"),
        context_length=128,
        batch_tokens=1024,
        tokens=400 * 1024,
        optimizer=OptimizerConfig(learning_rate=7e-3),
        evaluation=EvaluationConfig(tokens=2**16, longest_context=1024),
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def small_long(name: str, parent: RunConfig) -> RunConfig:
    return replace(
        parent,
        name=f"{name}-long",
        start_from=start_of(parent, "llama3_vs_optimal_small"),
        model=replace(parent.model, rope_theta=100_000.0),
        context_length=1024,
        tokens=40 * 1024,
        optimizer=replace(parent.optimizer, learning_rate=1e-3),
        evaluation=replace(parent.evaluation, contexts=(32, 128, 512)),
    )


def question(variant: str) -> Question:
    return Question(contexts=(1024,), baseline=(8, 2), demonstration=True)


def runs(variant: str = "") -> list[RunConfig]:
    """Both models at the short context, then both at the long one."""
    if variant == "small":
        parents = {name: small_short(name, model) for name, model in SMALL_PAIR.items()}
        longer = [small_long(name, parent) for name, parent in parents.items()]
    else:
        parents = {name: short(name, model) for name, model in PAIR.items()}
        longer = [long(name, parent) for name, parent in parents.items()]
    return [*parents.values(), *longer]
