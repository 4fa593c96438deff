"""Fits laws of seconds to timings, on half of the models, and judges them on the other half.

A model (its layers, width and heads) is fitted or held out with all its contexts and batches, as
those that a study asks about were never timed. Models in the order of their digests go to the one
half and to the other in turn: the split follows from which were timed and from nothing else.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from gqa_scaling import __version__
from gqa_scaling.config import ModelConfig, require
from gqa_scaling.costs import HardwareCost
from gqa_scaling.fields import digest_of
from gqa_scaling.files.timings import Machine, Phase, read_timings
from gqa_scaling.hardware import Hardware
from gqa_scaling.study.calibration import Calibration, Judged, Law, sha256_of
from gqa_scaling.study.roofline import FORMS, Form, Roofline, fit_roofline
from gqa_scaling.study.timed import (
    Case,
    Predictor,
    each,
    judge,
    label,
    misled,
    paced,
    paper_z,
    seconds_of,
    usual,
)
from gqa_scaling.study.zform import ZLaw, fit_z

LEAST_MODELS = 6  # half of them are held out
LEAST_CONTEXTS = 2
LEAST_SHAPES = 20  # of which half are fitted, by 6 coefficients


def calibrate(path: Path, spec: Hardware | None = None) -> Calibration:
    """Fit and judge the timings in a file; a row of `hardware`, if any, is judged beside them.

    Raises UserError where there are too few models or contexts, models of several dtypes, or no file
    of timings.
    """
    timings, digest = read_timings(path), sha256_of(path)
    every, machine = paced(timings), usual(timings)
    half = halves([case.row.model for case in every if case.row.phase == "decode"])
    decoding, lack, flags = _usable([case for case in every if case.row.phase == "decode"], half)
    require(not lack, f"{path}: decode: {lack}; time more with `gqa-scaling bench-inference`")
    dtypes = sorted({case.row.model.dtype for case in decoding})
    require(
        len(dtypes) == 1,
        f"{path} has models in {' and '.join(dtypes)}: calibrate those of one dtype at a time, timed into "
        "a file of their own",
    )
    prefills, lack, more = _usable([c for c in every if c.row.phase == "prefill"], half)
    flags += [*more, *([f"prefill is not calibrated: {lack}"] if lack else [])]
    judged: list[Judged] = []
    laws: dict[Phase, Roofline] = {}
    phases: list[tuple[Phase, list[Case]]] = [("decode", decoding), ("prefill", prefills)]
    for phase, cases in phases:
        if not cases:
            continue
        own = [case for case in cases if case.row.model in half]
        rest = [case for case in cases if case.row.model not in half]
        predictors = _predictors(phase, own, machine, spec)
        judged += [judge(phase, law, how, rest) for law, how in predictors.items()]
        laws[phase] = _roofline(phase, cases, _form(phase, own))
        flags += _flags(laws[phase], machine)
    if any(case.row.bytes > 1.01 * (case.work.weights + case.work.cache) for case in decoding):
        flags.append(
            "devices that share KV heads or sequences keep copies of heads or weights: the roofline has "
            "their reading as slower"
        )
    z = _z_laws(decoding)
    for cache, law in z.items():
        if law.at_bound:
            names = ", ".join(law.at_bound)
            flags.append(f"Z fitted to cache {cache}: these timings do not tell {names}")
    return Calibration(
        timings=path.name,
        sha256=digest,
        machine=machine,
        versions={**timings.versions, "gqa-scaling": __version__},
        dtype=dtypes[0],
        fitted=_labels(case for case in decoding if case.row.model in half),
        held_out=_labels(case for case in decoding if case.row.model not in half),
        decode=laws["decode"],
        prefill=laws.get("prefill"),
        z=z,
        judged=tuple(judged),
        misled=misled(decoding),
        ranges=_ranges(decoding),
        patterns=tuple(sorted({m.label for c in decoding if (m := c.row.model.pattern)})),
        flags=tuple(flags),
    )


def _usable(cases: list[Case], half: frozenset[ModelConfig]) -> tuple[list[Case], str, list[str]]:
    """The cases of one phase that laws can be fitted to and judged on; what all of them lack for it.

    A type of the cache of which there is too little is left out, and flagged.
    """
    used: list[Case] = []
    lack, flags = "none were timed", []
    for cache in dict.fromkeys(case.row.cache for case in cases):
        own = [case for case in cases if case.row.cache == cache]
        why = _lack(own, half)
        if why:
            lack = why
            flags.append(f"{own[0].row.phase} with its cache in {cache} is left out: {why}")
        else:
            used += own
    return (used, "", flags) if used else ([], lack, [])


def _lack(cases: Sequence[Case], half: frozenset[ModelConfig]) -> str:
    """What timings with one type of the cache lack for a fit and a judgement; "" for nothing."""
    models, contexts = {case.row.model for case in cases}, {case.row.context for case in cases}
    fitted, held_out = len(models & half), len(models - half)
    if len(models) < LEAST_MODELS:
        return f"{len(models)} models of sizes and heads were timed and at least {LEAST_MODELS} are needed"
    if min(fitted, held_out) < 2:
        return (
            f"of the {len(models)} models timed {fitted} are among those to fit and {held_out} among those "
            "held out, and two of each are needed"
        )
    if len(contexts) < LEAST_CONTEXTS:
        return f"one context, {min(contexts):,} tokens, was timed and two or more are needed"
    if len(cases) < LEAST_SHAPES:
        return f"{len(cases)} shapes were timed and at least {LEAST_SHAPES} are needed"
    return ""


def halves(models: Sequence[ModelConfig]) -> frozenset[ModelConfig]:
    """The models to fit: every other one in the order of their digests."""
    ordered = sorted(set(models), key=lambda model: digest_of(model.to_dict()))
    return frozenset(ordered[::2])


def _labels(cases: Iterable[Case]) -> tuple[str, ...]:
    return tuple(sorted({label(case.row.model) for case in cases}))


def _ranges(cases: Sequence[Case]) -> dict[str, tuple[float, float]]:
    values = {
        "context": [case.row.context for case in cases],
        "batch": [case.row.batch for case in cases],
        "n": [case.shape.n for case in cases],
        "head_dim": [case.shape.head_dim for case in cases],
    }
    return {name: (float(min(v)), float(max(v))) for name, v in values.items()}


def _roofline(phase: Phase, cases: Sequence[Case], form: Form) -> Roofline:
    caches = [case.row.cache for case in cases]
    return fit_roofline(phase, [case.work for case in cases], caches, seconds_of(cases), form)


def _form(phase: Phase, cases: Sequence[Case]) -> Form:
    """The form of the least error for models left out in turn, of those that are fitted."""

    def error(form: Form) -> float:
        off = []
        for model in {case.row.model for case in cases}:
            own = [case for case in cases if case.row.model != model]
            law = _roofline(phase, own, form)
            rest = [case for case in cases if case.row.model == model]
            off += [abs(math.log(law.seconds(c.work, c.row.cache) / c.seconds)) for c in rest]
        return float(np.median(off))

    return min(FORMS, key=error)


def _z_laws(cases: Sequence[Case]) -> dict[str, ZLaw]:
    """Z knows nothing of bytes: a law for each type of the cache."""
    out: dict[str, ZLaw] = {}
    for cache in sorted({case.row.cache for case in cases}):
        own = [case for case in cases if case.row.cache == cache]
        memory, flops = np.array([case.paper(case.row.batch) for case in own], float).T
        out[cache] = fit_z(memory, flops, seconds_of(own))
    return out


def _predictors(
    phase: Phase, fitted: Sequence[Case], machine: Machine, spec: Hardware | None
) -> dict[Law, Predictor]:
    """Every law of a phase, from what is fitted alone."""
    out: dict[Law, Predictor] = {}
    for form in FORMS:
        law = _roofline(phase, fitted, form)
        out[form] = _predicting(law)
    if phase == "decode":
        z = _z_laws(fitted)
        out["z"] = lambda cases: each(
            cases, lambda c: z[c.row.cache].seconds(*c.paper(c.row.batch))
        )
        out["z_default"] = _scaled(lambda c: HardwareCost()(*c.paper(c.row.batch)), fitted)
        out["z_one"] = _scaled(paper_z, fitted)
        out["bytes"] = _scaled(_bytes, fitted)
    else:
        out["flops"] = _scaled(_flops, fitted)

    def roofline(bandwidth: float, flops: float) -> Predictor:
        return lambda cases: each(cases, lambda c: max(_bytes(c) / bandwidth, _flops(c) / flops))

    out["machine"] = roofline(machine.bandwidth, machine.flops[fitted[0].row.model.dtype])
    if spec is not None:
        out["hardware"] = roofline(spec.bandwidth, spec.peak_flops * spec.mfu)
    return out


def _predicting(law: Roofline) -> Predictor:
    return lambda cases: each(cases, lambda c: law.seconds(c.work, c.row.cache))


def _bytes(case: Case) -> float:
    return float(case.work.weights + case.work.cache)


def _flops(case: Case) -> float:
    return float(case.work.linear + case.work.attention)


def _scaled(value: Callable[[Case], float], fitted: Sequence[Case]) -> Predictor:
    """Seconds in proportion to a value: one scale for each cache and batch, the fitted median."""

    def kind(case: Case) -> tuple[str, int]:
        return case.row.cache, case.row.batch

    scales = {
        key: float(np.median([c.seconds / value(c) for c in fitted if kind(c) == key]))
        for key in {kind(case) for case in fitted}
    }
    every = float(np.median([case.seconds / value(case) for case in fitted]))
    return lambda cases: each(cases, lambda c: scales.get(kind(c), every) * value(c))


def _flags(law: Roofline, machine: Machine) -> list[str]:
    """What must be known of a roofline: terms without a time, or without a time of their own."""
    out = []
    if law.nothing:
        out.append(f"{law.phase}: {', '.join(law.nothing)} take no time in these timings")
    if law.joined:
        out.append(
            f"{law.phase}: these timings do not tell {', '.join(law.joined)} from the rest; time more "
            "batches, or heads that share KV heads by other numbers"
        )
    if 2 * machine.bandwidth < law.rate("weights") < math.inf:
        out.append(
            f"{law.phase}: weights are read at {law.rate('weights') / machine.bandwidth:.1f} times the "
            "measured bandwidth: models this small stay in the processor's caches; time larger ones"
        )
    return out
