"""Llama-3's heads against the cost-optimal ones at 128K: the published pair (Chen et al. 2025, section 5).

    gqa-scaling plan experiments.llama3_vs_optimal --hardware v5p --devices 64
    gqa-scaling run experiments.llama3_vs_optimal

1.2B parameters with (32, 8) heads and 1.8B with (8, 1), which are to reach one loss at 128K. Each is
trained on 20B tokens at 4K; another run goes on from its parameters, with a fresh optimizer, on 1B
tokens at 128K and a maximum learning rate of 1e-5. Needles are asked for at up to 128K. On a pod of
64 chips (fsdp x context). The corpus and the tokenizer are those of head_ladder; llama3_vs_optimal_small
is the same shrunken, for a CPU.
"""

from dataclasses import replace

from experiments.head_ladder import DATA
from gqa_scaling.config import (
    CheckpointConfig,
    EvaluationConfig,
    ModelConfig,
    NeedleTask,
    OptimizerConfig,
    ParallelConfig,
    Question,
    RunConfig,
)
from gqa_scaling.experiment.starts import start_of

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
        data=DATA,
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


def runs() -> list[RunConfig]:
    """Both models at 4K, then both at 128K."""
    parents = {name: short(name, model) for name, model in PAIR.items()}
    return [*parents.values(), *(long(name, parent) for name, parent in parents.items())]
