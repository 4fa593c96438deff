"""A calibrated machine as models are served on it: seconds of a step, how sure, and what they are worth.

It takes the place of a row of `hardware`, whose rates are a vendor's.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import between, require
from gqa_scaling.costs import VALUE_BYTES, Number
from gqa_scaling.study.calibration import Calibration, Judged
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads, pattern_of
from gqa_scaling.study.roofline import Roofline, Shape, decode_work, prefill_work
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity

# Beyond what was timed by this factor or more no difference is decided: on the timings of
# docs/calibration.md the ratio of two was off by twice as much there as the held-out half says.
FAR = 4.0
# Whose error it is where it is no configuration's, for which it is `pair` of its heads.
WHOLE, SECOND_WHOLE = "whole model", "second whole model"
_MIDDLE = 1.6448536269514722  # standard deviations that hold LEVEL of a Gaussian
Timed = Literal["context", "batch", "head_dim", "n"]


@dataclass(frozen=True)
class Clock:
    """What a calibration says of a machine, for weights in `dtype` and a cache in `cache`.

    `price` is in dollars an hour, of all its devices; 0 where none was named. `error` is how
    `decode` did on shapes of `held_out` models that were held out, `ranges` and `patterns` are what
    was timed.
    """

    name: str
    timings: str
    sha256: str
    price: float
    dtype: str
    cache: str
    decode: Roofline
    prefill: Roofline | None
    error: Judged
    held_out: int
    ranges: Mapping[str, Interval]
    patterns: tuple[str, ...]

    @property
    def kept(self) -> dict[str, str]:
        """What weights and cached values are kept in, by their names in `Serving`."""
        return {"weight_bytes": self.dtype, "cache_bytes": self.cache}

    @property
    def how(self) -> str:
        """Where the seconds come from and how far they may be off, in words."""
        e = self.error
        return (
            f"as {self.timings} has them timed on {self.name}: on shapes held out the error was "
            f"{e.median:.1%} in the middle and at most {e.most:.1%} for 90%"
        )

    @property
    def ratio_error(self) -> str:
        """How far the ratio of two times may be off, in words."""
        if not math.isfinite(self.error.ratio):
            return "none of the models held out were open to choice, so that no ratio of two was judged"
        return (
            f"the ratio of two at one context and batch was off by at most {self.error.ratio:.1%} in "
            f"{LEVEL:.0%} of {self.error.pairs} pairs held out"
        )

    def errors(self, whose: str, rows: int) -> np.ndarray:
        """What the logarithm of a model's seconds may be off by: 0, then a draw for each refit (rows,).

        Of two models held out, LEVEL of the ratios of their seconds were off by no more than
        `error.ratio`. So each has an error of its own, the same at every context: Gaussian, as wide as
        that makes the difference of two, and wider by what so few held-out models leave open, which
        makes that difference Student's t with one degree of freedom less than there were models.
        Without a pair that was judged, the error of the seconds themselves is taken for that of a ratio.
        """
        ratio = self.error.ratio if math.isfinite(self.error.ratio) else self.error.most
        width = math.log1p(ratio) / _MIDDLE / math.sqrt(2)
        return width * _standard(whose, rows, max(self.held_out - 1, 1))

    def stretch(
        self, context: float, batch: float, head_dim: float, sizes: Iterable[float]
    ) -> dict[Timed, float]:
        """By which factor these lie beyond what was timed: 16 is 16 times the most, 0.5 half the least.

        Only what lies beyond is named; of sizes N that which lies furthest.
        """
        asked: dict[Timed, list[float]] = {
            "context": [context],
            "batch": [batch],
            "head_dim": [head_dim],
            "n": [n for n in sizes if math.isfinite(n)],
        }
        beyond = {name: self._beyond(name, values) for name, values in asked.items()}
        return {name: factor for name, (far, factor) in beyond.items() if far}

    def _beyond(self, name: Timed, values: Iterable[float]) -> tuple[list[float], float]:
        """Those of the values that lie beyond what was timed, and by which factor the furthest does."""
        low, high = self.ranges[name]
        far = [v for v in values if not low <= v <= high]
        factors = [v / (high if v > high else low) for v in far]
        return far, max(factors, key=lambda factor: abs(math.log(factor)), default=1.0)

    def decode_seconds(self, shape: Shape, keys: Number, batch: int) -> Any:
        """Seconds of one token of each sequence, which reads `keys` tokens, T_eff."""
        work = decode_work(shape, keys, batch, self.dtype, self.cache)
        return self.decode.seconds(work, self.cache)

    def prefill_seconds(self, shape: Shape, tokens: int, keys: Number, batch: int) -> Any:
        """Seconds of prompts of `tokens` each, a token of which reads `keys` on average, Tbar."""
        require(self.prefill is not None, f"{self.timings} has no calibration of prefill")
        assert self.prefill is not None
        return self.prefill.seconds(prefill_work(shape, tokens, keys, batch), self.cache)

    def caveats(
        self,
        contexts: Sequence[int],
        batch: int,
        head_dim: int,
        heads: Iterable[Heads] = (),
        sizes: Iterable[float] = (),
    ) -> list[str]:
        """What is to be known of seconds for models of these N*, in words: how far beyond what was
        timed they lie, and how large an error refits draw."""
        asked: dict[Timed, tuple[str, list[float], Callable[[float], str]]] = {
            "context": ("contexts of {} tokens", [float(c) for c in contexts], "{:,.0f}".format),
            "batch": ("a batch of {}", [float(batch)], "{:,.0f}".format),
            "head_dim": ("heads of size {}", [float(head_dim)], "{:.0f}".format),
            "n": ("models of {} parameters", list(sizes), quantity),
        }
        out = [
            "each refit draws an error of the seconds of each configuration beside the noise of losses: "
            f"{self.ratio_error}"
        ]
        for name, (words, values, form) in asked.items():
            far, most = self._beyond(name, values)
            if far:
                ends = dict.fromkeys(form(v) for v in (min(far), max(far)))
                timed = dict.fromkeys(form(v) for v in self.ranges[name])
                out.append(
                    f"seconds for {words.format(' to '.join(ends))} lie beyond what was timed, "
                    f"{' to '.join(timed)}: {times(most)}"
                    + (", too far to decide by" if too_far(most) else "")
                )
        own = {p.label for h in heads if (p := pattern_of(h))}
        if own - set(self.patterns):
            out.append(
                "seconds of patterns are those of dense heads that read as much: none was timed"
            )
        return out


@functools.lru_cache(maxsize=256)
def _standard(whose: str, rows: int, dof: int) -> np.ndarray:
    """0, then draws (rows,): of `whose` alone its Gaussian, of all the width that a draw has.

    Fewer rows are the beginning of more, so that whoever draws for the same has the same.
    """
    width = np.sqrt(dof / np.random.default_rng(dof).chisquare(dof, rows - 1))
    own = np.random.default_rng(list(whose.encode())).standard_normal(rows - 1)
    drawn = np.r_[0.0, width * own]
    drawn.flags.writeable = False
    return drawn


def too_far(factor: float) -> bool:
    """Whether something lies so far beyond what was timed that no difference is decided there."""
    return not 1 / FAR < factor < FAR


_THINGS: dict[Timed, str] = {
    "context": "contexts",
    "batch": "batches",
    "head_dim": "head sizes",
    "n": "models",
}


def times(factor: float) -> str:
    """How far beyond what was timed, in words: 16 times the most, or 1/8 of the least."""
    value = max(factor, 1 / factor)
    number = f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"
    return f"{number} times the most" if factor > 1 else f"1/{number} of the least"


def untimed(stretch: Mapping[Timed, float]) -> str:
    """Why nothing is decided by seconds this far beyond what was timed; "" where something may be."""
    far = [
        f"{_THINGS[name]} {times(factor)}" for name, factor in stretch.items() if too_far(factor)
    ]
    return f"seconds of {', '.join(far)} that was timed" if far else ""


def clock(
    calibration: Calibration,
    price: float | None = None,
    weight_bytes: float | None = None,
    cache_bytes: float | None = None,
) -> Clock:
    """The calibrated machine at a price, for a cache of so many bytes a value.

    By default weights and cache are as the models computed. Raises UserError for bytes that were not
    timed, and a price that is none.
    """
    c = calibration
    between("price", price or 0.0, 0, 1e6, "dollars an hour")
    own = VALUE_BYTES[c.dtype]
    require(
        weight_bytes in (None, own),
        f"weight_bytes={weight_bytes} was not timed: {c.timings} has weights in {c.dtype}, {own} bytes",
    )
    timed = {VALUE_BYTES[cache]: cache for cache in c.caches}
    known = ", ".join(f"{size} ({name})" for size, name in sorted(timed.items()))
    require(
        cache_bytes is None or cache_bytes in timed,
        f"cache_bytes={cache_bytes} was not timed: {c.timings} has {known}",
    )
    usual = c.dtype if c.dtype in c.caches else c.caches[0]
    return Clock(
        name=c.name,
        timings=c.timings,
        sha256=c.sha256,
        price=price or 0.0,
        dtype=c.dtype,
        cache=usual if cache_bytes is None else timed[int(cache_bytes)],
        decode=c.decode,
        prefill=c.prefill,
        error=c.error,
        held_out=len(c.held_out),
        ranges=c.ranges,
        patterns=c.patterns,
    )
