"""Which configurations are ranked, and the curves that they are ranked by.

Step 1 of the search of Chen et al. 2025, section 4.1, takes all head counts that are powers of two.
Most of them are never trained: a joint law predicts them (`strays`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from gqa_scaling.config import UserError, require
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study.choices import Law
from gqa_scaling.study.compare import preferred_law
from gqa_scaling.study.context import spans_contexts
from gqa_scaling.study.curves import Curves
from gqa_scaling.study.estimates import Estimates, estimate
from gqa_scaling.study.fit import known_of, make_model
from gqa_scaling.study.fitted import Fit, flagged
from gqa_scaling.study.models import LAWS
from gqa_scaling.study.points import MIN_SIZES, Interval, Points
from gqa_scaling.study.results import Heads, Results, pairs, pattern_of
from gqa_scaling.study.solver import solve_point
from gqa_scaling.study.strays import StrayedLaw, strayed_law
from gqa_scaling.study.tokens import spans_budgets

Which = Literal["all", "measured"]
WHICH: tuple[Which, ...] = get_args(Which)
MOST = 32  # heads of the largest configuration that was published (Chen et al. 2025, section 4.1)
LEAST = 5  # trained configurations that a joint law of four parameters about heads needs
Known = Literal["measured", "predicted", "beyond"]
KNOWN: dict[Known, str] = {
    "measured": "measured",
    "predicted": "predicted",
    "beyond": "predicted beyond the trained heads",
}


def known_as(heads: Heads, trained: Sequence[Heads]) -> Known:
    """Whether a configuration was trained and, if not, lies within the head counts that were."""
    if heads in trained:
        return "measured"
    counts = np.array([h[:2] for h in trained])
    inside = (counts.min(0) <= heads[:2]) & (heads[:2] <= counts.max(0))
    return "predicted" if inside.all() else "beyond"


def heads_to_rank(
    trained: Sequence[Heads], which: Which | Sequence[Heads] | None = None
) -> tuple[Heads, ...]:
    """The configurations to rank: "all" the published ones, "measured", or those that are named.

    By default powers of two up to the largest head counts that were trained. Trained ones are
    always among them, unless others are named. Raises UserError for another word.
    """
    require(
        not isinstance(which, str) or which in WHICH,
        f"candidates={which!r} must be {' or '.join(WHICH)}, or a list of heads such as (8, 1)",
    )
    if which == "measured":
        return tuple(trained)
    if isinstance(which, str | None):
        queries, values = (
            (MOST, MOST) if which else map(max, zip(*(h[:2] for h in trained), strict=True))
        )
        powers = head_candidates(2 ** (queries.bit_length() - 1))
        which = [*trained, *(h for h in powers if h[1] <= values)]
    return tuple(dict.fromkeys(which))


@dataclass(frozen=True)
class OtherLaw:
    """The curves of a law that the answers do not rest on, to see what they would cost by it."""

    law: Law
    heads: tuple[Heads, ...]
    curves: Curves


@dataclass(frozen=True)
class Candidates:
    """The configurations to rank, with curves on one scale.

    `estimates` are of the runs, of trained configurations alone. `fit` has the curves of all of
    `heads` and whatever else was asked for; `strayed` makes more, None where nothing but trained ones
    can be ranked. `note` says in a line why that is, "" where nothing was left out.
    """

    estimates: Estimates
    fit: Fit
    heads: tuple[Heads, ...]
    strayed: StrayedLaw | None = None
    others: tuple[OtherLaw, ...] = ()
    note: str = ""


def candidates(
    results: Results,
    which: Which | Sequence[Heads] | None = None,
    law: Law | None = None,
    also: Iterable[Heads] = (),
    leave_out: Callable[[Heads], bool] = lambda heads: False,
    **options: Any,
) -> Candidates:
    """Estimate what the runs allow, and the curves of every configuration that is to be ranked.

    `which` as in `heads_to_rank`; `also` are heads whose curves are needed besides, such as a
    baseline's. `leave_out` tells the configurations that are not to be ranked unless they are named.
    `law` is the joint law that predicts; without one `preferred_law` chooses. `options` go to
    `estimate`. A joint law is also taken where a configuration has too few sizes for a curve. Where no joint law can be had, trained configurations alone are ranked, each by a
    curve of its own. Raises UserError where `which` or `also` need more than that.
    """
    context = options.get("context_length")
    chosen = results if context is None else results.select(results.context_length == context)
    known = ", ".join(f"{length:,}" for length in sorted(set(results.context_length.tolist())))
    require(
        len(chosen) > 0,
        f"{results.source}: no runs at context length {context}; there are {known}. The contexts that "
        "models are served at are --contexts",
    )
    trained, also = tuple(sorted(set(chosen.heads))), tuple(also)
    heads = heads_to_rank(trained, which)
    if isinstance(which, str | None):  # what is named is ranked, whatever was left out
        heads = tuple(h for h in heads if not leave_out(h))
    unseen = [h for h in (*heads, *also) if h not in trained]
    few = any(
        len(set(chosen.n_params[[h == own for h in chosen.heads]])) < MIN_SIZES for own in trained
    )
    why = ""
    if unseen or law not in (None, "separate") or (few and law is None):
        try:
            return _on_one_scale(chosen, heads, also, law, options)
        except UserError as error:
            why = str(error).removeprefix(f"{results.source}: ")
    needed = [h for h in (also if which is None else (*heads, *also)) if h not in trained]
    require(
        not needed,
        f"{results.source}: {pairs(needed)} cannot be predicted, only {pairs(trained)} were trained: "
        f"{why}",
    )
    found = estimate(results, law=law or "separate", **options)
    note = f"only the {len(trained)} trained configurations are ranked: {why}" if unseen else ""
    return Candidates(found, found.fit, tuple(h for h in heads if h in trained), note=note)


def _on_one_scale(
    results: Results,
    heads: tuple[Heads, ...],
    also: tuple[Heads, ...],
    law: Law | None,
    options: dict[str, Any],
) -> Candidates:
    """A joint law with the strays of each configuration; UserError with the reason for none."""
    dense = {h[:2] for h in results.heads if pattern_of(h) is None}
    refusals = [
        (law == "separate", "law 'separate' knows nothing of heads that were not trained"),
        (spans_contexts(results), "the runs span several training contexts"),
        (spans_budgets(results), "the runs have several token budgets for a size"),
        (not results.n_layers.all(), "a joint law needs columns n_layers and d_model"),
        (len(dense) < LEAST, f"a joint law needs {LEAST} dense configurations, not {len(dense)}"),
    ]
    for holds, reason in refusals:
        require(not holds, reason)
    found = estimate(results, law=law or preferred_law(results), **options)
    fit, head_dim = found.fit, int(results.head_dim[0])
    require(
        fit.converged and fit.rank == fit.n_parameters,
        f"these runs do not determine law {fit.law!r}: vary query heads and KV heads apart",
    )
    strayed = strayed_law(fit, head_dim)
    strayed = dataclasses.replace(strayed, fit=flagged(strayed.fit, known_of(results)))
    whole = strayed.fit_of((*heads, *also))
    found = dataclasses.replace(found, fit=strayed.fit_of(()))
    others = tuple(_other_laws(found.fit.points, whole, head_dim))
    return Candidates(found, whole, heads, strayed, others)


def _other_laws(trained: Points, whole: Fit, head_dim: int) -> Iterator[OtherLaw]:
    """The other laws that these runs can be fitted with; separate curves have the trained heads."""
    few = min(np.bincount(trained.curve)) < MIN_SIZES
    for law in LAWS:
        if law == whole.law or (few and law == "separate"):
            continue
        points = trained if law == "separate" else whole.points
        with contextlib.suppress(UserError):  # too few configurations for this law
            model = make_model(law, points, head_dim)
            found = solve_point(model, points.loss, points.replicates.astype(float))
            yield OtherLaw(law, points.heads, model.curves(found.parameters))


def sizes_of(fit: Fit, k: int) -> Interval:
    """The least and the largest N of configuration k that its curve rests on.

    With a curve of its own these are its own sizes, with a joint law those of all runs: the N that it
    has at their least and their largest N_b.
    """
    p, backbone = fit.points, fit.curves.backbone
    if backbone is None:
        return p.range_n(k)
    ends = n_formula(p.n_layers, p.d_model, 0, 0)
    low, high = backbone.to_n(k, np.array([ends.min(), ends.max()], float))
    return float(low), float(high)


def trained_curves(fit: Fit) -> list[int]:
    """The indices of the configurations that have runs."""
    return sorted(set(fit.points.curve.tolist()))
