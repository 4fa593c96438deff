"""Training curves: the losses that a run logged as it went, thinned."""

import json
import math

import numpy as np

from gqa_scaling.files.runs import RunDirectory

LOSS = "learning/loss"
MOST_PLACES = 100

Curve = tuple[tuple[float, ...], tuple[float, ...]]
"""The training tokens seen, and the training loss there in nats; each a mean of the steps logged since the
place before. Places are even in the logarithm of the step."""


def training_curve(directory: RunDirectory, batch_tokens: int) -> Curve:
    """The training curve of one run; empty where nothing was logged.

    Raises UserError for a damaged line, naming it; a last one that a kill cut short is left out.
    """
    if not directory.metrics_file.exists():
        return (), ()
    logged = _logged(directory)
    if not logged:
        return (), ()
    edges = np.geomspace(1, len(logged) + 1, MOST_PLACES + 1)
    places = np.unique(edges.round().astype(int)) - 1
    columns = np.array(logged, float).T
    steps, losses = (np.add.reduceat(each, places[:-1]) / np.diff(places) for each in columns)
    return tuple((steps * batch_tokens).tolist()), tuple(losses.tolist())


def _logged(directory: RunDirectory) -> list[tuple[int, float]]:
    """The steps that have a finite loss, and their losses.

    What lines should be is looked at where they are not (`RunDirectory.metrics`): reading thousands of
    runs takes half the time so.
    """
    try:
        lines = [json.loads(line) for line in directory.metrics_file.read_bytes().splitlines()]
        pairs = [(line["step"], line[LOSS]) for line in lines if LOSS in line]
        return [(step, loss) for step, loss in pairs if math.isfinite(loss)]
    except (ValueError, KeyError, TypeError):
        # This raises, and names the damaged line, but for a last one that was cut short.
        lines = [line for line in directory.metrics() if LOSS in line]
        return [(line["step"], line[LOSS]) for line in lines if math.isfinite(line[LOSS])]
