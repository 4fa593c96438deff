"""Which heads are best for the same training FLOPs at a long context?

    gqa-scaling plan experiments.equal_training --hardware v5p --devices 8
    gqa-scaling prepare experiments.equal_training@laptop
    gqa-scaling run experiments.equal_training@laptop --workers 2

Chen et al. 2025, section 5: aligned by training FLOPs at 128K, fewer heads see more tokens. A budget is
what the baseline of one size spends on 20 tokens for each of its parameters; every configuration of every
size spends exactly that, so each budget is an isoFLOP curve for each configuration.
"""

from dataclasses import replace

from gqa_scaling.config import Question, RunConfig
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.scales import VARIANTS as VARIANTS

QUESTION = Question(contexts=(131072,), baseline=(8, 8))
LONG = {"": 131072, "laptop": 1024, "smoke": 256}


def question(scale: str) -> Question:
    most = scales.at(scale).most_heads
    return Question(contexts=(LONG[scale],), baseline=(most, most), demonstration=True)


def runs(scale: str = "") -> list[RunConfig]:
    """Budgets x the size of the budget and its neighbours x heads, the least budget first."""
    s, long = scales.at(scale), LONG[scale]
    most = min(8, s.most_heads)
    heads = ((most, most), (most, 1), (most // 2, 1), (1, 1))
    cells = [
        [replace(s.run(z, h), context_length=long, parallel=s.parallel(long)) for h in heads]
        for z in s.sizes[:4]
    ]
    return [
        scales.for_the_flops_of(baseline, run)  # <- what is equal
        for i, (baseline, *_) in enumerate(cells)
        for size in cells[max(0, i - 1) : i + 2]
        for run in size
    ]
