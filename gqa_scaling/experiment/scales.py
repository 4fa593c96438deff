"""What the studies that come with it are made of, at three scales.

A study says what it varies; sizes, text, batches and devices are those of its scale. `FULL` is Chen
et al. 2025 (section 4 and appendix) on a pod, `LAPTOP` hours of a CPU or minutes of a GPU, and `SMOKE`
minutes of a CPU, for trying the way: nothing can be decided by that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from gqa_scaling import costs
from gqa_scaling.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    require,
)
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.ladder import TRAINED_SIZES, Size


@dataclass(frozen=True)
class Scale:
    """Sizes, heads, text and batches of a study.

    `sizes` go from small to large, each with its maximum learning rate. Lengths are in tokens:
    `context_length` is trained at, `contexts` are served. Widths that are chosen for an N are multiples
    of `width_step`. `devices` share a batch.
    """

    sizes: tuple[Size, ...]
    most_heads: int
    head_dim: int
    vocab_size: int
    dtype: Literal["bfloat16", "float32"]
    data: DataConfig
    context_length: int
    contexts: tuple[int, ...]
    batch_tokens: int
    evaluation: EvaluationConfig
    every_steps: int
    width_step: int = 4
    devices: int = 1

    @property
    def heads(self) -> list[tuple[int, int]]:
        """Query and KV heads: all powers of two up to `most_heads`."""
        return head_candidates(self.most_heads)

    def run(self, size: Size, heads: tuple[int, int], name: str = "") -> RunConfig:
        """One model: 20 tokens for each of its parameters, at the learning rate of its size."""
        n_heads, n_kv_heads = heads
        return RunConfig(
            name=f"{size.name}-h{n_heads}-kv{n_kv_heads}{name}",
            model=ModelConfig(
                size.n_layers,
                size.d_model,
                n_heads,
                n_kv_heads,
                head_dim=self.head_dim,
                vocab_size=self.vocab_size,
                dtype=self.dtype,
            ),
            data=self.data,
            context_length=self.context_length,
            batch_tokens=self.batch_tokens,
            tokens_per_param=20.0,
            optimizer=OptimizerConfig(learning_rate=size.learning_rate),
            evaluation=self.evaluation,
            parallel=self.parallel(self.context_length),
            checkpoint=CheckpointConfig(every_steps=self.every_steps),
        )

    def parallel(self, context: int) -> ParallelConfig:
        """Sequences are dealt out to the devices; where there are fewer, devices share them."""
        if self.devices == 1:
            return ParallelConfig()
        rows = min(self.devices, self.batch_tokens // context)
        return ParallelConfig(
            fsdp=rows,
            context=self.devices // rows,
            remat="full" if context > self.context_length else "dots",
        )


FULL = Scale(
    sizes=TRAINED_SIZES,
    most_heads=32,
    head_dim=64,
    vocab_size=50304,
    dtype="bfloat16",
    data=DataConfig(corpus="data/slimpajama", tokenizer="data/gpt2/tokenizer.json"),
    context_length=8192,
    contexts=(8192, 32768, 131072),
    batch_tokens=64 * 8192,
    evaluation=EvaluationConfig(tokens=2**22, longest_context=2**17),
    every_steps=1000,
    width_step=32,
    devices=8,
)
LAPTOP = Scale(
    sizes=(  # rates by the law of experiments/linux.py
        Size("L2-d32", 2, 32, 1.8e-2),
        Size("L3-d48", 3, 48, 1e-2),
        Size("L4-d64", 4, 64, 6.9e-3),
        Size("L4-d88", 4, 88, 4.4e-3),
        Size("L5-d112", 5, 112, 3.2e-3),
        Size("L6-d144", 6, 144, 2.2e-3),
    ),
    most_heads=8,
    head_dim=16,
    vocab_size=1024,
    dtype="float32",
    data=DataConfig(corpus="linux-6.1", tokenizer="bpe-1024"),
    context_length=256,
    contexts=(2048, 8192, 32768),
    batch_tokens=2048,
    evaluation=EvaluationConfig(tokens=2**18, longest_context=1024),
    every_steps=500,
)
SMOKE = Scale(
    sizes=(
        Size("L2-d16", 2, 16, 1.5e-2),
        Size("L2-d24", 2, 24, 1e-2),
        Size("L2-d32", 2, 32, 1e-2),
    ),
    most_heads=4,
    head_dim=8,
    vocab_size=264,
    dtype="float32",
    data=DataConfig(corpus="stdlib", tokenizer="bytes"),
    context_length=128,
    contexts=(512, 2048, 8192),
    batch_tokens=1024,
    evaluation=EvaluationConfig(tokens=2**15, longest_context=256),
    every_steps=100,
)
SCALES: Mapping[str, Scale] = {"": FULL, "laptop": LAPTOP, "smoke": SMOKE}
VARIANTS = ("laptop", "smoke")


def for_the_flops_of(baseline: RunConfig, run: RunConfig) -> RunConfig:
    """The run with the token budget that costs as many training FLOPs as the baseline's."""
    flops = costs.training_flops(baseline)
    tokens = round(flops / costs.training_flops_per_token(run.model, run.context_length))
    name = f"{run.name}-F{flops:.1e}".replace("+", "")
    return replace(run, name=name, tokens=tokens, tokens_per_param=None)


def at(scale: str) -> Scale:
    """The scale of this name, "" for the full one."""
    require(scale in SCALES, f"unknown scale {scale!r}: {', '.join(VARIANTS)}")
    return SCALES[scale]
