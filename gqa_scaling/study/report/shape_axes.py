"""The table of loss against shape at one N; its picture is among `loss_pictures`."""

from gqa_scaling.study.report.table import Column, Table
from gqa_scaling.study.results import Results
from gqa_scaling.study.shape_axes import OnAxis, shape_axes
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity


def shape_tables(results: Results) -> list[Table]:
    """One table, or none where no size was trained in several shapes."""
    points = shape_axes(results)
    if not points:
        return []
    return [
        Table(
            "Loss against shape, at the same N",
            [
                Column("axis", lambda p: p.axis),
                Column("N", lambda p: quantity(p.n_params)),
                Column("value", lambda p: f"{p.value:.3g}"),
                Column("runs", lambda p: str(p.runs), spare=1),
                Column("loss", lambda p: f"{p.loss:.4f}", "nats"),
                Column("minus the\nmiddle", _difference, "millinats"),
            ],
            points,
            about=f"One of head size, FFN ratio and aspect is varied; width and FFN take up what that "
            f"leaves of N. The middle is the shape with most seeds. Intervals are {LEVEL:.0%} of the "
            "noise between seeds, each difference by itself.",
        )
    ]


def _difference(p: OnAxis) -> str:
    if p.is_middle:
        return "the middle"
    interval = "" if p.half is None else f" ± {1000 * p.half:.1f}"
    return f"{1000 * p.difference:+.1f}{interval}"
