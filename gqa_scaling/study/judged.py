"""What runs were judged by beside their loss: other contexts, and needles by length and depth."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gqa_scaling.config import RunConfig
from gqa_scaling.study.results import Heads, Results


@dataclass(frozen=True)
class Judged:
    """Of one run: bits per byte, the loss in nats of the same targets at other context lengths, and
    the share of needles found, for each length one value for each of the `depths` (0 the beginning
    of the text, 1 its end); and what reading a text for the second time gains, in nats per token.
    Empty where it was not asked for, NaN where it is not known."""

    bits_per_byte: float
    losses: dict[int, float]
    depths: tuple[float, ...]
    accuracy: dict[int, tuple[float, ...]]
    form: str = ""
    gained_by_rereading: float = math.nan

    @property
    def further(self) -> bool:
        """Whether there is more than a loss and its bits."""
        return bool(self.losses or self.accuracy)

    def found(self, length: int) -> float:
        """The share of needles found in texts of a length, a mean over depths; NaN without one."""
        return float(np.mean(self.accuracy[length])) if length in self.accuracy else float("nan")


@dataclass(frozen=True)
class Row:
    """A run with what it was judged by."""

    name: str
    heads: Heads
    context_length: int
    loss: float
    judged: Judged


def judged_of(evaluation: dict[str, Any]) -> Judged:
    """What an evaluation of a result.json holds; its shape was checked when it was read."""
    needles = evaluation.get("needles") or {"depths": (), "accuracy": {}, "form": ""}
    first = evaluation.get("loss_of_first_reading", math.nan)
    second = evaluation.get("loss_of_second_reading", math.nan)
    return Judged(
        bits_per_byte=float(evaluation.get("bits_per_byte") or "nan"),
        losses={int(k): v for k, v in (evaluation.get("loss_by_context") or {}).items()},
        depths=tuple(needles["depths"]),
        accuracy={int(k): tuple(v) for k, v in needles["accuracy"].items()},
        form=needles["form"],
        gained_by_rereading=first - second,
    )


def judged_row(run: RunConfig, evaluation: dict[str, Any]) -> Row:
    heads = run.model.n_heads, run.model.n_kv_heads
    judged = judged_of(evaluation)
    return Row(run.name, heads, run.context_length, evaluation["loss"], judged)


def judged_rows(results: Results) -> list[Row]:
    """The runs that were judged by more than a loss, in their order."""
    r, out = results, []
    for name, heads, context, loss in zip(r.name, r.heads, r.context_length, r.loss, strict=True):
        judged = r.judged.get(name)
        if judged and judged.further:
            out.append(Row(str(name), heads, int(context), float(loss), judged))
    return out


def to_dict(results: Results) -> list[dict[str, Any]]:
    return [
        {"name": row.name, "context_length": row.context_length, "loss": row.loss}
        | asdict(row.judged)
        for row in judged_rows(results)
    ]
