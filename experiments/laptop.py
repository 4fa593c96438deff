"""Which heads for a small model of Python? Worth an hour of CPU or minutes of a GPU.

    gqa-scaling prepare experiments.laptop
    gqa-scaling run experiments.laptop@lr --workers 2     # optional: the learning rate of each size
    gqa-scaling learning-rates experiments.laptop@lr
    gqa-scaling run experiments.laptop --workers 2        # on a GPU without --workers
    gqa-scaling report experiments.laptop

The smoke study's question with a BPE vocabulary, longer contexts, more tokens, more heads. The sweep
tries a third of the declared rates, these and three times these; once every rate of a size is finished,
that size is trained at the best one and the choice is recorded in every run.
"""

from dataclasses import replace

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
)
from gqa_scaling.experiment.learning_rates import LearningRateSweep

VARIANTS = ("lr",)
QUESTION = Question(contexts=(2048, 8192, 32768), baseline=(8, 8), demonstration=True)
SIZES = ((2, 32, 1e-2), (3, 56, 7e-3), (4, 88, 4e-3), (5, 128, 3e-3))  # L, d, learning rate
HEADS = ((8, 8), (8, 2), (8, 1), (4, 4), (4, 1), (2, 1))  # <- what the study varies


def run(
    size: tuple[int, int, float], heads: tuple[int, int], seed: int = 0, name: str = ""
) -> RunConfig:
    """One cell of the grid."""
    (L, d, learning_rate), (n_h, n_kv) = size, heads
    return RunConfig(
        name=f"L{L}-d{d}-h{n_h}-kv{n_kv}" + (f"-seed{seed}" if seed else "") + name,
        model=ModelConfig(L, d, n_h, n_kv, head_dim=16, vocab_size=1024, dtype="float32"),
        data=DataConfig(corpus="stdlib", tokenizer="bpe-1024"),
        context_length=256,
        batch_tokens=2048,
        tokens=1000 * 2048,
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        evaluation=EvaluationConfig(tokens=2**17),
        checkpoint=CheckpointConfig(every_steps=500),
    )


def learning_rate_runs() -> list[RunConfig]:
    """Sizes x rates with the baseline's heads, seed 1000 so that no cell of the grid is reused."""
    out = []
    for size in reversed(SIZES):
        for factor in (1 / 3, 1.0, 3.0):
            rate = float(f"{size[2] * factor:.1g}")
            cell = run(size, HEADS[0], seed=1000, name=f"-lr{rate:g}")
            out.append(replace(cell, optimizer=replace(cell.optimizer, learning_rate=rate)))
    return out


def runs(variant: str = "") -> list[RunConfig]:
    """Sizes x heads, the largest first, and two more seeds of one cell."""
    if variant == "lr":
        return learning_rate_runs()
    cells = [run(size, heads) for size in reversed(SIZES) for heads in HEADS]
    return cells + [run(SIZES[1], HEADS[0], seed) for seed in (1, 2)]


LEARNING_RATES = LearningRateSweep("laptop_lr", learning_rate_runs)  # once it is finished
