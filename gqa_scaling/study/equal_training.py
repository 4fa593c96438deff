"""Equal training FLOPs: what each configuration reaches for the price of training a baseline.

A configuration that is cheaper for each token gets more tokens for the same total (Chen et al.
2025, section 5.6). Asked are the lowest loss that the total buys and, at the baseline's loss, the
configuration that is cheapest to serve: a smaller model trained on more tokens.

Training FLOPs are 6 N D + 6 T L d_h n_h D at the training context T: causal attention, the output
matrix left out (`costs.training_flops_formula`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gqa_scaling.baselines import WholeModel
from gqa_scaling.config import MOST_CONTEXT, MOST_TOKENS, Question, UserError, between, require
from gqa_scaling.study.baseline import baseline_of
from gqa_scaling.study.caveats import MISSED, beyond_training
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import Ranked, decide, rank
from gqa_scaling.study.results import Heads, Results, pair, pattern_of
from gqa_scaling.study.serving import Deployment, Serving, require_costs, units
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.tokens import TokenLaw
from gqa_scaling.study.trainer import Trainer
from gqa_scaling.study.uncertainty import interval
from gqa_scaling.units import quantity

TRAINING = "6 N D + 6 T L d_h n_h D (causal, Tbar = T/2, without the output matrix)"
SHARDED = "; with a pattern 12 Tbar for 6 T, Tbar the mean number of keys that are read"


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
class Served(Ranked):
    """The smallest model of a configuration at the baseline's loss and training FLOPs, served.

    N and its `tokens`, D, are infinite where no size gets to the loss. Savings are against the
    baseline run, at one inference context, with intervals over the refits that get to the loss.
    """

    tokens: float
    n_outside: bool
    tokens_outside: bool


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
class EqualTraining:
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
        sharded = any(pattern_of(t.heads) for t in self.goals[0].trained)
        training = TRAINING + (SHARDED if sharded else "")
        return units(self.question, self.serving, sharded) | {"training_flops": training}

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self)
        told["units"] = self.units
        for goal in told["goals"]:
            goal["served"] = {str(t): rows for t, rows in goal["served"].items()}
        return plain(told)


def equal_training(
    law: TokenLaw,
    results: Results,
    question: Question | None = None,
    *,
    train_context: int | None = None,
    baseline_run: tuple[float, float] | None = None,
    objective: Objective = "z",
    serving: Serving | None = None,
) -> EqualTraining:
    """Give every configuration the training FLOPs of a baseline run and compare what comes of it.

    The run is `baseline_run`, (N, D); else, for each target loss of the question, the baseline at
    the N that reaches it with the tokens per parameter that its runs have (their median); else the
    baseline's largest size with the median of its budgets. `train_context` is T of the training
    FLOPs, by default the runs' own. Probabilities and intervals are over the law's refits, which all
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
    baseline = baseline_of(q, law.heads)
    if isinstance(baseline, str | WholeModel):
        raise UserError(
            f"baseline={q.baseline!r}: at equal training FLOPs a baseline is heads that were trained, "
            "such as 8,8"
        )
    base, family = law.fit.index(baseline), family_of(results)
    surface = law.best.first(law.draws)
    trainers = [Trainer(law, surface, k, family, context) for k in range(len(law.heads))]
    allowed = [t for t in trainers if s.allows(t.heads)]
    require(bool(allowed), f"no configuration has n_kv a multiple of {s.kv_multiple}")
    deployments = [Deployment(family, q, t, objective, s) for t in q.contexts]
    goals = tuple(
        _goal(trainers[base], allowed, n, tokens, deployments)
        for n, tokens in _baseline_runs(trainers[base], q.losses, baseline_run)
    )
    return EqualTraining(
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
        flags=tuple(_flags(law, goals, q, objective, context, trained_at)),
    )


def _baseline_runs(
    base: Trainer, losses: Sequence[float] | None, named: tuple[float, float] | None
) -> list[tuple[float, float]]:
    """(N, D) of every baseline run that is asked about."""
    law, (least, most) = base.law, base.family.reach(base.heads)
    mine = law.fit.points.curve == base.k
    n, tokens = law.fit.points.n[mine], law.tokens[mine]
    if named is not None:
        require(
            least <= named[0] <= most and 1 <= named[1] <= MOST_TOKENS,
            f"baseline_run={named[0]:g},{named[1]:g} must be N and D: N from {least:.3g} to "
            f"{most:.3g} parameters, within reach of the sizes that were trained, and D from 1 to "
            f"{MOST_TOKENS:g} tokens",
        )
        return [(float(named[0]), float(named[1]))]
    if not losses:
        budgets = np.sort(tokens[n == n.max()])
        return [(float(n.max()), float(budgets[(len(budgets) - 1) // 2]))]
    from scipy.optimize import brentq  # takes a quarter of a second, and most answers need none

    ratio = float(np.median(tokens / n))

    def above(log_n: float, loss: float) -> float:
        """How far the baseline of this size stays above the loss, in nats."""
        return float(law.best.loss(base.k, np.exp(log_n), ratio * np.exp(log_n))[0]) - loss

    ends = np.log(least), np.log(most)
    reached = [loss for loss in losses if above(ends[1], loss) < 0 < above(ends[0], loss)]
    require(
        bool(reached),
        f"the baseline never reaches {', '.join(f'{v:g}' for v in losses)} nats at its "
        f"{ratio:.3g} tokens a parameter (E is {law.floor[0]:.3f}); name a higher loss, or a run "
        "with --baseline-run N,D",
    )
    sizes = [math.exp(brentq(above, *ends, args=(loss,), xtol=1e-14)) for loss in reached]
    return [(size, ratio * size) for size in sizes]


def _goal(
    base: Trainer,
    allowed: Sequence[Trainer],
    n: float,
    tokens: float,
    deployments: Sequence[Deployment],
) -> Goal:
    """What the training FLOPs of the baseline at (n, tokens) buy each allowed configuration."""
    flops = float(base.flops_per_token(n)) * tokens
    loss = base.surface.loss(base.k, n, tokens)
    everywhere = [t.lowest(flops, t.grid) for t in allowed]
    # no N is recommended that nothing near was trained at
    near = [t.lowest(flops, t.near(n)) for t in allowed]
    losses = np.stack([least for _, least in near], 1)
    probability, _ = decide(losses[1:])
    trained = []
    for i, t in enumerate(allowed):
        size, least = float(near[i][0][0]), float(losses[0, i])
        budget, same = float(t.tokens(size, flops)), float(t.tokens(n, flops))
        n_outside, tokens_outside = t.outside(size, budget)
        trained.append(
            Trained(
                heads=t.heads,
                same_n_tokens=same,
                same_n_loss=float(t.surface.loss(t.k, n, same)[0]),
                same_n_outside=any(t.outside(n, same)),
                n=size,
                tokens=budget,
                loss=least,
                gain=float(loss[0]) - least,
                gain_interval=interval(loss[1:] - losses[1:, i]),
                probability=float(probability[i]),
                beyond=_beyond(size, float(everywhere[i][0][0])),
                n_outside=n_outside,
                tokens_outside=tokens_outside,
            )
        )
    smallest = [t.smallest(flops, loss, best) for t, best in zip(allowed, everywhere, strict=True)]
    sizes = np.stack(smallest, 1)
    return Goal(
        n=n,
        tokens=tokens,
        loss=float(loss[0]),
        loss_interval=interval(loss[1:]),
        flops=flops,
        outside=any(base.outside(n, tokens)),
        trained=tuple(sorted(trained, key=lambda t: (t.loss, t.heads))),
        served={d.context: _served(d, base, n, allowed, sizes, flops) for d in deployments},
    )


def _beyond(near: float, everywhere: float) -> Literal["", "larger", "smaller"]:
    """Where the size of lowest loss lies, seen from the best one near those that were trained."""
    further = math.log(everywhere / near)
    if abs(further) < 0.01:
        return ""
    return "larger" if further > 0 else "smaller"


def _served(
    deployment: Deployment,
    base: Trainer,
    n: float,
    allowed: Sequence[Trainer],
    sizes: np.ndarray,
    flops: float,
) -> tuple[Served, ...]:
    """Models of these sizes (rows, allowed), cheapest to serve first; savings against the run of n."""
    ranking = rank(deployment, [t.heads for t in allowed], sizes)
    alone = deployment.costs(np.full(len(sizes), n), base.heads)
    reference, rows = deployment.drawn(alone, pair(base.heads)), []
    for k, t in enumerate(allowed):
        size, tokens, outside = float(sizes[0, k]), math.inf, (False, False)
        if math.isfinite(size):
            tokens = float(t.tokens(size, flops))
            outside = t.outside(size, tokens)
        ranked = ranking.of(k, reference, finite=True)
        rows.append(
            Served(**vars(ranked), tokens=tokens, n_outside=outside[0], tokens_outside=outside[1])
        )
    return tuple(sorted(rows, key=lambda row: row.order))


def _flags(
    law: TokenLaw,
    goals: Sequence[Goal],
    q: Question,
    objective: Objective,
    context: int,
    trained_at: int,
) -> list[str]:
    out = list(law.flags)
    if trained_at and context != trained_at:
        out.append(
            f"training FLOPs are those at T = {context:,} tokens, losses were measured at "
            f"{trained_at:,}: this assumes that differences between configurations stay as they are"
        )
    out += beyond_training(law.heads, trained_at, q)
    cheapest = [(t, rows[0]) for g in goals for t, rows in g.served.items()]
    told = [g.trained[0] for g in goals] + [row for _, row in cheapest if row.reached]
    if any(g.outside for g in goals) or any(a.n_outside or a.tokens_outside for a in told):
        low, high = law.range_tokens
        out.append(
            "~ marks N more than 10% outside the sizes that a configuration was trained at, or D that "
            f"far outside {quantity(low)} to {quantity(high)} tokens: there the law is extrapolated; "
            "a run there would tell"
        )
    missed = [
        f"{pair(row.heads)} at {t:,} tokens in {row.unreachable:.0%}"
        for t, row in cheapest
        if row.reached and row.unreachable > MISSED
    ]
    if missed:
        out.append(
            f"some refits never reach the baseline's loss with the cheapest: {'; '.join(missed)}"
        )
    nothing = [f"{t:,}" for t, row in cheapest if not row.reached]
    if nothing:
        out.append(
            f"no configuration reaches the baseline's loss with what must hold at {', '.join(nothing)} "
            f"tokens by {OBJECTIVES[objective]}"
        )
    return out
