"""The runs to do next: in a table, and how to train the first."""

from collections.abc import Sequence

from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.report.table import Column, Table, percent
from gqa_scaling.study.results import pair, pairs
from gqa_scaling.study.suggest import Suggestion
from gqa_scaling.units import quantity

KINDS = {
    "grid": "of the grid",
    "size": "new size",
    "seed": "new seed",
    "heads": "new heads",
    "context": "new length",
    "fit": "for a fit",
}


def suggest_table(found: Sequence[Suggestion], objective: Objective) -> Table:
    notes = [
        f"Regret: expected excess of {OBJECTIVES[objective]} over the cheapest, mean over the question's "
        "answers."
    ]
    if any(each.kind == "context" for each in found):
        notes.append(
            "A new training length tells only by differences: one size of each configuration, together."
        )
    return Table(
        "Runs to do next, most regret lowered per FLOP first",
        [
            *_columns(),
            Column("regret\nbefore", lambda s: percent(s.regret_before, 3)),
            Column("regret\nafter", lambda s: percent(s.regret_after, 3)),
        ],
        found,
        notes,
    )


def fit_table(found: Sequence[Suggestion], why: str) -> Table:
    return Table(
        f"Too few runs to fit: {why}",
        _columns(),
        found,
        [
            "The cheapest runs that make a fit possible; --without leaves a configuration out instead."
        ],
    )


def _columns() -> list[Column]:
    return [
        Column("run", _name, fold=True),
        Column("why", lambda s: KINDS[s.kind]),
        Column("heads, KV", lambda s: pairs([run.heads for run in s.runs]), fold=True),
        Column("L x d", lambda s: f"{s.runs[0].n_layers} x {s.runs[0].d_model}"),
        Column("T", lambda s: f"{s.runs[0].context:,}" if s.runs[0].context else "-", "tokens", 2),
        Column("D", lambda s: quantity(s.runs[0].tokens), "tokens", 1),
        Column("training", lambda s: quantity(s.flops), "FLOPs"),
    ]


def _name(step: Suggestion) -> str:
    """The run, or the first of several with how many there are."""
    more = len(step.runs) - 1
    return step.name + (f" and {more} more" if more else "")


def first_step(step: Suggestion, command: str, *, declared: bool) -> str:
    """How to train the first; plain text, for its command must not be folded.

    `declared` says that the experiment has the run in its grid.
    """
    run = step.runs[0]
    if not command:
        return (
            f"To train the first, declare an experiment (docs/using.md) with {pair(run.heads)} at "
            f"L = {run.n_layers}, d = {run.d_model}: these runs come without their corpus."
        )
    declare = (
        ""
        if declared
        else "\nA fit takes it in once the experiment declares it: add its size, heads, seed or length."
    )
    return f"Train the first, {run.name}:\n\n{command}\n{declare}"
