"""How do heads compare at other token budgets than 20 a parameter? L(N, D) for each configuration.

    gqa-scaling plan experiments.token_budgets --hardware v5e --devices 64
    gqa-scaling prepare experiments.token_budgets@laptop
    gqa-scaling run experiments.token_budgets@laptop --workers 2
    gqa-scaling report experiments.token_budgets@laptop

From 5 to 80 tokens for each parameter. The warm-up is as long at every budget, so what budgets share until
their decay is trained once: `plan` says what that saves.
"""

from gqa_scaling.config import Question, RunConfig
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.branches import at_budgets
from gqa_scaling.experiment.scales import VARIANTS as VARIANTS

QUESTION = Question(contexts=scales.FULL.contexts, baseline=(8, 8))
BUDGETS = (5, 10, 20, 40, 80)  # <- what the study varies: tokens a parameter


def question(scale: str) -> Question:
    contexts, most = scales.at(scale).contexts, scales.at(scale).most_heads
    return Question(contexts=contexts, baseline=(most, most), demonstration=True)


def runs(scale: str = "") -> list[RunConfig]:
    """Sizes x heads x budgets, the smallest first."""
    s = scales.at(scale)
    most = min(8, s.most_heads)
    return [
        run
        for size in s.sizes[:4]
        for heads in ((most, most), (most, 1), (most // 2, 1), (1, 1))
        for run in at_budgets(s.run(size, heads), BUDGETS)
    ]
