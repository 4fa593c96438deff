"""A calibrated machine as models are served on it: seconds of a step, and what they are worth.

It takes the place of a row of `hardware`, whose rates are a vendor's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gqa_scaling.config import between, require
from gqa_scaling.costs import VALUE_BYTES, Number
from gqa_scaling.study.calibration import Calibration, Judged
from gqa_scaling.study.points import Interval
from gqa_scaling.study.results import Heads, pattern_of
from gqa_scaling.study.roofline import Roofline, Shape, decode_work, prefill_work
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import quantity


@dataclass(frozen=True)
class Clock:
    """What a calibration says of a machine, for weights in `dtype` and a cache in `cache`.

    `price` is in dollars an hour, of all its devices; 0 where none was named. `error` is how
    `decode` did on shapes that were held out, `ranges` and `patterns` are what was timed.
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
        """What is to be known of seconds for models of these N*, in words: what lies beyond what was
        timed, and that intervals know nothing of their error."""
        asked = {
            "context": ("contexts of {} tokens", [float(c) for c in contexts], "{:,.0f}".format),
            "batch": ("a batch of {}", [float(batch)], "{:,.0f}".format),
            "head_dim": ("heads of size {}", [float(head_dim)], "{:.0f}".format),
            "n": ("models of {} parameters", list(sizes), quantity),
        }
        out = [
            "probabilities and intervals hold the noise of losses alone; seconds have an error of their "
            f"own: {self.ratio_error}"
        ]
        for name, (words, values, form) in asked.items():
            low, high = self.ranges[name]
            far = [v for v in values if not low <= v <= high]
            if far:
                ends = dict.fromkeys(form(v) for v in (min(far), max(far)))
                timed = dict.fromkeys(form(v) for v in (low, high))
                out.append(
                    f"seconds for {words.format(' to '.join(ends))} lie beyond what was timed, "
                    f"{' to '.join(timed)}"
                )
        own = {p.label for h in heads if (p := pattern_of(h))}
        if own - set(self.patterns):
            out.append(
                "seconds of patterns are those of dense heads that read as much: none was timed"
            )
        return out


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
        ranges=c.ranges,
        patterns=c.patterns,
    )
