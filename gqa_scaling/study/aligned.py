"""Equal training FLOPs: what each configuration reaches for the price of training a baseline.

A configuration that is cheaper for each token gets more tokens for the same total (Chen et al.
2025, section 5.6). Asked are the lowest loss that the total buys and, at the baseline's loss, the
configuration that is cheapest to serve: a smaller model trained on more tokens.

Training FLOPs are 6 N D + 6 T L d_h n_h D at the training context T: causal attention, the output
matrix left out (`costs.training_flops_formula`).
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import MOST_CONTEXT, MOST_TOKENS, Question, between, require
from gqa_scaling.costs import training_flops_formula
from gqa_scaling.study.fit import Interval, interval, plain
from gqa_scaling.study.frontier import (
    OBJECTIVES,
    Objective,
    Scale,
    Serving,
    beyond_training,
    costs_at,
    decide,
    default_baseline,
    require_costs,
    scale_of,
    units,
)
from gqa_scaling.study.results import Heads, Results, pair, pattern_of
from gqa_scaling.study.shapes import shapes, training_keys
from gqa_scaling.study.tokens import Surface, TokenLaw
from gqa_scaling.units import quantity

TRAINING = "6 N D + 6 T L d_h n_h D (causal, Tbar = T/2, without the output matrix)"
SHARDED = "; with a pattern 12 Tbar for 6 T, Tbar the mean number of keys that are read"
_STEP = 0.05  # between the sizes that are looked at, in ln N
_GOLDEN = (math.sqrt(5) - 1) / 2
_SLACK = 1.1
_SPARED = 0.05  # a larger share of refits without an answer is said so


@dataclass(frozen=True)
class Trained:
    """The lowest loss of a configuration for the baseline's training FLOPs.

    `same_n_*` keep the baseline's N and spend the FLOPs on tokens; `n`, `tokens` and `loss` have
    the best N among the sizes that the configuration was trained at and the baseline's; `beyond`
    says on which side of them the law falls further. `gain` is the baseline's loss minus `loss`, in
    nats; `probability` the share of refits in which the configuration reaches the lowest loss of
    all. `n_outside` and `tokens_outside` mark values outside what the law was fitted to.
    """

    heads: Heads
    same_n_tokens: float
    same_n_loss: float
    same_n_outside: bool
    n: float
    tokens: float
    loss: float
    gain: float
    gain_interval: Interval
    probability: float
    beyond: Literal["", "larger", "smaller"]
    n_outside: bool
    tokens_outside: bool


@dataclass(frozen=True)
class Served:
    """The smallest model of a configuration at the baseline's loss and training FLOPs, served.

    Layers and width are real-valued, between the study's sizes. N and D are infinite where no size reaches the loss. Costs are at one inference context, memory
    in values; savings are 1 - cost / the baseline run's, with intervals over the refits that reach
    the loss; `unreachable` is the share of the others.
    """

    heads: Heads
    n: float
    tokens: float
    n_layers: float
    d_model: float
    memory: float
    flops: float
    z: float
    cost: float
    saving: dict[str, float]
    saving_interval: dict[str, Interval]
    probability: float
    unreachable: float
    n_outside: bool
    tokens_outside: bool

    @property
    def reached(self) -> bool:
        """Whether some size reaches the loss within what must hold."""
        return math.isfinite(self.cost)


@dataclass(frozen=True)
class Goal:
    """One baseline run and what its training FLOPs buy.

    `trained` is sorted by loss, lowest first; `served` holds the configurations for each inference
    context, cheapest first. `loss` is the baseline's by the law, in nats; `flops` its training.
    """

    n: float
    tokens: float
    loss: float
    loss_interval: Interval
    flops: float
    outside: bool
    trained: tuple[Trained, ...]
    served: dict[int, tuple[Served, ...]]


@dataclass(frozen=True)
class Aligned:
    """The answers at equal training FLOPs, one `Goal` for each baseline run."""

    source: str
    count: str
    question: Question
    objective: Objective
    serving: Serving
    baseline: Heads
    train_context: int
    range_tokens: Interval
    goals: tuple[Goal, ...]
    intervals: str
    flags: tuple[str, ...]

    @property
    def units(self) -> dict[str, str]:
        """The unit of every kind of number here."""
        sharded = any(pattern_of(t.heads) for t in self.goals[0].trained)
        training = TRAINING + (SHARDED if sharded else "")
        return units(self.question, self.serving, sharded) | {"training_flops": training}

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        told = asdict(self)
        told["units"] = self.units
        for goal in told["goals"]:
            goal["served"] = {str(t): rows for t, rows in goal["served"].items()}
        return plain(told)


# ----------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Trainer:
    """One configuration k trained for a total: N decides D, and both decide the loss."""

    surface: Surface
    k: int
    heads: Heads
    scale: Scale
    context: int

    def flops_per_token(self, n: np.ndarray | float) -> np.ndarray:
        """Training FLOPs of one token at N, the layers those of the study's ladder."""
        n = np.asarray(n, float)
        s = self.scale
        layers, _ = shapes(s.to_formula(n, self.heads), self.heads, s.head_dim, s.ladder)
        keys = training_keys(self.heads, layers, self.context)
        return training_flops_formula(n, self.context, layers, s.head_dim, self.heads[0], keys=keys)

    def tokens(self, n: np.ndarray | float, flops: float) -> np.ndarray:
        """D that the total buys at N; 0 at an infinite N."""
        return flops / self.flops_per_token(n)

    def loss(self, n: np.ndarray, flops: float) -> np.ndarray:
        """Loss for the total at N, of shape (rows,) or (rows, more), in nats."""
        return self.surface.loss(self.k, n, self.tokens(n, flops))

    @property
    def grid(self) -> np.ndarray:
        """ln N of all sizes that can be built, a step apart."""
        low, high = np.log(self.scale.reach(self.heads))
        return np.linspace(low, high, round((high - low) / _STEP) + 1)

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

    def smallest(self, flops: float, target: np.ndarray, best: tuple) -> np.ndarray:
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


def aligned(
    law: TokenLaw,
    results: Results,
    question: Question | None = None,
    *,
    train_context: int | None = None,
    baseline_run: tuple[float, float] | None = None,
    objective: Objective = "z",
    serving: Serving | None = None,
) -> Aligned:
    """Give every configuration the training FLOPs of a baseline run and compare what comes of it.

    The run is `baseline_run`, (N, D); else, for each target loss of the question, the baseline at
    the N that reaches it with the tokens per parameter that its runs have (their median); else the
    baseline's largest size with the median of its budgets. `train_context` is T of the training FLOPs, by
    default the runs' own. Probabilities and intervals are over the law's refits, which all
    configurations share. Raises UserError for a baseline, objective or length that cannot be.
    """
    q, s = question or Question(), serving or Serving()
    require_costs(objective, s)
    trained_at = law.fit.context_length or 0
    context = trained_at if train_context is None else train_context
    require(
        context != 0,
        f"{law.fit.source}: training FLOPs need the training context length: fill in column "
        "context_length, or name one with --train-context",
    )
    between("train_context", context, 1, MOST_CONTEXT, "tokens")
    baseline = tuple(q.baseline) if q.baseline else default_baseline(law.heads)
    base, scale = law.fit.index(baseline), scale_of(results)
    surface = law.best.first(law.draws)
    trainers = [Trainer(surface, k, h, scale, context) for k, h in enumerate(law.heads)]
    goals = tuple(
        _goal(law, trainers, base, n, tokens, q, objective, s)
        for n, tokens in _baseline_runs(law, base, scale, q, baseline_run)
    )
    return Aligned(
        source=law.fit.source,
        count=law.fit.count,
        question=q,
        objective=objective,
        serving=s,
        baseline=baseline,
        train_context=context,
        range_tokens=law.range_tokens,
        goals=goals,
        intervals=law.fit.how,
        flags=_flags(law, goals, q, objective, context, trained_at),
    )


def _baseline_runs(
    law: TokenLaw, base: int, scale: Scale, q: Question, named: tuple[float, float] | None
) -> list[tuple[float, float]]:
    """(N, D) of every baseline run that is asked about."""
    mine = law.fit.points.curve == base
    n, tokens = law.fit.points.n[mine], law.tokens[mine]
    if named is not None:
        low, high = scale.reach(law.heads[base])
        require(
            low <= named[0] <= high and 1 <= named[1] <= MOST_TOKENS,
            f"baseline_run={named[0]:g},{named[1]:g} must be N and D: N from {low:.3g} to {high:.3g} "
            f"parameters, within reach of the sizes that were trained, and D from 1 to "
            f"{MOST_TOKENS:g} tokens",
        )
        return [(float(named[0]), float(named[1]))]
    if not q.losses:
        budgets = np.sort(tokens[n == n.max()])
        return [(float(n.max()), float(budgets[(len(budgets) - 1) // 2]))]
    ratio = float(np.median(tokens / n))
    out = []
    for loss in q.losses:
        low, high = np.log(scale.reach(law.heads[base]))

        def at(x: float) -> float:
            return float(law.best.loss(base, np.exp(x), ratio * np.exp(x))[0])

        if not at(high) < loss < at(low):
            continue
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if at(middle) <= loss else (middle, high)
        out.append((float(np.exp(high)), float(ratio * np.exp(high))))
    require(
        bool(out),
        f"the baseline never reaches {', '.join(f'{v:g}' for v in q.losses)} nats at its "
        f"{ratio:.3g} tokens a parameter (E is {law.floor[0]:.3f}); name a higher loss, or a run "
        "with --baseline-run N,D",
    )
    return out


def _goal(
    law: TokenLaw,
    trainers: list[Trainer],
    base: int,
    n: float,
    tokens: float,
    q: Question,
    objective: Objective,
    serving: Serving,
) -> Goal:
    flops = float(trainers[base].flops_per_token(n)) * tokens
    surface = trainers[base].surface
    loss = surface.loss(base, n, tokens)  # of the best parameters, then of every refit
    allowed = [t for t in trainers if t.heads[1] % serving.kv_multiple == 0]
    require(bool(allowed), f"no configuration has n_kv a multiple of {serving.kv_multiple}")
    free = [t.lowest(flops, t.grid) for t in allowed]
    best = []
    for t in allowed:  # no N is recommended that nothing near was trained at
        low, high = law.fit.points.range_n(t.k)
        near = np.log(min(low, n)), np.log(max(high, n))
        best.append(t.lowest(flops, np.linspace(*near, round((near[1] - near[0]) / _STEP) + 2)))
    losses = np.stack([least for _, least in best], 1)
    wins = np.bincount(losses[1:].argmin(1), minlength=len(allowed)) / (len(losses) - 1)
    outside = _outside(law)
    trained = []
    for i, t in enumerate(allowed):
        size, least = float(best[i][0][0]), float(losses[0, i])
        further = float(np.log(free[i][0][0] / size))
        beyond = "" if abs(further) < 0.01 else "larger" if further > 0 else "smaller"
        budget, same = float(t.tokens(size, flops)), float(t.tokens(n, flops))
        trained.append(
            Trained(
                heads=t.heads,
                same_n_tokens=same,
                same_n_loss=float(t.surface.loss(t.k, n, same)[0]),
                same_n_outside=any(outside(t.k, n, same)),
                n=size,
                tokens=budget,
                loss=least,
                gain=float(loss[0]) - least,
                gain_interval=interval(loss[1:] - losses[1:, i]),
                probability=float(wins[i]),
                beyond=beyond,
                n_outside=outside(t.k, size, budget)[0],
                tokens_outside=outside(t.k, size, budget)[1],
            )
        )
    least = [t.smallest(flops, loss, b) for t, b in zip(allowed, free, strict=True)]
    served = {
        context: _served(
            allowed, least, trainers[base].heads, n, flops, context, q, objective, serving, outside
        )
        for context in q.contexts
    }
    return Goal(
        n=n,
        tokens=tokens,
        loss=float(loss[0]),
        loss_interval=interval(loss[1:]),
        flops=flops,
        outside=any(outside(base, n, tokens)),
        trained=tuple(sorted(trained, key=lambda t: (t.loss, t.heads))),
        served=served,
    )


def _outside(law: TokenLaw) -> Callable[[int, float, float], tuple[bool, bool]]:
    """Whether N lies outside a configuration's sizes, and D outside the budgets of all runs.

    Both by more than a tenth: one N is never the same (L, d) for two configurations.
    """
    ranges = [law.fit.points.range_n(k) for k in range(len(law.heads))]
    low, high = law.range_tokens

    def outside(k: int, n: float, tokens: float) -> tuple[bool, bool]:
        return (
            not ranges[k][0] / _SLACK <= n <= ranges[k][1] * _SLACK,
            not low / _SLACK <= tokens <= high * _SLACK,
        )

    return outside


def _served(
    trainers: list[Trainer],
    n: list[np.ndarray],
    baseline: Heads,
    baseline_n: float,
    flops: float,
    context: int,
    q: Question,
    objective: Objective,
    serving: Serving,
    outside: Callable[[int, float, float], tuple[bool, bool]],
) -> tuple[Served, ...]:
    scale = trainers[0].scale
    reference, _, _ = costs_at(np.array(baseline_n), baseline, context, q, scale, serving)
    found = [
        costs_at(size, t.heads, context, q, scale, serving)
        for t, size in zip(trainers, n, strict=True)
    ]
    costs, shape = [c for c, _, _ in found], [at for _, *at in found]
    cost = np.stack(
        [np.where(c.bytes <= serving.limit_bytes, getattr(c, objective), math.inf) for c in costs],
        axis=1,
    )
    probability, _ = decide(cost[1:])
    kinds = tuple(dict.fromkeys(("z", "memory", "flops", objective)))
    rows = []
    for i, t in enumerate(trainers):
        c, reached = costs[i], np.isfinite(cost[1:, i])
        ratio = {m: getattr(c, m) / float(getattr(reference, m)) for m in kinds}
        saving = {m: np.round(1 - v, 12) + 0.0 for m, v in ratio.items()}  # no -0.0%
        size = float(n[i][0])
        tokens = float(t.tokens(size, flops)) if math.isfinite(size) else math.inf
        far = outside(t.k, size, tokens) if math.isfinite(size) else (False, False)
        rows.append(
            Served(
                heads=t.heads,
                n=size,
                tokens=tokens,
                n_layers=float(shape[i][0][0]),
                d_model=float(shape[i][1][0]),
                memory=float(c.memory[0]),
                flops=float(c.flops[0]),
                z=float(c.z[0]),
                cost=float(cost[0, i]),
                saving={m: float(v[0]) for m, v in saving.items()},
                saving_interval={
                    m: interval(v[1:][reached]) if reached.any() else (math.nan, math.nan)
                    for m, v in saving.items()
                },
                probability=float(probability[i]),
                unreachable=float(1 - reached.mean()),
                n_outside=far[0],
                tokens_outside=far[1],
            )
        )
    return tuple(sorted(rows, key=lambda r: (r.cost, -r.probability, r.heads)))


def _flags(
    law: TokenLaw,
    goals: tuple[Goal, ...],
    q: Question,
    objective: Objective,
    context: int,
    trained_at: int,
) -> tuple[str, ...]:
    """What a reader must know before spending by these answers."""
    out = list(law.flags)
    if trained_at and context != trained_at:
        out.append(
            f"training FLOPs are those at T = {context:,} tokens, losses were measured at "
            f"{trained_at:,}: this assumes that differences between configurations stay as they are"
        )
    out += beyond_training(law.heads, trained_at, q)
    low, high = law.range_tokens
    far = sum(g.trained[0].n_outside or g.trained[0].tokens_outside for g in goals)
    beyond = sum(
        rows[0].reached and (rows[0].n_outside or rows[0].tokens_outside)
        for g in goals
        for rows in g.served.values()
    )
    if far or beyond or any(g.outside for g in goals):
        out.append(
            "~ marks N more than 10% outside the sizes that a configuration was trained at, or D that "
            f"far outside {quantity(low)} to {quantity(high)} tokens: there the law is extrapolated; "
            "a run there would tell"
        )
    missed = [
        f"{pair(rows[0].heads)} at {t:,} tokens in {rows[0].unreachable:.0%}"
        for g in goals
        for t, rows in g.served.items()
        if rows[0].reached and rows[0].unreachable > _SPARED
    ]
    if missed:
        out.append(
            f"some refits never reach the baseline's loss with the cheapest: {'; '.join(missed)}"
        )
    nothing = [f"{t:,}" for g in goals for t, rows in g.served.items() if not rows[0].reached]
    if nothing:
        out.append(
            f"no configuration reaches the baseline's loss with what must hold at {', '.join(nothing)} "
            f"tokens by {OBJECTIVES[objective]}"
        )
    return tuple(out)
