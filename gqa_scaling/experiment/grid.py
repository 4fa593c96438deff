"""Grids of runs: the head configurations to try, and the rule that no run is declared twice."""

import itertools
from collections.abc import Iterable

from gqa_scaling.config import RunConfig, require


def head_candidates(max_heads: int) -> list[tuple[int, int]]:
    """(n_h, n_kv) over powers of two up to `max_heads`, n_kv <= n_h: 21 of them for 32.

    Step 1 of the search of Chen et al. 2025, section 4.1.
    """
    require(
        max_heads > 0 and max_heads & (max_heads - 1) == 0,
        f"max_heads={max_heads} must be a power of two",
    )
    powers = [2**k for k in range(max_heads.bit_length())]
    return [(h, kv) for h, kv in itertools.product(powers, powers) if kv <= h]


def unique(runs: Iterable[RunConfig]) -> list[RunConfig]:
    """The runs as a list, refused when two share a name or would train the same model."""
    runs = list(runs)
    for field, what in (("name", "name"), ("digest", "definition")):
        seen: dict[str, RunConfig] = {}
        for run in runs:
            other = seen.setdefault(getattr(run, field), run)
            require(other is run, f"runs {other.name} and {run.name} share one {what}")
    return runs
