"""`ladder.interpolate` for arrays: the real-valued shapes that bootstrap draws need by thousands."""

from collections.abc import Sequence

import numpy as np

from gqa_scaling.costs import n_formula
from gqa_scaling.study.results import Heads


def shapes(
    n: np.ndarray, heads: Heads, head_dim: int, ladder: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """`ladder.interpolate` for an array of N at once: real-valued (L, d), inf where N is."""
    sizes = np.array(sorted((n_formula(L, d, *heads, head_dim), d / L) for L, d in ladder))
    n = np.asarray(n, float)
    finite = np.where(np.isfinite(n), n, 1.0)
    ratio = np.interp(finite, sizes[:, 0], sizes[:, 1])
    cubic, square = 8 * ratio**2, 2 * ratio * head_dim * sum(heads)
    layers = (finite / cubic) ** (1 / 3)  # above the root: Newton falls onto it monotonically
    for _ in range(60):
        value = cubic * layers**3 + square * layers**2 - finite
        step = value / (3 * cubic * layers**2 + 2 * square * layers)
        layers = layers - step
        if np.all(np.abs(step) <= 1e-14 * layers):
            break
    layers = np.where(np.isfinite(n), layers, np.inf)
    return layers, ratio * layers
