"""How long a step takes on one machine: a law of what it reads, computes and begins, fitted to timings.

The time of a step is put together from overheads (of the step, and of each layer), bytes read and
FLOPs, each at a rate of its own. Coefficients are seconds a unit and never negative. Where reading
and computing come one after the other their times add up ("sum"); where they overlap the longer
counts ("max"), of the weights and their products, and of the cache and attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import least_squares, nnls

from gqa_scaling.config import require
from gqa_scaling.costs import SCALE_BYTES, VALUE_BYTES, Number, inference_flops, kv_cache_values
from gqa_scaling.files.timings import Phase

Form = Literal["sum", "max"]
FORMS: tuple[Form, ...] = ("sum", "max")
NOISE = 0.05  # of log seconds: timings further off a law count less and less
NOTHING = 1e-3  # a share of every timing below which a term is nothing
_DEPENDENT = 1e-3  # what is left of a term beside the others below which they cannot be told apart


@dataclass(frozen=True)
class Work:
    """What one step does, for all sequences of a batch together: numbers, or arrays of one shape.

    `weights` are bytes read of N and of the output matrix, `cache` those of keys and values; `linear`
    and `attention` are FLOPs of products with the weights, and of queries with keys and values.
    """

    layers: Number
    weights: Number
    cache: Number
    linear: Number
    attention: Number


@dataclass(frozen=True)
class Shape:
    """Models to be timed or priced: N without embeddings, `output` d V; real-valued, or arrays."""

    n: Number
    output: Number
    n_layers: Number
    n_heads: Number
    n_kv_heads: Number
    head_dim: int


def decode_work(shape: Shape, keys: Number, batch: Number, dtype: str, cache: str) -> Work:
    """Of one token of each of `batch` sequences, which read `keys` tokens, T_eff."""
    s, read = shape, shape.n + shape.output
    values = batch * kv_cache_values(keys, s.n_layers, s.head_dim, s.n_kv_heads)
    each = VALUE_BYTES[cache] + (SCALE_BYTES / s.head_dim if cache == "int8" else 0)
    attention = batch * inference_flops(0, keys, s.n_layers, s.head_dim, s.n_heads)
    return Work(s.n_layers, VALUE_BYTES[dtype] * read, each * values, 2 * batch * read, attention)


def prefill_work(shape: Shape, tokens: Number, keys: Number, batch: Number) -> Work:
    """Of prompts of `tokens` each, whose tokens read `keys` on average, Tbar: all of it is computing."""
    s = shape
    linear = 2 * batch * (tokens * s.n + s.output)
    attention = 4 * batch * tokens * keys * s.n_layers * s.head_dim * s.n_heads
    return Work(s.n_layers, 0.0, 0.0, linear, attention)


def terms(work: Work, phase: Phase, cache: str) -> dict[str, Number]:
    """What the terms of a law multiply: how many of each unit there are, by the names of the terms.

    Reading the cache and attention have rates of their own for each type of the cache.
    """
    out = {"linear": work.linear, f"attention {cache}": work.attention}
    if phase == "decode":
        out = {"weights": work.weights, f"cache {cache}": work.cache} | out
    return out | {"step": np.ones_like(work.layers, float), "layer": work.layers}


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step, from coefficients in seconds a unit: a byte, a FLOP, a layer, a step.

    `nothing` are terms that take less than a thousandth of every timing, and count as 0; `joined` are
    those that these timings cannot tell from the others, and are not there.
    """

    phase: Phase
    form: Form
    seconds_per: Mapping[str, float]
    nothing: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    def seconds(self, work: Work, cache: str) -> Any:
        """Seconds of the whole batch's step; infinite where the work is."""
        parts = {}
        for name, units in terms(work, self.phase, cache).items():
            known = name in self.seconds_per or name in self.joined
            require(known, f"{self.phase} with its cache in {cache} was not timed")
            if self.seconds_per.get(name):
                parts[name] = self.seconds_per[name] * units
        return combined(parts, self.form)

    def rate(self, term: str) -> float:
        """Units a second of a term; infinite where it takes no time."""
        value = self.seconds_per.get(term, 0.0)
        return 1 / value if value else float("inf")


_PAIRS = (("weights", "linear"), ("cache", "attention"))


def combined(parts: Mapping[str, Any], form: Form) -> Any:
    if form == "sum":
        return sum(parts.values())
    left, total = dict(parts), 0.0
    for pair in _PAIRS:
        names = [name for name in left if name.split()[0] in pair]
        for kind in {name.partition(" ")[2] for name in names}:
            own = [left.pop(name) for name in names if name.partition(" ")[2] == kind]
            total = total + (np.maximum(*own) if len(own) > 1 else own[0])
    return total + sum(left.values())


def fit_roofline(
    phase: Phase, work: Sequence[Work], caches: Sequence[str], seconds: np.ndarray, form: Form
) -> Roofline:
    """The law that errs least, in log seconds; timings far off it count less (soft L1)."""
    tables = [terms(each, phase, cache) for each, cache in zip(work, caches, strict=True)]
    names = list(dict.fromkeys(name for table in tables for name in table))
    columns = np.array([[table.get(name, 0.0) for name in names] for table in tables])
    scale = np.nanmedian(np.where(columns > 0, columns / seconds[:, None], np.nan), axis=0)
    columns = columns / scale / seconds[:, None]  # as shares of the time, near 1 where it is all
    kept = _independent(columns, names)

    def shares(x: np.ndarray) -> np.ndarray:
        return combined({names[k]: columns[:, k] * v for k, v in zip(kept, x, strict=True)}, form)

    start = nnls(columns[:, kept], np.ones(len(seconds)))[0]
    found = least_squares(
        lambda x: np.log(shares(x)),
        np.maximum(start, 0.01),
        bounds=(0, np.inf),
        loss="soft_l1",
        f_scale=NOISE,
    )
    x = np.where((columns[:, kept] * found.x).max(0) < NOTHING, 0.0, found.x)
    return Roofline(
        phase,
        form,
        {names[k]: float(v / scale[k]) for k, v in zip(kept, x, strict=True)},
        tuple(names[k] for k, v in zip(kept, x, strict=True) if not v),
        tuple(name for k, name in enumerate(names) if k not in kept),
    )


def _independent(columns: np.ndarray, names: Sequence[str]) -> list[int]:
    """The columns that can be told from those before them, overheads first."""
    kept: list[int] = []
    order = ("weights", "cache", "step", "layer", "linear", "attention")
    for k in sorted(range(len(names)), key=lambda k: order.index(names[k].split()[0])):
        own = columns[:, k] / np.linalg.norm(columns[:, k])
        if kept:
            own = own - columns[:, kept] @ np.linalg.lstsq(columns[:, kept], own)[0]
        if np.linalg.norm(own) > _DEPENDENT:
            kept.append(k)
    return sorted(kept)
