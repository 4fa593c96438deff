"""The paper's cost Z as a law of seconds: scale Z(M, C), with its own constants or fitted ones.

Z = lambda M^alpha + (1 - lambda) C^beta (Chen et al. 2025, section 4.2): M values held, C FLOPs of one
token, equations 3 and 4, here of all sequences of a batch. Its authors chose the constants by tests on
their own machine, and never held its ranking against a clock.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from scipy.special import expit, logit

from gqa_scaling.config import POWERS
from gqa_scaling.study.roofline import NOISE

_EDGE = 1e-3  # shares of either part below which it is nothing
_STARTS = ((0.5, 1.0), (0.5, 1.0))  # alpha, beta


@dataclass(frozen=True)
class ZLaw:
    """Seconds of a step: per_memory M^alpha + per_flops C^beta, which is scale Z(M, C).

    `at_bound` names those of lambda, alpha and beta that the timings do not tell.
    """

    per_memory: float
    per_flops: float
    memory_power: float
    compute_power: float
    at_bound: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Seconds of one unit of Z."""
        return self.per_memory + self.per_flops

    @property
    def weight(self) -> float:
        """Lambda."""
        return self.per_memory / self.scale

    def seconds(self, memory: Any, flops: Any) -> Any:
        """Seconds, from values and FLOPs of the whole batch."""
        m, c = memory**self.memory_power, flops**self.compute_power
        return self.per_memory * m + self.per_flops * c


def fit_z(memory: np.ndarray, flops: np.ndarray, seconds: np.ndarray) -> ZLaw:
    """The scale, lambda, alpha and beta that err least, in log seconds, soft L1 as in `roofline`.

    What is sought beside alpha and beta is the time and the share of memory in it where M and C have
    their geometric means: lambda itself depends on the units of both.
    """
    log_m, log_c, log_s = np.log(memory), np.log(flops), np.log(seconds)
    m0, c0 = log_m.mean(), log_c.mean()

    def residual(x: np.ndarray) -> np.ndarray:
        log_share, log_rest = -np.logaddexp(0, -x[1]), -np.logaddexp(0, x[1])
        parts = log_share + x[2] * (log_m - m0), log_rest + x[3] * (log_c - c0)
        return x[0] + np.logaddexp(*parts) - log_s

    edge = float(logit(1 - _EDGE / 10))
    bounds = [-np.inf, -edge, POWERS[0], POWERS[0]], [np.inf, edge, POWERS[1], POWERS[1]]
    tries = [
        least_squares(
            residual, [log_s.mean(), 0.0, alpha, beta], bounds=bounds, loss="soft_l1", f_scale=NOISE
        )
        for alpha, beta in product(*_STARTS)
    ]
    time, odds, alpha, beta = min(tries, key=lambda each: each.cost).x
    log_a, log_b = -np.logaddexp(0, -odds) - alpha * m0, -np.logaddexp(0, odds) - beta * c0
    share, at_bound = expit(odds), []
    if not _EDGE < share < 1 - _EDGE:  # the other part's power then says nothing
        at_bound += ["lambda", "beta" if share > 0.5 else "alpha"]
    for name, power in (("alpha", alpha), ("beta", beta)):
        if name not in at_bound and not 1.01 * POWERS[0] < power < 0.99 * POWERS[1]:
            at_bound.append(name)
    return ZLaw(
        per_memory=float(np.exp(time + log_a)),
        per_flops=float(np.exp(time + log_b)),
        memory_power=float(alpha),
        compute_power=float(beta),
        at_bound=tuple(at_bound),
    )
