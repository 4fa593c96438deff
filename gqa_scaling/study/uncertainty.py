"""How sure least squares are: what each point moves, and which points are too far off."""

from typing import Any

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.90  # of every interval that is printed
REFITS = (100, 10_000)  # fewer give no interval, more narrow none and take memory
_DETERMINED = 1e-7  # least singular value of the scaled Jacobian that counts, to the largest
_STRANGE = 0.01  # how often a study without spoiled runs has a point that is called strange


def interval(draws: np.ndarray, axis: int = 0) -> Any:
    """The central 90% of bootstrap draws (percentile interval)."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, (tail, 100 - tail), axis=axis, method="inverted_cdf")
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


def influence(
    jacobian: np.ndarray, w: np.ndarray, residual: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Leverage of each point, the change of E without it (nats, linearised), and the rank.

    The rank of the Jacobian (points, parameters) says how many parameters the points with weights w
    determine. Its first column is that of E; where it is 0, E stays.
    """
    root = np.sqrt(w)[:, None] * jacobian
    norms = np.linalg.norm(root, axis=0)
    basis, strength, others = np.linalg.svd(
        root / np.where(norms > 0, norms, 1), full_matrices=False
    )
    known = strength > _DETERMINED * strength[0]
    leverage = np.clip((basis[:, known] ** 2).sum(1), 0, 1)
    if not norms[0]:
        return leverage, np.zeros(len(w)), int(known.sum())
    floor = basis[:, known] @ (others[known, 0] / strength[known]) / norms[0]
    return (
        leverage,
        -floor * np.sqrt(w) * residual / np.maximum(1 - leverage, 1e-9),
        int(known.sum()),
    )


def strangers(
    residual: np.ndarray, w: np.ndarray, leverage: np.ndarray, seeds: float, dof: int
) -> np.ndarray:
    """Which points lie too far off their curves for chance.

    Each residual is compared with the noise that the other points show (externally studentised) and
    with Student's t at 1% over all points (Bonferroni). `seeds` are the squared deviations between
    replicate seeds, `dof` the degrees of freedom of the noise with them.
    """
    if dof < 3:
        return np.zeros(len(w), bool)
    free = np.maximum(1 - leverage, 1e-9)
    own = w * residual**2 / free
    others = np.maximum((w * residual**2).sum() + seeds - own, 1e-300) / (dof - 1)
    most = stdtrit(dof - 1, 1 - _STRANGE / (2 * len(w)))
    return np.asarray((own > most**2 * others) & (free > 1e-3))
