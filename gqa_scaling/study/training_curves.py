"""Training curves: what a run logged of its losses as it went."""

import json
import math

import numpy as np

from gqa_scaling.files.runs import RunDirectory

LOSS, GAIN = "learning/loss", "evaluation/gained_by_rereading"
MOST_PLACES = 100

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""The training tokens seen at each place, and what was measured there in nats per token."""


def training_curve(directory: RunDirectory, batch_tokens: int) -> Curve:
    """The training loss of one run; empty where nothing was logged.

    Thinned: each is a mean of the steps logged since the place before, and places are even in the
    logarithm of the step. Raises UserError for a damaged line, naming it; a last one that a kill cut short is left out.
    """
    logged = _logged(directory, LOSS)
    if not logged:
        return (), ()
    edges = np.geomspace(1, len(logged) + 1, MOST_PLACES + 1)
    places = np.unique(edges.round().astype(int)) - 1
    columns = np.array(logged, float).T
    steps, losses = (np.add.reduceat(each, places[:-1]) / np.diff(places) for each in columns)
    return tuple((steps * batch_tokens).tolist()), tuple(losses.tolist())


def rereading_curve(directory: RunDirectory, batch_tokens: int) -> Curve:
    """What reading a text again gained one run, each time that it was measured before the end of training.

    Raises UserError as `training_curve` does.
    """
    logged = _logged(directory, GAIN)
    return tuple(float(step * batch_tokens) for step, _ in logged), tuple(
        gain for _, gain in logged
    )


def _logged(directory: RunDirectory, name: str) -> list[tuple[int, float]]:
    """The steps for which this was logged and is finite, with it; none where nothing was logged.

    What lines should be is looked at where they are not (`RunDirectory.metrics`): reading thousands of
    runs takes half the time so.
    """
    if not directory.metrics_file.exists():
        return []
    try:
        lines = [json.loads(line) for line in directory.metrics_file.read_bytes().splitlines()]
        pairs = [(line["step"], line[name]) for line in lines if name in line]
        return [(step, value) for step, value in pairs if math.isfinite(value)]
    except (ValueError, KeyError, TypeError):
        # This raises, and names the damaged line, but for a last one that was cut short.
        lines = [line for line in directory.metrics() if name in line]
        return [(line["step"], line[name]) for line in lines if math.isfinite(line[name])]
