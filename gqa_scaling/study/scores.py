"""What came of forecasts: each run's loss against what was sealed before it began.

What counts for a run is the first forecast, and only where it was sealed before the run's first
attempt began; later ones are kept and not scored. A run's loss counts when it was trained and
measured on the data that the forecast speaks of.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from gqa_scaling.config import UserError
from gqa_scaling.files.forecasts import Sealed, read_forecasts
from gqa_scaling.files.runs import directory_of, evaluation_in
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.points import Interval
from gqa_scaling.study.records import Records
from gqa_scaling.study.source import Source
from gqa_scaling.study.uncertainty import LEVEL

# "begun": sealed when the run had begun, or nobody knows when that was; "other data" and "other
# evaluation": the run's loss is not the one that was forecast; "damaged": a file of the run is.
State = Literal["scored", "waiting", "begun", "other data", "other evaluation", "damaged"]


@dataclass(frozen=True)
class Score:
    """What was forecast of one run, in nats, and what came of it.

    `observed` is None unless the state is "scored". `beyond` is as in `predict.Prediction`;
    `sealed` is in seconds since 1970, `file` the name of the forecast.
    """

    name: str
    digest: str
    heads: tuple[int, int]
    pattern: str
    n_layers: int
    d_model: int
    n: float
    law: str
    beyond: str
    predicted: float
    interval: Interval
    state: State
    observed: float | None
    sealed: float
    file: str

    @property
    def error(self) -> float:
        """Observed minus predicted, in nats; NaN before there is a loss."""
        return math.nan if self.observed is None else self.observed - self.predicted

    @property
    def inside(self) -> bool | None:
        """Whether the loss lies in the interval; None before there is one."""
        if self.observed is None:
            return None
        return self.interval[0] <= self.observed <= self.interval[1]


@dataclass(frozen=True)
class Forecasts:
    """All forecasts of an experiment's runs: one score for each run, in the order of sealing.

    `altered` says of every file that does not count why.
    """

    scores: tuple[Score, ...] = ()
    altered: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.scores or self.altered)

    @property
    def judged(self) -> tuple[Score, ...]:
        return tuple(score for score in self.scores if score.observed is not None)

    @property
    def inside(self) -> int:
        return sum(bool(score.inside) for score in self.judged)

    @property
    def rms(self) -> float:
        """Root mean square error in nats; NaN without a finished run."""
        errors = [score.error for score in self.judged]
        return float(np.sqrt(np.mean(np.square(errors)))) if errors else math.nan

    @property
    def mean(self) -> float:
        """Mean of observed minus predicted, in nats; NaN without a finished run."""
        errors = [score.error for score in self.judged]
        return float(np.mean(errors)) if errors else math.nan

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for score in self.scores:
            row = asdict(score)
            low, high = row.pop("interval")
            names = {"predicted": "predicted_nats", "observed": "observed_nats"}
            row = {names.get(key, key): value for key, value in row.items()}
            error = {"error_nats": score.error, "inside": score.inside}
            rows.append(row | {"low_nats": low, "high_nats": high} | error)
        return plain(
            {
                "runs": rows,
                "finished": len(self.judged),
                "inside": self.inside,
                "expected_inside": LEVEL * len(self.judged),
                "rms_error_nats": self.rms,
                "mean_error_nats": self.mean,
                "altered": list(self.altered),
            }
        )


NO_FORECASTS = Forecasts()


def forecasts_of(source: Source) -> Forecasts:
    """The forecasts of the runs that a source stands for, scored: in their folder, or as they were kept."""
    if source.root is not None and source.experiment is not None:
        return score_forecasts(source.root, source.experiment.name)
    return NO_FORECASTS if source.kept is None else score_kept(source.kept)


def score_forecasts(root: Path, experiment: str) -> Forecasts:
    """The forecasts of the experiment's runs, scored. Only reads, and may be called while they are trained."""

    def outcome(run: dict[str, Any]) -> _Outcome | None:
        directory = directory_of(root, experiment, run["name"], run["digest"])
        try:
            return _Outcome(directory.result(), directory.attempts())
        except UserError:  # what is wrong with the file, and the remedy, `status` says
            return None

    return _scored(read_forecasts(root, experiment), outcome)


def score_kept(kept: Records) -> Forecasts:
    """Those of a study that is kept. A run whose result is not kept counts as not finished."""

    def outcome(run: dict[str, Any]) -> _Outcome:
        whole = kept.result(run["digest"])
        attempts = (whole.get("attempts") or []) if whole else []
        return _Outcome(whole, [each for each in attempts if "began" in each])

    return _scored(kept.forecasts, outcome)


class _Outcome(NamedTuple):
    """What is known of a run that was forecast: its result.json if there is one, and its attempts."""

    whole: dict[str, Any] | None
    attempts: list[dict[str, Any]]


def _scored(
    sealed: Sequence[Sealed], outcome: Callable[[dict[str, Any]], _Outcome | None]
) -> Forecasts:
    """`outcome` tells of a run in a forecast what came of it, None where its files are damaged."""
    first: dict[str, Score] = {}
    for each in sealed:
        for run in each.said.get("runs", ()):
            if run["digest"] not in first:
                first[run["digest"]] = _score(outcome(run), each, run)
    altered = tuple(each.altered for each in sealed if each.altered)
    return Forecasts(tuple(first.values()), altered)


def _score(found: _Outcome | None, sealed: Sealed, run: dict[str, Any]) -> Score:
    state: State = "damaged"
    observed = None
    if found is not None:
        state, observed = _observed(found, sealed.said, run["evaluation_digest"])
    return Score(
        name=run["name"],
        digest=run["digest"],
        heads=(run["n_heads"], run["n_kv_heads"]),
        pattern=run.get("pattern") or "",
        n_layers=run["n_layers"],
        d_model=run["d_model"],
        n=run["n"],
        law=run["law"],
        beyond=run["beyond"],
        predicted=run["predicted_nats"],
        interval=(run["low_nats"], run["high_nats"]),
        state=state,
        observed=observed,
        sealed=sealed.said["sealed"],
        file=sealed.path.name,
    )


def _observed(found: _Outcome, said: dict[str, Any], evaluation: str) -> tuple[State, float | None]:
    """The loss that the run came to, where that is the one which was forecast."""
    began = _began(found)
    if began is not None and not said["sealed"] < began:
        return "begun", None
    judged = evaluation_in(found.whole, evaluation)
    if found.whole is None or judged is None:
        return "waiting", None
    data = found.whole["result"].get("data", {})
    if judged.get("hash", "") != said["evaluation_hash"]:
        return "other evaluation", None
    if (data.get("corpus_hash") or data.get("store_hash", "")) != said["corpus_hash"]:
        return "other data", None
    return "scored", float(judged["loss"])


def _began(found: _Outcome) -> float | None:
    """When the first attempt at the run began; None where none did, long ago if nobody knows when."""
    if found.attempts:
        return float(found.attempts[0]["began"])
    return None if found.whole is None else -math.inf
