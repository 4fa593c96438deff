"""One configuration that spends a total of training FLOPs: more parameters, or more tokens.

Training FLOPs are 6 N D + 6 T L d_h n_h D at the training context T (`costs.training_flops_formula`).
"""

import math
from dataclasses import dataclass

import numpy as np

from gqa_scaling.costs import training_flops_formula
from gqa_scaling.study.curves import centred
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads
from gqa_scaling.study.shapes import Family, training_keys
from gqa_scaling.study.tokens import Surface, TokenLaw

_STEP = 0.05  # between the sizes that are looked at, in ln N
_GOLDEN = (math.sqrt(5) - 1) / 2
_SLACK = 1.1  # values this far outside what was trained, by their ratio, are marked


@dataclass(frozen=True)
class Trainer:
    """One configuration k trained for a total: N decides D, and both decide the loss.

    `surface` holds the law's best parameters in its first row, then those of every refit: rows of
    sizes and losses are as it. `context` is T of the training FLOPs, in tokens.
    """

    law: TokenLaw
    surface: Surface
    k: int
    family: Family
    context: int

    @property
    def heads(self) -> Heads:
        return self.law.heads[self.k]

    def flops_per_token(self, n: np.ndarray | float, layers: float | None = None) -> np.ndarray:
        """Training FLOPs of one token at N, the layers those of the study's ladder or as given."""
        n, head_dim = np.asarray(n, float), self.family.head_dim
        depth = self.family.shape(n, self.heads)[0] if layers is None else np.full_like(n, layers)
        keys = training_keys(self.heads, depth, self.context)
        return training_flops_formula(n, self.context, depth, head_dim, self.heads[0], keys=keys)

    def tokens(self, n: np.ndarray | float, flops: float) -> np.ndarray:
        """D that the total buys at N; 0 at an infinite N."""
        return flops / self.flops_per_token(n)

    def loss(self, n: np.ndarray, flops: float) -> np.ndarray:
        """Loss for the total at N, of shape (rows,) or (rows, more), in nats."""
        return self.surface.loss(self.k, n, self.tokens(n, flops))

    def outside(self, n: float, tokens: float) -> tuple[bool, bool]:
        """Whether N lies outside the configuration's sizes, and D outside the budgets of all runs.

        Both by more than a tenth: one N is never the same (L, d) for two configurations.
        """

        def far(value: float, trained: Interval) -> bool:
            return not trained[0] / _SLACK <= value <= trained[1] * _SLACK

        return far(n, self.law.fit.points.range_n(self.k)), far(tokens, self.law.range_tokens)

    @property
    def grid(self) -> np.ndarray:
        """ln N of all sizes that can be built, a step apart."""
        low, high = np.log(self.family.reach(self.heads))
        return np.linspace(low, high, round((high - low) / _STEP) + 1)

    def near(self, n: float) -> np.ndarray:
        """ln N of the sizes between those that were trained and n, no more than a step apart."""
        least, most = self.law.fit.points.range_n(self.k)
        low, high = np.log(min(least, n)), np.log(max(most, n))
        return np.linspace(low, high, round((high - low) / _STEP) + 2)

    def lowest(self, flops: float, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The N of lowest loss for the total, within the grid of ln N, and that loss (rows,)."""
        losses = self.loss(np.exp(grid)[None], flops)
        i = losses.argmin(1)
        low, high = grid[np.maximum(i - 1, 0)], grid[np.minimum(i + 1, len(grid) - 1)]
        for _ in range(40):
            width = _GOLDEN * (high - low)
            left, right = high - width, low + width
            keep = self.loss(np.exp(left), flops) <= self.loss(np.exp(right), flops)
            low, high = np.where(keep, low, left), np.where(keep, right, high)
        n = np.exp((low + high) / 2)
        return n, self.loss(n, flops)

    def least(
        self, target: np.ndarray, n: np.ndarray, layers: float | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The least training FLOPs (rows,) that reach the target losses, and their N and D.

        Sought among the sizes n, whose layers are the ladder's unless they are given; infinite where
        none gets there on any number of tokens.
        """
        s, c, k = self.surface, self.surface.curves, self.k
        per_token = self.flops_per_token(n, layers)
        own = centred(n[None], c.u[:, [k]], c.b[:, [k]], 0.0, c.centre[k])
        excess = target[:, None] - c.floor[:, None] - own
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            log_tokens = (s.v[:, None] - np.log(excess)) / s.beta[:, None]
            tokens = np.exp(log_tokens + s.token_centre)
        reached = (excess > 0) & (s.beta[:, None] > 0)
        flops = np.where(reached, tokens * per_token, np.inf)
        i, rows = flops.argmin(1), np.arange(len(flops))
        return flops[rows, i], n[i], np.where(reached, tokens, np.inf)[rows, i]

    def smallest(
        self, flops: float, target: np.ndarray, best: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        """The least N (rows,) that reaches the target loss for the total; inf where none does.

        `best` is what `lowest` gives. Left of it the loss falls with N, so the root is bracketed.
        """
        (n_best, least), grid = best, self.grid
        above = self.loss(np.exp(grid)[None], flops) > target[:, None]
        above &= grid[None] < np.log(n_best)[:, None]
        last = len(grid) - 1 - above[:, ::-1].argmax(1)
        low, high = grid[last], np.log(n_best)
        for _ in range(50):
            middle = (low + high) / 2
            reached = self.loss(np.exp(middle), flops) <= target
            low, high = np.where(reached, low, middle), np.where(reached, middle, high)
        # at a baseline that is itself the best of its total the loss only touches the target
        touches = least <= target + 1e-12
        return np.where(touches & above.any(1), np.exp(high), np.inf)
