"""The maximum learning rate of experiments.linux, swept at its three smallest sizes with MHA.

gqa-scaling prepare experiments.linux
gqa-scaling run experiments.linux_lr --workers 2
gqa-scaling learning-rates experiments.linux_lr
"""

from experiments.linux import learning_rate_runs as runs

__all__ = ["runs"]
