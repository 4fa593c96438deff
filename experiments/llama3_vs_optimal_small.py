"""The published pair at 128K, shrunken: the way of llama3_vs_optimal on a CPU, in minutes.

    gqa-scaling prepare experiments.llama3_vs_optimal_small
    gqa-scaling run experiments.llama3_vs_optimal_small --workers 2
    gqa-scaling report experiments.llama3_vs_optimal_small

Heads (8, 2) against (2, 1) of a model half as large again, bytes of Python's standard library, 128
tokens of context, then 1,024 with RoPE's theta from 10,000 to 100,000. Too small to decide by.
"""

from dataclasses import replace

from experiments import llama3_vs_optimal as published
from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Question,
    RunConfig,
)
from gqa_scaling.experiment.starts import start_of

QUESTION = Question(contexts=(1024,), baseline=(8, 2), demonstration=True)
MODEL = ModelConfig(3, 48, 8, 2, head_dim=8, vocab_size=264, rope_theta=10_000.0, dtype="float32")
PAIR = {  # <- what is compared
    "48-h8-kv2": MODEL,
    "64-h2-kv1": replace(MODEL, d_model=64, n_heads=2, n_kv_heads=1),
}
SHORT, LONG = 128, 1024


def short(name: str, model: ModelConfig) -> RunConfig:
    """The first part, at 128 tokens."""
    return replace(
        published.short(name, model),
        name=f"{name}-short",
        data=DataConfig(corpus="stdlib", tokenizer="bytes"),
        context_length=SHORT,
        batch_tokens=1024,
        tokens=400 * 1024,
        optimizer=OptimizerConfig(learning_rate=7e-3),
        evaluation=EvaluationConfig(tokens=2**16, longest_context=LONG),
        parallel=ParallelConfig(),
        checkpoint=CheckpointConfig(every_steps=100),
    )


def long(name: str, parent: RunConfig) -> RunConfig:
    """A tenth as many tokens more, at 1,024."""
    return replace(
        parent,
        name=f"{name}-long",
        start_from=start_of(parent, "llama3_vs_optimal_small"),
        model=replace(parent.model, rope_theta=100_000.0),
        context_length=LONG,
        tokens=40 * 1024,
        optimizer=replace(parent.optimizer, learning_rate=1e-3),
        evaluation=replace(parent.evaluation, contexts=(32, SHORT, 512)),
    )


def runs() -> list[RunConfig]:
    """Both models at 128 tokens, then both at 1,024."""
    parents = {name: short(name, model) for name, model in PAIR.items()}
    return [*parents.values(), *(long(name, parent) for name, parent in parents.items())]
