"""How far an answer hangs on what was assumed of its costs: each assumption halved and doubled.

Nobody knows lambda, alpha and beta of Z exactly, nor the batch and the bytes that will be served.
Each is changed alone, and configurations are ranked again, by the objective that it enters.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import POWERS, Convention, Question
from gqa_scaling.study.choices import Objective
from gqa_scaling.study.fitted import Fit, plain
from gqa_scaling.study.frontier import Frontier, with_draws
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import known_interval, rank
from gqa_scaling.study.results import Heads, Results
from gqa_scaling.study.serving import Deployment, Serving
from gqa_scaling.study.shapes import family_of

Assumption = Literal[
    "", "lambda", "alpha", "beta", "convention", "batch", "weight_bytes", "cache_bytes", "objective"
]
FACTORS = (0.5, 2.0)
BATCHES = (8.0, 64.0)  # times the batch: one sequence at a time is rarely how a model is served


@dataclass(frozen=True)
class Changed:
    """The answer with one assumption changed from `before` to `after`, by this objective.

    `assumption` "" is the answer as it stands. `heads` are the cheapest then, of N* parameters;
    `dearer` is how much more the present answer costs than they do (0.02 is 2%), with its interval
    over the refits, infinite where it no longer holds what must hold; `within` the share of refits
    in which that is no more than the question's indifference.
    """

    assumption: Assumption
    before: float | str
    after: float | str
    objective: Objective
    heads: Heads
    n: float
    dearer: float
    dearer_interval: Interval
    within: float


@dataclass(frozen=True)
class Sensitivity:
    """The answer for one loss (nats) and context (tokens) under every change; `heads` the present."""

    loss: float
    context: int
    heads: Heads
    indifference: float
    rows: tuple[Changed, ...]

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self))


def sensitivity(fit: Fit, results: Results, answers: Frontier) -> Sensitivity | None:
    """The answer that stands for all under other assumptions; None where nothing reaches its loss.

    Lambda is changed in its odds lambda / (1 - lambda), which are what is halved and doubled. The
    three assumptions of Z are judged by Z, batch and bytes by the objective where they enter it and
    by the bytes held where they do not.
    """
    answer, family = answers.headline, family_of(results)
    if not answer.best.reached:
        return None
    heads = sorted((choice.heads for choice in answer.choices), key=fit.index)
    n_star = with_draws(fit).n_star(answer.loss)
    n = np.stack([family.within(n_star[:, fit.index(h)], h) for h in heads], 1)
    present, rows = heads.index(answer.best.heads), []
    for assumption, before, after, objective, question, serving in _changes(answers):
        place = Deployment(family, question, answer.context, objective, serving)
        ranking = rank(place, heads, n)
        cost, least = ranking.cost, ranking.cost.min(1)
        if not np.isfinite(least[0]):
            continue
        k = int(cost[0].argmin())
        with np.errstate(invalid="ignore"):
            dearer = cost[:, present] / least - 1
        rows.append(
            Changed(
                assumption=assumption,
                before=before,
                after=after,
                objective=objective,
                heads=heads[k],
                n=float(n[0, k]),
                dearer=float(dearer[0]),
                dearer_interval=known_interval(dearer[1:]),
                within=float(ranking.near[:, present].mean()) if len(ranking.near) else 0.0,
            )
        )
    return Sensitivity(
        answer.loss, answer.context, answer.best.heads, answers.question.indifference, tuple(rows)
    )


def _changes(
    answers: Frontier,
) -> Iterator[tuple[Assumption, float | str, float | str, Objective, Question, Serving]]:
    """What is changed from what to what, the objective it is judged by, and the changed question."""
    q, s, own = answers.question, answers.serving, answers.objective
    yield "", "", "", own, q, s
    if 0 < q.weight < 1:
        for factor in FACTORS:
            odds = factor * q.weight / (1 - q.weight)
            weight = odds / (1 + odds)
            yield "lambda", q.weight, weight, "z", replace(q, weight=weight), s
    powers: tuple[tuple[Assumption, str], ...]
    powers = ("alpha", "memory_power"), ("beta", "compute_power")
    for name, field in powers:
        for factor in FACTORS:
            power = getattr(q, field)
            after = min(max(factor * power, POWERS[0]), POWERS[1])
            if after != power:
                changed = replace(q, **{field: after})
                yield name, power, after, "z", changed, s
    other: Convention = "per_token" if q.convention == "per_sequence" else "per_sequence"
    yield "convention", q.convention, other, "z", replace(q, convention=other), s
    for objective in ("memory", "flops"):
        if objective != own:
            yield "objective", own, objective, objective, q, s
    # objectives that count what is held or read know of the batch and of bytes
    served: Objective = own if own in ("bytes", "seconds", "dollars") else "bytes"
    if served != own:
        yield "objective", own, served, served, q, s
    for factor in BATCHES:
        more = replace(s, batch=round(factor * s.batch))
        yield "batch", s.batch, more.batch, served, q, more
    sizes: tuple[Assumption, ...] = ("weight_bytes", "cache_bytes")
    for size in () if s.clock else sizes:  # what was timed was timed with these bytes
        for factor in FACTORS:
            value = factor * getattr(s, size)
            if 0.01 <= value <= 100:
                yield size, getattr(s, size), value, served, q, replace(s, **{size: value})
