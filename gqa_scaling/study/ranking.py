"""Which configuration is the cheapest, and how sure that is.

Every answer that ranks configurations does it here. Sizes and costs are arrays (rows, configurations):
the point estimate in the first row, then one row for each refit of the bootstrap, whose draw all
configurations share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads, pair
from gqa_scaling.study.serving import Costs, Deployment
from gqa_scaling.study.uncertainty import LEVEL, interval


@dataclass(frozen=True)
class Ranked:
    """A configuration of one size, and how it compares with the others at one context.

    Layers and width are real-valued, between the study's sizes. Memory is in values; `cost` is the
    objective, infinite where no size does what is asked within what must hold. Savings are
    1 - cost / the baseline's, of memory, FLOPs, Z and the objective, with intervals over the refits.
    `probability` is the share of refits in which it is the cheapest, `within` that in which it is no
    dearer than the cheapest by more than the question's indifference, both of those in which any
    configuration does what is asked; `unreachable` the share of all in which it does not itself.
    """

    heads: Heads
    n: float
    n_layers: float
    d_model: float
    memory: float
    flops: float
    z: float
    cost: float
    saving: dict[str, float]
    saving_interval: dict[str, Interval]
    probability: float
    within: float
    unreachable: float

    @property
    def reached(self) -> bool:
        """Whether some size that can be built does what is asked within what must hold."""
        return math.isfinite(self.cost)

    @property
    def order(self) -> tuple:
        """Sorts configurations, the cheapest first."""
        return self.cost, -self.probability, self.heads


@dataclass(frozen=True)
class Ranking:
    """Configurations of given sizes, compared in every row of (rows, configurations).

    `cost` is infinite where what must hold does not; `regret` as `decide` gives it.
    """

    deployment: Deployment
    heads: Sequence[Heads]
    n: np.ndarray
    costs: Sequence[Costs]
    cost: np.ndarray
    probability: np.ndarray
    regret: np.ndarray

    @property
    def near(self) -> np.ndarray:
        """Which are as good as the cheapest (refits, configurations): `near_least`."""
        return near_least(self.cost[1:], self.deployment.question.indifference)

    @property
    def tied(self) -> tuple[Heads, ...]:
        """What may be chosen: `tied` by this cost; none where the cheapest misses the loss."""
        cost, near = self.cost[0], self.near
        if not np.isfinite(cost).any():
            return ()
        first = min(range(len(cost)), key=lambda k: (cost[k], -self.probability[k], self.heads[k]))
        return tuple(self.heads[k] for k in tied(near, first))

    def of(self, k: int, reference: Costs, *, finite: bool = False) -> Ranked:
        """One configuration against the reference's costs, one for all rows or one for each.

        Savings are NaN where the reference's cost is infinite. Refits in which the configuration
        does not do what is asked count as endless costs; `finite` leaves them out of intervals.
        """
        costs, cost = self.costs[k], self.cost[:, k]
        kept = np.isfinite(cost) if finite else np.ones(len(cost), bool)
        saving = {
            kind: saved(getattr(costs, kind), getattr(reference, kind))
            for kind in self.deployment.kinds
        }
        return Ranked(
            heads=self.heads[k],
            n=float(self.n[0, k]),
            n_layers=float(costs.n_layers[0]),
            d_model=float(costs.d_model[0]),
            memory=float(costs.memory[0]),
            flops=float(costs.flops[0]),
            z=float(costs.z[0]),
            cost=float(cost[0]),
            saving={kind: float(v[0]) for kind, v in saving.items()},
            saving_interval={kind: known_interval(v[1:][kept[1:]]) for kind, v in saving.items()},
            probability=float(self.probability[k]),
            within=float(self.near[:, k].mean()) if len(self.near) else 0.0,
            unreachable=float(np.isinf(cost[1:]).mean()),
        )


def rank(deployment: Deployment, heads: Sequence[Heads], n: np.ndarray) -> Ranking:
    """Compare configurations whose sizes are n (rows, configurations), infinite where there is none."""
    costs = [deployment.drawn(deployment.costs(n[:, k], h), pair(h)) for k, h in enumerate(heads)]
    cost = np.stack([deployment.cost(c, h) for c, h in zip(costs, heads, strict=True)], axis=1)
    return Ranking(deployment, heads, n, costs, cost, *decide(cost[1:]))


def decide(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of being cheapest and expected regret, from costs (draws, configurations).

    Draws in which nothing reaches the loss say nothing and are left out; the regret of a
    configuration that misses it in some other draw is infinite.
    """
    least = draws.min(1)
    kept = np.isfinite(least)
    if not kept.any():
        return np.zeros(draws.shape[1]), np.full(draws.shape[1], math.nan)
    draws, least = draws[kept], least[kept]
    probability = np.bincount(draws.argmin(1), minlength=draws.shape[1]) / len(draws)
    return probability, (draws / least[:, None] - 1).mean(0)


def near_least(draws: np.ndarray, margin: float) -> np.ndarray:
    """Whose cost is within `margin`, a share, of the least in each draw (draws, configurations)."""
    least = draws.min(1)
    kept = np.isfinite(least)
    return draws[kept] <= (1 + margin) * least[kept, None]


def tied(near: np.ndarray, first: int) -> list[int]:
    """The configurations among which these draws do not decide, `first` ahead of the others.

    With a probability of 90% all that are left out are dearer than the cheapest by more than the
    margin of `near` (`near_least`). So a tie is either practical, two costs that differ by less than
    the margin in nearly all draws, or of noise: draws in which another one is the cheapest. Taken in
    are `first`, then what is near the cheapest most often, until in 90% of the draws nothing near it
    is left. Without a margin these are the fewest that hold 90% of the probability of being cheapest.
    """
    out, left = [first], near.copy()
    left[:, first] = False
    others = sorted(set(range(near.shape[1])) - {first}, key=lambda k: -near[:, k].sum())
    for k in others if len(near) else ():
        if 1 - left.any(1).mean() >= LEVEL - 1e-12:
            break
        out.append(k)
        left[:, k] = False
    return out


def saved(cost: Any, reference: Any) -> Any:
    """1 - cost / reference; NaN where the reference is infinite: it never does what is asked.

    Rounded where only the rounding of searches is left, so that no saving is a negative 0.
    """
    with np.errstate(invalid="ignore"):
        saving = np.round(1 - np.divide(cost, reference), 12) + 0.0
    return np.where(np.isinf(reference), math.nan, saving)


def known_interval(draws: np.ndarray) -> Interval:
    """The interval of the draws that are not NaN; NaN where all are."""
    kept = draws[~np.isnan(draws)]
    return interval(kept) if len(kept) else (math.nan, math.nan)
