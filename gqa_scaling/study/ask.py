"""What is asked of finished runs, and their whole answer: the same from the command line and from Python."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from gqa_scaling.config import Question, require
from gqa_scaling.fields import did_you_mean
from gqa_scaling.study.baseline import curves_for, named_baseline
from gqa_scaling.study.candidates import Which, candidates
from gqa_scaling.study.choices import Law, Objective
from gqa_scaling.study.commands import with_training
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.predict import Expected, expected, of_new_heads, require_told
from gqa_scaling.study.results import Heads
from gqa_scaling.study.scores import forecasts_of
from gqa_scaling.study.serving import Serving, require_costs
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.sides import Side, side
from gqa_scaling.study.source import Source
from gqa_scaling.study.study import Study
from gqa_scaling.study.verdict import with_verdict
from gqa_scaling.study.versus import Versus, versus


def asked(question: Question, **changes: Any) -> Question:
    """The question with these fields changed; None leaves a field as it is.

    A baseline that is one whole model has a loss of its own, which is the target where no losses are
    given. Raises UserError for a name or value that cannot be.
    """
    known = [each.name for each in fields(Question)]
    for name in changes:
        require(name in known, f"a question has no {name!r}{did_you_mean(name, known)}")
    given = {name: value for name, value in changes.items() if value is not None}
    baseline = given.get("baseline")
    if isinstance(baseline, str) and "@" in baseline and "losses" not in given:
        question = replace(question, losses=None)
    return replace(question, **given)


def answer(
    source: Source,
    question: Question,
    objective: Objective = "z",
    serving: Serving | None = None,
    *,
    which: Which | Sequence[Heads] | None = None,
    law: Law | None = None,
    ending: Sequence[str] = (),
    **options: Any,
) -> Study:
    """The whole study but for equal training FLOPs: estimated, ranked, checked, with its forecasts.

    `which` and `law` say what is ranked, and by which curves, as `candidates` has them; `options` are
    those of `estimate`. `ending` are options that end the commands which train an answer. Raises
    UserError as `candidates` and `frontier` do.
    """
    serving = serving or Serving()
    require_costs(objective, serving)  # before anything is estimated
    baseline = named_baseline(question)
    also = curves_for(baseline) if baseline else ()
    among = candidates(source.results, which, law, also, source.leaves_out, **options)
    found = among.estimates
    told = frontier(among.fit, source.results, question, objective, serving, among=among)
    told = with_training(told, source, found, ending, fit=among.fit)
    found, told = with_verdict(found, source.results, told, fit=among.fit)
    return Study(source.results, found, told, candidates=among, forecasts=forecasts_of(source))


def sides(source: Source, *texts: str) -> tuple[Side, ...]:
    """The configurations and models that these texts name, as `side` has them."""
    known = sorted(set(source.results.heads), key=str)
    return tuple(side(text, known) for text in texts)


def compare_two(
    source: Source,
    first: str,
    second: str,
    changes: dict[str, Any],
    objective: Objective = "z",
    serving: Serving | None = None,
    *,
    law: Law | None = None,
    **options: Any,
) -> Versus:
    """Which of the two is cheaper or better, by their own curves where both were trained.

    Where one was not, or has too few sizes, both stand on the scale that `answer` ranks them on.
    `changes` are fields of the source's question, as `asked` takes them; `options` are those of
    `estimate`. Raises UserError as `side`, `candidates` and `versus` do.
    """
    question = asked(source.question, **changes)
    one, other = sides(source, first, second)
    if changes.get("losses") is None and (one.shape or other.shape):
        question = replace(question, losses=None)  # a whole model has a loss of its own
    heads = (one.heads, other.heads)
    among = candidates(source.results, heads, law, **options)
    result = (among.estimates, source.results, one, other)
    return versus(*result, question, objective, serving, fit=among.fit)


def predict_one(
    source: Source,
    found: Estimates,
    what: str,
    n: float | None = None,
    train_context: int | None = None,
    tokens: float | None = None,
) -> Expected:
    """The loss that `found`, estimated from the source's runs, expects of a model.

    `what` is a whole model such as 8,1@L24d1536, or heads, whose N is `n`; heads that nobody trained
    are predicted as `candidates` are. Raises UserError for a size, a training context or a budget that
    the study does not speak of, and as `side`, `candidates` and `expected` do.
    """
    (one,) = sides(source, what)
    require(
        (n is None) == (one.shape is not None),
        f"{what!r} must be a whole model such as 8,1@L24d1536, or heads with their N (n=1e9)",
    )
    family = family_of(source.results)
    if one.shape:
        n = float(family.n_of(*one.shape, one.heads))
    assert n is not None
    family.require_reached(n, one.heads, one.label)
    require_told(one.label, found, source.results, n, train_context, tokens)
    if one.heads not in found.fit.heads:
        found = of_new_heads(found, source.results, [one.heads])
    return expected(found, one.heads, n, train_context, tokens)
