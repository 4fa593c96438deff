"""The pictures of the answers: what is cheapest, what it saves and gains, and how sure that is."""

import math
import textwrap
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gqa_scaling.config import LOSSES
from gqa_scaling.study.baseline import label
from gqa_scaling.study.candidates import Candidates, trained_curves
from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.frontier import Answer, Choice, Frontier, frontier
from gqa_scaling.study.report import drawing as draw
from gqa_scaling.study.report.looks import OKABE_ITO, light, looks, short_names
from gqa_scaling.study.report.table import percent
from gqa_scaling.study.results import Results, pair
from gqa_scaling.study.uncertainty import LEVEL


@draw.styled
def heat_map(among: Candidates, results: Results, answers: Frontier) -> Figure:
    """The cheapest configuration over loss and context, written into the map of its saving."""
    figure, axis = draw.frame(8.6, 4.4)
    heat_map_on(axis, among, results, answers)
    return figure


def heat_map_on(axis: Axes, among: Candidates, results: Results, answers: Frontier) -> None:
    """The same on given axes, from whose figure its colour bar takes a strip."""
    name = OBJECTIVES[answers.objective]
    fit = among.fit
    ends = [fit.curves.loss(k, np.array(fit.points.range_n(k))) for k in trained_curves(fit)]
    covered = np.clip([*np.ravel(ends), *answers.losses], *LOSSES)
    losses = np.linspace(covered.min(), covered.max(), 7).tolist()
    contexts = spread(min(answers.question.contexts), max(answers.question.contexts))
    asked = replace(answers.question, losses=tuple(losses), contexts=tuple(contexts))
    by = answers.objective
    whole = frontier(fit, results, asked, by, answers.serving, among=among, gains=False)
    cells = [[whole.at(loss, context) for context in contexts] for loss in losses]
    saved = 100 * np.array([[a.best.saving[answers.objective] for a in row] for row in cells])
    short, codes = short_names(among.heads)
    shown = np.ma.masked_invalid(saved)
    bottom, top = colour_scale(shown.compressed())
    image = axis.imshow(shown, aspect="auto", origin="lower", cmap="cividis", vmin=bottom, vmax=top)
    for (i, j), value in np.ndenumerate(saved):
        answer = cells[i][j]
        if not answer.best.reached:
            axis.text(j, i, "none", color="#555555", **draw.CENTRED)
            continue
        ink = "black" if np.nan_to_num(value, nan=top) > (bottom + top) / 2 else "white"
        text = short[answer.best.heads] + ("~" if answer.best.extrapolated else "")
        text += f"\n{percent(answer.best.probability, 0)}"
        text += f", tied {len(answer.tied) - 1}" if len(answer.tied) > 1 else ""
        axis.text(j, i, text, fontsize=8, color=ink, **draw.CENTRED)
    axis.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts])
    axis.set_yticks(range(len(losses)), [f"{v:.3f}" for v in losses])
    axis.grid(False)
    axis.set(
        xlabel=draw.explained("inference context (tokens)", codes),
        ylabel="target loss (nats per token)",
        title=f"Cheapest (heads, KV) by {name}, its probability, and how many tie with it\n"
        "~ its size lies outside the fitted ones",
    )
    bar = axis.figure.colorbar(image, ax=axis, pad=0.01)
    bar.set_label(f"{name} saved against {label(answers.baseline)} (%)")
    bar.outline.set_visible(False)


def spread(first: int, last: int, most: int = 9) -> list[int]:
    """Contexts from `first` to `last`, both included, in equal numbers of doublings.

    From five to `most` of them: a short range is continued below `first`.
    """
    doublings = max(4, math.ceil(math.log2(last / first)))
    stride = math.ceil(doublings / (most - 1))
    steps = [max(1, last >> k) for k in range(0, doublings + stride, stride)]
    if last / first > 16:
        steps = [t for t in steps if t > 1.4 * first] + [first]
    return sorted(set(steps))


def colour_scale(percentages: np.ndarray) -> tuple[float, float]:
    """A colour scale over the data in tens, so that no small difference looks like a large one."""
    if not len(percentages):
        return 0.0, 100.0
    bottom = 10 * math.floor(percentages.min() / 10)
    return bottom, max(bottom + 10, 10 * math.ceil(percentages.max() / 10))


@draw.styled
def gains(answers: Frontier) -> Figure:
    """What each configuration gains in loss at the baseline's cost, against the context."""
    look = looks(answers.told)
    middle, base = answers.headline.loss, label(answers.baseline)
    shown = sorted((a for a in answers.answers if a.loss == middle), key=lambda a: a.context)
    figure, axis = draw.frame(7.4, 3.9)
    draw.zero_line(axis)
    for i, heads in enumerate(sorted(look)):
        reached = [(a.context, a.choice(heads).equal_cost) for a in shown]
        reached = [(context, e) for context, e in reached if math.isfinite(e.gain)]
        if heads == answers.baseline or not reached:
            continue
        x = np.array([t for t, _ in reached]) * draw.side_by_side(i, len(look), 1.025)
        y = 1e3 * np.array([e.gain for _, e in reached])
        ends = 1e3 * np.array([e.gain_interval for _, e in reached])
        draw.error_bars(axis, x, y, ends, label=pair(heads), capsize=2, **look[heads])
        far = np.array([e.extrapolated for _, e in reached])
        axis.plot(x[far], y[far], "o", markersize=11, color="none", markeredgecolor=draw.GREY)
    contexts = [a.context for a in shown]
    limits = contexts[0] / 1.5, contexts[-1] * 1.5
    draw.doublings_axis(axis, contexts, [f"{t:,}" for t in contexts], limits)
    axis.set(
        xlabel="inference context (tokens)",
        ylabel="loss lower by (millinats)",
        title=f"Gained over {base} at equal {OBJECTIVES[answers.objective]}, its loss {middle:g} nats\n"
        f"{LEVEL:.0%} intervals; ringed: a size outside the fitted ones",
    )
    draw.legend(figure, list(look))
    return figure


@draw.styled
def savings(answers: Frontier) -> Figure:
    """Memory and FLOPs of each configuration at equal loss, split by what the context changes."""
    answer = answers.headline
    choices = [answer.choice(heads) for heads in answers.told]
    choices = [c for c in choices if math.isfinite(c.n)]
    short, codes = short_names([c.heads for c in choices])
    figure, axes = draw.frames(9.4, 3.8, 2)
    for axis, kind in zip(axes, ("memory", "flops"), strict=True):
        whole = getattr(answer.baseline, kind)
        _stacked_bars(axis, choices, [short[c.heads] for c in choices], kind, whole)
        share = f"\n% of {label(answers.baseline)}'s" if math.isfinite(whole) else ""
        name = draw.COST_LABELS[kind].format(convention=answers.question.convention)
        axis.set(xlabel="(heads, KV)", ylabel=name + share)
    if codes:
        figure.supxlabel("\n".join(textwrap.wrap(codes, 110)), fontsize=8)
    axes[0].set_title(f"Costs at {answer.loss:g} nats and {answer.context:,} tokens")
    return figure


def _stacked_bars(
    axis: Axes, choices: list[Choice], names: list[str], kind: str, whole: float
) -> None:
    """A bar for each configuration, in percent of `whole` where that is finite."""
    unit = 100 / whole if math.isfinite(whole) else 1.0
    fixed = np.array([getattr(c, f"{kind}_fixed") for c in choices]) * unit
    total = np.array([getattr(c, kind) for c in choices]) * unit
    axis.bar(names, fixed, color=OKABE_ITO[0], label="time-invariant (parameters)")
    axis.bar(
        names,
        total - fixed,
        bottom=fixed,
        color=OKABE_ITO[4],
        hatch="///",
        edgecolor="white",
        linewidth=0,
        label="time-variant (" + ("KV cache)" if kind == "memory" else "attention)"),
    )
    for i, value in enumerate(total):
        text = f"{value:.0f}" if math.isfinite(whole) else draw.short_quantity(value)
        axis.text(i, value, text, ha="center", va="bottom", fontsize=8)
    axis.set_ylim(0, 1.32 * max(total, default=1.0))
    axis.legend(loc="upper left", fontsize=8, handlelength=1.5)
    axis.grid(False, axis="x")
    axis.tick_params(axis="x", rotation=0 if len(names) < 9 else 60, labelsize=8)


@draw.styled
def probabilities(fit: Fit, answers: Frontier) -> Figure:
    """How probable each configuration is to be the cheapest, one bar for each answer."""
    figure, axis = draw.frame(8.2, 1.5 + 0.32 * len(answers.answers))
    probabilities_on(axis, fit, answers)
    return figure


def probabilities_on(axis: Axes, fit: Fit, answers: Frontier) -> None:
    """The same on given axes."""
    look = looks([c.heads for c in answers.answers[0].choices])
    shown: list[Answer] = sorted(answers.answers, key=lambda a: (a.context, -a.loss))
    short, codes = short_names(list(look))
    figure = axis.get_figure(root=True)
    inches = 0.7 * figure.get_figwidth() if figure else 5.0  # about those of the axis
    for i, answer in enumerate(shown):
        left = 0.0
        for choice in sorted(answer.choices, key=lambda c: -c.probability):
            width, color = 100 * choice.probability, look[choice.heads]["color"]
            if not width:
                continue
            axis.barh(i, width, left=left, color=color, edgecolor="white")
            text = f"{short[choice.heads]} {width:.0f}%"
            if width / 100 * inches > 0.06 * len(text):  # a letter is 0.06 inches wide
                ink = "white" if light(color) < 0.25 else "black"
                axis.text(left + width / 2, i, text, fontsize=8, color=ink, **draw.CENTRED)
            left += width
    axis.set_yticks(range(len(shown)), [f"{a.context:,} tokens, {a.loss:g} nats" for a in shown])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.grid(False, axis="y")
    axis.set(
        xlabel=draw.explained("probability of being the cheapest (%)", codes),
        title=f"Decision probability over {fit.refits} refits, seed {fit.seed}",
    )
