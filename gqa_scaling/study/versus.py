"""Which of two is cheaper or better, by how much, and how sure that is.

The two are head configurations, whose size is free, or whole models. They are compared at one loss,
at one cost and at one size, and where runs tell what training tokens do, by the training FLOPs that
one loss takes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import Question, require
from gqa_scaling.study.candidates import KNOWN, known_as, sizes_of
from gqa_scaling.study.caveats import beyond_training
from gqa_scaling.study.choices import Law, Objective
from gqa_scaling.study.clock import SECOND_WHOLE, WHOLE, Timed, untimed
from gqa_scaling.study.equal_cost import affordable
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import Fit, plain
from gqa_scaling.study.frontier import target_losses, with_draws
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import decide, known_interval, near_least, saved, tied
from gqa_scaling.study.results import Results, pair
from gqa_scaling.study.serving import Costs, Deployment, Serving, require_costs, units
from gqa_scaling.study.shapes import Family, family_of
from gqa_scaling.study.sides import Side
from gqa_scaling.study.tokens import TokenLaw
from gqa_scaling.study.trainer import Trainer
from gqa_scaling.study.uncertainty import LEVEL

_STEP = 0.01  # between the sizes that the least training FLOPs are sought at, in ln N


@dataclass(frozen=True)
class Gap:
    """How the first compares with the second by one measure.

    `first` and `second` are the measure: the cost of `kind`, a loss in nats, or training FLOPs. `gain`
    says how much better the first is: 1 - first / second of costs, second - first of losses, and
    second / first of training FLOPs, the compute multiplier. `probability` is the share of the refits
    in which the first is better, of those in which either does what is asked. `n` and `tokens` are
    their sizes and, for training FLOPs, training tokens; `outside` marks sizes (or tokens) beyond
    those that were trained. Infinite or NaN where one does not do what is asked.
    """

    kind: str
    first: float
    second: float
    gain: float
    gain_interval: Interval
    probability: float
    n: tuple[float, float]
    outside: tuple[bool, bool]
    tokens: tuple[float, float] | None = None


Verdict = Literal["first", "second", "equivalent", "open", "neither", "untimed"]


@dataclass(frozen=True)
class Match:
    """The two for one loss (nats) and context (tokens).

    `itself` are the costs and the losses of two whole models as they are, the objective first;
    `equal_loss` the costs of the sizes that reach the loss, the objective first; `equal_cost` the
    losses for the cost of the reference; `equal_size` those at its N; `training` the FLOPs for the
    loss, None where no law tells them. The reference is the second, or the first where only that is
    a whole model; a model's loss is its predicted one. `verdict` says which is cheaper at equal loss:
    by more than the question's indifference in 90% of the refits, "equivalent" where the two are
    within it in as many, "open" where these runs do not tell, "untimed" where seconds would tell that
    lie too far beyond what was timed (`stretch`, as `Clock.stretch`). `within` is the share of refits in
    which they are.
    """

    loss: float
    context: int
    verdict: Verdict
    within: float
    itself: tuple[Gap, ...]
    equal_loss: tuple[Gap, ...]
    equal_cost: Gap
    equal_size: Gap
    training: Gap | None
    stretch: Mapping[Timed, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Versus:
    """A comparison of two, one `Match` for each loss and context, by the curves of `law`.

    `no_training` says in a line why there is no compute multiplier, "" where there is one.
    """

    source: str
    count: str
    question: Question
    objective: Objective
    serving: Serving
    first: Side
    second: Side
    matches: tuple[Match, ...]
    no_training: str
    intervals: str
    law: Law
    flags: tuple[str, ...]

    @property
    def reference(self) -> Side:
        """Whose cost and size the losses are compared at."""
        only_first = self.first.shape and not self.second.shape
        return self.first if only_first else self.second

    @property
    def labels(self) -> tuple[str, str]:
        """What the two are called where a size is sought for whichever is not the reference."""
        both = (self.first, self.second)
        one, other = (s.label if s is self.reference else pair(s.heads) for s in both)
        return one, other

    @property
    def headline(self) -> Match:
        """The match that is told in words: the middle loss at the longest context."""
        longest = max(m.context for m in self.matches)
        losses = sorted(m.loss for m in self.matches if m.context == longest)
        middle = losses[len(losses) // 2]
        return next(m for m in self.matches if (m.loss, m.context) == (middle, longest))

    def to_dict(self) -> dict[str, Any]:
        told = asdict(self) | {"units": units(self.question, self.serving)}
        return plain(told | {"first_label": self.first.label, "second_label": self.second.label})


def versus(
    found: Estimates,
    results: Results,
    first: Side,
    second: Side,
    question: Question | None = None,
    objective: Objective = "z",
    serving: Serving | None = None,
    *,
    fit: Fit | None = None,
) -> Versus:
    """Compare the two for every loss and context of the question.

    `fit` has their curves, by default those of `found`. Where one is a whole model the loss is that
    model's own. Raises UserError for heads without a curve, an objective without its costs, two that
    are one, target losses beside a whole model, and a model beyond what the study can speak of.
    """
    q, s, fit = question or Question(), serving or Serving(), fit or found.fit
    require_costs(objective, s)
    require(first != second, f"{first.label} is compared with itself; name two")
    family, whole = family_of(results), first.shape or second.shape
    require(
        not (whole and q.losses),
        "a whole model has a loss of its own, predicted at its size: leave the target loss out",
    )
    for each in (first, second):
        require(
            s.allows(each.heads), f"{each.label} has no n_kv that is a multiple of {s.kv_multiple}"
        )
    names = WHOLE, SECOND_WHOLE
    both = [
        _Known(fit, family, side, name) for side, name in zip((first, second), names, strict=True)
    ]
    training, why = _training(found, family, both)
    losses = (None,) if whole else q.losses or target_losses(fit)
    matches = tuple(
        _match(both, Deployment(family, q, context, objective, s), loss, training)
        for loss in losses
        for context in q.contexts
    )
    flags = [
        *fit.flags,
        *beyond_training([first.heads, second.heads], found.fit.trained_at(results), q),
    ]
    for each in (first, second):
        known = known_as(each.heads, sorted(set(results.heads), key=str))
        if known != "measured":
            flags.append(
                f"{pair(each.heads)} was never trained: {KNOWN[known]}, by law {fit.law!r}"
            )
    gaps = [g for m in matches for g in (*m.itself, *m.equal_loss, m.equal_cost, m.equal_size)]
    if any(any(g.outside) for g in gaps):
        flags.append("~ marks sizes outside those that the configuration was trained at")
    if s.clock:
        sizes = [n for gap in gaps for n in gap.n if math.isfinite(n)]
        asked = q.contexts, s.batch, family.head_dim, [first.heads, second.heads]
        flags += s.clock.caveats(*asked, sizes)
    return Versus(
        source=fit.source,
        count=fit.count,
        question=q,
        objective=objective,
        serving=s,
        first=first,
        second=second,
        matches=matches,
        no_training=why,
        intervals=fit.how,
        law=fit.law,
        flags=tuple(flags),
    )


class _Known:
    """What the study knows of one of the two: losses and costs in the point estimate and each refit."""

    def __init__(self, fit: Fit, family: Family, side: Side, name: str) -> None:
        """`name` is whose error the clock has of it, where it is a whole model."""
        self.name = name
        self.side, self.family, self.k = side, family, fit.index(side.heads)
        self.curves = with_draws(fit)
        self.range_n = sizes_of(fit, self.k)
        self.n = math.nan
        if side.shape:
            self.n = float(family.n_of(*side.shape, side.heads))
            family.require_reached(self.n, side.heads, side.label)

    def loss(self, n: np.ndarray) -> np.ndarray:
        return self.curves.loss_by_row(self.k, n)

    def size(self, loss: np.ndarray) -> np.ndarray:
        """N that reaches the losses (rows,), infinite beyond reach."""
        n = self.curves.n_star(loss)[:, self.k]
        return self.family.within(n, self.side.heads)

    def costs(self, deployment: Deployment, n: np.ndarray, *, built: bool = False) -> Costs:
        """Costs at N (rows,), of the model's own shape where it is `built`."""
        heads, shape = self.side.heads, self.side.shape
        if not (built and shape):
            return deployment.drawn(deployment.costs(n, heads), pair(heads))
        return deployment.drawn(deployment.costs_of_model(n, heads, shape), self.name)

    def outside(self, n: float) -> bool:
        return not self.range_n[0] <= n <= self.range_n[1]


def _match(
    both: Sequence[_Known],
    deployment: Deployment,
    target: float | None,
    training: "Sequence[_Trained] | None",
) -> Match:
    """The two at one context, for the target loss or, without, for that of the reference model."""
    rows = len(both[0].curves.floor)
    r = 0 if both[0].side.shape and not both[1].side.shape else 1
    reference = both[r]
    if target is None:
        own = np.full(rows, reference.n)
        loss = reference.loss(own)
    else:
        loss = np.full(rows, target)
        own = reference.size(loss)
    built = reference.side.shape is not None
    costs_of_own = reference.costs(deployment, own, built=built)

    # at equal loss
    sizes = [own if i == r else each.size(loss) for i, each in enumerate(both)]
    costs = [
        costs_of_own if i == r else each.costs(deployment, sizes[i]) for i, each in enumerate(both)
    ]
    cost = np.stack(
        [deployment.cost(c, each.side.heads) for c, each in zip(costs, both, strict=True)], 1
    )
    near = near_least(cost[1:], deployment.question.indifference)

    # at equal cost and at equal size
    budgets, limit = deployment.objective_of(costs_of_own), deployment.serving.limit_bytes
    known = np.where(np.isfinite(own), own, math.nan)
    alike = [
        known if i == r else affordable(deployment, each.side.heads, budgets, limit)
        for i, each in enumerate(both)
    ]
    both_built = all(each.side.shape for each in both)
    stretch = _stretch(both, deployment, [float(n[0]) for n in (*sizes, *alike)])
    far = deployment.by_clock is not None and bool(untimed(stretch))
    return Match(
        loss=float(loss[0]),
        context=deployment.context,
        verdict="untimed" if far else _verdict(cost, near),
        within=float(near.all(1).mean()) if len(near) else 0.0,
        itself=_themselves(both, deployment) if both_built else (),
        equal_loss=tuple(_costs(both, deployment, costs, sizes)),
        equal_cost=_losses(both, alike),
        equal_size=_losses(both, [known, known]),
        training=_multiplier(training, loss) if training else None,
        stretch=stretch,
    )


def _stretch(
    both: Sequence[_Known], deployment: Deployment, sizes: Sequence[float]
) -> Mapping[Timed, float]:
    """How far beyond what was timed the two are served, at these N and their own."""
    clock, s = deployment.serving.clock, deployment.serving
    if clock is None:
        return {}
    own = [*sizes, *(each.n for each in both)]
    return clock.stretch(deployment.context, s.batch, deployment.family.head_dim, own)


def _verdict(cost: np.ndarray, near: np.ndarray) -> Verdict:
    """Which of the two is cheaper, by costs (rows, 2) and who is near the cheapest (refits, 2)."""
    if not np.isfinite(cost[0]).any():
        return "neither"
    first = int(cost[0].argmin())
    if len(tied(near, first)) == 1:
        return "first" if first == 0 else "second"
    return "equivalent" if near.all(1).mean() >= LEVEL else "open"


def _themselves(both: Sequence[_Known], deployment: Deployment) -> tuple[Gap, ...]:
    sizes = [np.full(len(each.curves.floor), each.n) for each in both]
    costs = [each.costs(deployment, n, built=True) for each, n in zip(both, sizes, strict=True)]
    return (*_costs(both, deployment, costs, sizes), _losses(both, sizes))


def _costs(
    both: Sequence[_Known],
    deployment: Deployment,
    costs: Sequence[Costs],
    sizes: Sequence[np.ndarray],
) -> list[Gap]:
    """The gaps in every kind of cost, the objective first; infinite where what must hold does not."""
    heads = [each.side.heads for each in both]
    held = np.isfinite([deployment.cost(c, h) for c, h in zip(costs, heads, strict=True)])
    out = []
    for kind in dict.fromkeys((deployment.objective, *deployment.kinds)):
        values = np.where(held, [getattr(c, kind) for c in costs], math.inf).T
        out.append(_gap(kind, both, values, saved(values[:, 0], values[:, 1]), sizes))
    return out


def _losses(both: Sequence[_Known], sizes: Sequence[np.ndarray]) -> Gap:
    values = np.stack([each.loss(n) for each, n in zip(both, sizes, strict=True)], 1)
    return _gap("loss", both, values, values[:, 1] - values[:, 0], sizes)


def _gap(
    kind: str,
    both: Sequence[_Known],
    values: np.ndarray,
    gain: np.ndarray,
    sizes: Sequence[np.ndarray],
) -> Gap:
    """A gap from the measure (rows, 2), of which less is better, and what the first gains (rows,)."""
    n = float(sizes[0][0]), float(sizes[1][0])
    probability, _ = decide(np.where(np.isnan(values[1:]), math.inf, values[1:]))
    return Gap(
        kind=kind,
        first=float(values[0, 0]),
        second=float(values[0, 1]),
        gain=float(gain[0]),
        gain_interval=known_interval(gain[1:]),
        probability=float(probability[0]),
        n=n,
        outside=(both[0].outside(n[0]), both[1].outside(n[1])),
    )


# ------------------------------------------------------------------------- what training takes


@dataclass(frozen=True)
class _Trained:
    """One of the two under a token law: `sizes` are the N that it may have, of these `layers`."""

    trainer: Trainer
    sizes: np.ndarray
    layers: float | None


def _training(
    found: Estimates, family: Family, both: Sequence[_Known]
) -> tuple[tuple[_Trained, ...] | None, str]:
    """The two under the token law; without one None, and why in a line."""
    law = found.tokens
    if law is None:
        return None, (
            "No compute multiplier: how loss falls with training tokens is not told by these runs; it "
            "needs runs of one context length with several token budgets for a size."
        )
    unknown = [each.side.heads for each in both if each.side.heads not in law.heads]
    if unknown:
        return None, (
            f"No compute multiplier: {pair(unknown[0])} was not trained on several token budgets."
        )
    if not law.fit.context_length:
        return None, (
            "No compute multiplier: training FLOPs need the training context length; fill in column "
            "context_length."
        )
    return tuple(_trained_as(law, family, each) for each in both), ""


def _trained_as(law: TokenLaw, family: Family, known: _Known) -> _Trained:
    k, shape = law.fit.index(known.side.heads), known.side.shape
    trainer = Trainer(law, law.best.first(law.draws), k, family, int(law.fit.context_length or 0))
    if shape:
        return _Trained(trainer, np.array([known.n]), float(shape[0]))
    low, high = np.log(known.range_n)
    return _Trained(trainer, np.exp(np.linspace(low, high, round((high - low) / _STEP) + 2)), None)


def _multiplier(training: Sequence[_Trained], loss: np.ndarray) -> Gap:
    """The least training FLOPs for these losses (rows,): of the sizes trained, or of the model."""
    least = [t.trainer.least(loss, t.sizes, t.layers) for t in training]
    flops = np.stack([total for total, _, _ in least], 1)
    with np.errstate(invalid="ignore"):
        ratio = flops[:, 1] / flops[:, 0]
    n, tokens = ([float(each[i][0]) for each in least] for i in (1, 2))
    probability, _ = decide(flops[1:])
    away = [any(t.trainer.outside(a, b)) for t, a, b in zip(training, n, tokens, strict=True)]
    return Gap(
        kind="training_flops",
        first=float(flops[0, 0]),
        second=float(flops[0, 1]),
        gain=float(ratio[0]),
        gain_interval=known_interval(ratio[1:]),
        probability=float(probability[0]),
        n=(n[0], n[1]),
        outside=(away[0], away[1]),
        tokens=(tokens[0], tokens[1]),
    )
