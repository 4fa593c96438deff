"""What savings may be stated against, as it is written: heads, a whole model, or a published family."""

import re
from typing import NamedTuple

from gqa_scaling.fields import require

LLAMA3 = (
    "llama3"  # n_h = d / d_h query heads and 8 KV heads at every size (Chen et al. 2025, section 5)
)
_MODEL = re.compile(r"(\d{1,5}),(\d{1,5})@L(\d{1,5})d(\d{1,7})")


class WholeModel(NamedTuple):
    """One model: its heads, layers and width."""

    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_model: int

    @property
    def heads(self) -> tuple[int, int]:
        return self.n_heads, self.n_kv_heads


def named(text: str) -> WholeModel | str:
    """The model that 24,8@L36d1536 names, or the family `llama3`; UserError for any other text."""
    if text == LLAMA3:
        return text
    found = _MODEL.fullmatch(text)
    sizes = tuple(map(int, found.groups())) if found else ()
    require(
        bool(sizes) and min(sizes) > 0,
        f"baseline={text!r} must be a pair of heads such as (8, 8), or the text 24,8@L36d1536 for one model "
        f"(24 query heads, 8 KV heads, 36 layers, width 1536) or {LLAMA3} for the published family",
    )
    return WholeModel(*sizes)
