"""What people compare, as they write it: head configurations, and whole models."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gqa_scaling.config import require
from gqa_scaling.study.results import Heads, pair


@dataclass(frozen=True)
class Side:
    """One of the two: heads alone, whose size is free, or with the (layers, width) of a model."""

    heads: Heads
    shape: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """(8,1), or (8,1)@L24d1536 for a whole model."""
        return pair(self.heads) + ("@L{}d{}".format(*self.shape) if self.shape else "")


def side(text: str, heads: Sequence[Heads] = ()) -> Side:
    """The configuration (8,1) or the model 8,1@L24d1536 that a text names.

    `heads` are those of the study, whose patterns are named as they are printed: (8,1) b64 w16. Raises
    UserError for a text that names neither.
    """
    name, at, model = text.strip().partition("@")
    bare = re.sub(r"[()]", "", name).replace(", ", ",").strip()
    plain_pair = re.fullmatch(r"([1-9]\d{0,4}),([1-9]\d{0,4})", bare)
    shape = re.fullmatch(r"L([1-9]\d{0,4})d([1-9]\d{0,8})", model)
    spoken = {re.sub(r"[()]", "", pair(h)): h for h in heads}
    require(
        (bare in spoken or bool(plain_pair)) and bool(at) == bool(shape),
        f"{text!r} must be heads such as 8,1 or a whole model such as 8,1@L24d1536",
    )
    own = spoken.get(bare)
    if own is None:
        assert plain_pair is not None
        own = int(plain_pair[1]), int(plain_pair[2])
    require(own[1] <= own[0], f"{text!r} has more KV heads than query heads")
    return Side(own, (int(shape[1]), int(shape[2])) if shape else None)
