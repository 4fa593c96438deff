"""Training curves: what a run logged of its losses as it went."""

import json
import math
from typing import Any

import numpy as np

from gqa_scaling.fields import JsonShape
from gqa_scaling.files.runs import RunDirectory, read_json

LOSS, GAIN = "learning/loss", "evaluation/gained_by_rereading"
MOST_PLACES = 100

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""The training tokens seen at each place, and what was measured there in nats per token."""

CURVES = {"training_curve": "losses", "rereading_curve": "gains"}  # beside the tokens of each
CURVE_SHAPES: JsonShape = {
    f"{name}?": {"tokens": [float], of: [float]} for name, of in CURVES.items()
}


def training_curves(directory: RunDirectory, batch_tokens: int) -> tuple[Curve, Curve]:
    """The training loss of one run, and what reading a text again gained it each time that it was
    measured before the end of training; empty where nothing was logged.

    Losses are thinned: each is a mean of the steps logged since the place before, and places are even
    in the logarithm of the step. Raises UserError for a damaged line, naming it; a last one that a kill
    cut short is left out. Of a run that was put back from a kept study they are those that were kept.
    """
    if directory.is_restored():
        told = read_json(
            directory.curves_file, CURVE_SHAPES, "remove it: the run then has no curves"
        )
        return curves_told(told)
    losses, gains = _logged(directory)
    return _thinned(losses, batch_tokens), (
        tuple(float(step * batch_tokens) for step, _ in gains),
        tuple(gain for _, gain in gains),
    )


def tell_curves(*curves: Curve) -> dict[str, dict[str, list[float]]]:
    """Those of CURVES as they are kept: tokens are whole, values have four digits."""
    return {
        name: {"tokens": [round(n) for n in tokens], of: [round(value, 4) for value in values]}
        for (name, of), (tokens, values) in zip(CURVES.items(), curves, strict=True)
    }


def curves_told(told: dict[str, Any]) -> tuple[Curve, Curve]:
    """Those of CURVES as `tell_curves` had them; empty where one was not kept."""

    def curve(name: str) -> Curve:
        kept = told.get(name, {"tokens": [], CURVES[name]: []})
        return tuple(kept["tokens"]), tuple(kept[CURVES[name]])

    return curve("training_curve"), curve("rereading_curve")


def _thinned(logged: list[tuple[int, float]], batch_tokens: int) -> Curve:
    if not logged:
        return (), ()
    edges = np.geomspace(1, len(logged) + 1, MOST_PLACES + 1)
    places = np.unique(edges.round().astype(int)) - 1
    columns = np.array(logged, float).T
    steps, losses = (np.add.reduceat(each, places[:-1]) / np.diff(places) for each in columns)
    return tuple((steps * batch_tokens).tolist()), tuple(losses.tolist())


def _logged(directory: RunDirectory) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """The steps with a finite LOSS, and those with a finite GAIN, with it; none where nothing was logged.

    What lines should be is looked at where they are not (`RunDirectory.metrics`): reading thousands of
    runs takes half the time so.
    """
    if not directory.metrics_file.exists():
        return [], []
    try:
        lines = [json.loads(line) for line in directory.metrics_file.read_bytes().splitlines()]
        return _finite(lines, LOSS), _finite(lines, GAIN)
    except (ValueError, KeyError, TypeError):
        # This raises, and names the damaged line, but for a last one that was cut short.
        lines = directory.metrics()
        return _finite(lines, LOSS), _finite(lines, GAIN)


def _finite(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    pairs = [(line["step"], line[name]) for line in lines if name in line]
    return [(step, value) for step, value in pairs if math.isfinite(value)]
