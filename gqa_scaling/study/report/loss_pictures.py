"""The pictures of what was estimated: losses against size, cost, heads, density and position."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.frontier import Frontier
from gqa_scaling.study.heads import common_n, head_laws
from gqa_scaling.study.judged import Row, judged_rows
from gqa_scaling.study.report import drawing as draw
from gqa_scaling.study.report.looks import looks, style
from gqa_scaling.study.results import Heads, Results, pair, pattern_of
from gqa_scaling.study.scores import Forecasts
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shape_axes import shape_axes
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.sparsity import Sparsity
from gqa_scaling.study.uncertainty import LEVEL, interval
from gqa_scaling.units import count, quantity

LOSS = "evaluation loss (nats per token)"


@draw.styled
def loss_curves(fit: Fit) -> Figure:
    figure, axis = draw.frame(7.4, 4.2)
    losses_on(axis, fit)
    axis.set_title(f"Loss curves, law {fit.law}, with {LEVEL:.0%} bands of the curves")
    draw.legend(figure, fit.heads, looks(fit.heads))
    return figure


@draw.styled
def loss_against_costs(fit: Fit, results: Results, answers: Frontier) -> Figure:
    """Loss against memory, FLOPs and Z at the longest context of the question."""
    figure, axes = draw.frames(10.4, 3.7, 3, share_y=True)
    for axis, kind in zip(axes, draw.COST_LABELS, strict=True):
        losses_against(kind, axis, fit, results, answers)
        axis.set_ylabel("")
    axes[0].set(ylabel=LOSS, title=f"at context {max(answers.question.contexts):,} tokens")
    draw.legend(figure, fit.heads, looks(fit.heads))
    return figure


def losses_on(axis: Axes, fit: Fit) -> None:
    """Runs, fitted curves and bands of every configuration over N, labelled with its heads."""
    _curves(axis, fit, lambda n, heads: n)
    axis.set(xlabel=f"parameters N without embeddings ({fit.count})", ylabel=LOSS)


def losses_against(kind: str, axis: Axes, fit: Fit, results: Results, answers: Frontier) -> None:
    """The same over a cost, "memory", "flops" or "z", at the longest context of the question."""
    q = answers.question
    deployment = Deployment(family_of(results), q, max(q.contexts))
    _curves(axis, fit, lambda n, heads: getattr(deployment.costs(n, heads), kind))
    axis.set(xlabel=draw.COST_LABELS[kind].format(convention=q.convention), ylabel=LOSS)


def _curves(axis: Axes, fit: Fit, to_x: Callable[[np.ndarray, Heads], np.ndarray]) -> None:
    """Points, fitted curves and bands of every configuration over a function of N."""
    look, edges = looks(fit.heads), []
    for k, heads in enumerate(fit.heads):
        n, mine = np.geomspace(*fit.points.range_n(k), 60), fit.points.curve == k
        x, style = to_x(n, heads), look[heads]
        low, high = interval(fit.draws.loss(k, n))
        axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        axis.plot(x, fit.curves.loss(k, n), color=style["color"], linestyle=style["linestyle"])
        dots = style | {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.5}
        axis.plot(to_x(fit.points.n[mine], heads), fit.points.loss[mine], label=pair(heads), **dots)
        edges += [float(x.min()), float(x.max())]
    axis.set_xlim(min(edges) / 1.12, max(edges) * 1.12)
    draw.decades_axis(axis)


@draw.styled
def loss_against_heads(fit: Fit) -> Figure | None:
    """Fitted loss against n_heads at one N inside every curve, a line for each n_kv rule."""
    n = common_n(fit)
    heads = {k: h[:2] for k, h in enumerate(fit.heads) if pattern_of(h) is None}
    if not heads:
        return None
    powers = {law.n_kv_heads: law for law in head_laws(fit, n)}
    figure, axis = draw.frame(6.6, 3.9)
    values = sorted({kv for _, kv in heads.values()})
    for i, kv in enumerate(values):
        inside, look = [k for k, h in heads.items() if h[1] == kv], style(i, i)
        x = np.array([fit.heads[k][0] for k in inside], float)
        draw.error_bars(
            axis,
            x * draw.side_by_side(i, len(values), 1.02),
            np.array([float(fit.curves.loss(k, n)) for k in inside]),
            [interval(fit.draws.loss(k, n)) for k in inside],
            **look | ({"linestyle": "none"} if kv in powers else {}),
            capsize=3,
            label=f"{kv}",
        )
        if kv in powers:
            law, fine = powers[kv], np.geomspace(x.min(), x.max(), 80)
            label = f"{law.a:.3f} n_h^{law.b:.3f} + {law.c:.3f}"
            axis.plot(fine, law.loss(fine), label=label, **look | {"marker": ""})
    queries = sorted({h for h, _ in heads.values()})
    limits = queries[0] / 1.3, queries[-1] * 1.3
    draw.doublings_axis(axis, queries, [str(h) for h in queries], limits)
    axis.set(
        xlabel="query heads",
        ylabel="fitted loss (nats per token)",
        title=f"Loss against heads at N = {quantity(n)}, {LEVEL:.0%} intervals",
    )
    figure.legend(loc="outside right upper", title="KV heads")
    return figure


@draw.styled
def residuals(fit: Fit) -> Figure:
    figure, axis = draw.frame(7.4, 3.6)
    residuals_on(axis, fit)
    axis.set_title("Residuals; grey: one standard deviation of a run")
    draw.legend(figure, fit.heads, looks(fit.heads))
    return figure


def residuals_on(axis: Axes, fit: Fit) -> None:
    """The residuals of every configuration over N, labelled with its heads."""
    look = looks(fit.heads)
    axis.axhspan(-1e3 * fit.sigma, 1e3 * fit.sigma, color="#eeeeee", zorder=0)
    draw.zero_line(axis)
    for k, heads in enumerate(fit.heads):
        mine = fit.points.curve == k
        dots = look[heads] | {"linestyle": "none", "label": pair(heads)}
        axis.plot(fit.points.n[mine], 1e3 * fit.residual[mine], **dots)
    axis.set_xlim(fit.points.n.min() / 1.12, fit.points.n.max() * 1.12)
    draw.decades_axis(axis)
    axis.set(
        xlabel=f"parameters N without embeddings ({fit.count})",
        ylabel="loss minus curve (millinats)",
    )


@draw.styled
def forecast_errors(forecasts: Forecasts, heads: Sequence[Heads]) -> Figure | None:
    """Loss minus forecast of every finished run, its interval as a bar; None where none is finished.

    `heads` are those of the study, whose look each has in the other pictures.
    """
    scores = sorted(forecasts.judged, key=lambda score: score.n)
    if not scores:
        return None
    look = looks([*heads, *(score.heads for score in scores)])
    figure, axis = draw.frame(7.4, 1.4 + 0.3 * min(len(scores), 40))
    axis.axvline(0, color=draw.GREY, linewidth=1)
    for i, score in enumerate(scores):
        low, high = (1e3 * (end - score.predicted) for end in score.interval)
        color = look[score.heads]["color"]
        axis.barh(i, high - low, left=low, height=0.62, color=color, alpha=0.25, linewidth=0)
        dots = look[score.heads] | {"linestyle": "none", "markersize": 7}
        axis.plot(1e3 * score.error, i, **dots, markeredgecolor="white", markeredgewidth=0.5)
    names = [f"{score.name}, N = {quantity(score.n)}" for score in scores]
    axis.set_yticks(range(len(scores)), names, fontsize=8)
    axis.set_ylim(-0.7, len(scores) - 0.3)
    axis.use_sticky_edges = False  # no bar ends at the frame
    axis.grid(False, axis="y")
    axis.set(
        xlabel="loss minus forecast (millinats)",
        title=f"{forecasts.inside} of {count(len(scores), 'run')} inside their {LEVEL:.0%} intervals (bars), "
        "the largest at the top",
    )
    return figure


@draw.styled
def loss_against_density(fit: Fit, found: Sparsity | None) -> Figure | None:
    """What patterns add to the loss of dense attention with the same heads, against density."""
    rows = [row for row in found.rows if math.isfinite(row.loss)] if found else []
    if not found or not rows:
        return None
    look, least = looks(fit.heads), min(row.density for row in rows) / 1.1
    figure, axis = draw.frame(7.4, 3.9)
    draw.zero_line(axis)
    for row in rows:
        style = look[row.heads] | {"linestyle": "none", "label": pair(row.heads), "capsize": 3}
        ends = 1e3 * np.array([row.loss_interval])
        draw.error_bars(axis, [row.density], 1e3 * np.array([row.loss]), ends, **style)
    if found.rate is not None and found.excess is not None:
        x = np.geomspace(least, 1, 80)
        y = 1e3 * found.excess * np.expm1(-found.rate * np.log2(x))
        label = f"law {found.law}: exp(r) = {math.exp(found.rate):.3f} a halving"
        axis.plot(x, y, color=draw.GREY, linestyle="--", label=label)
    places = [2.0**-k for k in range(math.ceil(-math.log2(least)) + 1)]
    labels = ["1", *(f"1/{round(1 / p)}" for p in places[1:])]
    draw.doublings_axis(axis, places, labels, (1.05, places[-1]))  # 1 is at the left
    axis.set(
        xlabel=f"density at the training context of {found.train_context:,} tokens",
        ylabel="loss higher than dense (millinats)",
        title=f"What sparsity costs at N = {quantity(found.n)}, same heads, {LEVEL:.0%} intervals",
    )
    draw.legend(figure, [row.heads for row in rows])
    return figure


@draw.styled
def loss_by_position(results: Results) -> Figure | None:
    """Where in the context patterns gain and lose: loss minus that of dense attention.

    Of the largest size that has one dense run and others with the same heads, context and seed; None
    where none has, or evaluations have not told positions apart.
    """
    sizes: dict[tuple, dict[Heads, int]] = {}
    for i, heads in enumerate(results.heads):
        if str(results.name[i]) in results.positions:
            same = "n_layers", "d_model", "context_length", "tokens", "seed"
            where = *(getattr(results, column)[i] for column in same), heads[:2]
            sizes.setdefault(where, {})[heads] = i
    whole = [runs for where, runs in sizes.items() if where[-1] in runs and len(runs) > 1]
    if not whole:
        return None
    runs = max(whole, key=lambda runs: max(results.n_params[i] for i in runs.values()))
    dense = runs.pop(next(h for h in runs if not pattern_of(h)))
    look = looks([*runs, results.heads[dense]])
    base = np.array(results.positions[str(results.name[dense])])
    T = int(results.context_length[dense])
    places = (np.arange(len(base)) + 0.5) * T / len(base)
    figure, axis = draw.frame(7.4, 3.9)
    draw.zero_line(axis)
    for heads in sorted(runs):
        there = np.array(results.positions[str(results.name[runs[heads]])])
        style = look[heads] | {"markersize": 3, "linewidth": 1}
        axis.plot(places, 1e3 * (there - base), label=pair(heads), **style)
    axis.set_xlim(0, T)
    size = f"L = {results.n_layers[dense]}, d = {results.d_model[dense]}"
    axis.set(
        xlabel=f"position in the context (tokens), in {len(base)} parts",
        ylabel="loss higher than dense (millinats)",
        title=f"Loss by position against dense {pair(results.heads[dense])}, {size}",
    )
    draw.legend(figure, list(runs))
    return figure


@draw.styled
def needle_maps(results: Results) -> Figure | None:
    """Needles found by length and depth, a map for each run; None where none was asked for one."""
    return map_of(judged_rows(results))


@draw.styled
def map_of(rows: Sequence[Row]) -> Figure | None:
    """The same of some runs."""
    rows = [row for row in rows if row.judged.accuracy]
    if not rows:
        return None
    columns = min(4, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure = Figure(figsize=(0.6 + 2.3 * columns, 0.9 + 1.9 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    images = []
    for axis, row in zip(axes.flat, rows, strict=False):
        lengths = sorted(row.judged.accuracy)
        share = 100 * np.array([row.judged.accuracy[length] for length in lengths]).T
        images.append(axis.imshow(share, aspect="auto", cmap="cividis", vmin=0, vmax=100))
        for (i, j), value in np.ndenumerate(share):
            ink = "black" if value > 50 else "white"
            axis.text(j, i, f"{value:.0f}", fontsize=8, color=ink, **draw.CENTRED)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(row.judged.depths)), [f"{d:.0%}" for d in row.judged.depths])
        axis.grid(False)
        axis.set_title(row.name, fontsize=8.5)
    for axis in axes.flat[len(rows) :]:
        axis.set_visible(False)
    figure.supxlabel("length of the text (tokens)", fontsize=9.5)
    figure.supylabel("depth of the needle", fontsize=9.5)
    bar = figure.colorbar(images[0], ax=axes, pad=0.01)
    bar.set_label("needles found (%)")
    bar.outline.set_visible(False)
    return figure


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
                **style(i, i),
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
