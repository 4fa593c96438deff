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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gqa_scaling.baselines import WholeModel
from gqa_scaling.config import Question, UserError, require
from gqa_scaling.study.baseline import (
    Baseline,
    Reference,
    baseline_of,
    curves_for,
    in_words,
    label,
    reference,
    whole_model,
)
from gqa_scaling.study.build import Check, Model, build
from gqa_scaling.study.candidates import (
    KNOWN,
    Candidates,
    Known,
    OtherLaw,
    known_as,
    sizes_of,
    trained_curves,
)
from gqa_scaling.study.caveats import beyond_training, caveats, doubt
from gqa_scaling.study.choices import Law, Objective
from gqa_scaling.study.clock import Timed, untimed
from gqa_scaling.study.curves import Curves
from gqa_scaling.study.equal_cost import NOT_SOUGHT, EqualCost, equal_costs
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import Fit, plain
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import Ranked, rank
from gqa_scaling.study.results import Heads, Results, pairs, pattern_of
from gqa_scaling.study.serving import Deployment, Serving, require_costs, units
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.uncertainty import LEVEL, interval

_BOTH: tuple[Objective, ...] = ("z", "seconds")  # what answers on a calibrated machine stand by


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
    known: Known
    extrapolated: bool
    bytes: float
    seconds: float
    dollars: float
    equal_cost: EqualCost


@dataclass(frozen=True)
class Based:
    """The baseline at one target loss and context: its N, loss (nats) and costs."""

    n: float
    n_layers: float
    d_model: float
    loss: float
    memory: float
    flops: float
    z: float
    cost: float
    unreachable: float


@dataclass(frozen=True)
class Answer:
    """All configurations for one target loss (nats) and context (tokens), cheapest first.

    `tied` are the best and those that these runs do not tell from it, or only by less than what the
    question is indifferent to (`ranking.tied`); `margin` is how much dearer the runner-up is. `under`
    says, for each other law, how much dearer by its curves the best is than the best of that law; NaN
    where it does not know the best, infinite where by it the best never reaches the loss. `model` is
    None where none can be built that fits.
    On a calibrated machine `tied_by_clock` are tied by seconds, whatever the objective, and `stretch`
    says how far beyond what was timed the best, that by Z, that by seconds or the baseline lie
    (`Clock.stretch`).
    """

    loss: float
    context: int
    choices: tuple[Choice, ...]
    tied: tuple[Heads, ...]
    margin: float
    baseline: Based
    under: dict[Law, float]
    model: Model | None
    tied_by_clock: tuple[Heads, ...] = ()
    stretch: Mapping[Timed, float] = field(default_factory=dict)

    @property
    def best(self) -> Choice:
        return self.choices[0]

    def outsized(self, serving: Serving) -> bool:
        """Whether some configuration reaches the loss, but none within the bytes that it may hold."""
        sizes = (c.n for c in self.choices if serving.allows(c.heads))
        return not self.best.reached and any(map(math.isfinite, sizes))

    @property
    def lowest(self) -> Choice | None:
        """The configuration of least loss at the baseline's cost; None where there is none."""
        known = [c for c in self.choices if math.isfinite(c.equal_cost.gain)]
        return max(known, key=lambda c: c.equal_cost.gain, default=None)

    @property
    def safest(self) -> Choice | None:
        """The cheapest configuration that was trained; None where none reaches the loss."""
        known = (c for c in self.choices if c.known == "measured" and c.reached)
        return next(known, None)

    @property
    def equivalent(self) -> tuple[Heads, ...]:
        """Of the tied those as good as the cheapest in 90% of the refits."""
        others = (self.choice(h) for h in self.tied if h != self.best.heads)
        return tuple(c.heads for c in others if c.within >= LEVEL)

    def least(self, kind: Objective) -> Choice:
        """The configuration that is the cheapest by another cost, of those that reach the loss."""
        reached = [c for c in self.choices if c.reached]
        return min(reached or self.choices, key=lambda c: getattr(c, kind))

    def choice(self, heads: Heads) -> Choice:
        return next(c for c in self.choices if c.heads == heads)


@dataclass(frozen=True)
class Frontier:
    """The answers to a question, losses in the order given, contexts within each.

    `doubt` says in a few words why the fit behind them cannot carry an answer; "" when it can.
    `checks` are runs trained as the study's own but left out of its fit. Losses are those at the
    training context `train_context`, in tokens; 0 where it is unknown. `trained` are the heads that
    were; `law` is the one that the curves follow.
    """

    source: str
    count: str
    train_context: int
    question: Question
    objective: Objective
    serving: Serving
    baseline: Baseline
    losses: tuple[float, ...]
    answers: tuple[Answer, ...]
    intervals: str
    flags: tuple[str, ...]
    doubt: str
    law: Law = "separate"
    trained: tuple[Heads, ...] = ()
    checks: tuple[Check, ...] = ()

    @property
    def sharded(self) -> bool:
        return any(pattern_of(c.heads) for c in self.answers[0].choices)

    @property
    def by_clock(self) -> bool:
        """Whether it is ranked by the seconds of a calibrated machine."""
        return self.serving.clock is not None and self.objective in ("seconds", "dollars")

    def untimed(self, answer: Answer) -> str:
        """Why seconds decide nothing in this answer (`clock.untimed`); "" where they may."""
        return untimed(answer.stretch) if self.by_clock else ""

    @property
    def told(self) -> tuple[Heads, ...]:
        """The configurations shown one by one: those that were trained, and every best and lowest."""
        ranked = {c.heads for c in self.answers[0].choices}
        named = {c.heads for a in self.answers for c in (a.best, a.lowest) if c}
        return tuple(sorted(named | ranked.intersection(self.trained)))

    @property
    def headline(self) -> Answer:
        """The answer that is told first: the longest context, the middle target loss."""
        return self.at(sorted(self.losses)[len(self.losses) // 2], max(self.question.contexts))

    @property
    def units(self) -> dict[str, str]:
        return units(self.question, self.serving, self.sharded)

    def at(self, loss: float, context: int) -> Answer:
        """The answer for a target loss in nats at a context; UserError for one that was not asked for."""
        found = [a for a in self.answers if a.loss == loss and a.context == context]
        asked = ", ".join(f"({a.loss:g}, {a.context})" for a in self.answers[:6])
        require(
            bool(found),
            f"{loss:g} nats at {context} tokens was not asked for; the first that were are {asked}",
        )
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        out = dataclasses.asdict(self)
        out["units"] = self.units
        out["baseline_in_words"] = in_words(self.baseline)
        for answer, whole in zip(out["answers"], self.answers, strict=True):
            answer["best"] = whole.best.heads
            answer["best_measured"] = whole.safest and whole.safest.heads
            answer["equivalent"] = whole.equivalent
            answer["lowest"] = whole.lowest and whole.lowest.heads
            for row in answer["choices"]:
                row["known"] = KNOWN[row["known"]]
        for row, check in zip(out["checks"], self.checks, strict=True):
            row["difference"] = check.difference
        return plain(out)


def target_losses(fit: Fit, most: int = 3) -> tuple[float, ...]:
    """A few round losses inside the range that every configuration's curve covers."""
    ends = [fit.curves.loss(k, np.array(sizes_of(fit, k))) for k in trained_curves(fit)]
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


def frontier(
    fit: Fit,
    results: Results,
    question: Question | None = None,
    objective: Objective = "z",
    serving: Serving | None = None,
    *,
    among: Candidates | None = None,
    gains: bool = True,
) -> Frontier:
    """Rank the configurations for each target loss and context of the question.

    They are the fit's or, with curves of untrained ones too, those of `among`, which goes before the
    fit. `results` are the runs behind it: their ladder, head size and vocabulary make shapes of
    N*. `serving` says how costs in bytes, seconds and dollars come about and what must hold.
    Without `gains` nothing is sought at equal cost, which takes most of the time: for maps.
    Raises UserError for a baseline or an objective that is not there.
    """
    q, s = question or Question(), serving or Serving()
    require_costs(objective, s)
    among = among or Candidates(Estimates(fit), fit, fit.heads)
    require(
        any(map(s.allows, among.heads)),
        f"no candidate has n_kv that is a multiple of {s.kv_multiple}: {pairs(among.heads)}",
    )
    fit, trained, family = among.fit, among.estimates.fit.heads, family_of(results)
    baseline = baseline_of(q, trained)
    for heads in curves_for(baseline):
        fit.index(heads)
    curves = with_draws(fit)
    own = (
        whole_model(baseline, fit, curves, family)[1] if isinstance(baseline, WholeModel) else None
    )
    losses = q.losses or (target_losses(fit) if own is None else (float(own[0]),))
    answers = []
    for loss in losses:
        targets = np.full(len(curves.floor), loss) if own is None or q.losses else own
        for context in q.contexts:
            deployment = Deployment(family, q, context, objective, s)
            base = reference(baseline, fit, curves, among.strayed, deployment, targets)
            answers.append(_answer(among, curves, deployment, targets, base, gains))
    train_context = fit.trained_at(results)
    flags = [
        *fit.flags,
        *([among.note] if among.note else []),
        *beyond_training(among.heads, train_context, q),
        *caveats(
            answers, {h: family.reach(h) for h in among.heads}, label(baseline), q.indifference, s
        ),
    ]
    if s.clock:
        sizes = [a.least(kind).n for a in answers for kind in _BOTH]
        asked = q.contexts, s.batch, family.head_dim, among.heads
        flags += s.clock.caveats(*asked, [n for n in sizes if math.isfinite(n)])
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
        answers=tuple(answers),
        intervals=fit.how,
        flags=tuple(flags),
        doubt=doubt(fit),
        law=fit.law,
        trained=trained,
    )


def _answer(
    among: Candidates,
    curves: Curves,
    deployment: Deployment,
    targets: np.ndarray,
    base: Reference,
    gains: bool,
) -> Answer:
    """The answer to one target loss, (rows,) as the curves: the point estimate, then the refits."""
    fit, heads, trained = among.fit, among.heads, among.estimates.fit.heads
    family, index, loss = deployment.family, [fit.index(h) for h in heads], float(targets[0])
    n_star = curves.n_star(targets)
    n = np.stack([family.within(n_star[:, k], fit.heads[k]) for k in index], 1)
    ranking = rank(deployment, heads, n)
    clock = deployment.serving.clock
    timed = rank(dataclasses.replace(deployment, objective="seconds"), heads, n) if clock else None
    gained = equal_costs(fit, curves, deployment, heads, base) if gains else None
    least = ranking.cost[0].min()
    choices = []
    for i, costs in enumerate(ranking.costs):
        cost, (low, high) = float(ranking.cost[0, i]), sizes_of(fit, index[i])
        choices.append(
            Choice(
                **vars(ranking.of(i, base.costs)),
                n_interval=interval(n[1:, i]),
                memory_fixed=float(costs.memory_fixed[0]),
                flops_fixed=float(costs.flops_fixed[0]),
                effective=float(np.broadcast_to(costs.effective, len(n))[0]),
                excess=cost / least - 1 if math.isfinite(cost) else math.inf,
                regret=float(ranking.regret[i]),
                known=known_as(heads[i], trained),
                extrapolated=not low <= n[0, i] <= high,
                bytes=float(costs.bytes[0]),
                seconds=float(costs.seconds[0]),
                dollars=float(costs.dollars[0]),
                equal_cost=gained[i] if gained else NOT_SOUGHT,
            )
        )
    choices.sort(key=lambda choice: choice.order)
    answer = Answer(
        loss=loss,
        context=deployment.context,
        choices=tuple(choices),
        tied=ranking.tied,
        margin=choices[1].excess if len(choices) > 1 else math.inf,
        baseline=_based(base, deployment),
        under={
            other.law: _under(other, heads, deployment, choices[0], loss) for other in among.others
        },
        model=_model(fit, deployment, choices[0]),
        tied_by_clock=timed.tied if timed else (),
    )
    if clock is None:
        return answer
    sizes = [answer.best.n, float(base.n[0]), *(answer.least(kind).n for kind in _BOTH)]
    place = deployment.context, deployment.serving.batch, family.head_dim
    return dataclasses.replace(answer, stretch=clock.stretch(*place, sizes))


def _based(base: Reference, deployment: Deployment) -> Based:
    cost = deployment.objective_of(base.costs)
    kinds = ("n_layers", "d_model", "memory", "flops", "z")
    return Based(
        n=float(base.n[0]),
        loss=float(base.loss[0]),
        cost=float(cost[0]),
        unreachable=float(np.isinf(base.n[1:]).mean()),
        **{kind: float(getattr(base.costs, kind)[0]) for kind in kinds},
    )


def _under(
    other: OtherLaw, heads: Sequence[Heads], deployment: Deployment, best: Choice, loss: float
) -> float:
    """How much dearer than the best of another law this choice is by that law's curves."""
    if not best.reached or best.heads not in other.heads:
        return math.nan
    mine = [h for h in other.heads if h in heads]
    n_star = other.curves.n_star(loss)
    n = [deployment.family.within(n_star[other.heads.index(h)], h) for h in mine]
    cost = rank(deployment, mine, np.array([n, n])).cost[0]
    here = float(cost[mine.index(best.heads)])
    return here / float(cost.min()) - 1 if math.isfinite(here) else math.inf


def with_draws(fit: Fit) -> Curves:
    """The curves of the point estimate in the first row, then those of every refit."""
    return fit.curves.then(fit.draws)


def _model(fit: Fit, deployment: Deployment, best: Choice) -> Model | None:
    """The model to build for the best choice; None where none near it fits what must hold."""
    if not best.reached:
        return None
    with contextlib.suppress(UserError):  # a pattern may not fit the few layers of a small model
        model = build(fit, deployment, best.heads, best.n)
        if model.weight_bytes + model.cache_bytes <= deployment.serving.limit_bytes:
            return model
    return None
