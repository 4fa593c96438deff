"""Which heads for a tiny byte-level model? A demonstration in minutes, run by `make smoke`.

    gqa-scaling prepare experiments.smoke
    gqa-scaling run experiments.smoke --workers 2 --only 'L[23]-*'
    gqa-scaling run experiments.smoke --workers 2 --forecast experiments.smoke
    gqa-scaling report experiments.smoke

The second command forecasts the largest size from the others before it trains it, and the report
says how good that was. Four sizes spanning 20x at one token budget, four head configurations, and two more seeds of one
cell, which tell how much of a difference is noise.
"""

from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
)

QUESTION = Question(contexts=(512, 2048, 8192), baseline=(4, 4), demonstration=True)
SIZES = ((2, 24, 1e-2), (2, 48, 1e-2), (3, 64, 7e-3), (4, 96, 4e-3))  # L, d, learning rate
HEADS = ((4, 4), (8, 1), (4, 1), (1, 1))  # <- what the study varies


def runs() -> list[RunConfig]:
    """Sizes x heads, the largest first, then the replicate seeds."""
    cells = [(size, heads, 0) for size in reversed(SIZES) for heads in HEADS]
    cells += [(SIZES[1], HEADS[0], seed) for seed in (1, 2)]
    return [
        RunConfig(
            name=f"L{L}-d{d}-h{n_h}-kv{n_kv}" + (f"-seed{seed}" if seed else ""),
            model=ModelConfig(L, d, n_h, n_kv, head_dim=8, vocab_size=264, dtype="float32"),
            data=DataConfig(corpus="stdlib", tokenizer="bytes"),
            context_length=128,
            batch_tokens=1024,
            tokens=800 * 1024,
            seed=seed,
            optimizer=OptimizerConfig(learning_rate=learning_rate),
            evaluation=EvaluationConfig(tokens=2**17),
            checkpoint=CheckpointConfig(every_steps=200),
        )
        for (L, d, learning_rate), (n_h, n_kv), seed in cells
    ]
