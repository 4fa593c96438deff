"""What the page carries: the fitted curves, their refits and what costs are made of, for `numerics.js`.

Draws are kept as what each refit adds to the point estimate, in float32: that is exact to about 1e-8
of an excess loss, so that the page prints the digits that the command line prints.
"""

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqa_scaling.baselines import LLAMA3, WholeModel
from gqa_scaling.config import LOSSES, MOST_CONTEXT, POWERS, Question
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.costs import n_formula
from gqa_scaling.hardware import GIB, HARDWARE, Hardware
from gqa_scaling.study.baseline import Baseline, baseline_of, llama3_sizes
from gqa_scaling.study.baseline import label as baseline_label
from gqa_scaling.study.candidates import KNOWN, known_as, sizes_of
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.clock import FAR, WHOLE, Clock
from gqa_scaling.study.fitted import Fit
from gqa_scaling.study.report.looks import looks
from gqa_scaling.study.results import Heads, pair, pattern_of
from gqa_scaling.study.roofline import Roofline, Shape, decode_work
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.shapes import Family, family_of
from gqa_scaling.study.strays import StrayedLaw
from gqa_scaling.study.study import Study

MOST_DRAWS = 1000  # refits that a page carries: those of a study by default


def packed(values: np.ndarray, kind: str = "f8") -> dict[str, str]:
    """Numbers as little-endian float64 or float32 in base64, as `Numerics.unpack` reads them."""
    data = np.ascontiguousarray(values, f"<{kind}").tobytes()
    return {"kind": kind, "data": base64.b64encode(data).decode()}


@dataclass(frozen=True)
class Again:
    """The command that prints an answer, less what the page can move, and the question it comes with.

    `candidates` are those that were named for it, as they were typed, and `cost` the options of the
    machine that was timed, where there is one.
    """

    command: str
    question: Question
    candidates: tuple[str, ...] = ()
    cost: str = ""


def carried(study: Study, again: Again) -> dict[str, Any]:
    """All that the page computes with, ready for JSON.

    Configurations are those that have a curve; `ranked` marks those that the study ranks, in whose
    order they stand. `configurations[k]` owns the k-th stretch of the draws of u and of b.
    """
    frontier, among, clock = study.frontier, study.ranked, study.frontier.serving.clock
    fit, family, trained = among.fit, family_of(study.results), among.estimates.fit.heads
    order = [*among.heads, *(h for h in fit.heads if h not in among.heads)]
    places = [fit.index(heads) for heads in order]
    alphabet, look = {h: i for i, h in enumerate(sorted(order))}, looks(order)
    one, many = fit.curves, fit.draws
    draws = slice(0, MOST_DRAWS)
    baseline, losses, headline = frontier.baseline, frontier.question.losses, frontier.headline
    return {
        "configurations": [
            {
                **_configuration(fit, family, k, heads),
                "known": known_as(heads, trained),
                "known_words": KNOWN[known_as(heads, trained)],
                "ranked": heads in among.heads,
                "order": alphabet[heads],
                "look": look[heads],
            }
            for k, heads in zip(places, order, strict=True)
        ],
        "floor": float(one.floor),
        "draws": {
            "floor": packed(many.floor[draws] - one.floor, "f4"),
            "u": packed((many.u[draws][:, places] - one.u[places]).T, "f4"),
            "b": packed((many.b[draws][:, places] - one.b[places]).T, "f4"),
        },
        "refits": {"carried": len(many.floor[draws]), "all": len(many.floor)},
        "intervals": frontier.intervals,
        "log_backbone": packed(one.backbone.log_backbone) if one.backbone else None,
        "head_dim": family.head_dim,
        "ladder": [list(size) for size in family.ladder],
        "embeddings": float(family.embeddings(1.0)),
        "family": _family(among.strayed, family, draws) if among.strayed else None,
        "baselines": _baselines(study, order),
        "baseline": {"name": _baseline_name(baseline), "label": baseline_label(baseline)},
        "asked": _asked(frontier.question, frontier.serving, frontier.objective)
        | {
            "baseline": _baseline_name(baseline),
            "loss": None if isinstance(baseline, WholeModel) and not losses else headline.loss,
            "context": headline.context,
        },
        "defaults": _asked(again.question, Serving(), "z")
        | {"baseline": _baseline_name(baseline_of(again.question, trained))},
        "command": again.command,
        "candidates": list(again.candidates),
        "contexts": list(frontier.question.contexts),
        "hardware": {
            **(
                {
                    _machine(clock): _timed(clock, frontier.serving, again, family)
                    | {"errors": _errors(clock, order, len(many.floor[draws]) + 1)}
                }
                if clock
                else {}
            ),
            **{
                row.name: {
                    "peak_flops": row.peak_flops,
                    "bandwidth": row.bandwidth,
                    "mfu": row.mfu,
                    "price": row.price,
                }
                for row in HARDWARE.values()
            },
        },
        "objectives": OBJECTIVES,
        "limits": {"loss": LOSSES, "context": [1, MOST_CONTEXT], "power": POWERS},
        "train_context": frontier.train_context,
        "doubt": frontier.doubt,
        "demonstration": frontier.question.demonstration,
        "covered": _covered(fit, places, order, trained),
        "count": frontier.count,
        "law": frontier.law,
    }


def _machine(row: Hardware | Clock) -> str:
    """What a machine is called on the page; one that was timed may have the name of a data sheet's."""
    return f"{row.name}, timed" if isinstance(row, Clock) else row.name


def _timed(clock: Clock, s: Serving, again: Again, family: Family) -> dict[str, Any]:
    """The machine that was timed: what its steps are put together from (`study/roofline.py`)."""

    def law(found: Roofline) -> dict[str, Any]:
        own = {name.partition(" ")[0]: name for name in found.seconds_per if " " not in name}
        own |= {name: f"{name} {clock.cache}" for name in ("cache", "attention")}
        rates = {name: found.seconds_per.get(term, 0.0) for name, term in own.items()}
        return {"form": found.form, "seconds_per": rates}

    # what one cached value takes, its share of an int8 cache's scales included
    one = decode_work(Shape(0, 0, 1, 1, 1, family.head_dim), 1, 1, clock.dtype, clock.cache).cache
    return {
        "price": clock.price,
        "option": again.cost,
        "ranges": {name: list(ends) for name, ends in clock.ranges.items()},
        "far": FAR,
        "timed": {
            "decode": law(clock.decode),
            "prefill": law(clock.prefill) if clock.prefill and s.output_tokens else None,
            "output_tokens": s.output_tokens,
            "weight_bytes": s.weight_bytes,
            "cache_bytes": s.cache_bytes,
            "value_bytes": float(one) / (2 * family.head_dim),
            "vocab_size": family.template.vocab_size,
        },
    }


def _errors(clock: Clock, order: list[Heads], rows: int) -> dict[str, Any]:
    """What the clock may be off by, drawn for the refits of whatever may be priced by it."""
    named = [*map(pair, order), WHOLE, LLAMA3]
    return {whose: packed(clock.errors(whose, rows), "f4") for whose in named}


def _configuration(fit: Fit, family: Family, k: int, heads: Heads) -> dict[str, Any]:
    """A configuration: its curve, how its parameters are counted, and what its heads read."""
    curves, (log_n, ratio) = fit.curves, family.ratio(heads)
    pattern = pattern_of(heads)
    return {
        "name": pair(heads),
        "n_heads": heads[0],
        "n_kv_heads": heads[1],
        "pattern": _pattern(pattern, heads[1]) if pattern else None,
        "centre": float(np.broadcast_to(curves.centre, (len(fit.heads),))[k]),
        "u": float(curves.u[k]),
        "b": float(curves.b[k]),
        "log_n": packed(curves.backbone.log_n[k]) if curves.backbone else None,
        "ratio_log_n": np.asarray(log_n, float).tolist(),
        "ratio": np.asarray(ratio, float).tolist(),
        "reach": list(family.reach(heads)),
        "fitted": list(sizes_of(fit, k)),
    }


def _pattern(pattern: ContextSharding, n_kv_heads: int) -> dict[str, Any]:
    """The sparse layers of a pattern until they repeat, each head as [block, local, stride, ...]."""
    shown = pattern.sparse_layers(n_kv_heads)
    return {
        "label": pattern.label,
        "dense_layers": pattern.dense_layers,
        "sparse": [
            [h and [h.block, h.local, h.stride, h.offset, h.sinks] for h in layer]
            for layer in shown
        ],
    }


def _family(law: StrayedLaw, family: Family, draws: slice) -> dict[str, Any]:
    """The published Llama-3 family by the joint law: its sizes, and the law's parameters by refit."""
    x, layers, width = llama3_sizes(family)
    names = law.fit.names
    rows = np.hstack([law.rows, law.unseen(LLAMA3)])[: (draws.stop or 0) + 1]
    trained = np.array([h[:2] for h in law.fit.heads], float)
    known = sorted((n_formula(L, d, 0, 0), rest) for (L, d), rest in family.rest.items())
    counted = known or [(1.0, 0.0)]
    return {
        "names": [*names, "s", "t"],
        "rows": packed(rows.T),
        "most": trained.max(0).tolist(),
        "centre": float(np.ravel(law.fit.curves.centre)[0]),
        "x": x.tolist(),
        "layers": layers.tolist(),
        "width": width.tolist(),
        "counted": {"n": [n for n, _ in counted], "share": [rest / n for n, rest in counted]},
    }


def _baseline_name(baseline: Baseline) -> str:
    """The baseline as the page and the command line name it."""
    if isinstance(baseline, WholeModel):
        return f"{baseline.n_heads},{baseline.n_kv_heads}@L{baseline.n_layers}d{baseline.d_model}"
    return baseline if isinstance(baseline, str) else pair(baseline)


def _baselines(study: Study, order: list[Heads]) -> list[dict[str, str]]:
    """What savings can be stated against: every configuration, and the family where it has curves."""
    dense = [{"name": pair(heads), "label": pair(heads)} for heads in order]
    family = [{"name": LLAMA3, "label": baseline_label(LLAMA3)}] if study.ranked.strayed else []
    own: Baseline = study.frontier.baseline
    whole = isinstance(own, WholeModel)
    named = [{"name": _baseline_name(own), "label": baseline_label(own)}] if whole else []
    return [*named, *dense, *family]


def _asked(q: Question, s: Serving, objective: Objective) -> dict[str, Any]:
    """A question as the page holds it, but for its loss, context and baseline."""
    return {
        "convention": q.convention,
        "lambda": q.weight,
        "alpha": q.memory_power,
        "beta": q.compute_power,
        "indifference": q.indifference,
        "objective": objective,
        "batch": s.batch,
        "weight_bytes": s.weight_bytes,
        "cache_bytes": s.cache_bytes,
        "limit_gib": s.limit_bytes / GIB if math.isfinite(s.limit_bytes) else None,
        "kv_multiple": s.kv_multiple,
        "hardware": _machine(s.hardware) if s.hardware else None,
        "price": s.hardware.price if s.hardware else None,
    }


def _covered(
    fit: Fit, places: list[int], order: list[Heads], trained: tuple[Heads, ...]
) -> list[float]:
    """The losses, in nats, that the curves of the trained configurations cover."""
    own = [k for k, heads in zip(places, order, strict=True) if heads in trained]
    ends = [fit.curves.loss(k, np.array(sizes_of(fit, k))) for k in own]
    return [float(np.min(ends)), float(np.max(ends))]
