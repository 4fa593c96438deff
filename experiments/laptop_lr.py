"""The maximum learning rate of each size of experiments.laptop, swept once with MHA.

    gqa-scaling run experiments.laptop_lr --workers 2
    gqa-scaling learning-rates experiments.laptop_lr

experiments.laptop reads the choice and records it in every run.
"""

from dataclasses import replace

from experiments.laptop import SIZES, run
from gqa_scaling.config import RunConfig

FACTORS = (1 / 3, 1.0, 3.0)  # of the rate that experiments.laptop declares


def runs() -> list[RunConfig]:
    """Sizes x rates with the baseline's heads, seed 1000 so that no cell of the grid is reused."""
    out = []
    for size in reversed(SIZES):
        for factor in FACTORS:
            rate = float(f"{size[2] * factor:.1g}")
            cell = run(size, (8, 8), seed=1000, name=f"-lr{rate:g}")
            out.append(replace(cell, optimizer=replace(cell.optimizer, learning_rate=rate)))
    return out
