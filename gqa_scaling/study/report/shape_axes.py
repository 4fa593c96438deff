"""The table and the picture of loss against shape at one N."""

import numpy as np
from matplotlib.figure import Figure

from gqa_scaling.study.report import drawing as draw
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


@draw.styled
def loss_against_shape(results: Results) -> Figure | None:
    """A frame for each axis, a line for each size; None where there is nothing to show."""
    points = shape_axes(results)
    axes_found = list(dict.fromkeys(p.axis for p in points))
    if not points:
        return None
    figure, axes = draw.frames(3.4 * len(axes_found), 3.2, len(axes_found), share_y=True)
    sizes = sorted({p.n_params for p in points})
    for axis, name in zip(axes, axes_found, strict=True):
        for i, n in enumerate(sizes):
            on = [p for p in points if p.axis == name and p.n_params == n]
            x = np.array([p.value for p in on])
            y = np.array([1000 * p.difference for p in on])
            bars = np.array([1000 * (p.half or 0.0) for p in on])
            axis.errorbar(
                x,
                y,
                bars,
                color=draw.OKABE_ITO[i % len(draw.OKABE_ITO)],
                marker=draw.MARKERS[i % len(draw.MARKERS)],
                linestyle=draw.LINES[i % len(draw.LINES)],
                capsize=2,
                label=f"N = {quantity(n)}",
            )
        axis.axhline(0, color=draw.GREY, linewidth=0.7)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_xlabel(name)
    axes[0].set_ylabel("loss minus the middle's (millinats)")
    axes[-1].legend()
    return figure
