"""Heads and whole models as people write them, and what savings may be stated against."""

import re
from typing import NamedTuple

from gqa_scaling.fields import UserError, require

LLAMA3 = (
    "llama3"  # n_h = d / d_h query heads and 8 KV heads at every size (Chen et al. 2025, section 5)
)
_HEADS = re.compile(r"([1-9]\d{0,4}),([1-9]\d{0,4})")
_SHAPE = re.compile(r"L([1-9]\d{0,4})d([1-9]\d{0,8})")


class WholeModel(NamedTuple):
    """One model: its heads, layers and width."""

    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_model: int

    @property
    def heads(self) -> tuple[int, int]:
        return self.n_heads, self.n_kv_heads


def written_heads(text: str) -> tuple[int, int] | None:
    """(n_heads, n_kv_heads) that 8,1 or (8,1) names; None for any other text.

    Raises UserError for more KV heads than query heads.
    """
    found = _HEADS.fullmatch(bare(text))
    if not found:
        return None
    heads = int(found[1]), int(found[2])
    require(heads[1] <= heads[0], f"{text!r} has more KV heads than query heads")
    return heads


def written_shape(text: str) -> tuple[int, int] | None:
    """(layers, width) that L36d1536 names; None for any other text."""
    found = _SHAPE.fullmatch(text.strip())
    return (int(found[1]), int(found[2])) if found else None


def bare(text: str) -> str:
    """A configuration without the brackets that it is printed in: 8,1 b64 w16 for (8,1) b64 w16."""
    return re.sub(r"^\(([^()]*)\)", r"\1", text.strip()).replace(", ", ",")


def named(text: str) -> WholeModel | str:
    """The model that 24,8@L36d1536 names, or the family `llama3`; UserError for any other text."""
    if text == LLAMA3:
        return text
    name, _, model = text.partition("@")
    heads, shape = written_heads(name), written_shape(model)
    if heads is None or shape is None:
        raise UserError(
            f"baseline={text!r} must be a pair of heads such as (8, 8), or the text 24,8@L36d1536 for one "
            f"model (24 query heads, 8 KV heads, 36 layers, width 1536) or {LLAMA3} for the published family"
        )
    return WholeModel(*heads, *shape)
