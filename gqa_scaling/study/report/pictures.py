"""Every picture of a study: its function, its caption, and its files. Nothing is shown here."""

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

from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.report.decision_pictures import (
    gains,
    heat_map,
    heat_map_on,
    probabilities,
    probabilities_on,
    savings,
)
from gqa_scaling.study.report.drawing import COST_LABELS, DPI, frame, styled
from gqa_scaling.study.report.loss_pictures import (
    forecast_errors,
    loss_against_costs,
    loss_against_density,
    loss_against_heads,
    loss_against_shape,
    loss_by_position,
    loss_curves,
    losses_against,
    losses_on,
    needle_maps,
    residuals,
    residuals_on,
)
from gqa_scaling.study.study import Study


def _against(kind: str, axes: Axes, s: Study) -> None:
    losses_against(kind, axes, s.fit, s.results, s.frontier)


NEEDLES = "Which needles each model finds, by the length of the text and the needle's depth in it."
SHAPES = "What head size, FFN ratio and aspect change at the same N, with the noise between seeds."
# By file name: what draws it, or None where this study has nothing to show, and its caption.
PICTURES: dict[str, tuple[Callable[[Study], Figure | None], str]] = {
    "loss_curves": (
        lambda s: loss_curves(s.fit),
        "Evaluation loss of every run and the fitted curve of each configuration.",
    ),
    "loss_against_costs": (
        lambda s: loss_against_costs(s.fit, s.results, s.frontier),
        "The same curves against what inference costs at {context:,} tokens: further left is cheaper.",
    ),
    "heat_map": (
        lambda s: heat_map(s.ranked, s.results, s.frontier),
        "The configuration of least {objective} for each target loss and context.",
    ),
    "savings": (
        lambda s: savings(s.frontier),
        "Where the costs come from, all configurations at the same loss.",
    ),
    "gains": (
        lambda s: gains(s.frontier),
        "The loss each configuration reaches for the {objective} that the baseline costs.",
    ),
    "probabilities": (
        lambda s: probabilities(s.fit, s.frontier),
        "How sure the recommendation is: the share of bootstrap draws in which each "
        "configuration is the cheapest.",
    ),
    "loss_against_heads": (
        lambda s: loss_against_heads(s.fit),
        "What more heads buy at a fixed parameter count.",
    ),
    "loss_against_density": (
        lambda s: loss_against_density(s.fit, s.sparsity),
        "What reading part of the context costs in loss, measured at the training context.",
    ),
    "loss_by_position": (
        lambda s: loss_by_position(s.results),
        "Where in the context each pattern gains and loses, at the largest size with a dense run.",
    ),
    "forecasts": (
        lambda s: forecast_errors(s.forecasts, s.fit.heads),
        "What came of the forecasts: each run's loss against what was sealed before it began.",
    ),
    "residuals": (lambda s: residuals(s.fit), "What the curves leave unexplained."),
    "needles": (lambda s: needle_maps(s.results), NEEDLES),
    "loss_against_shape": (lambda s: loss_against_shape(s.results), SHAPES),
}

# What can be drawn on axes of somebody's own figure, by name.
ON_AXES: dict[str, Callable[[Axes, Study], None]] = {
    "losses": lambda axes, s: losses_on(axes, s.fit),
    **{
        kind: functools.partial(_against, kind)  # the same against what inference costs
        for kind in COST_LABELS
    },
    "residuals": lambda axes, s: residuals_on(axes, s.fit),
    "heat_map": lambda axes, s: heat_map_on(axes, s.ranked, s.results, s.frontier),
    "probabilities": lambda axes, s: probabilities_on(axes, s.fit, s.frontier),
}


def all_figures(study: Study) -> dict[str, tuple[Figure, str]]:
    """Every picture that the study has, by file name, with its caption."""
    answers = study.frontier
    known = {"context": max(answers.question.contexts), "objective": OBJECTIVES[answers.objective]}
    drawn = {name: (draw(study), caption) for name, (draw, caption) in PICTURES.items()}
    return {
        name: (figure, caption.format(**known))
        for name, (figure, caption) in drawn.items()
        if figure is not None
    }


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
    made |= {name: figure for name, (figure, _) in others if name not in _DRAWN_ANEW}
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
    png = io.BytesIO()
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(png)  # type: ignore[no-untyped-call]
    return png.getvalue()
