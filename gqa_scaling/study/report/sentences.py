"""The answers in sentences, with their intervals and whatever weakens them."""

import dataclasses
import math

from gqa_scaling.baselines import WholeModel
from gqa_scaling.hardware import GIB
from gqa_scaling.study.baseline import label
from gqa_scaling.study.build import Model
from gqa_scaling.study.candidates import KNOWN
from gqa_scaling.study.caveats import MISSED
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.equal_training import EqualTraining, Served, Trained
from gqa_scaling.study.frontier import Answer, Choice, Frontier
from gqa_scaling.study.points import Interval
from gqa_scaling.study.report.table import margin, percent, span
from gqa_scaling.study.results import pair, pairs, pattern_of
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import count, quantity

DEMONSTRATION = "Demonstration, too small to decide by. "


def sentence(frontier: Frontier) -> str:
    """The answer in one or two sentences, with its interval and whatever weakens it."""
    answer, best = frontier.headline, frontier.headline.best
    start = DEMONSTRATION if frontier.question.demonstration else ""
    start += f"NOT TO BE RELIED ON: {frontier.doubt}. " if frontier.doubt else ""
    if not best.reached and answer.outsized(frontier.serving):
        limit = frontier.serving.limit_bytes / GIB
        return (
            f"{start}No configuration that reaches {_goal(answer)} fits --fit-gib {limit:g} (GiB), by "
            "these curves."
        )
    if not best.reached:
        return (
            f"{start}No configuration reaches {_goal(answer)} with what must hold at any size that can "
            "be built, by these curves: it is out of reach."
        )
    pattern, alike, untimed = pattern_of(best.heads), answer.equivalent, frontier.untimed(answer)
    others = [h for h in answer.tied if h != best.heads and h not in alike]
    sparse = (
        f" with pattern {pattern.label} (T_eff {best.effective:,.0f} tokens)" if pattern else ""
    )
    said = [
        f"{start}For {_goal(answer)}, take {count(best.heads[0], 'query head')} and "
        f"{count(best.heads[1], 'KV head')}{sparse} at {quantity(best.n)} parameters: "
        f"{_saving(best, frontier)}.",
        f"NOT DECIDED which is the cheapest: {untimed}."
        if untimed
        else f"The noise leaves open whether {pairs(others)} {'are' if len(others) > 1 else 'is'} as good."
        if others
        else f"It is the cheapest in {percent(best.probability, 0)} of the refits.",
    ]
    if alike and not untimed:
        most = margin(frontier.question.indifference)
        said.append(
            f"As good, within {most} of the cheapest in {LEVEL:.0%} of the refits: {pairs(alike)}."
        )
    if best.unreachable > MISSED:
        said.append(
            f"{percent(best.unreachable, 0)} of the refits never reach that loss with it, at any size "
            "that can be built within what must hold."
        )
    if best.known != "measured":
        said.append(
            f"Its heads were never trained: they are {KNOWN[best.known]}, and the run below checks them."
        )
        if answer.safest:
            said.append(
                f"The cheapest that was trained is {pair(answer.safest.heads)}, "
                f"{percent(answer.safest.excess)} dearer."
            )
    if best.extrapolated:
        said.append("Its size lies outside the fitted ones.")
    if pattern and answer.context > frontier.train_context:
        said.append(
            f"That its pattern costs no more loss there than at the {frontier.train_context:,} tokens "
            "it was trained at is untested."
        )
    return " ".join(said)


def _goal(answer: Answer) -> str:
    return f"{answer.loss:g} nats at {answer.context:,} tokens"


def _saving(best: Choice, frontier: Frontier) -> str:
    """What the cheapest configuration saves against the baseline, and what it gains in loss."""
    base, objective = label(frontier.baseline), frontier.objective
    if best.heads == frontier.baseline:
        return "it is the baseline itself"
    if not math.isfinite(best.saving[objective]):
        return f"{base} never reaches that loss"
    others: tuple[Objective, ...] = ("memory", "flops", "z")
    saved, *rest = (
        f"{less(best.saving[kind])} {OBJECTIVES[kind]}"
        for kind in dict.fromkeys((objective, *others))
    )
    return (
        f"{saved} than {base}{_at_loss(frontier)} ({LEVEL:.0%} interval "
        f"{span(_as_said(best, objective), percent)}), with {' and '.join(rest)}"
        + _gained(best, OBJECTIVES[objective])
    )


def _as_said(best: Choice, objective: Objective) -> Interval:
    """The interval of what is said to be less, or more."""
    low, high = best.saving_interval[objective]
    return (low, high) if best.saving[objective] >= 0 else (-high, -low)


def _at_loss(frontier: Frontier) -> str:
    """At which loss the baseline stands: one model has its own, whatever is asked for."""
    if not isinstance(frontier.baseline, WholeModel) or not frontier.question.losses:
        return " at the same loss"
    return f", whose loss is {frontier.answers[0].baseline.loss:.3f}"


def less(saving: float) -> str:
    """A saving in words: 3.1% less, or more where it is negative."""
    return f"{percent(abs(saving))} {'less' if saving >= 0 else 'more'}"


def _gained(choice: Choice, kind: str) -> str:
    """What the choice gains in loss at the baseline's cost, as the end of a sentence."""
    e = choice.equal_cost
    if not math.isfinite(e.gain):
        return ""
    ends = sorted(e.gain_interval if e.gain >= 0 else (-v for v in e.gain_interval))
    far = ", outside the fitted sizes" if e.extrapolated else ""
    return (
        f"; or {abs(e.gain):.3f} nats {'less' if e.gain >= 0 else 'more'} at the same {kind} "
        f"({span(ends)}{far})"
    )


def aligned_sentence(answer: EqualTraining) -> str:
    """The answer at equal training FLOPs, with its intervals and whatever weakens it."""
    goal = answer.goals[len(answer.goals) // 2]
    best, at = goal.trained[0], max(answer.question.contexts)
    served, kind = goal.served[at][0], OBJECTIVES[answer.objective]
    ends = {"larger": ", the largest size trained", "smaller": ", the smallest size trained"}
    first = (
        f"{DEMONSTRATION if answer.question.demonstration else ''}"
        f"For the training FLOPs of {pair(answer.baseline)} at {quantity(goal.n)} parameters "
        f"on {quantity(goal.tokens)} tokens ({goal.flops:.3g}, T = {answer.train_context:,}), "
        f"{pair(best.heads)} reaches the lowest loss: {best.loss:.4f} nats at {quantity(best.n)} on "
        f"{quantity(best.tokens)} tokens{_far(best)}{ends.get(best.beyond, '')}: {best.gain:z.4f} "
        f"below the baseline ({LEVEL:.0%} interval {span(best.gain_interval, 'z.4f')}), lowest in "
        f"{percent(best.probability, 0)} of the refits."
    )
    if not served.reached:
        return f"{first} At equal loss none can be served at {at:,} tokens with what must hold."
    saved, probability = served.saving[answer.objective], percent(served.probability, 0)
    if served.heads == answer.baseline and abs(saved) < 1e-6:
        return (
            f"{first} At equal loss none is cheaper to serve at {at:,} tokens than that baseline run "
            f"itself, in {probability} of the refits."
        )
    return (
        f"{first} At equal loss the cheapest to serve at {at:,} tokens is {pair(served.heads)} at "
        f"{quantity(served.n)} on {quantity(served.tokens)} tokens{_far(served)}: {less(saved)} "
        f"{kind} than that baseline run ({LEVEL:.0%} interval "
        f"{span(served.saving_interval[answer.objective], percent)}), cheapest in {probability} of the "
        "refits."
    )


def _far(found: Trained | Served) -> str:
    return " outside what was trained" if found.n_outside or found.tokens_outside else ""


def training(frontier: Frontier) -> str:
    """How to train the model of the sentence; plain text, for its command must not be folded."""
    answer, m = frontier.headline, frontier.headline.model
    if m is None:
        return ""
    goal = _goal(answer)
    if m.trained:
        return f"The model to build for {goal} is a run of this study: {m.trained}."
    if not m.command:
        return (
            f"To build for {goal}: {model_text(m)}. To train it, declare an experiment "
            "(docs/using.md): these runs come without their corpus." + _checks(answer)
        )
    others = {a.model.command for a in frontier.answers if a.model} - {m.command, ""}
    more = "\nThe commands of the other models are in the report and in --json." if others else ""
    return f"Train the model to build for {goal}:\n\n{m.command}\n{_checks(answer)}{more}"


def _checks(answer: Answer) -> str:
    """What the run of a predicted winner is to show."""
    if answer.model is None or answer.best.known == "measured":
        return ""
    return (
        f" It checks heads that were never trained: a loss outside "
        f"{span(answer.model.run_interval)} nats speaks against the law."
    )


def model_text(model: Model) -> str:
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
    known = {k: getattr(model.config, k) for k in names}
    known = {k: v for k, v in known.items() if v is not None}
    if pattern := model.config.pattern:
        fields = (
            (f.name, f.default, getattr(pattern, f.name)) for f in dataclasses.fields(pattern)
        )
        own = {name: value for name, default, value in fields if value != default}
        known["pattern"] = f"ContextSharding({_arguments(own)})"
    return f"ModelConfig({_arguments(known)})"


def _arguments(values: dict[str, object]) -> str:
    return ", ".join(f"{k}={v if k == 'pattern' else repr(v)}" for k, v in values.items())
