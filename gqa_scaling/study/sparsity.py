"""What sparsity costs in loss and saves in serving, against dense attention with the same heads.

Losses are compared at one N, costs at one loss: the curves of a fit answer both. How loss follows
density is told by a joint law, in which each halving of it multiplies the excess over E by exp(r).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import UserError
from gqa_scaling.study.fit import fit
from gqa_scaling.study.fitted import Fit, plain
from gqa_scaling.study.frontier import Answer, Frontier, with_draws
from gqa_scaling.study.heads import common_n
from gqa_scaling.study.points import Interval
from gqa_scaling.study.ranking import known_interval, saved
from gqa_scaling.study.results import Heads, Results, pair, pattern_of
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.uncertainty import interval


@dataclass(frozen=True)
class Sparse:
    """One configuration with a pattern, against the dense one with its heads.

    `density` is the share of causal query-key pairs computed at the training context, `effective`
    T_eff at the answer's context, in tokens. `loss` is how much higher its loss is at equal N, in
    nats, `saving` 1 - cost / the dense one's at equal loss, by the objective. NaN without a dense
    configuration of these heads, or where either never reaches the loss.
    """

    heads: Heads
    density: float
    effective: float
    loss: float
    loss_interval: Interval
    saving: float
    saving_interval: Interval


@dataclass(frozen=True)
class Cheapest:
    """The density of the cheapest configuration at one context, and how often it is the cheapest."""

    context: int
    heads: Heads
    density: float
    probability: float


@dataclass(frozen=True)
class Sparsity:
    """All configurations with a pattern at one target loss, densest first.

    Losses are compared at `n` parameters, savings at `loss` nats and `context` tokens. `rate` is r
    of the law `law`, None where `no_rate` says why there is none; `excess` is what dense models of
    `n` parameters lose above E by that law, in nats, a mean over heads, None without dense ones.
    `left_out` says how many refits of that law failed, "" for none.
    """

    n: float
    loss: float
    context: int
    train_context: int
    rows: tuple[Sparse, ...]
    cheapest: tuple[Cheapest, ...]
    law: str
    rate: float | None = None
    rate_interval: Interval | None = None
    excess: float | None = None
    no_rate: str = ""
    left_out: str = ""

    @property
    def halving(self) -> float | None:
        """What halving the density of a dense model of `n` parameters adds to its loss, in nats."""
        if self.rate is None or self.excess is None:
            return None
        return self.excess * float(np.expm1(self.rate))

    def to_dict(self) -> dict[str, Any]:
        return plain(asdict(self) | {"halving": self.halving})


def sparsity(found: Fit, results: Results, answers: Frontier) -> Sparsity | None:
    """The trade-off at the answer that stands for all; None where all runs are dense.

    The rate is that of the fit's own law where it is a joint one, else of the product law fitted
    to the same runs.
    """
    if not answers.sharded:
        return None
    answer, n = answers.headline, common_n(found)
    where = (answer.context, answers.objective, answers.serving)
    deployment = Deployment(family_of(results), answers.question, *where)
    curves = with_draws(found)
    n_star, family = curves.n_star(answer.loss), deployment.family

    def cost(k: int) -> np.ndarray:
        """Of configuration k at the answer's loss: of the point estimate, then of every draw."""
        sizes = family.within(n_star[:, k], found.heads[k])
        costs = deployment.costs(sizes, found.heads[k])
        return deployment.objective_of(deployment.drawn(costs, pair(found.heads[k])))

    rows = []
    for k, heads in enumerate(found.heads):
        if pattern_of(heads) is None:
            continue
        higher = saving = np.full(2, math.nan)
        if heads[:2] in found.heads:
            dense = found.index(heads[:2])
            higher = curves.loss(k, n) - curves.loss(dense, n)
            saving = saved(cost(k), cost(dense))
            saving = np.where(np.isfinite(saving), saving, math.nan)
        rows.append(
            Sparse(
                heads=heads,
                density=float(found.points.density[k]),
                effective=answer.choice(heads).effective,
                loss=float(higher[0]),
                loss_interval=known_interval(higher[1:]),
                saving=float(saving[0]),
                saving_interval=known_interval(saving[1:]),
            )
        )
    cheapest = [
        _cheapest(a, found)
        for a in sorted(answers.answers, key=lambda a: a.context)
        if a.loss == answer.loss and a.best.reached
    ]
    return Sparsity(
        n=n,
        loss=answer.loss,
        context=answer.context,
        train_context=answers.train_context,
        rows=tuple(sorted(rows, key=lambda row: (-row.density, row.heads))),
        cheapest=tuple(cheapest),
        **_rate(found, results, n),
    )


def _rate(found: Fit, results: Results, n: float) -> dict[str, Any]:
    """What a joint law says of density, as fields of `Sparsity`."""
    law = found
    if "r" not in found.names:
        context, refits = found.context_length, found.refits
        try:
            law = fit(results, context_length=context, law="product", refits=refits)
        except UserError as error:
            return {"law": found.law, "no_rate": str(error)}
    if "r" not in law.names or not law.converged or law.rank < law.n_parameters:
        return {
            "law": law.law,
            "no_rate": "the runs do not tell what density does from what heads do",
        }
    i = law.names.index("r")
    dense = [law.curves.loss(k, n) for k, h in enumerate(law.heads) if pattern_of(h) is None]
    return {
        "law": law.law,
        "rate": float(law.parameters[i]),
        "rate_interval": interval(law.parameter_draws[:, i]),
        "excess": float(np.mean(dense)) - law.floor if dense else None,
        "left_out": law.left_out,
    }


def _cheapest(answer: Answer, found: Fit) -> Cheapest:
    density = {
        choice.heads: 1.0 for choice in answer.choices
    }  # heads that nobody trained are dense
    density |= dict(zip(found.heads, found.points.density.tolist(), strict=True))
    own = density[answer.best.heads]
    alike = [c for c in answer.choices if abs(density[c.heads] / own - 1) < 0.01]
    return Cheapest(
        context=answer.context,
        heads=answer.best.heads,
        density=own,
        probability=sum(c.probability for c in alike),
    )
