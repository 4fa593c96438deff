"""What a reader must know before deciding by an answer, and why there may be none to decide by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gqa_scaling.config import Question
from gqa_scaling.hardware import GIB
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads, pairs, pattern_of
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity

if TYPE_CHECKING:
    from gqa_scaling.study.frontier import Answer
    from gqa_scaling.study.serving import Serving

MISSED = 0.05  # a larger share of refits that never reach the loss is said so


def doubt(fit: Fit) -> str:
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


def caveats(
    answers: "Sequence[Answer]",
    reach: dict[Heads, Interval],
    baseline: str,
    indifference: float,
    serving: "Serving",
) -> list[str]:
    """What a reader must know before deciding by these answers; `reach` as `Family.reach`.

    `indifference` is the share that costs may differ by and be as good as equal.
    """

    def goals(some: "Sequence[Answer]") -> str:
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
    outsized = [a for a in answers if a.outsized(serving)]
    limit = f"--fit-gib {serving.limit_bytes / GIB:g} (GiB)"
    tell(outsized, f"no configuration that reaches {goals(outsized)} fits {limit}")
    lost = [a for a in answers if not a.best.reached and a not in outsized]
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
        f"{a.baseline.unreachable:.0%} of the refits for {goals([a])}"
        for a in reached
        if a.baseline.unreachable > MISSED
    ]
    tell(
        unsaved,
        f"the baseline {baseline} never reaches the loss, so that savings leave them out, in "
        f"{'; '.join(unsaved)}",
    )
    uneven = sorted({a.best.heads for a in reached if a.best.heads[0] % a.best.heads[1]})
    tell(
        uneven,
        f"{pairs(uneven)}: query heads that are no multiple of the KV heads have costs and a loss, but "
        "no model of them can be built here",
    )
    unbuilt = [a for a in reached if a.model is None and a.best.heads not in uneven]
    tell(unbuilt, f"no model near the best N* can be built within the bytes: {goals(unbuilt)}")
    ties = [a for a in answers if len(a.tied) > 1 + len(a.equivalent)]
    noisy = sum(a.best.probability < LEVEL for a in ties)
    close = len(ties) - noisy
    tell(
        range(noisy),
        f"the noise cannot separate the best configuration in {noisy} of {many} answers: they are "
        "printed as tied",
    )
    tell(
        range(close),
        f"in {close} of {many} answers the best is the cheapest in {LEVEL:.0%} of the refits or more, "
        f"but others may be within {100 * indifference:g}% of it: they are printed as tied, too",
    )
    return out
