"""What a pod must hold: 1.2B at 8K, 32K and 128K tokens of context, and 1.8B at 128K.

    gqa-scaling plan experiments.pods --compile v5e:16x16
    gqa-scaling plan experiments.pods --compile v6e:16x16
    gqa-scaling plan experiments.pods --compile v5p:4x8x8

For 256 chips, batches of 512K tokens, data and evaluation as in head_ladder. Parameters are split over
64 chips and each part lies on four: split over all 256, their gradients would be summed whole on every
chip. docs/pods.md shows what the compilers said.
"""

from gqa_scaling.config import ModelConfig, OptimizerConfig, ParallelConfig, Question, RunConfig
from gqa_scaling.experiment.scales import FULL

QUESTION = Question(contexts=(8192, 32768, 131072))
BATCH = 2**19
CHIPS, REPLICAS = 256, 4  # and how many chips hold the same part of the parameters


def run(name: str, model: ModelConfig, context: int) -> RunConfig:
    """A batch has too few sequences for one on each chip: the rest of the chips share them."""
    sequences = BATCH // context
    return RunConfig(
        name=name,
        model=model,
        data=FULL.data,
        context_length=context,
        batch_tokens=BATCH,
        tokens_per_param=20.0,
        optimizer=OptimizerConfig(learning_rate=2e-4),
        evaluation=FULL.evaluation,
        parallel=ParallelConfig(fsdp=sequences // REPLICAS, context=CHIPS // sequences),
    )


def runs() -> list[RunConfig]:
    small, large = ModelConfig(36, 1536, 24, 8), ModelConfig(36, 2048, 8, 1)
    return [
        run("1.2B-8K", small, 2**13),
        run("1.2B-32K", small, 2**15),
        run("1.2B-128K", small, 2**17),
        run("1.8B-128K", large, 2**17),
    ]
