"""Draws the pictures of docs/findings.md from the studies that are kept, and tells when runs learn to copy.

python docs/findings.py
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.fit import fit
from gqa_scaling.study.report import drawing as draw
from gqa_scaling.study.report.drawing import frames
from gqa_scaling.study.report.looks import looks
from gqa_scaling.study.report.loss_pictures import losses_on
from gqa_scaling.study.report.pictures import rendered
from gqa_scaling.study.results import COPIES, Heads, Results, pair
from gqa_scaling.study.source import Source, read_source

HERE = Path(__file__).parent
STUDIES = HERE.parent / "studies"
LINUX, EQUAL_TOKENS, ALL_TEXT = (
    str(STUDIES / f"{name}.csv") for name in ("linux", "linux_equal_tokens", "linux_all_text")
)
FALLEN = 3.0  # nats of training loss: models of up to width 88 come there, by these tokens, by copying alone


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
    """When a run learned to copy, in training tokens; None if not before its learning rate decays, at
    `watched` tokens."""

    heads: Heads
    width: int
    tokens: float | None
    watched: float

    def __str__(self) -> str:
        at = f"> {self.watched / 1e6:.1f}M" if self.tokens is None else f"{self.tokens / 1e6:.1f}M"
        return f"{pair(self.heads)} {at}"


def onsets(source: Source) -> list[Onset]:
    """Of every run from width 64 on, by its training curve: where it goes below FALLEN and stays there.

    Only as long as the learning rate is at its maximum: losses of all runs fall as it decays, those of
    smaller models after fewer tokens.
    """
    r, kept, found = source.results, source.kept, []
    assert kept is not None
    decays = {run.name: run.optimizer.decay for run in kept.runs}
    for i in np.flatnonzero(r.d_model >= 64):
        name = str(r.name[i])
        watched = (1 - decays[name]) * float(r.tokens[i])
        tokens, losses = np.array(kept.curves[name])
        above = np.flatnonzero((losses >= FALLEN) & (tokens <= watched))[-1]
        later = tokens[(tokens > tokens[above]) & (tokens <= watched)]
        first = float(later[0]) if len(later) > 1 else None
        found.append(Onset(r.heads[i], int(r.d_model[i]), first, watched))
    return found


def sooner(found: Sequence[Onset]) -> str:
    """Whether runs with a KV head for each query head learn to copy sooner than others of their width: of
    the pairs in which it can be told, and how often as many or more are, over those that are later, when
    the runs of each width are shuffled: Gehan's test of censored times (1965), within widths."""
    order = np.array([[_order(one, other) for other in found] for one in found])
    alike = np.array([one.heads[0] == one.heads[1] for one in found])
    told = order[np.ix_(alike, ~alike)]
    widths, rng, shuffled = np.array([one.width for one in found]), np.random.default_rng(0), []
    for _ in range(10_000):
        mixed = alike.copy()
        for width in set(widths.tolist()):
            mixed[widths == width] = rng.permutation(alike[widths == width])
        shuffled.append(order[np.ix_(mixed, ~mixed)].sum())
    p = np.mean(np.array(shuffled) >= told.sum())
    return f"{(told > 0).sum()} of {(told != 0).sum()} pairs, p = {p:.2f}"


def _order(one: Onset, other: Onset) -> int:
    """1 if the one is sooner, -1 if the other, 0 where that cannot be told or they differ in width."""
    if one.width != other.width:
        return 0
    if one.tokens is not None and one.tokens < (other.tokens or other.watched):
        return 1
    return -int(other.tokens is not None and other.tokens < (one.tokens or one.watched))


@draw.styled
def training(source: Source) -> Figure:
    """The training curves of each width, and where each run has learned to copy."""
    assert source.kept is not None
    r = source.results
    widths = sorted(set(r.d_model[r.d_model >= 64].tolist()))
    figure, axes = frames(3.5 + 2.5 * len(widths), 4.1, len(widths), share_y=True)
    found = dict(zip(np.flatnonzero(r.d_model >= 64).tolist(), onsets(source), strict=True))
    for axis, width in zip(axes, widths, strict=True):
        for i in np.flatnonzero(r.d_model == width):
            look = looks(r.heads)[r.heads[i]]
            tokens, losses = map(np.array, source.kept.curves[str(r.name[i])])
            at, onset = tokens > 5e5, found[int(i)]
            axis.plot(tokens[at], losses[at], **look | {"marker": "", "linewidth": 1})
            if onset.tokens is not None:
                there = np.interp(onset.tokens, tokens, losses)
                axis.plot(onset.tokens, there, **look | {"linestyle": "none", "markersize": 9})
        most = r.tokens[r.d_model == width].max()
        axis.axhline(FALLEN, color=draw.GREY, linewidth=1)
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
    made: dict[str, dict[int, float]] = {}  # by how many runs each was made from
    began = {
        each["result"]["config"]["name"]: each["attempts"][0]["began"] for each in kept.results
    }
    for sealed in kept.forecasts:
        known = len(sealed.said["predicted_from"]["runs"])
        for run in sealed.said["runs"]:
            if sealed.said["sealed"] < began.get(run["name"], 0):
                made.setdefault(run["name"], {})[known] = run["predicted_nats"]
    loss = dict(zip(map(str, r.name), r.loss.tolist(), strict=True))
    return [
        f"{name}: {1e3 * (loss[name] - said[max(said)]):+.0f} from all runs, "
        f"{1e3 * (loss[name] - said[min(said)]):+.0f} from those that copy"
        for name, said in made.items()
        if len(said) > 1
    ]


def reading_again(source: Source) -> list[str]:
    """When runs were first seen to gain by reading a text again, from training that was measured on the
    way: after the one and by the other of these training tokens."""
    r, kept, lines = source.results, source.kept, []
    assert kept is not None
    for width in sorted(set(r.d_model.tolist())):
        seen = []
        for i in np.flatnonzero(r.d_model == width):
            places, gains = kept.rereading[str(r.name[i])]
            places, gains = (0.0, *places, r.tokens[i]), (0.0, *gains, r.gained_by_rereading[i])
            at = next((k for k, gain in enumerate(gains) if gain >= COPIES), None)
            span = f"> {places[-1] / 1e6:.0f}M" if at is None else ""
            span = span or f"{places[at - 1] / 1e6:.0f} to {places[at] / 1e6:.0f}M"
            seen.append((np.inf if at is None else places[at], f"{pair(r.heads[i])} {span}"))
        lines.append(f"by reading again, width {width}: {', '.join(s for _, s in sorted(seen))}")
    return lines


def training_losses(source: Source) -> np.ndarray:
    """What the runs' training losses ended at: means over the last logged steps, of batches that were
    new to the run."""
    assert source.kept is not None
    return np.array([source.kept.curves[str(name)][1][-1] for name in source.results.name])


def apart(source: Source, which: str = "") -> str:
    """How far held-out losses lie above training losses."""
    above = source.results.loss - training_losses(source)
    return f"{which}held-out minus training loss: {above.min():.2f} to {above.max():.2f} nats"


def on_text_as_trained_on(source: Source, which: str = "") -> list[str]:
    """Law `product` of the training losses, as the held-out text is of another kind."""
    r, lines = dataclasses.replace(source.results, loss=training_losses(source)), []
    for those, runs in (("all", r), ("that copy", r.select(r.gained_by_rereading >= COPIES))):
        found = fit(runs, law="product")
        drawn = dict(zip(found.names, found.parameter_draws.T, strict=True))
        drawn["p - q"] = drawn["p"] - drawn["q"]
        ends_of = {
            name: np.quantile(drawn[name], (0.05, 0.95)) for name in ("E", "p", "q", "p - q")
        }
        said = "; ".join(f"{name} {low:.3f} to {high:.3f}" for name, (low, high) in ends_of.items())
        bend = found.misfit.p_value if found.misfit else np.nan
        noise = f"noise {1e3 * found.sigma:.0f} millinats, bend p = {bend:.2f}"
        lines.append(f"{which}training losses, {len(runs)} runs {those}: {said}; {noise}")
    return lines


def told() -> str:
    """When runs learn to copy, and how forecasts fared, in words."""
    names = LINUX, EQUAL_TOKENS, ALL_TEXT
    linux, equal, every = (read_source(name, (), None) for name in names)
    lines = copying(linux) + copying(equal, "on equal tokens, ")
    lines += reading_again(equal) + forecast_again(linux)
    for source, which in (linux, ""), (equal, "on equal tokens, "):
        lines += [apart(source, which), *on_text_as_trained_on(source, which)]
    lines.append(apart(every, "by all text, "))
    return "\n".join(lines)


def copying(source: Source, which: str = "") -> list[str]:
    """When the runs of each width learn to copy, and whether heads matter for it."""
    found, lines = onsets(source), []
    for width in sorted({o.width for o in found}):
        mine = sorted((o for o in found if o.width == width), key=lambda o: o.tokens or np.inf)
        lines.append(f"{which}width {width}: {', '.join(map(str, mine))}")
    return [*lines, f"{which}a KV head for each query head is sooner in {sooner(found)}"]


def main() -> None:
    print(told())
    linux, equal = (read_source(name, (), None) for name in (LINUX, EQUAL_TOKENS))
    figures = {
        "laws": laws(),
        "training": training(linux),
        "context": context_gains(linux.results),
        "equal_tokens": training(equal),
    }
    for name, figure in figures.items():
        (HERE / f"findings_{name}.png").write_bytes(rendered(figure, "png"))


if __name__ == "__main__":
    main()
