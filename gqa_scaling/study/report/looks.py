"""How a configuration looks in every picture: colour, marker, line, and a short name.

Query heads have a hue and a marker, KV heads its shade and a line: the more of them, the darker. A
configuration looks the same in every picture and every study. Hues are Okabe and Ito's, safe for
colour-blind readers; shades differ in lightness and markers repeat what hues say, so the pictures survive
a grey printer. No plotting library is loaded here.
"""

import math
from collections.abc import Sequence
from typing import Any

from gqa_scaling.study.results import Heads, pair, pattern_of

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 3)))
HUES = (*OKABE_ITO[:6], "#9A9A9A")  # of 1, 2, 4, ... query heads; black has no shades
SHADES = (0.0, 0.22, 0.4, 0.54, 0.65, 0.73)  # of black in the hue, for 1, 2, 4, ... KV heads


def looks(heads: Sequence[Heads]) -> dict[Heads, dict[str, Any]]:
    """Colour, marker and line for each configuration.

    Where some have patterns, these are told apart: by marker and line, the colour being that of the
    heads, or, of one pair of heads, by the colour as well.
    """
    ordered = sorted(set(heads))
    several = sorted({h[:2] for h in ordered})
    if not any(map(pattern_of, ordered)):
        queries = _doublings({h[0] for h in ordered})
        values = _doublings({h[1] for h in ordered})
        return {h: _shaded(queries[h[0]], values[h[1]]) for h in ordered}
    if len(ordered) <= len(OKABE_ITO) or len(several) == 1:
        return {h: style(i, i) for i, h in enumerate(ordered)}
    kinds = sorted({h[2:] for h in ordered})
    return {h: style(several.index(h[:2]), kinds.index(h[2:])) for h in ordered}


def _doublings(numbers: set[int]) -> dict[int, int]:
    """How often 1 is doubled to get at each; in their order where two would be the same."""
    found = {n: round(math.log2(n)) for n in numbers}
    if len(set(found.values())) < len(found):
        return {n: i for i, n in enumerate(sorted(numbers))}
    return found


def _shaded(i: int, j: int) -> dict[str, Any]:
    """The i-th hue with the i-th marker, in the j-th shade with the j-th line."""
    hue, black = HUES[i % len(HUES)], SHADES[j % len(SHADES)]
    parts = (round((1 - black) * int(hue[at : at + 2], 16)) for at in (1, 3, 5))
    color = "#" + "".join(f"{part:02X}" for part in parts)
    return style(i, j) | {"color": color, "marker": MARKERS[i % len(MARKERS)]}


def light(color: str) -> float:
    """How light a colour is, 0 to 1: relative luminance (ITU-R BT.709), as WCAG has it."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
