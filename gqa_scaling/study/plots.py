"""The study's pictures, each a function to a matplotlib `Figure`; nothing is shown or saved here.

Colours are Okabe and Ito's, safe for colour-blind readers; markers and line styles repeat what
they say, so the pictures survive a grey printer.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from gqa_scaling.config import LOSSES
from gqa_scaling.study.fit import LEVEL, Fit, interval
from gqa_scaling.study.frontier import Frontier, frontier, headline
from gqa_scaling.study.heads import common_n, head_laws
from gqa_scaling.study.results import Heads, Results, pair, pattern_of
from gqa_scaling.study.serving import OBJECTIVES, Deployment
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.sparsity import Sparsity
from gqa_scaling.study.tables import percent, quantity

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
STYLE = {
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
    "svg.hashsalt": "gqa_scaling",
    "figure.dpi": 100,
    "savefig.dpi": 160,
}
COST_LABELS = {
    "memory": "inference memory (values)",
    "flops": "inference FLOPs ({convention})",
    "z": "hardware-aware cost Z ({convention})",
}


def _figure(width: float, height: float, columns: int = 1, **kwargs: object) -> tuple:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **kwargs)


def looks(heads: Sequence[Heads]) -> dict[Heads, dict[str, object]]:
    """Colour, marker and line for each configuration.

    Up to seven have a colour each; more take their colour from n_heads and the rest from n_kv, or,
    where some have patterns, their colour from the heads and the rest from the pattern.
    """
    ordered = sorted(set(heads))
    several = sorted({h[:2] for h in ordered})
    sparse = any(map(pattern_of, ordered)) and len(several) > 1
    if len(ordered) <= len(OKABE_ITO) or (any(map(pattern_of, ordered)) and not sparse):
        keys = {h: (i, i) for i, h in enumerate(ordered)}
    elif sparse:
        kinds = sorted({h[2:] for h in ordered})
        keys = {h: (several.index(h[:2]), kinds.index(h[2:])) for h in ordered}
    else:
        queries, values = (sorted({h[i] for h in ordered}) for i in (0, 1))
        keys = {h: (queries.index(h[0]), values.index(h[1])) for h in ordered}
    return {
        h: {
            "color": OKABE_ITO[i % len(OKABE_ITO)],
            "marker": MARKERS[j % len(MARKERS)],
            "linestyle": LINES[j % len(LINES)],
        }
        for h, (i, j) in keys.items()
    }


def _log_axis(axis: Axes, which: str = "x") -> None:
    """Logarithmic with plain SI labels: at 1, 2 and 5 when it spans less than two decades."""
    low, high = axis.get_xlim() if which == "x" else axis.get_ylim()
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    ticks = axis.xaxis if which == "x" else axis.yaxis
    steps = (1, 2, 5) if high / max(low, 1e-300) < 500 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
    if len(places) > 7:
        places = places[:: math.ceil(len(places) / 7)]
    if len(places) >= 2:
        ticks.set_ticks(places)
    ticks.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))
    ticks.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    text = quantity(value)
    unit = text[-1] if text[-1].isalpha() else ""
    return f"{float(text[: len(text) - len(unit)]):g}{unit}"


def _range(fit: Fit, k: int, steps: int = 60) -> np.ndarray:
    return np.geomspace(*fit.points.range_n(k), steps)


def _curves(
    axis: Axes, fit: Fit, to_cost: Callable[[np.ndarray, Heads], np.ndarray] | None = None
) -> None:
    """Points, fitted curves and bands of every configuration over N or over a cost of N."""
    look = looks(fit.heads)
    edges = []
    for k, heads in enumerate(fit.heads):
        n, mine = _range(fit, k), fit.points.curve == k
        x = to_cost(n, heads) if to_cost else n
        dots = to_cost(fit.points.n[mine], heads) if to_cost else fit.points.n[mine]
        low, high = interval(fit.draws.loss(k, n))
        style = look[heads]
        axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        axis.plot(x, fit.curves.loss(k, n), color=style["color"], linestyle=style["linestyle"])
        axis.plot(
            dots,
            fit.points.loss[mine],
            linestyle="none",
            color=style["color"],
            marker=style["marker"],
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        edges += [float(x.min()), float(x.max())]
    axis.set_xlim(min(edges) / 1.12, max(edges) * 1.12)
    _log_axis(axis)


def _legend(figure: Figure, fit: Fit) -> None:
    from matplotlib.lines import Line2D

    look = looks(fit.heads)
    handles = [Line2D([], [], label=pair(h), **look[h]) for h in fit.heads]
    _place(figure, fit.heads, handles=handles)


def _place(figure: Figure, heads: Sequence[Heads], **content: object) -> None:
    """The legend of the configurations: at the right or, where patterns make it wide, below."""
    below = any(map(pattern_of, heads))
    where = {"loc": "outside right upper", "title": "heads, KV"}
    if below:
        columns = max(1, int(figure.get_figwidth() // 2.9))
        where = {"loc": "outside lower center", "ncols": columns}
        lines = math.ceil(len(heads) / columns)
        figure.set_figheight(figure.get_figheight() + 0.19 * lines)
    named = any(axis.get_legend_handles_labels()[1] for axis in figure.axes)
    if named or content.get("handles"):  # nothing is drawn where no configuration has an answer
        figure.legend(**where, handlelength=3, **content)


def _codes(heads: Sequence[Heads]) -> tuple[dict[Heads, str], str]:
    """Names short enough to write into a picture, and the line that explains them."""
    patterns = sorted({h[2] for h in heads if pattern_of(h)})
    letters = {p: chr(ord("a") + i % 26) * (1 + i // 26) for i, p in enumerate(patterns)}
    short = {h: pair(h[:2]) + (letters[h[2]] if pattern_of(h) else "") for h in heads}
    return short, "; ".join(f"{letter}: {p.label}" for p, letter in letters.items())


def _explain(axis: Axes, label: str, codes: str) -> None:
    """The label of the x axis, with the line that explains short names below it."""
    axis.set_xlabel("\n".join([label, *textwrap.wrap(codes, 95)]))


def loss_curves(fit: Fit) -> Figure:
    """Loss against N by configuration, with fits and their 90% bands."""
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.4, 4.2)
        _curves(axis, fit)
        axis.set_xlabel(f"parameters N without embeddings ({fit.count})")
        axis.set_ylabel("evaluation loss (nats per token)")
        axis.set_title(f"Loss curves, law {fit.law}, with {LEVEL:.0%} bands of the curves")
        _legend(figure, fit)
    return figure


def loss_against_costs(fit: Fit, results: Results, answers: Frontier) -> Figure:
    """Loss against memory, FLOPs and Z at the longest context of the question."""
    q = answers.question
    context = max(q.contexts)
    deployment = Deployment(family_of(results), q, context)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(10.4, 3.7, 3, sharey=True)
        for axis, kind in zip(axes, ("memory", "flops", "z"), strict=True):

            def to_cost(n: np.ndarray, heads: Heads, kind: str = kind) -> np.ndarray:
                return getattr(deployment.costs(n, heads), kind)

            _curves(axis, fit, to_cost)
            axis.set_xlabel(COST_LABELS[kind].format(convention=q.convention))
        axes[0].set_ylabel("evaluation loss (nats per token)")
        axes[0].set_title(f"at context {context:,} tokens")
        _legend(figure, fit)
    return figure


def heat_map(fit: Fit, results: Results, answers: Frontier) -> Figure:
    """The cheapest configuration over loss and context, written into the map of its saving."""
    ends = [fit.curves.loss(k, np.array(fit.points.range_n(k))) for k in range(len(fit.heads))]
    low = min(min(e.min() for e in ends), *answers.losses)
    high = max(max(e.max() for e in ends), *answers.losses)
    losses = np.linspace(*np.clip((low, high), *LOSSES), 7)
    contexts = spread(min(answers.question.contexts), max(answers.question.contexts))
    wide = replace(
        answers.question,
        losses=tuple(float(v) for v in losses),
        contexts=tuple(contexts),
        baseline=answers.baseline,
    )
    whole = frontier(fit, results, wide, answers.objective, answers.serving, gains=False)
    saved = np.array(
        [
            [whole.at(float(loss), c).best.saving[answers.objective] for c in contexts]
            for loss in losses
        ]
    )
    short, codes = _codes(fit.heads)
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(8.6, 4.4)
        shown = np.ma.masked_invalid(100 * saved)
        bottom, top = _rounded(shown.compressed())
        image = axis.imshow(
            shown, aspect="auto", origin="lower", cmap="cividis", vmin=bottom, vmax=top
        )
        for i, loss in enumerate(losses):
            for j, context in enumerate(contexts):
                answer = whole.at(float(loss), context)
                if not answer.best.reached:
                    axis.text(j, i, "none", ha="center", va="center", color="#555555")
                    continue
                text = short[answer.best.heads] + ("~" if answer.best.extrapolated else "")
                others = len(answer.tied) - 1
                text += f"\n{percent(answer.best.probability, 0)}" + (
                    f", tied {others}" if others else ""
                )
                bright = np.nan_to_num(100 * saved[i, j], nan=top) > (bottom + top) / 2
                ink = "black" if bright else "white"
                axis.text(j, i, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(len(contexts)), [f"{c:,}" for c in contexts])
        axis.set_yticks(range(len(losses)), [f"{v:.3f}" for v in losses])
        axis.grid(False)
        _explain(axis, "inference context (tokens)", codes)
        axis.set_ylabel("target loss (nats per token)")
        name = OBJECTIVES[answers.objective]
        axis.set_title(
            f"Cheapest (heads, KV) by {name}, its probability, and how many tie with it\n"
            "~ its size lies outside the fitted ones"
        )
        bar = figure.colorbar(image, ax=axis, pad=0.01)
        bar.set_label(f"{name} saved against {pair(answers.baseline)} (%)")
        bar.outline.set_visible(False)
    return figure


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


def _rounded(percentages: np.ndarray) -> tuple[float, float]:
    """A colour scale over the data in tens, so that no small difference looks like a large one."""
    if not len(percentages):
        return 0.0, 100.0
    bottom = 10 * math.floor(percentages.min() / 10)
    return bottom, max(bottom + 10, 10 * math.ceil(percentages.max() / 10))


def gains(answers: Frontier) -> Figure:
    """What each configuration gains in loss at the baseline's cost, against the context."""
    look = looks([c.heads for c in answers.answers[0].choices])
    middle = headline(answers).loss
    shown = sorted((a for a in answers.answers if a.loss == middle), key=lambda a: a.context)
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.4, 3.9)
        axis.axhline(0, color="#888888", linewidth=1)
        for i, heads in enumerate(sorted(look)):
            if heads == answers.baseline:
                continue
            found = [(a.context, a.choice(heads).equal_cost) for a in shown]
            found = [(t, e) for t, e in found if math.isfinite(e.gain)]
            if not found:
                continue
            y = 1e3 * np.array([e.gain for _, e in found])
            low, high = 1e3 * np.array([e.gain_interval for _, e in found]).T
            beside = 1.025 ** (i - (len(look) - 1) / 2)  # so that bars do not hide each other
            x = np.array([t for t, _ in found]) * beside
            bars = np.maximum([y - low, high - y], 0)
            axis.errorbar(x, y, bars, label=pair(heads), capsize=2, **look[heads])
            far = np.array([e.extrapolated for _, e in found])
            axis.plot(x[far], y[far], "o", markersize=11, color="none", markeredgecolor="#888888")
        contexts = [a.context for a in shown]
        axis.set_xscale("log", base=2)
        axis.set_xticks(contexts, [f"{t:,}" for t in contexts])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(contexts[0] / 1.5, contexts[-1] * 1.5)
        axis.set_xlabel("inference context (tokens)")
        axis.set_ylabel("loss lower by (millinats)")
        kind = OBJECTIVES[answers.objective]
        axis.set_title(
            f"Gained over {pair(answers.baseline)} at equal {kind}, its loss {middle:g} nats\n"
            f"{LEVEL:.0%} intervals; ringed: a size outside the fitted ones"
        )
        _place(figure, list(look))
    return figure


def savings(answers: Frontier) -> Figure:
    """Memory and FLOPs of each configuration at equal loss, split by what the context changes."""
    answer = headline(answers)
    base = answer.choice(answers.baseline)
    choices = [c for c in sorted(answer.choices, key=lambda c: c.heads) if math.isfinite(c.n)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(9.4, 3.8, 2)
        short, codes = _codes([c.heads for c in choices])
        names = [short[c.heads] for c in choices]
        for axis, kind in zip(axes, ("memory", "flops"), strict=True):
            whole = getattr(base, kind)
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
                axis.text(
                    i,
                    value,
                    f"{value:.0f}" if unit != 1.0 else _short(value),
                    ha="center",
                    va="bottom",
                    fontsize=8,
                )
            axis.set_ylim(0, 1.32 * max(total, default=1.0))
            axis.legend(loc="upper left", fontsize=8, handlelength=1.5)
            axis.grid(False, axis="x")
            axis.tick_params(axis="x", rotation=0 if len(names) < 9 else 60, labelsize=8)
            label = COST_LABELS[kind].format(convention=answers.question.convention)
            share = f"\n% of {pair(answers.baseline)}'s" if unit != 1.0 else ""
            axis.set_ylabel(label + share)
            axis.set_xlabel("(heads, KV)")
        if codes:
            figure.supxlabel("\n".join(textwrap.wrap(codes, 110)), fontsize=8)
        axes[0].set_title(f"Costs at {answer.loss:g} nats and {answer.context:,} tokens")
    return figure


def loss_against_heads(fit: Fit) -> Figure:
    """Fitted loss against n_heads at one N inside every curve, a line for each n_kv rule."""
    n = common_n(fit)
    heads = {k: h for k, h in enumerate(fit.heads) if pattern_of(h) is None}
    powers = {law.n_kv_heads: law for law in head_laws(fit, n)}
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(6.6, 3.9)
        values = sorted({kv for _, kv in heads.values()})
        for i, kv in enumerate(values):
            inside = [k for k, h in heads.items() if h[1] == kv]
            x = np.array([fit.heads[k][0] for k in inside], float)
            y = np.array([float(fit.curves.loss(k, n)) for k in inside])
            bounds = np.array([interval(fit.draws.loss(k, n)) for k in inside])
            axis.errorbar(
                x * 1.02 ** (i - (len(values) - 1) / 2),  # side by side, so that bars do not hide
                y,
                np.maximum([y - bounds[:, 0], bounds[:, 1] - y], 0),
                color=OKABE_ITO[i % len(OKABE_ITO)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="none" if kv in powers else LINES[i % len(LINES)],
                capsize=3,
                label=f"{kv}",
            )
            if kv in powers:
                law, fine = powers[kv], np.geomspace(x.min(), x.max(), 80)
                label = f"{law.a:.3f} n_h^{law.b:.3f} + {law.c:.3f}"
                style = {"color": OKABE_ITO[i % len(OKABE_ITO)], "linestyle": LINES[i % len(LINES)]}
                axis.plot(fine, law.loss(fine), label=label, **style)
        queries = sorted({h for h, _ in heads.values()})
        axis.set_xscale("log", base=2)
        axis.set_xticks(queries, [str(h) for h in queries])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(queries[0] / 1.3, queries[-1] * 1.3)
        axis.set_xlabel("query heads")
        axis.set_ylabel("fitted loss (nats per token)")
        axis.set_title(f"Loss against heads at N = {quantity(n)}, {LEVEL:.0%} intervals")
        figure.legend(loc="outside right upper", title="KV heads")
    return figure


def residuals(fit: Fit) -> Figure:
    """Loss minus curve of every point, with the noise of one run as a band."""
    look = looks(fit.heads)
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.4, 3.6)
        axis.axhspan(-1e3 * fit.sigma, 1e3 * fit.sigma, color="#eeeeee", zorder=0)
        axis.axhline(0, color="#888888", linewidth=1)
        for k, heads in enumerate(fit.heads):
            mine, style = fit.points.curve == k, look[heads]
            axis.plot(
                fit.points.n[mine],
                1e3 * fit.residual[mine],
                color=style["color"],
                marker=style["marker"],
                linestyle="none",
            )
        axis.set_xlim(fit.points.n.min() / 1.12, fit.points.n.max() * 1.12)
        _log_axis(axis)
        axis.set_xlabel(f"parameters N without embeddings ({fit.count})")
        axis.set_ylabel("loss minus curve (millinats)")
        axis.set_title("Residuals; grey: one standard deviation of a run")
        _legend(figure, fit)
    return figure


def probabilities(answers: Frontier) -> Figure:
    """How probable each configuration is to be the cheapest, one bar for each answer."""
    look = looks([c.heads for c in answers.answers[0].choices])
    shown = sorted(answers.answers, key=lambda a: (a.context, -a.loss))
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(8.2, 1.5 + 0.32 * len(shown))
        names = [f"{a.context:,} tokens, {a.loss:g} nats" for a in shown]
        short, codes = _codes(list(look))
        seen: dict[Heads, object] = {}
        for i, answer in enumerate(shown):
            left = 0.0
            for choice in sorted(answer.choices, key=lambda c: -c.probability):
                width = 100 * choice.probability
                if not width:
                    continue
                color = str(look[choice.heads]["color"])
                seen[choice.heads] = axis.barh(i, width, left=left, color=color, edgecolor="white")
                if width > 8:
                    dark = color in ("#0072B2", "#000000", "#D55E00", "#009E73")
                    axis.text(
                        left + width / 2,
                        i,
                        f"{short[choice.heads]} {width:.0f}%",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                    )
                left += width
        axis.set_yticks(range(len(shown)), names)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(False, axis="y")
        _explain(axis, "probability of being the cheapest (%)", codes)
        axis.set_title(f"Decision probability over {answers.intervals.split(', ', 1)[1]}")
    return figure


def loss_against_density(fit: Fit, found: Sparsity) -> Figure:
    """What patterns add to the loss of dense attention with the same heads, against density."""
    look = looks(fit.heads)
    rows = [row for row in found.rows if math.isfinite(row.loss)]
    least = min(row.density for row in rows) / 1.1
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.4, 3.9)
        axis.axhline(0, color="#888888", linewidth=1)
        for row in rows:
            y, (low, high) = 1e3 * row.loss, 1e3 * np.array(row.loss_interval)
            bars = [[max(y - low, 0)], [max(high - y, 0)]]
            style = look[row.heads] | {"linestyle": "none"}
            axis.errorbar([row.density], [y], bars, label=pair(row.heads), capsize=3, **style)
        if found.rate is not None and found.excess is not None:
            x = np.geomspace(least, 1, 80)
            y = 1e3 * found.excess * np.expm1(-found.rate * np.log2(x))
            label = f"law {found.law}: exp(r) = {math.exp(found.rate):.3f} a halving"
            axis.plot(x, y, color="#888888", linestyle="--", label=label)
        _density_axis(axis, least)
        axis.set_xlabel(f"density at the training context of {found.train_context:,} tokens")
        axis.set_ylabel("loss higher than dense (millinats)")
        axis.set_title(
            f"What sparsity costs at N = {quantity(found.n)}, same heads, {LEVEL:.0%} intervals"
        )
        _place(figure, [row.heads for row in rows])
    return figure


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
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.4, 3.9)
        axis.axhline(0, color="#888888", linewidth=1)
        for heads in sorted(runs):
            there = np.array(results.positions[str(results.name[runs[heads]])])
            style = look[heads] | {"markersize": 3, "linewidth": 1}
            axis.plot(places, 1e3 * (there - base), label=pair(heads), **style)
        axis.set_xlim(0, T)
        axis.set_xlabel(f"position in the context (tokens), in {len(base)} parts")
        axis.set_ylabel("loss higher than dense (millinats)")
        size = f"L = {results.n_layers[dense]}, d = {results.d_model[dense]}"
        axis.set_title(f"Loss by position against dense {pair(results.heads[dense])}, {size}")
        _place(figure, list(runs))
    return figure


def _density_axis(axis: Axes, least: float) -> None:
    """From 1 at the left down to the sparsest, in halvings."""
    places = [2.0**-k for k in range(math.ceil(-math.log2(least)) + 1)]
    axis.set_xscale("log", base=2)
    axis.set_xlim(1.05, places[-1])
    axis.set_xticks(places, ["1", *(f"1/{round(1 / p)}" for p in places[1:])])
    axis.xaxis.set_minor_formatter(NullFormatter())


FIGURES = (  # every name that a picture may have
    "loss_curves",
    "loss_against_costs",
    "heat_map",
    "savings",
    "gains",
    "probabilities",
    "loss_against_heads",
    "loss_against_density",
    "loss_by_position",
    "residuals",
)


def all_figures(
    fit: Fit, results: Results, answers: Frontier, sparse: Sparsity | None = None
) -> dict[str, tuple[Figure, str]]:
    """Every picture by file name, with its caption; `sparse` is there where patterns are."""
    t = max(answers.question.contexts)
    name = OBJECTIVES[answers.objective]
    out = {
        "loss_curves": (
            loss_curves(fit),
            "Evaluation loss of every run and the fitted curve of each configuration.",
        ),
        "loss_against_costs": (
            loss_against_costs(fit, results, answers),
            f"The same curves against what inference costs at {t:,} tokens: further left is cheaper.",
        ),
        "heat_map": (
            heat_map(fit, results, answers),
            f"The configuration of least {name} for each target loss and context.",
        ),
        "savings": (
            savings(answers),
            "Where the costs come from, all configurations at the same loss.",
        ),
        "gains": (
            gains(answers),
            f"The loss each configuration reaches for the {name} that the baseline costs.",
        ),
        "probabilities": (
            probabilities(answers),
            "How sure the recommendation is: the share of bootstrap draws in which each "
            "configuration is the cheapest.",
        ),
    }
    if not all(map(pattern_of, fit.heads)):
        out["loss_against_heads"] = (
            loss_against_heads(fit),
            "What more heads buy at a fixed parameter count.",
        )
    if sparse and any(math.isfinite(row.loss) for row in sparse.rows):
        out["loss_against_density"] = (
            loss_against_density(fit, sparse),
            "What reading part of the context costs in loss, measured at the training context.",
        )
    by_position = loss_by_position(results)
    if by_position is not None:
        out["loss_by_position"] = (
            by_position,
            "Where in the context each pattern gains and loses, at the largest size with a dense run.",
        )
    out["residuals"] = (residuals(fit), "What the curves leave unexplained.")
    return out
