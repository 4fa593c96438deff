"""The table of what an answer hangs on: each assumption changed alone."""

import math

from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.report.table import INTERVAL, Column, Table, margin, percent, span
from gqa_scaling.study.results import pair
from gqa_scaling.study.sensitivity import Changed, Sensitivity
from gqa_scaling.units import quantity

NAMES = {
    "": "as it stands",
    "lambda": "λ",
    "alpha": "α",
    "beta": "β",
    "convention": "FLOPs",
    "batch": "batch",
    "weight_bytes": "bytes a weight",
    "cache_bytes": "bytes a cached value",
    "objective": "what is least",
}


def sensitivity_table(found: Sensitivity) -> Table:
    most, here = margin(found.indifference), pair(found.heads)
    matters = [row for row in found.rows if row.assumption and row.dearer > found.indifference]
    said = (
        f"Where {here} would be dearer than the cheapest by more than {most}, it is marked !."
        if matters
        else f"No change makes {here} dearer than the cheapest by more than {most}."
    )
    return Table(
        f"What the answer {here} hangs on: {found.loss:g} nats at {found.context:,} tokens, one "
        "assumption changed",
        [
            Column("assumption", _change),
            Column("least", lambda row: OBJECTIVES[row.objective]),
            Column("heads, KV", lambda row: pair(row.heads)),
            Column("N*", lambda row: quantity(row.n), spare=1),
            Column(
                f"{here}\ndearer by",
                lambda row: _dearer(row.dearer) + ("!" if row in matters else ""),
            ),
            Column(INTERVAL, lambda row: span(row.dearer_interval, _dearer)),
            Column(f"within {most}", lambda row: percent(row.within, 0)),
        ],
        found.rows,
        [
            said + " Changes of λ are of its odds, λ / (1 - λ). What enters another cost alone is "
            "judged by that cost."
        ],
    )


def _change(row: Changed) -> str:
    if not row.assumption:
        return NAMES[""]

    def told(value: float | str) -> str:
        if row.assumption == "objective":
            return OBJECTIVES[str(value)]
        return value if isinstance(value, str) else f"{value:.3g}"

    return f"{NAMES[row.assumption]}: {told(row.before)} → {told(row.after)}"


def _dearer(share: float) -> str:
    return percent(share) if math.isfinite(share) else "excluded"
