"""What each configuration reaches for what the baseline costs: the largest size of an equal cost.

Costs are not inverted in closed form: between a ladder's sizes they follow real-valued layers and
widths, and may even fall with N where the ladder turns wider at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gqa_scaling.study.baseline import Reference
from gqa_scaling.study.candidates import sizes_of
from gqa_scaling.study.curves import Curves
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import known_interval
from gqa_scaling.study.results import Heads, pair
from gqa_scaling.study.serving import Deployment

Load = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # N to costs and shares held
_MOST_STEPS = 60  # of a search that takes five between two sizes of the grid
_ROUNDING = 1e-12  # costs this much apart, relative, are one cost: rounding leaves about 1e-15


@dataclass(frozen=True)
class EqualCost:
    """What a configuration reaches for what the baseline costs at the target loss.

    `n` is the largest size within reach of the study that costs no more, by the objective, and holds
    what must hold, `loss` the curve there, in nats. `gain` is the baseline's loss minus `loss`, the
    baseline too at its largest size of that cost: its N*, except where a ladder that turns wider at
    once makes a larger model no dearer. In each refit the cost is that of its own N*, as for the
    savings. NaN where the baseline has none, or where no size is as cheap.
    """

    n: float
    n_interval: Interval
    loss: float
    gain: float
    gain_interval: Interval
    extrapolated: bool


NOT_SOUGHT = EqualCost(
    math.nan, (math.nan, math.nan), math.nan, math.nan, (math.nan, math.nan), True
)


def equal_costs(
    fit: Fit, curves: Curves, deployment: Deployment, heads: Sequence[Heads], base: Reference
) -> list[EqualCost]:
    """`EqualCost` of these configurations for what the baseline costs at the target loss.

    Rows are the point estimate, then every refit. The baseline's own loss is free of what must hold.
    """
    budgets, limit = deployment.objective_of(base.costs), deployment.serving.limit_bytes
    baseline = base.loss
    if base.k is not None:
        free = affordable(deployment, fit.heads[base.k], budgets, math.inf, base.n)
        baseline = curves.loss_by_row(base.k, free)
    out = []
    for own in heads:
        k = fit.index(own)
        sizes, (low, high) = np.full_like(budgets, math.nan), sizes_of(fit, k)
        if deployment.serving.allows(own):
            known = base.n if k == base.k else None
            sizes = affordable(deployment, own, budgets, limit, known)
        losses = curves.loss_by_row(k, sizes)
        gains = baseline - losses
        out.append(
            EqualCost(
                n=float(sizes[0]),
                n_interval=known_interval(sizes[1:]),
                loss=float(losses[0]),
                gain=float(gains[0]),
                gain_interval=known_interval(gains[1:]),
                extrapolated=not low <= sizes[0] <= high,
            )
        )
    return out


def affordable(
    deployment: Deployment,
    heads: Heads,
    budgets: np.ndarray,
    limit: float,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """The largest N (rows,) of these heads that costs no more than the budgets and holds no more bytes
    than the limit; `known` as in `largest`."""

    def load(n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        costs = deployment.costs(n, heads)
        return deployment.objective_of(costs), costs.bytes / limit

    allowed = budgets / deployment.off(pair(heads), len(budgets))
    return largest(load, deployment.family.sizes(heads), allowed, known)


def largest(
    load: Load, grid: np.ndarray, budgets: np.ndarray, known: np.ndarray | None = None
) -> np.ndarray:
    """For each budget the largest N that costs no more and holds what must hold.

    `load` gives, for an array of N, the costs and what is held as a share of what may be. Costs
    need not rise everywhere, but their least values lie on the ascending `grid`. NaN where no size
    is as cheap, or the budget is no finite number; the grid's end is the largest size there is.

    Costs that differ by rounding alone are equal (`_ROUNDING`): which of two is smaller by its last
    bit differs from processor to processor. Where the budgets are the costs of `known` sizes, these
    cost no more than themselves, so that none comes out smaller than it is.
    """

    def over(x: np.ndarray, budget: np.ndarray) -> np.ndarray:
        """At most 0 where a size of ln N = x is within what it may cost and hold."""
        cost, held = load(np.exp(x))
        return np.log(np.maximum(cost / budget, held)) - _ROUNDING

    cost, held = load(grid)
    cheapest_from = np.minimum.accumulate(np.where(held <= 1, cost, math.inf)[::-1])[::-1]
    last = np.searchsorted(cheapest_from, budgets * (1 + _ROUNDING), side="right") - 1
    some = (last >= 0) & np.isfinite(budgets)
    sizes = np.where(some, grid[last], math.nan)
    between = np.flatnonzero(some & (last < len(grid) - 1))
    if len(between):
        ends = np.log(grid[last[between]]), np.log(grid[last[between] + 1])
        sizes[between] = np.exp(_crossing(lambda x: over(x, budgets[between]), *ends))
    if known is None:
        return sizes
    with np.errstate(invalid="ignore"):
        holds = np.isfinite(known) & (load(known)[1] <= 1)
    return np.fmax(sizes, np.where(holds, known, math.nan))


def _crossing(
    over: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray
) -> np.ndarray:
    """Where a function crosses 0 between these ends, for many at once; `low` where it does not.

    It is at most 0 at `low` and above at `high`, but for rounding. Regula falsi as the Illinois
    algorithm has it: an end that stays has its value halved (Dowell and Jarratt 1971).
    """
    below, above = over(low), over(high)
    crosses, first, before = (below < 0) & (above > 0), low, np.zeros(len(low))
    x = first
    for _ in range(_MOST_STEPS):
        with np.errstate(invalid="ignore", divide="ignore"):
            x = np.where(crosses, low + (high - low) * (below / (below - above)), first)
        value = over(x)
        if (~crosses | (np.abs(value) <= _ROUNDING)).all():
            break
        side = np.sign(value)
        stays = np.where(side == before, 0.5, 1.0)
        low, below, high, above = (
            np.where(side > 0, low, x),
            np.where(side > 0, stays * below, value),
            np.where(side > 0, x, high),
            np.where(side > 0, value, stays * above),
        )
        before = side
    return x
