"""Which heads for a small model of this text? Change it to ask your own question.

    gqa-scaling prepare SPEC
    gqa-scaling plan SPEC
    gqa-scaling run SPEC --workers 2
    gqa-scaling report SPEC

Every size is trained with every pair of heads; the report says which of them reach a loss at the least
cost. A fit needs three sizes, and says more with four that span a factor of ten or more.
"""

from gqa_scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
)

# What is asked: the context lengths at which the model will serve, and what savings are stated against.
QUESTION = Question(contexts=(512, 2048, 8192), baseline=(4, 4))

# What is tried: layers, width and learning rate of each size, and (query heads, KV heads).
SIZES = ((2, 32, 1e-2), (2, 48, 1e-2), (3, 64, 7e-3), (4, 96, 4e-3))
HEADS = ((4, 4), (4, 2), (4, 1))

# "stdlib" is the source of this Python's library; else a folder of text files or a .jsonl or .parquet
# file, relative to where the commands are given. "bpe-4096" trains a tokenizer; vocab_size must hold it.
DATA = DataConfig(corpus="stdlib", tokenizer="bytes")
VOCABULARY = 264


def runs() -> list[RunConfig]:
    """Sizes x heads, the largest first."""
    return [
        RunConfig(
            name=f"L{layers}-d{width}-h{n_heads}-kv{n_kv_heads}",
            model=ModelConfig(
                layers,
                width,
                n_heads,
                n_kv_heads,
                head_dim=8,
                vocab_size=VOCABULARY,
                dtype="float32",  # bfloat16, the default, where there are accelerators
            ),
            data=DATA,
            context_length=128,
            batch_tokens=1024,
            tokens=400 * 1024,
            optimizer=OptimizerConfig(learning_rate=rate),
            evaluation=EvaluationConfig(tokens=2**16),
        )
        for layers, width, rate in reversed(SIZES)
        for n_heads, n_kv_heads in HEADS
    ]
