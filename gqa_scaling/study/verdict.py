"""What a movement of the differences with T, as far as the runs leave it open, does to the answer."""

from dataclasses import replace

from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.flatness import Effect, Flatness
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.results import Results
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of


def judged(tested: Flatness, fit: Fit, results: Results, answers: Frontier) -> Flatness:
    """The test with what its largest movement would do to the answer that stands for all."""
    answer, best = answers.headline, answers.headline.best
    if tested.movement is None or not best.reached:
        return tested
    family, nats = family_of(results), tested.movement.most * answer.loss
    question, place = answers.question, (answer.context, answers.objective, answers.serving)
    deployment = Deployment(family, question, *place)
    k = fit.index(best.heads)
    n = family.within(fit.curves.n_star(max(answer.loss - nats, 1e-9))[k], best.heads)
    cost = float(deployment.cost(deployment.costs(n, best.heads), best.heads))
    others = [(c.cost, c.heads) for c in answer.choices if c.heads != best.heads]
    cheapest = min([(cost, best.heads), *others], key=lambda each: each[0])
    effect = Effect(
        heads=best.heads,
        loss=answer.loss,
        context=answer.context,
        objective=answers.objective,
        nats=nats,
        change=max(cost / best.cost - 1, 0.0),
        then=cheapest[1],
        indifference=question.indifference,
    )
    return replace(tested, effect=effect)


def with_verdict(
    found: Estimates, results: Results, answer: Frontier, fit: Fit | None = None
) -> tuple[Estimates, Frontier]:
    """Whether differences move with T judged by what that does to the answer, and said where it may."""
    if found.flatness is None:
        return found, answer
    tested = judged(found.flatness, fit or found.fit, results, answer)
    if tested.verdict not in ("flat", "untested"):
        answer = replace(answer, flags=(*answer.flags, tested.sentence()))
    return replace(found, flatness=tested), answer
