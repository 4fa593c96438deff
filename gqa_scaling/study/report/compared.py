"""How a comparison of two is shown: in a sentence and in tables."""

import math
from collections.abc import Callable, Sequence

from rich.console import Group

from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.clock import FAR, untimed
from gqa_scaling.study.report.sentences import DEMONSTRATION, less
from gqa_scaling.study.report.table import (
    INTERVAL,
    Column,
    Table,
    cost_heading,
    cost_text,
    margin,
    millinats,
    percent,
    shown,
    span,
)
from gqa_scaling.study.serving import Serving, units
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.study.versus import Gap, Match, Versus
from gqa_scaling.units import quantity


def compared(found: Versus) -> Group:
    """The comparison for a terminal: in a sentence, in tables, and what must be known of it."""
    return shown(tables(found), found.flags, sentence(found))


def sentence(found: Versus) -> str:
    """Which of the two, by how much and how sure, at the match that stands for all."""
    m, kind = found.headline, OBJECTIVES[found.objective]
    one, other = found.labels
    start = DEMONSTRATION if found.question.demonstration else ""
    goal = f"{m.loss:.4g} nats at {m.context:,} tokens"
    if m.verdict == "neither":
        return f"{start}Neither {one} nor {other} reaches {goal} with what must hold."
    far = m.verdict == "untimed"
    gap, most = m.equal_loss[0], margin(found.question.indifference)
    verdict = {
        "first": f"{one} is the cheaper",
        "second": f"{other} is the cheaper",
        "equivalent": f"{one} and {other} are as good, within {most} in {LEVEL:.0%} of the refits",
        "open": f"these runs leave open whether {one} or {other} is cheaper by more than {most}",
        "untimed": f"it is NOT DECIDED whether {one} or {other} is cheaper ({untimed(m.stretch)})",
    }[m.verdict]
    said = [
        f"{start}{_as_they_are(found)}For {goal} {verdict}: {one} takes {less(gap.gain)} {kind} ({LEVEL:.0%} interval "
        f"{span(_ends(gap), percent)})"
        + ("." if far else f", cheaper in {percent(gap.probability, 0)} of the refits.")
    ]
    if not math.isfinite(gap.gain):
        missing = one if math.isinf(gap.first) else other
        said = [
            f"{start}For {goal} {missing} is out of reach, {one if missing == other else other} is not."
        ]
    reference = found.reference.label
    for each, at in (
        (m.equal_cost, f"for the {kind} of {reference}"),
        (m.equal_size, f"at the size of {reference}, N = {quantity(m.equal_size.n[0])},"),
    ):
        if math.isfinite(each.gain):
            said.append(f"{at[0].upper()}{at[1:]} {_lower(each, one)}.")
    if m.training:
        g = m.training
        said.append(
            f"Trained to that loss {one} has a compute multiplier of {g.gain:.3f} "
            f"({span(g.gain_interval)}), above 1 in {percent(g.probability, 0)} of the refits."
        )
    return " ".join([*said, found.no_training] if found.no_training else said)


def _as_they_are(found: Versus) -> str:
    """Two whole models in a sentence; "" where there are none."""
    m = found.headline
    if not m.itself:
        return ""
    cost, loss = m.itself[0], m.itself[-1]
    return (
        f"As they are, {found.first.label} takes {less(cost.gain)} {OBJECTIVES[found.objective]} than "
        f"{found.second.label} at {m.context:,} tokens and {_lower(loss, found.first.label)}. "
    )


def _lower(gap: Gap, one: str) -> str:
    side = "below" if gap.gain >= 0 else "above"
    return (
        f"the loss of {one} is {millinats(abs(gap.gain))} millinats {side} the other's "
        f"({span(_ends(gap), millinats)})"
    )


def _ends(gap: Gap) -> tuple[float, float]:
    """The interval of what the first gains or, where it loses, of what it loses."""
    low, high = gap.gain_interval
    return (low, high) if gap.gain >= 0 else (-high, -low)


def tables(found: Versus) -> list[Table]:
    one, other = found.labels
    kind, matches = OBJECTIVES[found.objective], found.matches
    u, reference = units(found.question, found.serving), found.reference.label
    firsts = list({m.loss: m for m in matches}.values())
    out = []
    if matches[0].itself:
        out.append(_themselves(found))
    out.append(_equal_loss(found))
    out.append(
        Table(
            f"At equal {kind}, that of {reference} at that loss",
            [*_where(), *_loss_columns(found, lambda m: m.equal_cost)],
            matches,
        )
    )
    out.append(
        Table(
            f"At equal size, that of {reference} at that loss",
            [_where()[1], *_loss_columns(found, lambda m: m.equal_size)],
            firsts,
        )
    )
    if not found.no_training:
        out.append(_training(one, other, firsts))
    notes = [
        f"FLOPs: {u['flops']}. Z: {u['z']}. Probabilities and intervals: {found.intervals}.",
        "Compared by a curve of its own for each."
        if found.law == "separate"
        else f"Compared by law {found.law!r}, around which each configuration strays.",
        f"Told apart: one is dearer by more than {margin(found.question.indifference)} in {LEVEL:.0%} "
        "of the refits.",
    ]
    if found.serving != Serving():
        notes.append(f"Served: {found.serving.describe()}.")
    if found.serving.clock:
        notes.append(
            f"Each refit draws an error of the clock: {found.serving.clock.ratio_error}. Too far: {FAR:g} "
            "times and more beyond what was timed nothing is decided by seconds."
        )
    return [*out, Table("Conventions", notes=notes)]


def _where() -> tuple[Column, Column]:
    return (
        Column("context", lambda m: f"{m.context:,}", "tokens"),
        Column("loss", lambda m: f"{m.loss:.4g}", "nats"),
    )


def _marked(gap: Gap, i: int) -> str:
    return quantity(gap.n[i]) + ("~" if gap.outside[i] else "")


def _sides(found: Versus) -> tuple[tuple[int, str], tuple[int, str]]:
    first, second = found.labels
    return (0, first), (1, second)


def _equal_loss(found: Versus) -> Table:
    one, other = found.labels
    verdicts = {"first": one, "second": other, "equivalent": "as good", "untimed": "too far"}
    most = margin(found.question.indifference)

    def decided(cell: Callable[[Match], str]) -> Callable[[Match], str]:
        return lambda m: "-" if m.verdict == "untimed" else cell(m)

    def size(i: int) -> Callable[[Match], str]:
        return lambda m: _marked(m.equal_loss[0], i)

    def cost(i: int) -> Callable[[Match], str]:
        return lambda m: cost_text(
            found.objective, (m.equal_loss[0].first, m.equal_loss[0].second)[i]
        )

    def saved(kind: int) -> Callable[[Match], str]:
        return lambda m: percent(m.equal_loss[kind].gain)

    kinds = [g.kind for g in found.matches[0].equal_loss]
    objective = cost_heading(found.objective)
    rest = found.objective in ("memory", "flops", "z")  # whose columns may be left out
    return Table(
        f"At equal loss: what {one} saves against {other}",
        [
            *_where(),
            *(Column(f"N of {label}", size(i), spare=3) for i, label in _sides(found)),
            *(
                Column(f"{objective}\nof {label}", cost(i), spare=2 if rest else 0)
                for i, label in _sides(found)
            ),
            Column(f"{objective}\nsaved", saved(0)),
            Column(INTERVAL, lambda m: span(m.equal_loss[0].gain_interval, percent)),
            *(
                Column(f"{OBJECTIVES[kind]}\nsaved", saved(j), spare=1)
                for j, kind in enumerate(kinds)
                if j
            ),
            Column("P(cheaper)", decided(lambda m: percent(m.equal_loss[0].probability, 0))),
            Column(f"within {most}", decided(lambda m: percent(m.within, 0))),
            Column("cheaper", lambda m: verdicts.get(m.verdict, m.verdict)),
        ],
        found.matches,
    )


def _loss_columns(found: Versus, gap: Callable[[Match], Gap]) -> list[Column]:
    """N and loss of each, and by how much that of the first is lower."""

    def loss(i: int) -> Callable[[Match], str]:
        def cell(m: Match) -> str:
            value = (gap(m).first, gap(m).second)[i]
            return f"{value:.4f}" if math.isfinite(value) else "-"

        return cell

    def size(i: int) -> Callable[[Match], str]:
        return lambda m: _marked(gap(m), i)

    out: list[Column] = []
    for i, label in _sides(found):
        out.append(Column(f"N of {label}", size(i), spare=1))
        out.append(Column(f"loss of {label}", loss(i), "nats"))
    return [
        *out,
        Column("lower by", lambda m: millinats(gap(m).gain), "millinats"),
        Column(INTERVAL, lambda m: span(gap(m).gain_interval, millinats)),
        Column(
            "P(lower)",
            lambda m: "-" if _far(m, gap(m)) else percent(gap(m).probability, 0),
        ),
    ]


def _far(m: Match, gap: Gap) -> bool:
    """Whether the gap hangs on seconds that lie too far beyond what was timed."""
    return m.verdict == "untimed" and gap is m.equal_cost


def _themselves(found: Versus) -> Table:
    def value(gap: Gap, number: float) -> str:
        return f"{number:.4f}" if gap.kind == "loss" else quantity(number)

    def gain(gap: Gap) -> str:
        lower = gap.kind == "loss"
        return f"{millinats(gap.gain)} millinats" if lower else percent(gap.gain)

    def ends(gap: Gap) -> str:
        return span(gap.gain_interval, millinats if gap.kind == "loss" else percent)

    longest = max(found.matches, key=lambda m: m.context)
    return Table(
        f"As they are, costs at {longest.context:,} tokens",
        [
            Column("", lambda g: OBJECTIVES.get(g.kind, "loss, nats")),
            Column(found.first.label, lambda g: value(g, g.first)),
            Column(found.second.label, lambda g: value(g, g.second)),
            Column("the first is lower by", gain),
            Column(INTERVAL, ends),
            Column("P(lower)", lambda g: percent(g.probability, 0)),
        ],
        longest.itself,
    )


def _training(one: str, other: str, matches: Sequence[Match]) -> Table:
    def told(cell: Callable[[Gap], str]) -> Callable[[Match], str]:
        return lambda m: cell(m.training) if m.training else "-"

    def of(i: int) -> Callable[[Match], str]:
        def cell(g: Gap) -> str:
            assert g.tokens is not None
            flops = (g.first, g.second)[i]
            if not math.isfinite(flops):
                return "never"
            return f"{flops:.3g} ({_marked(g, i)}, {quantity(g.tokens[i])})"

        return told(cell)

    return Table(
        "Least training FLOPs for that loss (at N, D), of the sizes that were trained",
        [
            _where()[1],
            Column(one, of(0)),
            Column(other, of(1)),
            Column(f"multiplier of {one}", told(lambda g: f"{g.gain:.3f}")),
            Column(INTERVAL, told(lambda g: span(g.gain_interval))),
            Column("P(above 1)", told(lambda g: percent(g.probability, 0))),
        ],
        matches,
        ["A multiplier of 1.2: the other needs 1.2 times the FLOPs."],
    )
