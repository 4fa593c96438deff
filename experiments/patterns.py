"""What do windows and stripes lose where reading far is what counts, and does it hang on the heads?

    gqa-scaling plan experiments.patterns --hardware v5p --devices 8
    gqa-scaling prepare experiments.patterns@laptop
    gqa-scaling run experiments.patterns@laptop --workers 2
    gqa-scaling report experiments.patterns@laptop

Patterns are those of context_sharding, the text that of recall: of a fifth of it values are told once and asked
for again anywhere in the context. Judged by needles at several lengths and depths, and by the loss with less
text before. recall is the same at a size where recall is just learnt.
"""

from dataclasses import replace

from gqa_scaling.config import Needles, NeedleTask, Question, RunConfig
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.scales import VARIANTS as VARIANTS

QUESTION = Question(contexts=(32768,), baseline=(8, 8))
CONTEXT = {"": 32768, "laptop": 512, "smoke": 128}
BLOCK = {"": 128, "laptop": 16, "smoke": 8}
NEEDLES = {
    "": Needles(share=0.2, form="uuid"),
    "laptop": Needles(share=0.2, form="tokens"),
    "smoke": Needles(share=0.2, form="tokens"),
}


def question(scale: str) -> Question:
    most = scales.at(scale).most_heads
    return Question(contexts=(CONTEXT[scale],), baseline=(most, most), demonstration=True)


def patterns(block: int) -> dict[str, ContextSharding | None]:
    """A window of 4 blocks, with stripes of distant ones, and with every second layer dense."""
    return {  # <- what the study varies
        "dense": None,
        "window": ContextSharding(block=block, local=4),
        "stripes": ContextSharding(block=block, local=4, stride=8),
        "hybrid": ContextSharding(block=block, local=4, stride=8, dense_layers="every 2"),
    }


def runs(scale: str = "") -> list[RunConfig]:
    """Three sizes x heads x patterns, the smallest first."""
    s, T = scales.at(scale), CONTEXT[scale]
    most = min(8, s.most_heads)
    lengths = (T // 4, T // 2, T)
    needles = NEEDLES[scale]
    evaluation = replace(
        s.evaluation, contexts=lengths[:2], needles=NeedleTask(lengths=lengths, form=needles.form)
    )
    return [
        replace(
            run,
            name=f"{run.name}-{name}",
            model=replace(run.model, pattern=pattern),
            data=replace(s.data, needles=needles),
            context_length=T,
            parallel=s.parallel(T),
            evaluation=evaluation,
        )
        for size in s.sizes[:3]
        for run in (s.run(size, (most, most)), s.run(size, (most, 1)))
        for name, pattern in patterns(BLOCK[scale]).items()
    ]
