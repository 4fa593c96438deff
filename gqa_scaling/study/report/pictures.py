"""Every picture of a study: its function, and its files. Nothing is shown here."""

import functools
import io
import textwrap
from collections.abc import Callable
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gqa_scaling.study.report import decision_pictures as decisions
from gqa_scaling.study.report import loss_pictures as losses
from gqa_scaling.study.report.drawing import COST_LABELS, DPI, frame, styled
from gqa_scaling.study.study import Study


def _against(kind: str, axes: Axes, s: Study) -> None:
    losses.losses_against(kind, axes, s.fit, s.results, s.frontier)


# By file name: what draws it, or None where this study has nothing to show.
PICTURES: dict[str, Callable[[Study], Figure | None]] = {
    "loss_curves": lambda s: losses.loss_curves(s.fit),
    "loss_against_costs": lambda s: losses.loss_against_costs(s.fit, s.results, s.frontier),
    "heat_map": lambda s: decisions.heat_map(s.ranked, s.results, s.frontier),
    "savings": lambda s: decisions.savings(s.frontier),
    "gains": lambda s: decisions.gains(s.frontier),
    "probabilities": lambda s: decisions.probabilities(s.fit, s.frontier),
    "loss_against_heads": lambda s: losses.loss_against_heads(s.fit),
    "loss_against_density": lambda s: losses.loss_against_density(s.fit, s.sparsity),
    "loss_by_position": lambda s: losses.loss_by_position(s.results),
    "forecasts": lambda s: losses.forecast_errors(s.forecasts, s.fit.heads),
    "residuals": lambda s: losses.residuals(s.fit),
    "needles": lambda s: losses.needle_maps(s.results),
    "loss_against_shape": lambda s: losses.loss_against_shape(s.results),
}

# What can be drawn on axes of somebody's own figure, by name.
ON_AXES: dict[str, Callable[[Axes, Study], None]] = {
    "losses": lambda axes, s: losses.losses_on(axes, s.fit),
    **{
        kind: functools.partial(_against, kind)  # the same against what inference costs
        for kind in COST_LABELS
    },
    "residuals": lambda axes, s: losses.residuals_on(axes, s.fit),
    "heat_map": lambda axes, s: decisions.heat_map_on(axes, s.ranked, s.results, s.frontier),
    "probabilities": lambda axes, s: decisions.probabilities_on(axes, s.fit, s.frontier),
}


def all_figures(study: Study) -> dict[str, Figure]:
    """Every picture that the study has, by file name."""
    drawn = {name: draw(study) for name, draw in PICTURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


@styled
def rendered(figure: Figure, kind: Literal["svg", "pdf", "png"]) -> bytes:
    """The picture as a file of this kind, the same for the same figure.

    `savefig` would lay the figure out each time; here it is laid out once.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    out = io.BytesIO()
    if kind == "svg":
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})  # type: ignore[no-untyped-call]
    elif kind == "pdf":
        FigureCanvasPdf(figure).print_pdf(out, metadata={"CreationDate": None})  # type: ignore[no-untyped-call]
    else:
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(out)  # type: ignore[no-untyped-call]
    return out.getvalue()


# ------------------------------------------------------------------------------------ TensorBoard

_CARD = (4.6, 3.6)  # inches: TensorBoard shows 350 pixels of width, in which text is then 10 high
_DRAWN_ANEW = ("loss_curves", "loss_against_costs", "heat_map", "probabilities", "residuals")
_AS_THEY_ARE = ("needles",)  # as many maps as there are models


def cards(study: Study) -> dict[str, bytes]:
    """The pictures as PNG files that can be read in TensorBoard's Images tab, which shrinks them: as wide
    as a card there, axes below each other."""
    made = {name: _card(study, name) for name in ON_AXES}
    others = all_figures(study).items()
    made |= {name: figure for name, figure in others if name not in _DRAWN_ANEW}
    return {name: _narrow_png(figure, name not in _AS_THEY_ARE) for name, figure in made.items()}


@styled
def _card(study: Study, name: str) -> Figure:
    figure, axis = frame(*_CARD)
    ON_AXES[name](axis, study)
    if name == "heat_map":  # its cells are narrow
        for text in axis.texts:
            text.set(text=text.get_text().replace(", ", "\n"), fontsize=7)
    elif axis.get_legend_handles_labels()[1]:
        figure.legend(loc="outside lower center", ncols=4, title="heads, KV", fontsize=8)
    return figure


@styled
def _narrow_png(figure: Figure, narrow: bool) -> bytes:
    drawn = [axis for axis in figure.axes if axis.get_subplotspec() is not None]
    if narrow and figure.get_figwidth() > _CARD[0]:
        places = figure.add_gridspec(len(drawn), 1)
        for i, axis in enumerate(drawn):
            axis.set_subplotspec(places[i])
        height = max(_CARD[1], figure.get_figheight(), 2.9 * len(drawn))
        figure.set_size_inches(_CARD[0], height)
    for axis in drawn if narrow else ():
        lines = axis.get_title(loc="left").splitlines()
        wrapped = [part for line in lines for part in textwrap.wrap(line, 44)]
        axis.set_title("\n".join(wrapped), fontsize=9)
    return rendered(figure, "png")
