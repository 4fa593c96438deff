"""What people compare, as they write it: head configurations, and whole models."""

from collections.abc import Sequence
from dataclasses import dataclass

from gqa_scaling.baselines import bare, written_heads, written_shape
from gqa_scaling.config import UserError
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
    name, at, model = text.partition("@")
    spoken = {bare(pair(h)): h for h in heads}
    own, shape = spoken.get(bare(name)) or written_heads(name), written_shape(model)
    if own is None or bool(at) != bool(shape):
        raise UserError(f"{text!r} must be heads such as 8,1 or a whole model such as 8,1@L24d1536")
    return Side(own, shape)
