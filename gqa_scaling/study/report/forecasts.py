"""Forecasts as tables: what was sealed, and what came of it."""

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from gqa_scaling.study.report.table import Column, Table, millinats, span
from gqa_scaling.study.results import pair
from gqa_scaling.study.scores import Forecasts, Score
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity

if TYPE_CHECKING:
    from gqa_scaling.study.predict import Prediction

_BEYOND = {"sizes": "~", "heads": "*"}
_STATES = {
    "waiting": "not finished",
    "begun": "sealed too late",
    "other data": "trained on other data",
    "other evaluation": "evaluated on other data",
    "damaged": "a file is damaged",
}


def prediction_table(predictions: Sequence["Prediction"], title: str) -> Table:
    return Table(
        title,
        [
            Column("run", lambda p: p.run.name, fold=True),
            Column("heads, KV", lambda p: pair(p.heads), spare=2),
            Column("L x d", lambda p: f"{p.run.model.n_layers} x {p.run.model.d_model}", spare=3),
            Column("N", lambda p: quantity(p.n), spare=1),
            Column("forecast", lambda p: f"{p.loss:.4f}{_BEYOND.get(p.beyond, '')}", "nats"),
            Column(f"{LEVEL:.0%} of a run", lambda p: span(p.run_interval, ".4f"), "nats"),
            Column(f"{LEVEL:.0%} of the curve", lambda p: span(p.curve_interval, ".4f"), spare=4),
            Column("law", lambda p: p.law, spare=5),
        ],
        predictions,
        _marks(p.beyond for p in predictions),
    )


def forecast_table(forecasts: Forecasts) -> Table:
    return Table(
        "Forecasts sealed before training, losses in nats",
        [
            Column("run", lambda s: s.name, fold=True),
            Column("heads, KV", _heads, spare=4),
            Column("N", lambda s: quantity(s.n), spare=3),
            Column("sealed", lambda s: _date(s.sealed), "UTC", spare=2),
            Column("forecast", lambda s: f"{s.predicted:.4f}{_BEYOND.get(s.beyond, '')}"),
            Column(f"{LEVEL:.0%} of a run", lambda s: span(s.interval, ".4f")),
            Column("observed", lambda s: "-" if s.observed is None else f"{s.observed:.4f}"),
            Column("error", lambda s: millinats(s.error), "millinats"),
            Column("inside", _inside),
            Column("law", lambda s: s.law, page_only=True),
            Column("file", lambda s: s.file, page_only=True),
        ],
        forecasts.scores,
        [*_counted(forecasts), *_marks(s.beyond for s in forecasts.scores), *forecasts.altered],
        about="Error: observed minus forecast. What counts for a run is the first forecast, if it was "
        "sealed before the run began; files that were altered since do not count.",
    )


def _counted(forecasts: Forecasts) -> list[str]:
    """How many losses fell inside, and how many should have; what was wrong on average."""
    n = len(forecasts.judged)
    if not n:
        return ["None of these runs is finished." if forecasts.scores else "No forecast counts."]
    runs = "the finished run" if n == 1 else f"{n} finished runs"
    return [
        f"{forecasts.inside} of {runs} inside; of {LEVEL:.0%} intervals {LEVEL * n:.1f} are expected, "
        f"but misses of one fit come together. Error {millinats(forecasts.mean)} on average, "
        f"{millinats(forecasts.rms)} root mean square (millinats)."
    ]


def _marks(beyond: Iterable[str]) -> list[str]:
    known = set(beyond)
    told = {"sizes": "~ outside the sizes that were trained.", "heads": "* heads nobody trained."}
    parts = [text for code, text in told.items() if code in known]
    return [" ".join(parts)] if parts else []


def _heads(score: Score) -> str:
    return pair(score.heads) + (f" {score.pattern}" if score.pattern else "")


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _inside(score: Score) -> str:
    if score.inside is None:
        return _STATES[score.state]
    return "yes" if score.inside else "NO"
