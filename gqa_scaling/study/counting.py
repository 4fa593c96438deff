"""How a file of runs counts N, and whether that agrees with the shapes in it.

Rows are dictionaries of one run each, with `n_layers` 0 where the shape is unknown.
"""

from collections.abc import Sequence
from typing import Any

from gqa_scaling.config import require
from gqa_scaling.costs import n_formula
from gqa_scaling.study.results import Count, pair

# The columns that make a shape, in the order of `n_formula`.
_SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim")


def _shape(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row[name] for name in _SHAPE)


def formula(row: dict[str, Any]) -> float:
    return n_formula(*_shape(row))


def count_of(rows: Sequence[dict[str, Any]], source: str) -> Count:
    """How the file counts N: as its n_count column says, else told from the shapes."""
    said = sorted({row["n_count"] for row in rows})
    require(len(said) == 1, f"{source}: the runs mix counts of N ({', '.join(said)}); use one")
    if said[0]:
        return said[0]
    plain = all(row["n_layers"] and _follows_formula(row) for row in rows)
    return "n_formula" if plain else "n_given"


def require_counts(rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
    """Raise UserError where n_params contradicts the shape in the same line.

    N = 8 L d^2 + 2 L d d_h (n_h + n_kv) holds for an FFN of 8d/3; other sizes, norms and rounding are
    as good. So a count is believed where it is that formula's, within a quarter, or exactly that of
    a model built here with any d_ff, or where another model of the file is as far from the formula.
    Always N is more than the attention's own parameters, and at most what an FFN of 16 d makes. Where
    column n_count says how N is counted, that alone is checked: n_given may be any count above the
    attention's.
    """
    shaped = [(row, where) for row, where in zip(rows, places, strict=True) if row["n_layers"]]
    ratios: dict[tuple[int, ...], float] = {}
    for row, _ in shaped:
        ratios.setdefault(_shape(row), row["n_params"] / formula(row))
    for row, where in shaped:
        others = [1.0, *(ratio for shape, ratio in ratios.items() if shape != _shape(row))]
        require(
            _is_believed(row, others),
            f"{where}: n_params={row['n_params']:,.0f} contradicts n_layers={row['n_layers']}, "
            f"d_model={row['d_model']} and {pair((row['n_heads'], row['n_kv_heads']))} heads of size "
            f"{row['head_dim']}, which make {formula(row):,.0f} parameters without embeddings: correct "
            "one of them, leave n_params out, or give column n_count=n_given where N is counted "
            "otherwise",
        )


def _is_believed(row: dict[str, Any], ratios: Sequence[float]) -> bool:
    """Whether N may be that of the row's shape; `ratios` are those of N to the formula elsewhere."""
    if row["n_count"] == "n_formula":
        return _follows_formula(row)
    if row["n_count"] == "n_exact":
        return _can_be_built(row)
    n, ratio = row["n_params"], row["n_params"] / formula(row)
    cubic = row["n_layers"] * row["d_model"] ** 2
    attention = formula(row) - 8 * cubic
    if row["n_count"] == "n_given" or n <= attention:
        return n > attention
    alike = any(max(ratio / r, r / ratio) < 1.25 for r in ratios)
    return n <= attention + 3 * 16 * cubic and (alike or _can_be_built(row))


def _follows_formula(row: dict[str, Any]) -> bool:
    return abs(row["n_params"] / formula(row) - 1) < 1e-3


def _can_be_built(row: dict[str, Any]) -> bool:
    """Whether a model of this shape, with some d_ff, with or without QK norms, has exactly N."""
    layers, d = row["n_layers"], row["d_model"]
    rest = row["n_params"] - (formula(row) - 8 * layers * d**2) - (2 * layers + 1) * d
    return any(
        left > 0 and left % (3 * layers * d) == 0
        for left in (rest, rest - 2 * layers * row["head_dim"])
    )
