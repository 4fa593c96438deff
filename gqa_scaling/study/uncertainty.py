"""How sure least squares are: what each point moves, and which points are too far off."""

from typing import Any

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.90  # of every interval that is printed
REFITS = (100, 10_000)  # fewer give no interval, more narrow none and take memory
_DETERMINED = 1e-7  # least singular value of the scaled Jacobian that counts, to the largest
_STRANGE = 0.01  # how often a study without spoiled runs has a point that is called strange


def interval(draws: np.ndarray) -> Any:
    """The central 90% of bootstrap draws (percentile interval)."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, (tail, 100 - tail), axis=0, method="inverted_cdf")
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


def strange(
    residual: np.ndarray, w: np.ndarray, leverage: np.ndarray, seeds: float, dof: int
) -> int | None:
    """The point that lies the furthest off its curve, if that is too far for chance; else None.

    Each residual is compared with the noise that the other points show (externally studentised) and
    the largest with Student's t at 1% over all points (Bonferroni). One point alone is named, as a
    curve that follows it leaves its neighbours off. `seeds` are the squared deviations between
    replicate seeds, `dof` the degrees of freedom of the noise with them.
    """
    free = np.maximum(1 - leverage, 1e-9)
    own = np.where(free > 1e-3, w * residual**2 / free, 0.0)
    i = int(np.argmax(own))
    others = (w * residual**2).sum() + seeds - own[i]
    if dof < 3 or own[i] <= 1e-20 * (w * residual**2).sum() or others < 0:
        return None
    most = stdtrit(dof - 1, 1 - _STRANGE / (2 * len(w)))
    return i if own[i] * (dof - 1) > most**2 * others else None
