"""How a configuration looks in every picture: colour, marker, line, and a short name.

Colours are Okabe and Ito's, safe for colour-blind readers; markers and line styles repeat what
they say, so the pictures survive a grey printer. No plotting library is loaded here.
"""

from collections.abc import Sequence
from typing import Any

from gqa_scaling.study.results import Heads, pair, pattern_of

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))


def looks(heads: Sequence[Heads]) -> dict[Heads, dict[str, Any]]:
    """Colour, marker and line for each configuration.

    Up to seven have a colour each; more take their colour from n_heads and the rest from n_kv, or,
    where some have patterns, their colour from the heads and the rest from the pattern.
    """
    ordered = sorted(set(heads))
    several = sorted({h[:2] for h in ordered})
    sparse = any(map(pattern_of, ordered)) and len(several) > 1
    if len(ordered) <= len(OKABE_ITO) or (any(map(pattern_of, ordered)) and not sparse):
        keys = {h: (i, i) for i, h in enumerate(ordered)}
    elif sparse:
        kinds = sorted({h[2:] for h in ordered})
        keys = {h: (several.index(h[:2]), kinds.index(h[2:])) for h in ordered}
    else:
        queries, values = (sorted({h[i] for h in ordered}) for i in (0, 1))
        keys = {h: (queries.index(h[0]), values.index(h[1])) for h in ordered}
    return {h: style(i, j) for h, (i, j) in keys.items()}


def style(i: int, j: int) -> dict[str, Any]:
    """The i-th colour with the j-th marker and line."""
    return {
        "color": OKABE_ITO[i % len(OKABE_ITO)],
        "marker": MARKERS[j % len(MARKERS)],
        "linestyle": LINES[j % len(LINES)],
    }


def short_names(heads: Sequence[Heads]) -> tuple[dict[Heads, str], str]:
    """Names short enough to write into a picture, and the line that explains them."""
    patterns = sorted({pattern for h in heads if (pattern := pattern_of(h))})
    letters = {p: chr(ord("a") + i % 26) * (1 + i // 26) for i, p in enumerate(patterns)}
    short = {h: pair(h[:2]) + (letters[p] if (p := pattern_of(h)) else "") for h in heads}
    return short, "; ".join(f"{letter}: {p.label}" for p, letter in letters.items())
