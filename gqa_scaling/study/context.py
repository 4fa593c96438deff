"""Loss over training context lengths: L(T, N, H) = L(N, H) + delta(T), delta shared by all curves.

Whether that may be is tested in `flatness`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import require
from gqa_scaling.study.fit import brought, fit_model
from gqa_scaling.study.fitted import Fit, flagged, plain
from gqa_scaling.study.models import SeparateCurves
from gqa_scaling.study.points import Points, cells, labels
from gqa_scaling.study.results import Results, flags
from gqa_scaling.study.uncertainty import interval

FORMULA = "(a/N)^b + E + delta(T), E and delta shared"


def spans_contexts(results: Results) -> bool:
    return len(np.unique(results.context_length)) > 1


@dataclass(frozen=True)
class ContextLaw:
    """Curves at the reference length and an offset delta for each length, in nats.

    `runs` says how many points each length has, the shortest first. The reference is the length with
    the most, the longest of those that tie. `delta` and the columns of `delta_draws` follow
    `lengths`; both are 0 at the reference. `fit` holds the curves at the reference, with every run
    brought there by its delta.
    """

    fit: Fit
    reference: int
    runs: dict[int, int]
    delta: np.ndarray
    delta_draws: np.ndarray

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.runs)

    def to_dict(self) -> dict[str, Any]:
        return plain(
            {
                "formula": FORMULA,
                "reference_tokens": self.reference,
                "intervals": self.fit.how,
                "lengths": [
                    {
                        "context_tokens": t,
                        "runs": count,
                        "delta_nats": self.delta[i],
                        "delta_interval_nats": interval(self.delta_draws[:, i]),
                    }
                    for i, (t, count) in enumerate(self.runs.items())
                ],
            }
        )


def context_law(results: Results, *, refits: int = 1000, seed: int = 0) -> ContextLaw:
    """Fit the curves and an offset for each training context length together, and bootstrap them.

    E is that of the reference length. Errors may be common to all models of a size, at every length
    or at one. Raises UserError when the runs span one length only or do not say theirs, when one
    size has several token budgets at one length, or when runs are too few.
    """
    r = results
    lengths = tuple(sorted(set(r.context_length.tolist())))
    require(
        len(lengths) > 1,
        f"{r.source}: all runs have context length {lengths[0]}; a context law needs several",
    )
    require(lengths[0] > 0, f"{r.source}: some runs do not say their context_length; fill it in")
    p = cells(r, len(lengths), over=("context_length",))
    counts = {t: int((p.context == t).sum()) for t in lengths}
    reference = max(lengths, key=lambda t: (counts[t], t))
    model = SeparateCurves(p, {f"delta{t}": p.context == t for t in lengths if t != reference})
    fitted = fit_model(
        r,
        p,
        model,
        (p.size, labels(p.size, p.context)),
        title="the context law",
        refits=refits,
        seed=seed,
        context_length=reference,
    )
    at = lengths.index(reference)  # E is followed by the offsets of the other lengths
    others = slice(1, len(lengths))
    delta = np.insert(fitted.parameters[others], at, 0.0)
    draws = np.insert(fitted.parameter_draws[:, others], at, 0.0, axis=1)
    offset = delta[np.searchsorted(lengths, p.context)]
    known = [
        *flags(r),
        f"the runs span T = {', '.join(f'{t:,}' for t in lengths)}: curves and losses are those at "
        f"{reference:,} tokens, every run brought there by its delta(T)",
        *_budgets_differ(p),
    ]
    return ContextLaw(
        fit=flagged(brought(fitted, model, offset), known),
        reference=reference,
        runs=counts,
        delta=delta,
        delta_draws=draws,
    )


def _budgets_differ(p: Points) -> list[str]:
    size = labels(p.curve, p.n, p.size)
    for k in range(size.max() + 1):
        budget = p.tokens[size == k]
        if np.nanmax(budget, initial=0) > 1.1 * np.nanmin(budget, initial=np.inf):
            return [
                "one size has other token budgets at other context lengths: delta(T) mixes what "
                "length does with what data does"
            ]
    return []
