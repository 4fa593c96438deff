"""The maximum learning rate of each published size, swept once with MHA (Chen et al. 2025).

    gqa-scaling run experiments.head_ladder_lr
    gqa-scaling learning-rates experiments.head_ladder_lr

Once every rate of a size is finished, experiments.head_ladder trains that size at the best one and
records the choice in every run.
"""

from experiments.head_ladder import learning_rate_runs as runs

__all__ = ["runs"]
