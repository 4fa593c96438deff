"""Which configuration is the cheapest by the clock, beside that by Z, and what choosing by Z costs."""

import math
from collections.abc import Callable

from gqa_scaling.study.clock import FAR, untimed
from gqa_scaling.study.frontier import Answer, Choice, Frontier
from gqa_scaling.study.report.table import Column, Table, margin, percent
from gqa_scaling.study.results import pair
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity


def clock_table(frontier: Frontier) -> Table | None:
    """Every answer by Z and by seconds on a calibrated machine; None where none is named."""
    serving, clock = frontier.serving, frontier.serving.clock
    if clock is None:
        return None
    priced = clock.price > 0

    def of(kind: str, cell: Callable[[Choice], str], none: str = "-") -> Callable[[Answer], str]:
        def told(answer: Answer) -> str:
            least = answer.least("z" if kind == "Z" else "seconds")
            return cell(least) if least.reached else none

        return told

    def columns(kind: str) -> list[Column]:
        return [
            Column(f"by {kind}:\nheads, KV", of(kind, lambda c: pair(c.heads), "none")),
            Column("N*", of(kind, lambda c: quantity(c.n)), spare=1),
            Column("a token", of(kind, lambda c: milliseconds(c.seconds)), "ms"),
            *([Column("1M tokens", of(kind, _dollars), "dollars", spare=2)] if priced else []),
        ]

    def lost(cell: Callable[[Choice, Choice], str]) -> Callable[[Answer], str]:
        def told(answer: Answer) -> str:
            z, seconds = answer.least("z"), answer.least("seconds")
            return cell(z, seconds) if z.reached else "-"

        return told

    def dollars(z: Choice, seconds: Choice) -> str:
        return f"{z.dollars - seconds.dollars:.3g}"

    def sure(answer: Answer) -> str:
        z, seconds = answer.least("z"), answer.least("seconds")
        if not z.reached:
            return "-"
        if z.heads == seconds.heads:
            return "the same"
        if untimed(answer.stretch):
            return "too far"
        return "left open" if z.heads in answer.tied_by_clock else "yes"

    prompts = (
        f" Prefill of a prompt that fills the rest of the context is paid for by "
        f"{serving.output_tokens:,} output tokens."
        if serving.output_tokens
        else ""
    )
    return Table(
        f"By Z and by the clock of {clock.name}: batch {serving.batch}, cache in {clock.cache}",
        [
            Column("context", lambda a: f"{a.context:,}", "tokens"),
            Column("loss", lambda a: f"{a.loss:g}", "nats"),
            *columns("Z"),
            *columns("seconds"),
            Column(
                "choosing by Z\ncosts more",
                lost(lambda z, s: milliseconds(z.seconds - s.seconds)),
                "ms a token",
            ),
            Column("that is", lost(lambda z, s: percent(z.seconds / s.seconds - 1))),
            *([Column("dollars more", lost(dollars), "1M tokens", spare=3)] if priced else []),
            Column("told apart", sure),
        ],
        sorted(frontier.answers, key=lambda answer: answer.context),
        [
            f"Seconds: {clock.how}. {clock.ratio_error.capitalize()}. Told apart: in {LEVEL:.0%} of the "
            "refits, which draw that error too, that by Z is dearer by more than "
            f"{margin(frontier.question.indifference)}; too far: {FAR:g} times and more beyond what was "
            "timed nothing is decided." + prompts
        ],
        "What the configurations take on the machine that was timed, of the sizes that reach the loss. "
        "Intervals of N* are not in these figures.",
    )


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if math.isfinite(seconds) else "-"


def _dollars(choice: Choice) -> str:
    return f"{choice.dollars:.3g}" if math.isfinite(choice.dollars) else "-"
