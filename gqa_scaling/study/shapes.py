"""Real-valued shapes for arrays, which bootstrap draws need by thousands, and what is read there."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gqa_scaling.context_sharding import ContextSharding, keys_by_depth
from gqa_scaling.costs import n_formula
from gqa_scaling.study.results import Heads, pattern_of


def shapes(
    n: np.ndarray, heads: Heads, head_dim: int, ladder: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """`ladder.interpolate` for an array of N at once: real-valued (L, d), inf where N is."""
    sizes = np.array(sorted((n_formula(L, d, *heads[:2], head_dim), d / L) for L, d in ladder))
    n = np.asarray(n, float)
    finite = np.where(np.isfinite(n), n, 1.0)
    ratio = np.interp(finite, sizes[:, 0], sizes[:, 1])
    cubic, square = 8 * ratio**2, 2 * ratio * head_dim * sum(heads[:2])
    layers = (finite / cubic) ** (1 / 3)  # above the root: Newton falls onto it monotonically
    for _ in range(60):
        value = cubic * layers**3 + square * layers**2 - finite
        step = value / (3 * cubic * layers**2 + 2 * square * layers)
        layers = layers - step
        if np.all(np.abs(step) <= 1e-14 * layers):
            break
    layers = np.where(np.isfinite(n), layers, np.inf)
    return layers, ratio * layers


def effective_context(heads: Heads, layers: np.ndarray, context: int) -> Any:
    """T_eff of a configuration in models of real-valued L: the context itself where it is dense.

    Keys over all layers, L T_eff, are those of `context_sharding.effective_context` at whole L and
    straight between them, so that costs rise with L as they do for dense models.
    """
    return context if pattern_of(heads) is None else _per_layer(heads, layers, context, False)


def training_keys(heads: Heads, layers: np.ndarray, context: int) -> Any:
    """Tbar (`costs.training_keys`) in models of real-valued L, between whole L as above."""
    if pattern_of(heads) is None:
        return context / 2
    return _per_layer(heads, layers, context, True) - 1 / 2


def _per_layer(heads: Heads, layers: np.ndarray, context: int, training: bool) -> np.ndarray:
    finite = np.where(np.isfinite(layers), layers, 1.0)
    most = 2 ** int(np.ceil(np.log2(finite.max() + 1)))  # few tables serve all calls
    table = _keys(pattern_of(heads), heads[1], context, most, training)
    return np.interp(finite, np.arange(most + 1), table) / finite


@functools.lru_cache(maxsize=256)
def _keys(
    pattern: ContextSharding, n_kv_heads: int, context: int, most: int, training: bool
) -> np.ndarray:
    """`keys_by_depth` as an array.

    It is as long as the deepest model asked for. Callers bound that by `Scale.reach`, whose models
    have at most `config.MOST_LAYERS` layers, so that all tables kept here take at most 32 MiB.
    """
    return np.array(keys_by_depth(pattern, n_kv_heads, context, most, training))
