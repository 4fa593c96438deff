"""Draws the pictures of docs/findings.md from the studies that are kept, and tells when runs learn to copy.

python docs/findings.py
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import CensoredData, logrank

from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.report import drawing as draw
from gqa_scaling.study.report.drawing import frames
from gqa_scaling.study.report.looks import looks
from gqa_scaling.study.report.loss_pictures import losses_on
from gqa_scaling.study.report.pictures import rendered
from gqa_scaling.study.results import COPIES, Heads, Results, pair
from gqa_scaling.study.source import Source, read_source

HERE = Path(__file__).parent
LINUX = str(HERE.parent / "studies" / "linux.csv")
AWAY = 0.2  # nats below the trend of a width: a run that has learned to copy


@draw.styled
def laws() -> Figure:
    """The paper's runs and ours, with the law fitted to each."""
    figure, axes = frames(11, 4.1, 2)
    for axis, (name, source) in zip(
        axes,
        (("Chen et al. 2025, figure 2", "chen2025"), ("experiments.linux", LINUX)),
        strict=True,
    ):
        fit = estimate(read_source(source, (), None).results).fit
        losses_on(axis, fit)
        axis.set_title(name)
        axis.legend(title="heads, KV", fontsize=8, ncols=2)
    return figure


@draw.styled
def context_gains(results: Results) -> Figure:
    """What the context of 256 tokens gains each run, over what it was trained on."""
    figure, axes = frames(12.5, 4.1, 3)
    parts = np.array([results.positions[str(name)] for name in results.name])
    shown = (parts[:, 0], parts[:, 0] - parts[:, -1], results.gained_by_rereading)
    part = int(results.context_length[0]) // parts.shape[1]
    titles = (
        f"Loss at the first {part} positions of a sequence",
        f"That minus the loss at the last {part}",
        "Loss minus that of the same text read again",
    )
    reach = results.tokens.min() / 1.2, results.tokens.max() * 1.2
    for axis, values, title in zip(axes, shown, titles, strict=True):
        for heads, look in looks(results.heads).items():
            mine = [h == heads for h in results.heads]
            axis.plot(
                results.tokens[mine],
                values[mine],
                **look | {"linestyle": "none"},
            )
        axis.set(xlabel="training tokens", ylabel="nats per token", title=title, xlim=reach)
        draw.decades_axis(axis)
    axes[2].axhline(COPIES, color=draw.GREY, linewidth=1)
    draw.legend(figure, list(dict.fromkeys(sorted(results.heads))), looks(results.heads))
    return figure


@dataclass(frozen=True)
class Onset:
    """When a run fell away from the trend of its width, in training tokens; None if not by its end."""

    heads: Heads
    width: int
    tokens: float | None
    trained: float

    def __str__(self) -> str:
        at = f"> {self.trained / 1e6:.1f}M" if self.tokens is None else f"{self.tokens / 1e6:.1f}M"
        return f"{pair(self.heads)} {at}"


def onsets(source: Source) -> list[Onset]:
    """Of every run from width 64 on: when it learned to copy, by its training curve.

    All runs of a width go down one straight line in ln(tokens) from 1M to 2M tokens. A run has fallen
    away where two places of its curve in a row lie AWAY below that line.
    """
    r, kept, found = source.results, source.kept, []
    assert kept is not None
    for width in sorted(set(r.d_model[r.d_model >= 64].tolist())):
        mine = np.flatnonzero(r.d_model == width)
        curves = [np.array(kept.curves[str(r.name[i])]) for i in mine]
        early = np.concatenate([c[:, (c[0] > 1e6) & (c[0] < 2.05e6)] for c in curves], axis=1)
        line = np.polyfit(np.log(early[0]), early[1], 1)
        for i, (tokens, losses) in zip(mine, curves, strict=True):
            below = (np.polyval(line, np.log(tokens)) - losses > AWAY) & (tokens > early[0].min())
            both = below[:-1] & below[1:]
            first = float(tokens[np.argmax(both)]) if both.any() else None
            found.append(Onset(r.heads[i], width, first, float(r.tokens[i])))
    return found


def sooner(found: Sequence[Onset]) -> str:
    """Whether runs with a KV head for each query head fall away sooner than others of their width: of
    the pairs in which it can be told, and by a log-rank test, one-sided, of all widths together."""
    alike, others = ([o for o in found if is_mha(o.heads) == mha] for mha in (True, False))
    pairs = [_first(a, b) for a in alike for b in others if a.width == b.width]
    told = [first for first in pairs if first is not None]
    censored = [
        CensoredData(
            [o.tokens for o in group if o.tokens is not None],
            right=[o.trained for o in group if o.tokens is None],
        )
        for group in (alike, others)
    ]
    p = logrank(*censored, alternative="greater").pvalue
    return f"{sum(told)} of {len(told)} pairs, p = {p:.3f}"


def _first(one: Onset, other: Onset) -> bool | None:
    """Whether the one fell away first; None where that cannot be told."""
    if one.tokens is not None and one.tokens < (other.tokens or other.trained):
        return True
    if other.tokens is not None and other.tokens < (one.tokens or one.trained):
        return False
    return None


def is_mha(heads: Heads) -> bool:
    return heads[0] == heads[1]


@draw.styled
def training(source: Source) -> Figure:
    """The training curves of each width, and where each run falls away."""
    assert source.kept is not None
    r = source.results
    widths = sorted(set(r.d_model[r.d_model >= 64].tolist()))
    figure, axes = frames(11, 4.1, len(widths), share_y=True)
    found = iter(onsets(source))
    for axis, width in zip(axes, widths, strict=True):
        for i in np.flatnonzero(r.d_model == width):
            look = looks(r.heads)[r.heads[i]]
            tokens, losses = map(np.array, source.kept.curves[str(r.name[i])])
            at, onset = tokens > 5e5, next(found)
            axis.plot(tokens[at], losses[at], **look | {"marker": "", "linewidth": 1})
            if onset.tokens is not None:
                there = np.interp(onset.tokens, tokens, losses)
                axis.plot(onset.tokens, there, **look | {"linestyle": "none", "markersize": 9})
        most = r.tokens[r.d_model == width].max()
        axis.set(xlabel="training tokens", title=f"Width {width}", xlim=(5e5, 1.1 * most))
        draw.decades_axis(axis)
    shown = list(dict.fromkeys(sorted(r.heads)))
    draw.legend(figure, shown, looks(r.heads))
    axes[0].set_ylabel("training loss (nats per token)")
    return figure


def forecast_again(source: Source) -> list[str]:
    """Of each run that was forecast a second time, from runs that copy alone, before it began: by how
    much its loss missed either forecast, in millinats."""
    r, kept = source.results, source.kept
    assert kept is not None
    made: dict[str, list[float]] = {}
    began = {
        each["result"]["config"]["name"]: each["attempts"][0]["began"] for each in kept.results
    }
    for sealed in sorted(kept.forecasts, key=lambda each: float(each.said["sealed"])):
        for run in sealed.said["runs"]:
            if sealed.said["sealed"] < began.get(run["name"], 0):
                made.setdefault(run["name"], []).append(run["predicted_nats"])
    loss = dict(zip(map(str, r.name), r.loss.tolist(), strict=True))
    return [
        f"{name}: {1e3 * (loss[name] - first):+.0f} from all runs, "
        f"{1e3 * (loss[name] - again):+.0f} from those that copy"
        for name, (first, *more) in made.items()
        for again in more[-1:]
    ]


def told(linux: Source) -> str:
    """When runs learn to copy, in words."""
    found, lines = onsets(linux), []
    for width in sorted({o.width for o in found}):
        mine = sorted((o for o in found if o.width == width), key=lambda o: o.tokens or np.inf)
        lines.append(f"width {width}: {', '.join(map(str, mine))}")
    lines.append(f"a KV head for each query head is sooner in {sooner(found)}")
    return "\n".join([*lines, *forecast_again(linux)])


def main() -> None:
    linux = read_source(LINUX, (), None)
    print(told(linux))
    figures = {
        "laws": laws(),
        "training": training(linux),
        "context": context_gains(linux.results),
    }
    for name, figure in figures.items():
        (HERE / f"findings_{name}.png").write_bytes(rendered(figure, "png"))


if __name__ == "__main__":
    main()
