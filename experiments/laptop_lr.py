"""The maximum learning rate of each size of experiments.laptop, swept once with MHA.

    gqa-scaling prepare experiments.laptop
    gqa-scaling run experiments.laptop_lr --workers 2
    gqa-scaling learning-rates experiments.laptop_lr

A third of the declared rate, that rate and three times it. Once every rate of a size is finished,
experiments.laptop trains that size at the best one and records the choice in every run.
"""

from experiments.laptop import learning_rate_runs as runs

__all__ = ["runs"]
