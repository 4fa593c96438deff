"""The tables of a calibration: what a step takes, how well laws predict it, where Z chooses wrongly."""

import math
from dataclasses import dataclass

from rich.console import Group

from gqa_scaling.costs import HardwareCost
from gqa_scaling.study.calibration import Calibration, Judged, Law
from gqa_scaling.study.report.table import Column, Table, percent, shown
from gqa_scaling.study.roofline import Form, Roofline
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import count, quantity

_Z = HardwareCost()
_CONSTANTS = f"λ {_Z.weight:g}, α {_Z.memory_power:.3g}, β {_Z.compute_power:.3g}"
LAWS: dict[Law, str] = {
    "sum": "roofline, times added",
    "max": "roofline, the longer counts",
    "z": "Z, constants fitted",
    "z_default": "Z of the batch, the paper's constants",
    "z_one": "Z of a sequence, the paper's constants",
    "bytes": "bytes read alone",
    "flops": "FLOPs alone",
    "machine": "measured bandwidth and FLOP/s, no fit",
    "hardware": "the named hardware's figures, no fit",
}
_FORMS: dict[Form, str] = {
    "sum": "times added",
    "max": "of weights and their products, of cache and attention, the longer counts",
}


def calibrated(found: Calibration) -> Group:
    """The calibration for a terminal: in a sentence, in tables, and what must be known of it."""
    return shown(tables(found), found.flags, sentence(found))


def tables(found: Calibration) -> list[Table]:
    phases = [law for law in (found.decode, found.prefill) if law]
    return [
        *(roofline_table(found, law) for law in phases),
        z_table(found),
        *(judged_table(found, law) for law in phases),
        misled_table(found),
    ]


def sentence(found: Calibration) -> str:
    judged = {j.law: j for j in found.judged if j.phase == "decode"}
    own, z = found.error, judged["z_one"]
    said = (
        f"Seconds of a step on {found.name}: on {count(len(found.held_out), 'model')} held out "
        f"({own.shapes} shapes) the roofline is off by {percent(own.median)} in the middle and at most "
        f"{percent(own.most)} for {LEVEL:.0%}"
    )
    if not math.isfinite(own.regret):
        return f"{said}."
    return (
        f"{said}; choosing by it loses {percent(own.regret)} of the time of the faster of two on "
        f"average, by the paper's Z {percent(z.regret)}."
    )


@dataclass(frozen=True)
class _Term:
    """One term of a roofline as it is told."""

    name: str
    time: str
    share: str


_NAMES = {
    "weights": "reading weights",
    "linear": "products with weights",
    "step": "each step",
    "layer": "each layer",
}


def roofline_table(found: Calibration, law: Roofline) -> Table:
    peak = found.machine.flops[found.dtype]

    def told(name: str) -> _Term:
        kind, _, cache = name.partition(" ")
        words = _NAMES.get(name) or (
            f"reading the cache, {cache}" if kind == "cache" else f"attention, cache {cache}"
        )
        rate = law.rate(name)
        if not math.isfinite(rate):
            return _Term(words, "nothing", "-")
        if kind in ("step", "layer"):
            return _Term(words, f"{1e6 / rate:.3g} µs", "-")
        if kind in ("weights", "cache"):
            return _Term(words, f"{quantity(rate)}B/s", percent(rate / found.machine.bandwidth, 0))
        return _Term(words, f"{quantity(rate)}FLOP/s", percent(rate / peak, 0))

    whole = {"decode": "a step of decoding", "prefill": "prefill"}[law.phase]
    return Table(
        f"What {whole} takes on {found.name}, fitted to all timings: {_FORMS[law.form]}",
        [
            Column("", lambda term: term.name),
            Column("rate, or time", lambda term: term.time),
            Column("of the measured", lambda term: term.share),
        ],
        list(map(told, law.seconds_per)),
    )


def z_table(found: Calibration) -> Table:
    return Table(
        "Z = λ memory^α + (1 - λ) FLOPs^β of the whole batch, fitted to all timings of decoding",
        [
            Column("cache", lambda item: item[0]),
            Column("λ", lambda item: f"{item[1].weight:.4g}"),
            Column("α", lambda item: f"{item[1].memory_power:.3f}"),
            Column("β", lambda item: f"{item[1].compute_power:.3f}"),
            Column("seconds of Z = 1", lambda item: f"{item[1].scale:.3g}"),
            Column("not told", lambda item: ", ".join(item[1].at_bound) or "-"),
        ],
        list(found.z.items()),
        [f"The paper's: {_CONSTANTS}. λ depends on the units: memory in values, FLOPs of a step."],
    )


def judged_table(found: Calibration, law: Roofline) -> Table:
    phase = law.phase
    rows = [j for j in found.judged if j.phase == phase]

    def correlation(value: float) -> str:
        return f"{value:.3f}" if math.isfinite(value) else "-"

    def seconds(j: Judged) -> str:
        return f"{1e3 * j.regret_seconds:.3g}" if math.isfinite(j.regret_seconds) else "-"

    return Table(
        f"{phase}: laws fitted to {count(len(found.fitted), 'model')}, judged on {count(rows[0].shapes, 'shape')} and "
        f"{rows[0].pairs} pairs of {len(found.held_out)} others",
        [
            Column("law", lambda j: LAWS[j.law] + (" *" if j.law == law.form else "")),
            Column("error,\nmiddle", lambda j: percent(j.median)),
            Column(f"error,\n{LEVEL:.0%}", lambda j: percent(j.most)),
            Column("rank\ncorrelation", lambda j: correlation(j.rank)),
            Column("among\nchoices", lambda j: correlation(j.rank_within)),
            Column("pairs\nwrong", lambda j: percent(j.wrong)),
            Column("regret", lambda j: percent(j.regret)),
            Column("regret", seconds, "ms", spare=1),
            Column(f"ratio off,\n{LEVEL:.0%}", lambda j: percent(j.ratio), spare=2),
        ],
        rows,
        [
            "* what `frontier --cost` answers by: of both forms the one that errs less on models left "
            "out among those fitted. Choices: configurations at one context, batch and cache; pairs: two of "
            "them of which neither has less of everything (parameters, cache, attention). Regret: what choosing the faster of two by a law loses, a mean over all pairs. "
            "Laws in proportion to a value have a scale fitted for each batch and cache."
        ],
    )


def misled_table(found: Calibration) -> Table:
    title = "Where the paper's Z (of a sequence) prefers the slower of two"
    if not found.misled:
        none = "Nowhere among the models timed, beyond what the timings spread."
        return Table(title, notes=[none])
    return Table(
        title,
        [
            Column("cache", lambda m: m.cache),
            Column("batch", lambda m: str(m.batch)),
            Column("context", lambda m: f"{m.context:,}", "tokens"),
            Column("pairs\nwrong", lambda m: f"{m.wrong} of {m.pairs}"),
            Column("the worst:\nZ prefers", lambda m: m.chosen),
            Column("measured", lambda m: f"{1e3 * m.chosen_seconds:.3g}", "ms"),
            Column("faster", lambda m: m.faster),
            Column("measured", lambda m: f"{1e3 * m.faster_seconds:.3g}", "ms"),
            Column("lost", lambda m: f"{1e3 * (m.chosen_seconds - m.faster_seconds):.3g}", "ms"),
            Column("that is", lambda m: percent(m.lost, 0)),
        ],
        found.misled,
        ["All models timed; only differences larger than both timings spread."],
    )
