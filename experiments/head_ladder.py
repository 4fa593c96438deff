"""The published grid: 21 head configurations x 8 sizes at T = 8K (Chen et al. 2025, section 4).

    gqa-scaling plan experiments.head_ladder --hardware v5e --devices 64
    gqa-scaling run experiments.head_ladder@lr       # optional: the learning rate of each size
    gqa-scaling run experiments.head_ladder

The sizes are those of the paper's table; head_ladder@figure has those of its figure 2, d = 64 L. On a
pod of at least 8 chips (fsdp=8). 20 tokens per parameter, batches of 512K tokens. The corpus is yours: put
it at data/slimpajama as text, JSONL or Parquet files and the GPT-2 tokenizer at data/gpt2/tokenizer.json,
or name your own with --data.corpus DIR --data.tokenizer FILE. @laptop and @smoke are the same grid small.
"""

from gqa_scaling.config import Question, RunConfig
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.ladder import FIGURE_2_LADDER, TRAINED_SIZES, Size
from gqa_scaling.experiment.learning_rates import LearningRateSweep
from gqa_scaling.experiment.scales import FULL

VARIANTS = ("lr", "figure", *scales.VARIANTS)
QUESTION = Question(contexts=FULL.contexts, baseline=(8, 8))
# The figure's sizes at the rate that the table has for as many parameters.
FIGURE_RATES = (1e-3, 5e-4, 5e-4, 2e-4, 2e-4, 2e-4)
FIGURE_SIZES = tuple(
    Size(f"L{L}-d{d}", L, d, rate)
    for (L, d), rate in zip(FIGURE_2_LADDER, FIGURE_RATES, strict=True)
)


def question(variant: str) -> Question:
    scale = scales.SCALES.get(variant, FULL)
    most = min(8, scale.most_heads)
    return Question(contexts=scale.contexts, baseline=(most, most), demonstration=scale is not FULL)


def learning_rate_runs() -> list[RunConfig]:
    """8 sizes x {1, 2, 5} x 10^{-3, -4, -5} with MHA, n_h = d/64."""
    rates = [float(f"{m}e-{p}") for p in (3, 4, 5) for m in (1, 2, 5)]
    return [
        FULL.run(Size(size.name, size.n_layers, d, rate), (d // 64,) * 2, f"-lr{rate:g}")
        for size in reversed(TRAINED_SIZES)
        for d in (size.d_model,)
        for rate in rates
    ]


def runs(variant: str = "") -> list[RunConfig]:
    """Sizes x heads, the largest first, each size at its learning rate: 168 runs at full scale."""
    if variant == "lr":
        return learning_rate_runs()
    scale = FULL if variant == "figure" else scales.at(variant)
    sizes = FIGURE_SIZES if variant == "figure" else scale.sizes
    return [scale.run(size, heads) for size in reversed(sizes) for heads in scale.heads]


LEARNING_RATES = LearningRateSweep("head_ladder_lr", learning_rate_runs)  # once it is finished
