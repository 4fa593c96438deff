"""What all static pictures share: style, frames, axes, and the legend of the configurations."""

import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.typing import RcKeyType

from gqa_scaling.study.results import Heads, pair, pattern_of
from gqa_scaling.units import quantity

GREY = "#888888"
CENTRED: dict[str, Any] = {"ha": "center", "va": "center"}  # of a text around its place
DPI = 160  # of the PNG files
STYLE: dict[RcKeyType, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "svg.hashsalt": "gqa_scaling",  # makes two SVG files of one picture equal
    "figure.dpi": 100,
}
COST_LABELS = {
    "memory": "inference memory (values)",
    "flops": "inference FLOPs ({convention})",
    "z": "hardware-aware cost Z ({convention})",
}

_Arguments = ParamSpec("_Arguments")
_Drawn = TypeVar("_Drawn")


def styled(draw: Callable[_Arguments, _Drawn]) -> Callable[_Arguments, _Drawn]:
    """Have a function draw, or save, in this style."""

    @functools.wraps(draw)
    def inside(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Drawn:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


# ------------------------------------------------------------------------- frames and axes


def frame(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches, with one set of axes."""
    figure, (axis,) = frames(width, height, 1)
    return figure, axis


def frames(
    width: float, height: float, columns: int, *, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with several sets of axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, sharey=share_y, squeeze=False)[0])


def zero_line(axis: Axes) -> None:
    axis.axhline(0, color=GREY, linewidth=1)


def decades_axis(axis: Axes) -> None:
    """A logarithmic x axis with SI labels: at 1, 2 and 5 when it spans less than two decades."""
    low, high = axis.get_xlim()
    axis.set_xscale("log")
    steps = (1, 2, 5) if high / max(low, 1e-300) < 500 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    if len(places) > 7:
        places = places[:: math.ceil(len(places) / 7)]
    if len(places) >= 2:
        axis.xaxis.set_ticks(places)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short_quantity(v)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def doublings_axis(
    axis: Axes, places: Sequence[float], labels: Sequence[str], limits: tuple[float, float]
) -> None:
    """A logarithmic x axis to the base 2 with these labels and no others."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, labels)
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(*limits)


def error_bars(axis: Axes, x: Any, y: Any, ends: Any, **style: Any) -> None:
    """Points with intervals, `ends` (points, 2); a point outside its interval has no bar there."""
    low, high = np.asarray(ends).T
    axis.errorbar(x, y, np.maximum([y - low, high - y], 0), **style)


def side_by_side(i: int, many: int, step: float) -> float:
    """What moves the i-th of many along a logarithmic axis, so that error bars do not hide."""
    return step ** (i - (many - 1) / 2)


def short_quantity(value: float) -> str:
    """A quantity without trailing zeros."""
    text = quantity(value)
    unit = text[-1] if text[-1].isalpha() else ""
    return f"{float(text[: len(text) - len(unit)]):g}{unit}"


# ---------------------------------------------------------------------------- configurations


def legend(
    figure: Figure, heads: Sequence[Heads], look: dict[Heads, dict[str, Any]] | None = None
) -> None:
    """The legend of the configurations: at the right or, where patterns make it wide, below.

    It names what the axes label or, with `look`, every configuration.
    """
    where: dict[str, Any] = {"loc": "outside right upper", "title": "heads, KV"}
    if any(map(pattern_of, heads)):
        columns = max(1, int(figure.get_figwidth() // 2.9))
        where = {"loc": "outside lower center", "ncols": columns}
        lines = math.ceil(len(heads) / columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * lines)
    if look is not None:
        where["handles"] = [Line2D([], [], label=pair(h), **look[h]) for h in heads]
    named = any(axis.get_legend_handles_labels()[1] for axis in figure.axes)
    if named or look:  # nothing is drawn where no configuration has an answer
        figure.legend(handlelength=4, **where)  # a whole period of dashes and dots


def explained(label: str, names: str) -> str:
    """The label of an axis, with the line that explains short names below it."""
    return "\n".join([label, *textwrap.wrap(names, 95)])
