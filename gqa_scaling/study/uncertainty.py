"""How sure least squares are: what each point moves, which runs are trusted, and losses redrawn."""

from typing import Any, get_args

import numpy as np

from gqa_scaling.study.choices import Bootstrap

BOOTSTRAPS: tuple[Bootstrap, ...] = get_args(Bootstrap)
LEVEL = 0.90  # of every interval that is printed
REFITS = (100, 10_000)  # fewer give no interval, more narrow none and take memory
_DETERMINED = 1e-7  # least singular value of the scaled Jacobian that counts, to the largest
# Tukey's biweight: its constant, the standard deviations that residuals are cut at for the noise,
# and the variance that a normal distribution keeps when cut there.
_BISQUARE, _CLIP, _CLIPPED_VARIANCE = 4.685, 2.0, 0.9205


def interval(draws: np.ndarray, axis: int = 0) -> Any:
    """The central 90% of bootstrap draws (percentile interval)."""
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(draws, (tail, 100 - tail), axis=axis, method="inverted_cdf")
    return (float(low), float(high)) if np.ndim(low) == 0 else (low, high)


# ------------------------------------------------------------------- what each point moves


def _scaled(jacobian: np.ndarray, w: np.ndarray, ridge: np.ndarray) -> tuple:
    """The weighted Jacobian and the ridge's rows below it, columns of length 1; their lengths."""
    root = np.vstack([np.sqrt(w)[:, None] * jacobian, np.diag(np.sqrt(ridge))[ridge > 0]])
    norms = np.linalg.norm(root, axis=0)
    return root / np.where(norms > 0, norms, 1), norms


def rank(jacobian: np.ndarray, w: np.ndarray, ridge: np.ndarray) -> int:
    """How many parameters the points with weights w determine."""
    whole, _ = _scaled(jacobian, w, ridge)
    return int(np.linalg.matrix_rank(whole, tol=_DETERMINED * np.linalg.norm(whole, 2)))


def influence(
    jacobian: np.ndarray, w: np.ndarray, residual: np.ndarray, ridge: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leverage of each point, and the change of E without it (nats, linearised).

    The first column of the Jacobian (points, parameters) is that of E; where it is 0, E stays.
    """
    n = len(w)
    whole, norms = _scaled(jacobian, w, ridge)
    inverse = np.linalg.pinv(whole)[:, :n]
    leverage = np.clip((whole[:n] * inverse.T).sum(1), 0, 1)
    change = -inverse[0] * np.sqrt(w) * residual / np.maximum(1 - leverage, 1e-9)
    return leverage, change / norms[0] if norms[0] > 0 else np.zeros(n)


# --------------------------------------------------------------------- which runs are trusted


def _robust_deviation(residual: np.ndarray, w: np.ndarray, parameters: int) -> np.ndarray:
    """Standard deviation of one run from the median absolute residual, last axis kept."""
    n = residual.shape[-1]
    middle = np.median(np.abs(np.sqrt(w) * residual), axis=-1, keepdims=True)
    return np.maximum(1.4826 * middle * np.sqrt(n / (n - parameters)), 1e-12)


def trust(residual: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Tukey's weights: 1 on the curve, near 0 for a run so far off that it must be spoiled."""
    distance = np.abs(np.sqrt(w) * residual) / (_BISQUARE * _robust_deviation(residual, w, 0))
    return np.maximum(1 - np.minimum(distance, 1) ** 2, 1e-4) ** 2


def clipped(residual: np.ndarray, w: np.ndarray, parameters: int) -> np.ndarray:
    """Residuals with those of spoiled runs cut back, their variance kept for good ones."""
    most = _CLIP * _robust_deviation(residual, w, parameters) / np.sqrt(w)
    return np.clip(residual, -most, most) / np.sqrt(_CLIPPED_VARIANCE)


# ------------------------------------------------------------------------------- losses redrawn


def residual_noise(
    residual: np.ndarray,
    w: np.ndarray,
    leverage: np.ndarray,
    sigma: float,
    dof: float,
    refits: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Fresh noise for every refit: residuals redrawn, scaled to `sigma`, itself uncertain.

    With few runs sigma may be well off; drawing it from its scaled inverse chi-squared makes the
    intervals as wide as Student's.
    """
    pool = np.sqrt(w) * residual / np.sqrt(np.maximum(1 - leverage, 1e-3))
    pool = pool - pool.mean()
    pool = pool / max(pool.std(), 1e-300)
    sigmas = sigma * np.sqrt(dof / rng.chisquare(dof, (refits, 1)))
    return sigmas * rng.choice(pool, (refits, len(pool))) / np.sqrt(w)


def pair_counts(curve: np.ndarray, refits: int, rng: np.random.Generator) -> np.ndarray:
    """How often each point is drawn, curve by curve; a curve keeps at least two of its sizes."""
    counts = np.zeros((refits, len(curve)))
    for k in range(curve.max() + 1):
        index = np.flatnonzero(curve == k)
        todo = np.arange(refits)
        while len(todo):
            drawn = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), len(todo))
            counts[np.ix_(todo, index)] = drawn
            todo = todo[(drawn > 0).sum(1) < 2]
    return counts
