"""Forecasts of runs, sealed before these begin. What comes of them: `scores`."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gqa_scaling
from gqa_scaling.config import RunConfig
from gqa_scaling.fields import digest_of
from gqa_scaling.files.forecasts import (
    Sealed,
    forecast_digests,
    has_begun,
    read_forecasts,
    require_not_begun,
    seal,
)
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fitted import plain
from gqa_scaling.study.predict import Prediction, predict
from gqa_scaling.study.source import Source
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.versions import commit


def to_seal(
    root: Path, experiment: str, runs: Sequence[RunConfig], again: bool = True
) -> list[RunConfig]:
    """Those of the runs that have not begun; without `again`, of these the ones with no forecast."""
    known = set() if again else forecast_digests(read_forecasts(root, experiment))
    return [
        run
        for run in runs
        if run.digest not in known and not has_begun(root, experiment, run.name, run.digest)
    ]


def seal_forecast(
    source: Source, found: Estimates, experiment: str, runs: Sequence[RunConfig]
) -> tuple[Sealed, tuple[Prediction, ...]]:
    """Predict these runs of an experiment from what was estimated of the source, and seal that.

    Raises UserError where a run has begun, or the source says nothing of it; nothing is written then.
    """
    assert source.root is not None
    assert source.experiment is not None
    require_not_begun(source.root, experiment, {run.name: run.digest for run in runs})
    results, fitted = source.results, found.fit
    predictions = predict(found, results, source.grid, runs)
    finished = {run.name: run.digest for run in source.grid if run.name in results.name}
    learned = [
        {"name": name, "digest": finished[name], "loss_nats": loss}
        for name, loss in zip(results.name.tolist(), results.loss.tolist(), strict=True)
    ]
    said = {
        "predicted_from": {
            "experiment": source.experiment.name,
            "overrides": list(source.overrides),
            "digest": digest_of(learned),
            "runs": learned,
        },
        "evaluation_hash": str(results.evaluation[0]),
        "corpus_hash": str(results.corpus[0]),
        "tokenizer_hash": str(results.tokenizer[0]),
        "law": fitted.law,
        "intervals": fitted.how,
        "seed": fitted.seed,
        "level": LEVEL,
        "made_by": made_by(),
        "runs": [prediction.to_dict() for prediction in predictions],
    }
    return seal(source.root, experiment, plain(said)), predictions


def made_by() -> dict[str, Any]:
    """The code that makes a forecast: version, SHA-256 of its source, and commit in a checkout."""
    package = Path(gqa_scaling.__file__).parent
    whole = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        whole.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    version = gqa_scaling.__version__
    return {"version": version, "source_sha256": whole.hexdigest(), "commit": commit()}
