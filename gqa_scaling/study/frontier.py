"""The cost-optimal configuration for a target loss and a context length, and how sure it is.

For every head configuration H the law is inverted to N*(H), a real-valued (L, d) follows from the
study's own ladder, and the costs from `serving` (Chen et al. 2025, section 4.1, step 3). Repeating
this over the bootstrap draws, all configurations sharing each draw, gives the probability that a
configuration is the cheapest and what choosing it would cost on average.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import Question, UserError, require
from gqa_scaling.study.build import Check, Model, build
from gqa_scaling.study.choices import Objective
from gqa_scaling.study.equal_cost import NOT_SOUGHT, EqualCost, equal_costs
from gqa_scaling.study.fitted import Fit, plain
from gqa_scaling.study.laws import Curves
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import Ranked, rank
from gqa_scaling.study.results import Heads, Results, pair, pattern_of
from gqa_scaling.study.serving import Deployment, Serving, require_costs, units
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.uncertainty import LEVEL, interval
from gqa_scaling.units import quantity

MISSED = 0.05  # a larger share of refits that never reach the loss is said so


@dataclass(frozen=True)
class Choice(Ranked):
    """One configuration at one (loss, context), against the baseline at the same loss.

    `n` is N*, infinite where no size within reach of the study (`Family.reach`) gets to the loss, as
    is its interval's end where some refits do not. `effective` is T_eff, the keys that a head reads
    and keeps at the context, all of it when dense; `memory_fixed` and `flops_fixed` are the parts of
    the costs that no context enters. `excess` is how much dearer it is than the cheapest (0.02 is
    2%), `regret` the expected excess over the refits in which any configuration gets to the loss,
    infinite when in some only another does. Savings are NaN where the baseline never gets there.
    """

    n_interval: Interval
    memory_fixed: float
    flops_fixed: float
    effective: float
    excess: float
    regret: float
    extrapolated: bool
    bytes: float
    equal_cost: EqualCost


@dataclass(frozen=True)
class Answer:
    """All configurations for one target loss (nats) and context (tokens), cheapest first.

    `tied` are the best and those that these runs do not tell from it, or only by less than what the
    question is indifferent to (`ranking.tied`);
    `margin` is how much dearer the runner-up is, `baseline_unreachable` the share of draws in
    which the baseline never reaches the loss. `model` is None where none can be built that fits.
    """

    loss: float
    context: int
    choices: tuple[Choice, ...]
    tied: tuple[Heads, ...]
    margin: float
    baseline_unreachable: float
    model: Model | None

    @property
    def best(self) -> Choice:
        return self.choices[0]

    @property
    def lowest(self) -> Choice | None:
        """The configuration of least loss at the baseline's cost; None where there is none."""
        known = [c for c in self.choices if math.isfinite(c.equal_cost.gain)]
        return max(known, key=lambda c: c.equal_cost.gain, default=None)

    @property
    def equivalent(self) -> tuple[Heads, ...]:
        """Of the tied those as good as the cheapest whatever the noise, in 90% of the refits."""
        others = (self.choice(h) for h in self.tied if h != self.best.heads)
        return tuple(c.heads for c in others if c.within >= LEVEL)

    def choice(self, heads: Heads) -> Choice:
        return next(c for c in self.choices if c.heads == heads)


@dataclass(frozen=True)
class Frontier:
    """The answers to a question, losses in the order given, contexts within each.

    `doubt` says in a few words why the fit behind them cannot carry an answer; "" when it can.
    `checks` are runs trained as the study's own but left out of its fit. Losses are those at the
    training context `train_context`, in tokens; 0 where it is unknown.
    """

    source: str
    count: str
    train_context: int
    question: Question
    objective: Objective
    serving: Serving
    baseline: Heads
    losses: tuple[float, ...]
    answers: tuple[Answer, ...]
    intervals: str
    flags: tuple[str, ...]
    doubt: str
    checks: tuple[Check, ...] = ()

    @property
    def sharded(self) -> bool:
        """Whether some configuration has a pattern."""
        return any(pattern_of(c.heads) for c in self.answers[0].choices)

    @property
    def headline(self) -> Answer:
        """The answer that is told first: the longest context, the middle target loss."""
        return self.at(sorted(self.losses)[len(self.losses) // 2], max(self.question.contexts))

    @property
    def units(self) -> dict[str, str]:
        """The unit of every kind of number here."""
        return units(self.question, self.serving, self.sharded)

    def at(self, loss: float, context: int) -> Answer:
        return next(a for a in self.answers if a.loss == loss and a.context == context)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        out = dataclasses.asdict(self)
        out["units"] = self.units
        for answer, whole in zip(out["answers"], self.answers, strict=True):
            answer["best"] = whole.best.heads
            answer["equivalent"] = whole.equivalent
            answer["lowest"] = whole.lowest and whole.lowest.heads
        for row, check in zip(out["checks"], self.checks, strict=True):
            row["difference"] = check.difference
        return plain(out)


# ----------------------------------------------------------------------------------- the question


def target_losses(fit: Fit, most: int = 3) -> tuple[float, ...]:
    """A few round losses inside the range that every configuration's curve covers.

    Raises UserError when there is none: the curves of these configurations do not overlap.
    """
    ends = [fit.curves.loss(k, np.array(fit.points.range_n(k))) for k in range(len(fit.heads))]
    high, low = min(e.max() for e in ends), max(e.min() for e in ends)
    require(
        low < high,
        f"{fit.source}: no loss lies on every configuration's curve (the best of one is "
        f"{low:.3f} nats, the worst of another {high:.3f}); name target losses",
    )
    for digits in itertools.count(1):
        step = 10.0**-digits
        inside = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        if len(inside) >= most:
            chosen = inside[np.linspace(0, len(inside) - 1, most).round().astype(int)]
            return tuple(round(float(v), digits) for v in chosen[::-1])
    raise AssertionError


def default_baseline(heads: Sequence[Heads]) -> Heads:
    """The most query heads and, among those, the most KV heads; a dense one where there is any."""
    return max([h for h in heads if pattern_of(h) is None] or heads)


# ------------------------------------------------------------------------------------ the answers


def frontier(
    fit: Fit,
    results: Results,
    question: Question | None = None,
    objective: Objective = "z",
    serving: Serving | None = None,
    *,
    gains: bool = True,
) -> Frontier:
    """Rank every configuration for each target loss and context of the question.

    `results` are the runs behind the fit: their ladder, head size and vocabulary make shapes of
    N*. `serving` says how costs in bytes, seconds and dollars come about and what must hold.
    Without `gains` nothing is sought at equal cost, which takes most of the time: for maps.
    Raises UserError for a baseline or an objective that is not there.
    """
    q, s = question or Question(), serving or Serving()
    require_costs(objective, s)
    family = family_of(results)
    losses = q.losses or target_losses(fit)
    baseline: Heads = q.baseline or default_baseline(fit.heads)
    fit.index(baseline)
    answers = tuple(
        _answer(fit, Deployment(family, q, context, objective, s), loss, baseline, gains)
        for loss in losses
        for context in q.contexts
    )
    train_context = int(fit.context_length or results.context_length.max())
    flags = [
        *fit.flags,
        *beyond_training(fit.heads, train_context, q),
        *_flags(answers, {heads: family.reach(heads) for heads in fit.heads}, baseline),
    ]
    if not results.n_layers.all():
        flags.append("the data has no layer counts: shapes follow the published ladder")
    return Frontier(
        source=fit.source,
        count=fit.count,
        train_context=train_context,
        question=q,
        objective=objective,
        serving=s,
        baseline=baseline,
        losses=tuple(losses),
        answers=answers,
        intervals=fit.how,
        flags=tuple(flags),
        doubt=_doubt(fit),
    )


def _answer(fit: Fit, deployment: Deployment, loss: float, baseline: Heads, gains: bool) -> Answer:
    curves, family, base = with_draws(fit), deployment.family, fit.index(baseline)
    n_star = curves.n_star(loss)
    n = np.stack([family.within(n_star[:, k], h) for k, h in enumerate(fit.heads)], 1)
    ranking = rank(deployment, fit.heads, n)
    gained = [NOT_SOUGHT] * len(fit.heads)
    if gains:
        gained = equal_costs(fit, curves, deployment, base, n[:, base])
    least = ranking.cost[0].min()
    choices = []
    for k, costs in enumerate(ranking.costs):
        cost, (low, high) = float(ranking.cost[0, k]), fit.points.range_n(k)
        choices.append(
            Choice(
                **vars(ranking.of(k, ranking.costs[base])),
                n_interval=interval(n[1:, k]),
                memory_fixed=float(costs.memory_fixed[0]),
                flops_fixed=float(costs.flops_fixed[0]),
                effective=float(np.broadcast_to(costs.effective, len(n))[0]),
                excess=cost / least - 1 if math.isfinite(cost) else math.inf,
                regret=float(ranking.regret[k]),
                extrapolated=not low <= n[0, k] <= high,
                bytes=float(costs.bytes[0]),
                equal_cost=gained[k],
            )
        )
    choices.sort(key=lambda choice: choice.order)
    return Answer(
        loss=float(loss),
        context=deployment.context,
        choices=tuple(choices),
        tied=ranking.tied,
        margin=choices[1].excess if len(choices) > 1 else math.inf,
        baseline_unreachable=float(np.isinf(n[1:, base]).mean()),
        model=_model(fit, deployment, choices[0]),
    )


def with_draws(fit: Fit) -> Curves:
    """The curves of the point estimate in the first row, then those of every refit."""
    one, many = fit.curves, fit.draws
    return dataclasses.replace(
        one,
        floor=np.r_[one.floor, many.floor],
        u=np.vstack([one.u, many.u]),
        b=np.vstack([one.b, many.b]),
    )


def _model(fit: Fit, deployment: Deployment, best: Choice) -> Model | None:
    """The model to build for the best choice; None where none near it fits what must hold."""
    if not best.reached:
        return None
    with contextlib.suppress(UserError):  # a pattern may not fit the few layers of a small model
        model = build(fit, deployment, best.heads, best.n)
        if model.weight_bytes + model.cache_bytes <= deployment.serving.limit_bytes:
            return model
    return None


# --------------------------------------------------------------------------------------- in words


def _doubt(fit: Fit) -> str:
    """Why no answer should be read off this fit, whatever its intervals say; "" if it may."""
    reasons = [
        (not fit.converged, "the fit did not converge"),
        (bool(fit.at_bound), "E is at its bound, not identified by these runs"),
        (fit.rank < fit.n_parameters, "the runs do not determine every parameter"),
        (fit.refits_failed > fit.refits / 10, "many refits did not converge"),
        (not fit.r2 > 0.9, f"the curves explain the runs badly (R² = {fit.r2:.2f})"),
    ]
    return "; ".join(words for holds, words in reasons if holds)


def beyond_training(heads: Sequence[Heads], trained: int, q: Question) -> list[str]:
    """What answers assume at contexts longer than `trained` tokens, where losses were measured."""
    if not trained or max(q.contexts) <= trained:
        return []
    out = [
        f"losses were measured at T = {trained:,} tokens: beyond it the answer assumes that "
        "differences between configurations stay as they are"
    ]
    if any(map(pattern_of, heads)):
        out.append(
            f"losses of sharded configurations, too, are those at T = {trained:,} tokens: only their "
            "costs follow the context. That heads which then read a smaller share of it lose no more "
            "is untested, for windows alone above all; train some at a longer T, and judge loss by "
            "position and retrieval beside the mean loss"
        )
    return out


def _flags(answers: Sequence[Answer], reach: dict[Heads, Interval], baseline: Heads) -> list[str]:
    """What a reader must know before deciding by these answers; `reach` as `Family.reach`."""

    def goals(some: Sequence[Answer]) -> str:
        return "; ".join(f"{a.loss:g} nats at {a.context:,} tokens" for a in some)

    many, most = len(answers), quantity(max(high for _, high in reach.values()))
    reached = [a for a in answers if a.best.reached]
    out: list[str] = []

    def tell(some: Sequence[Any], words: str) -> None:
        if some:
            out.append(words)

    far = [f"{a.loss:g} at {a.context:,}" for a in reached if a.best.extrapolated]
    tell(
        far,
        f"the best configuration's N* lies outside its fitted sizes for {len(far)} of {many} answers "
        f"(marked ~): {'; '.join(far[:3])}{' ...' if len(far) > 3 else ''}",
    )
    lost = [a for a in answers if not a.best.reached]
    tell(
        lost,
        f"no configuration reaches {goals(lost)} with what must hold, at any size that can be built, "
        f"up to {most} parameters",
    )
    easy = [a for a in reached if a.best.n <= reach[a.best.heads][0]]
    tell(easy, f"the smallest size that can be built reaches {goals(easy)}: ask for less")
    missed = [
        f"{a.best.unreachable:.0%} of the refits never reach {goals([a])}"
        for a in reached
        if a.best.unreachable > MISSED
    ]
    tell(
        missed,
        f"with the best configuration and what must hold, {'; '.join(missed)}, at any size that can "
        f"be built, up to {most} parameters",
    )
    capped = [a for a in answers if a.lowest and a.lowest.equal_cost.n >= reach[a.lowest.heads][1]]
    tell(
        capped,
        f"what is gained at equal cost ends at the largest size that can be built, {most} parameters, "
        f"for {goals(capped)}",
    )
    unsaved = [
        f"{a.baseline_unreachable:.0%} of the refits for {goals([a])}"
        for a in reached
        if a.baseline_unreachable > MISSED
    ]
    tell(
        unsaved,
        f"the baseline {pair(baseline)} never reaches the loss, so that savings leave them out, in "
        f"{'; '.join(unsaved)}",
    )
    unbuilt = [a for a in reached if a.model is None]
    tell(unbuilt, f"no model near the best N* can be built within the bytes: {goals(unbuilt)}")
    ties = sum(len(a.tied) > 1 + len(a.equivalent) for a in answers)
    tell(
        range(ties),
        f"the noise cannot separate the best configuration in {ties} of {many} answers: they are "
        "printed as tied",
    )
    return out
