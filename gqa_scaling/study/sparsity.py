"""What sparsity costs in loss and saves in serving, against dense attention with the same heads.

Losses are compared at one N, costs at one loss: the curves of a fit answer both. How loss follows
density is told by a joint law, in which each halving of it multiplies the excess over E by exp(r).
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import UserError
from gqa_scaling.study.fit import Fit, Interval, fit, interval, plain
from gqa_scaling.study.frontier import Answer, Frontier, costs_at, scale_of
from gqa_scaling.study.heads import common_n
from gqa_scaling.study.results import Heads, Results, pattern_of


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
    """The density of the cheapest configuration at one context, and how often it is the cheapest.

    `probability` is the share of the refits whose cheapest configuration has this density.
    """

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
    rate: float | None
    rate_interval: Interval | None
    excess: float | None
    no_rate: str = ""
    left_out: str = ""

    @property
    def halving(self) -> float | None:
        """What halving the density of a dense model of `n` parameters adds to its loss, in nats."""
        if self.rate is None or self.excess is None:
            return None
        return self.excess * float(np.expm1(self.rate))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; losses in nats."""
        return plain(asdict(self) | {"halving": self.halving})


def sparsity(found: Fit, results: Results, answers: Frontier) -> Sparsity | None:
    """The trade-off at the answer that is told in a sentence; None where all runs are dense.

    The rate is that of the fit's own law where it is a joint one, else of the product law fitted
    to the same runs.
    """
    if not answers.sharded:
        return None
    answer, n, scale = answers.headline, common_n(found), scale_of(results)

    def costs(k: int) -> np.ndarray:
        """Of the point estimate, then of every draw."""
        sizes = np.r_[found.curves.n_star(answer.loss)[k], found.draws.n_star(answer.loss)[:, k]]
        sizes = scale.within(sizes, found.heads[k])
        where = (answer.context, answers.question, scale, answers.serving)
        cost = costs_at(sizes, found.heads[k], *where)[0]
        return getattr(cost, answers.objective)

    def losses(k: int) -> np.ndarray:
        return np.r_[found.curves.loss(k, n), found.draws.loss(k, n)]

    rows = []
    for k, heads in enumerate(found.heads):
        if pattern_of(heads) is None:
            continue
        higher = saved = np.full(2, np.nan)
        if heads[:2] in found.heads:
            dense = found.index(heads[:2])
            higher = losses(k) - losses(dense)
            with np.errstate(invalid="ignore"):
                saved = 1 - costs(k) / costs(dense)
            saved = np.where(np.isfinite(saved), saved, np.nan)
        rows.append(
            Sparse(
                heads=heads,
                density=float(found.points.density[k]),
                effective=answer.choice(heads).effective,
                loss=float(higher[0]),
                loss_interval=_interval(higher[1:]),
                saving=float(saved[0]),
                saving_interval=_interval(saved[1:]),
            )
        )
    law, why = found, ""
    try:
        if "r" not in found.names:
            r = results
            law = fit(r, context_length=found.context_length, law="product", refits=found.refits)
    except UserError as error:
        why = str(error)
    known = not why and "r" in law.names and law.converged and law.rank == law.n_parameters
    i = law.names.index("r") if known else 0
    return Sparsity(
        n=n,
        loss=answer.loss,
        context=answer.context,
        train_context=answers.train_context,
        rows=tuple(sorted(rows, key=lambda row: (-row.density, row.heads))),
        cheapest=tuple(
            _cheapest(a, found)
            for a in sorted(answers.answers, key=lambda a: a.context)
            if a.loss == answer.loss and a.best.reached
        ),
        law=law.law,
        rate=float(law.parameters[i]) if known else None,
        rate_interval=interval(law.parameter_draws[:, i]) if known else None,
        excess=_dense_excess(law, n) if known else None,
        no_rate="" if known else why or "the runs do not tell what density does from what heads do",
        left_out=law.left_out if known else "",
    )


def _interval(draws: np.ndarray) -> Interval:
    kept = draws[~np.isnan(draws)]
    return interval(kept) if len(kept) else (float("nan"), float("nan"))


def _dense_excess(law: Fit, n: float) -> float | None:
    """Loss minus E at N, in nats, a mean over the dense configurations; None without one."""
    dense = [k for k, heads in enumerate(law.heads) if pattern_of(heads) is None]
    return float(np.mean([law.curves.loss(k, n) for k in dense])) - law.floor if dense else None


def _cheapest(answer: Answer, found: Fit) -> Cheapest:
    density = dict(zip(found.heads, found.points.density, strict=True))
    own = density[answer.best.heads]
    alike = [c for c in answer.choices if abs(density[c.heads] / own - 1) < 0.01]
    return Cheapest(
        context=answer.context,
        heads=answer.best.heads,
        density=float(own),
        probability=sum(c.probability for c in alike),
    )
