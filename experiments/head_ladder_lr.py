"""The maximum learning rate of each published size, swept once with MHA (Chen et al. 2025).

    gqa-scaling run experiments.head_ladder_lr
    gqa-scaling learning-rates experiments.head_ladder_lr

{1, 2, 5} x 10^{-3, -4, -5}; experiments.head_ladder reads the choice and records it in every run.
"""

from experiments.head_ladder import run
from gqa_scaling.config import RunConfig
from gqa_scaling.ladder import TRAINED_SIZES

RATES = tuple(float(f"{m}e-{p}") for p in (3, 4, 5) for m in (1, 2, 5))


def runs() -> list[RunConfig]:
    """8 sizes x 9 rates with MHA, n_h = d/64."""
    return [
        run(size, (size.d_model // 64,) * 2, rate, f"-lr{rate:g}")
        for size in reversed(TRAINED_SIZES)
        for rate in RATES
    ]
