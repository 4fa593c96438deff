"""The loss laws as plain functions with their inverses; numbers or NumPy arrays alike.

Losses are mean next-token cross-entropies in nats. `n` counts parameters without embeddings.
"""

from typing import Any

import numpy as np

Number = Any  # a Python number or a NumPy array of them


def power(n: Number, a: Number, b: Number, floor: Number) -> Number:
    """L(N) = (a/N)^b + E, the curve of one head configuration (Chen et al. 2025, section 4.1)."""
    return (a / n) ** b + floor


def power_inverse(loss: Number, a: Number, b: Number, floor: Number) -> Number:
    """N*(L) = a / (L - E)^(1/b); infinite where the loss is not above the floor or b <= 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = a / np.maximum(np.subtract(loss, floor), 0.0) ** (1 / np.asarray(b, float))
    return np.where((np.subtract(loss, floor) > 0) & (np.asarray(b) > 0), n, np.inf)


def centred(n: Number, u: Number, b: Number, floor: Number, centre: Number) -> Number:
    """The same curve as E + exp(u - b (ln N - centre)): u is the log excess loss mid-data.

    u and b are nearly uncorrelated when `centre` is the mean of ln N, so this form is fitted.
    """
    with np.errstate(over="ignore"):
        return floor + np.exp(u - b * (np.log(n) - centre))


def centred_inverse(loss: Number, u: Number, b: Number, floor: Number, centre: Number) -> Number:
    """The N at which `centred` equals `loss`; infinite where it never does, or b <= 0."""
    excess = np.subtract(loss, floor)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        n = np.exp(centre + (u - np.log(np.maximum(excess, 0.0))) / np.asarray(b, float))
    return np.where((excess > 0) & (np.asarray(b) > 0), n, np.inf)


def scale(u: Number, b: Number, centre: Number) -> Number:
    """a of (a/N)^b, in parameters, from the centred form; overflows to inf for a flat curve."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        return np.exp(centre + np.divide(u, b))


def heads(n_heads: Number, a: Number, b: Number, c: Number) -> Number:
    """L(n_h) = a n_h^b + c at fixed N, b < 0 (Chen et al. 2025, section 5.4)."""
    return a * np.asarray(n_heads, float) ** b + c
