"""Every picture of a study: its function, its caption, and its files. Nothing is shown here."""

import io
from collections.abc import Callable

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.report.decision_pictures import gains, heat_map, probabilities, savings
from gqa_scaling.study.report.drawing import DPI, styled
from gqa_scaling.study.report.judged import needle_maps
from gqa_scaling.study.report.loss_pictures import (
    forecast_errors,
    loss_against_costs,
    loss_against_density,
    loss_against_heads,
    loss_by_position,
    loss_curves,
    residuals,
)
from gqa_scaling.study.report.shape_axes import loss_against_shape
from gqa_scaling.study.study import Study

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
def rendered(figure: Figure) -> tuple[bytes, bytes]:
    """The picture as an SVG and as a PNG file, the same for the same figure.

    `savefig` would lay the figure out and draw it twice for each of them; here it is laid out once.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")
    svg, png = io.BytesIO(), io.BytesIO()
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})  # type: ignore[no-untyped-call]
    figure.set_dpi(DPI)
    FigureCanvasAgg(figure).print_png(png)  # type: ignore[no-untyped-call]
    return svg.getvalue(), png.getvalue()
