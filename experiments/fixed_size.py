"""Do more query heads help more than as many KV heads, at one and the same size?

    gqa-scaling plan experiments.fixed_size --hardware v5e --devices 64
    gqa-scaling prepare experiments.fixed_size@laptop
    gqa-scaling run experiments.fixed_size@laptop --workers 2

Chen et al. 2025 find L = a n_h^b + c at fixed N. Here N is that of the size with the most query heads and
one KV head; layers stay, and what fewer heads leave goes into width and FFN. Query heads at one KV
head, KV heads at the most query heads, and MHA; three seeds of two cells say what is noise.
"""

from dataclasses import replace

from gqa_scaling.config import Question, RunConfig
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.ladder import at_size
from gqa_scaling.experiment.scales import VARIANTS as VARIANTS

QUESTION = Question(contexts=scales.FULL.contexts, baseline=(8, 8))


def question(scale: str) -> Question:
    contexts, most = scales.at(scale).contexts, scales.at(scale).most_heads
    return Question(contexts=contexts, baseline=(most, most), demonstration=True)


def runs(scale: str = "") -> list[RunConfig]:
    """Three sizes x heads, the smallest first."""
    s = scales.at(scale)
    most, powers = s.most_heads, [2**k for k in range(s.most_heads.bit_length())]
    heads = sorted(
        {*((h, 1) for h in powers), *((most, k) for k in powers), *((h, h) for h in powers)}
    )
    out = []
    for size in s.sizes[1:4]:
        like = s.run(size, (most, 1)).model
        for h in heads:  # <- what the study varies
            run = s.run(size, h)
            out.append(replace(run, model=at_size(like, run.model, multiple=s.width_step)))
        seeds = [
            run for run in out[-len(heads) :] if run.name.endswith(("-h1-kv1", f"-h{most}-kv1"))
        ]
        out += [replace(r, seed=k, name=f"{r.name}-seed{k}") for r in seeds for k in (1, 2)]
    return out
