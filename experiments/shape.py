"""What do head size, FFN ratio and aspect change at one and the same number of parameters?

    gqa-scaling plan experiments.shape --hardware v5e --devices 64
    gqa-scaling prepare experiments.shape@laptop
    gqa-scaling run experiments.shape@laptop --workers 2
    gqa-scaling report experiments.shape@laptop

Chen et al. 2025 leave these open; Bian et al. 2025 (arXiv 2510.18245) make d/sqrt(N) and the share of attention
axes of a conditional law. One is varied at a time, and width and FFN take up what it leaves. Heads of another
size are as many fewer, so that attention stays as wide.
"""

from dataclasses import replace

from gqa_scaling.config import ModelConfig, Question, RunConfig
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.ladder import at_size
from gqa_scaling.experiment.scales import VARIANTS as VARIANTS

QUESTION = Question(contexts=scales.FULL.contexts, baseline=(8, 4))
HEAD_SIZES = (1 / 4, 1 / 2, 2)  # <- what the study varies, times those of the middle
FFN_RATIOS = (1.0, 1.8, 4.0, 6.0)
DEPTHS = (1 / 2, 3 / 4, 3 / 2, 2)


def question(scale: str) -> Question:
    s = scales.at(scale)
    heads = (s.most_heads // 2, s.most_heads // 4)
    return Question(contexts=s.contexts, baseline=heads, demonstration=True)


def shapes(middle: ModelConfig, step: int) -> dict[str, ModelConfig]:
    """The model in the middle and those beside it, all of its N."""
    out = {"middle": at_size(middle, middle, multiple=step)}
    for x in HEAD_SIZES:
        size, n_heads = round(x * middle.head_dim), round(middle.n_heads / x)
        n_kv_heads = max(1, round(middle.n_kv_heads / x))
        model = replace(middle, head_dim=size, n_heads=n_heads, n_kv_heads=n_kv_heads)
        out[f"head{size}"] = at_size(middle, model, multiple=step)
    for x in FFN_RATIOS:
        out[f"ffn{x:g}"] = at_size(middle, middle, x, step)
    for L in sorted({round(x * middle.n_layers) for x in DEPTHS} - {middle.n_layers}):
        out[f"L{L}"] = at_size(middle, replace(middle, n_layers=L), multiple=step)
    return out


def runs(scale: str = "") -> list[RunConfig]:
    """Three sizes x one axis after the other, and two more seeds of the model in the middle."""
    s, out = scales.at(scale), []
    heads = (8, 4) if scale == "" else (s.most_heads // 2, s.most_heads // 4)
    for size in s.sizes[1:4]:
        run = s.run(size, heads)
        for name, model in shapes(run.model, s.width_step).items():
            other = replace(run, name=f"{size.name}-{name}", model=model)
            seeds = (0, 1, 2) if name == "middle" else (0,)
            out += [
                replace(other, name=f"{other.name}-seed{k}" if k else other.name, seed=k)
                for k in seeds
            ]
    return out
