"""The published grid: 21 head configurations x 8 sizes at T = 8K (Chen et al. 2025, section 4).

    gqa-scaling plan experiments.head_ladder --hardware v5e --devices 64
    gqa-scaling run experiments.head_ladder_lr       # optional: the learning rate of each size
    gqa-scaling run experiments.head_ladder

On a pod of at least 8 chips (fsdp=8). 20 tokens per parameter, batches of 512K tokens. The corpus is yours: put it at
data/slimpajama as text, JSONL or Parquet files and the GPT-2 tokenizer at data/gpt2/tokenizer.json,
or name your own with --data.corpus DIR --data.tokenizer FILE.
"""

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
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.ladder import TRAINED_SIZES, Size
from gqa_scaling.experiment.learning_rates import LearningRateSweep

QUESTION = Question(contexts=(8192, 32768, 131072), baseline=(8, 8))
DATA = DataConfig(corpus="data/slimpajama", tokenizer="data/gpt2/tokenizer.json")
EVALUATION = EvaluationConfig(tokens=2**22, longest_context=2**17)


def run(size: Size, heads: tuple[int, int], learning_rate: float, name: str = "") -> RunConfig:
    """One cell of the grid, as published."""
    n_heads, n_kv_heads = heads
    return RunConfig(
        name=f"{size.name}-h{n_heads}-kv{n_kv_heads}{name}",
        model=ModelConfig(
            n_layers=size.n_layers,
            d_model=size.d_model,
            n_heads=n_heads,  # <- what the study varies
            n_kv_heads=n_kv_heads,
        ),
        data=DATA,
        context_length=8192,
        batch_tokens=64 * 8192,
        tokens_per_param=20.0,
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        evaluation=EVALUATION,
        parallel=ParallelConfig(fsdp=8, remat="dots"),
        checkpoint=CheckpointConfig(every_steps=1000),
    )


def learning_rate_runs() -> list[RunConfig]:
    """8 sizes x {1, 2, 5} x 10^{-3, -4, -5} with MHA, n_h = d/64."""
    rates = [float(f"{m}e-{p}") for p in (3, 4, 5) for m in (1, 2, 5)]
    return [
        run(size, (size.d_model // 64,) * 2, rate, f"-lr{rate:g}")
        for size in reversed(TRAINED_SIZES)
        for rate in rates
    ]


def runs() -> list[RunConfig]:
    """168 runs, the largest first, each size at its published learning rate."""
    return [
        run(size, heads, size.learning_rate)
        for size in reversed(TRAINED_SIZES)
        for heads in head_candidates(32)
    ]


LEARNING_RATES = LearningRateSweep("head_ladder_lr", learning_rate_runs)  # once it is finished
