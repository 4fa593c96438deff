"""What does reading less of the context cost in loss, and which layers may? Under an hour of CPU.

    gqa-scaling prepare experiments.context_sharding
    gqa-scaling run experiments.context_sharding --workers 2     # on a GPU without --workers
    gqa-scaling report experiments.context_sharding

The same sizes and heads dense, with a sliding window, with stripes shared out among heads and
layers (heterogeneous context sharding, arXiv 2407.17678), and with every second layer dense.
What is not said here is as in laptop.
"""

from dataclasses import replace

from experiments import laptop
from gqa_scaling.config import CheckpointConfig, Question, RunConfig
from gqa_scaling.context_sharding import ContextSharding

QUESTION = Question(contexts=(1024, 8192, 32768), baseline=(4, 2), demonstration=True)
SIZES = ((2, 32, 1e-2), (2, 64, 1e-2), (4, 64, 7e-3), (4, 96, 5e-3))  # L, d, learning rate
PATTERNS = {  # <- what the study varies; windows of 4 blocks are 64 tokens
    "dense": None,
    "window64": ContextSharding(block=16, local=4),
    "w64s8": ContextSharding(block=16, local=4, stride=8),
    "w64s16": ContextSharding(block=16, local=4, stride=16),
    "w128s16": ContextSharding(block=16, local=8, stride=16),
    "window64-hybrid": ContextSharding(block=16, local=4, dense_layers="every 2"),
    "w64s16-hybrid": ContextSharding(block=16, local=4, stride=16, dense_layers="every 2"),
}


def cell(size: tuple[int, int, float], pattern: str, seed: int) -> RunConfig:
    """A model of laptop with 4 query heads and 2 KV heads, at a longer context."""
    L, d, _ = size
    run = laptop.run(size, (4, 2), seed)
    return replace(
        run,
        name=f"L{L}-d{d}-{pattern}" + (f"-seed{seed}" if seed else ""),
        model=replace(run.model, pattern=PATTERNS[pattern]),
        context_length=1024,
        tokens=1600 * 2048,
        checkpoint=CheckpointConfig(every_steps=400),
    )


def runs() -> list[RunConfig]:
    """Sizes x patterns, the largest first, and two more seeds of one cell."""
    cells = [(size, name, 0) for size in reversed(SIZES) for name in PATTERNS]
    cells += [(SIZES[1], "dense", seed) for seed in (1, 2)]
    return [cell(size, name, seed) for size, name, seed in cells]
