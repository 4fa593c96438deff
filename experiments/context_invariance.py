"""Do differences between heads stay as the training context grows?

    gqa-scaling plan experiments.context_invariance --hardware v5p --devices 8
    gqa-scaling prepare experiments.context_invariance@laptop
    gqa-scaling run experiments.context_invariance@laptop --workers 2
    gqa-scaling report experiments.context_invariance@laptop

Chen et al. 2025 find relative differences flat from 8K on, so that curves fitted there carry to longer
contexts. Each model is trained at each length, on as many tokens in batches of as many; it is judged on the
same targets by their position, and with the text before them cut to every shorter length.
"""

from dataclasses import replace

from gqa_scaling.config import Question, RunConfig
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.scales import VARIANTS as VARIANTS

QUESTION = Question(contexts=scales.FULL.contexts, baseline=(8, 8))
LENGTHS = {  # <- what the study varies
    "": (1024, 2048, 8192, 32768, 131072),
    "laptop": (64, 128, 256, 512, 1024),
    "smoke": (64, 128, 256),
}


def question(scale: str) -> Question:
    most = scales.at(scale).most_heads
    return Question(contexts=LENGTHS[scale][-1:], baseline=(most, most), demonstration=True)


def runs(scale: str = "") -> list[RunConfig]:
    """Three sizes x four heads x lengths, the smallest first."""
    s, lengths = scales.at(scale), LENGTHS[scale]
    most = min(8, s.most_heads)
    return [
        replace(
            s.run(size, heads, f"-T{length}"),
            context_length=length,
            parallel=s.parallel(length),
            evaluation=replace(s.evaluation, contexts=lengths[: lengths.index(length)]),
        )
        for size in s.sizes[:3]
        for heads in ((most, most), (most, 1), (most // 2, 1), (1, 1))
        for length in lengths
    ]
