"""The pictures of the page that do not move with its settings, as plain data for `page.js`.

A chart is axes and series of points; the page draws them all with one function. Losses are in nats.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gqa_scaling.study.histories import Histories
from gqa_scaling.study.report.looks import looks
from gqa_scaling.study.results import Heads, Results, pair
from gqa_scaling.study.scores import Forecasts
from gqa_scaling.study.study import Study
from gqa_scaling.study.uncertainty import LEVEL, interval
from gqa_scaling.units import quantity

Chart = dict[str, Any]
_PLACES = 40  # of a fitted curve


def charts(study: Study) -> dict[str, Chart]:
    found = {
        "loss_curves": loss_curves(study),
        "residuals": residuals(study),
        "training": training(study.results, study.histories),
        "forecasts": forecasts(study.forecasts, study.fit.heads),
        "positions": positions(study.results),
    }
    return {name: chart for name, chart in found.items() if chart["series"]}


def _chart(title: str, x: str, y: str, series: list[dict[str, Any]], **more: Any) -> Chart:
    return {"title": title, "x": x, "y": y, "series": series, **more}


def _rounded(values: Any, digits: int = 6) -> list[float]:
    return [float(f"{v:.{digits}g}") for v in np.asarray(values, float)]


def loss_curves(study: Study) -> Chart:
    fit, r = study.fit, study.results
    look, series = looks(fit.heads), []
    shown = _shown(r, fit.context_length)
    for k, heads in enumerate(fit.heads):
        mine = [i for i in shown if r.heads[i] == heads]
        n = np.geomspace(*fit.points.range_n(k), _PLACES)
        low, high = interval(fit.draws.loss(k, n))
        series.append(
            {
                "name": pair(heads),
                **look[heads],
                "line": {
                    "x": _rounded(n),
                    "y": _rounded(fit.curves.loss(k, n)),
                    "low": _rounded(low),
                    "high": _rounded(high),
                },
                "points": {
                    "x": _rounded(r.n_params[mine]),
                    "y": _rounded(r.loss[mine]),
                    "run": [_run(r, i, study.histories) for i in mine],
                },
            }
        )
    return _chart(
        f"Loss curves, law {fit.law}, with {LEVEL:.0%} bands",
        f"parameters N without embeddings ({fit.count})",
        "evaluation loss (nats per token)",
        series,
        log_x=True,
    )


def _shown(r: Results, context: int | None) -> list[int]:
    """The runs that belong to curves at this training context; all where there is but one."""
    several = context is not None and len(set(r.context_length.tolist())) > 1
    return [i for i in range(len(r)) if not several or r.context_length[i] == context]


def _run(r: Results, i: int, histories: Histories) -> list[str]:
    """What is said of a run when it is pointed at: its name, size, seed, and the command."""
    size = f"{r.n_layers[i]} x {r.d_model[i]}, " if r.n_layers[i] else ""
    command = f"{histories.command} {r.name[i]}" if histories.command else ""
    return [str(r.name[i]), f"{size}N {quantity(r.n_params[i])}", str(r.seed[i]), command]


def residuals(study: Study) -> Chart:
    fit, series = study.fit, []
    look = looks(fit.heads)
    for k, heads in enumerate(fit.heads):
        mine = fit.points.curve == k
        if mine.any():
            points = {
                "x": _rounded(fit.points.n[mine]),
                "y": _rounded(1e3 * fit.residual[mine]),
                "run": [[str(name), "", "", ""] for name in fit.points.name[mine]],
            }
            series.append({"name": pair(heads), **look[heads], "points": points})
    return _chart(
        "What the curves leave unexplained",
        f"parameters N without embeddings ({fit.count})",
        "loss minus curve (millinats)",
        series,
        log_x=True,
        zero=True,
    )


def training(r: Results, histories: Histories) -> Chart:
    look, series = looks(r.heads), []
    for i, heads in enumerate(r.heads):
        tokens, losses = histories.curves.get(str(r.name[i]), ((), ()))
        if tokens:
            line = {"x": _rounded(tokens, 4), "y": _rounded(losses, 4)}
            run = _run(r, i, histories)
            series.append({"name": pair(heads), **look[heads], "line": line, "run": run})
    return _chart(
        "Training loss of every run",
        "training tokens",
        "training loss (nats per token)",
        series,
        log_x=True,
        thin=True,
    )


def forecasts(made: Forecasts, heads: Sequence[Heads]) -> Chart:
    kinds = [*heads, *(score.heads for score in made.judged)]
    look, series = looks(kinds), []
    for kind in dict.fromkeys(score.heads for score in made.judged):
        mine = [score for score in made.judged if score.heads == kind]
        points = {
            "x": _rounded([s.n for s in mine]),
            "y": _rounded([1e3 * s.error for s in mine]),
            "low": _rounded([1e3 * (s.interval[0] - s.predicted) for s in mine]),
            "high": _rounded([1e3 * (s.interval[1] - s.predicted) for s in mine]),
            "run": [[s.name, f"forecast {s.predicted:.4f} nats", "", ""] for s in mine],
        }
        series.append({"name": pair(kind), **look[kind], "points": points})
    return _chart(
        f"Losses against their forecasts; bars: where {LEVEL:.0%} of runs were expected",
        "parameters N without embeddings",
        "loss minus forecast (millinats)",
        series,
        log_x=True,
        zero=True,
    )


def positions(r: Results) -> Chart:
    """Loss by position in the context, of the runs of the largest size."""
    told = [i for i in range(len(r)) if str(r.name[i]) in r.positions]
    sizes = {(r.n_layers[i], r.d_model[i]) for i in told}
    largest = max(sizes, key=lambda size: size[0] * size[1] ** 2, default=None)
    mine = [i for i in told if (r.n_layers[i], r.d_model[i]) == largest]
    return _chart(
        "Loss by position in the context, runs of the largest size",
        "position in the context (tokens)",
        "evaluation loss (nats per token)",
        list(_by_position(r, mine)),
    )


def _by_position(r: Results, mine: Sequence[int]) -> Iterator[dict[str, Any]]:
    look = looks([r.heads[i] for i in mine])
    for i in mine:
        losses = r.positions[str(r.name[i])]
        step = r.context_length[i] / len(losses)
        line = {"x": _rounded((np.arange(len(losses)) + 0.5) * step), "y": _rounded(losses)}
        heads = r.heads[i]
        yield {"name": pair(heads), **look[heads], "line": line, "run": _run(r, i, Histories())}
