"""Timings and what laws predict of them: how far off they are, and what choosing by them loses."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy.stats import spearmanr

from gqa_scaling.config import ModelConfig
from gqa_scaling.context_sharding import effective_context
from gqa_scaling.costs import (
    HardwareCost,
    inference_flops,
    inference_memory,
    n_exact,
    training_keys,
)
from gqa_scaling.files.timings import Machine, Phase, Timing, Timings
from gqa_scaling.study.calibration import Judged, Law, Misled
from gqa_scaling.study.results import heads_of
from gqa_scaling.study.roofline import Shape, Work, decode_work, prefill_work
from gqa_scaling.study.sides import Side
from gqa_scaling.study.uncertainty import LEVEL

Predictor = Callable[[Sequence["Case"]], np.ndarray]  # seconds


@dataclass(frozen=True)
class Case:
    """A timing, with what its step does.

    `pace` is how fast the machine was just then, to its usual pace: others may keep it busy.
    """

    row: Timing
    pace: float = 1.0

    @property
    def seconds(self) -> float:
        """Of the step at the machine's usual pace."""
        return self.row.seconds * self.pace

    @cached_property
    def shape(self) -> Shape:
        m = self.row.model
        output = m.d_model * m.vocab_size
        return Shape(n_exact(m), output, m.n_layers, m.n_heads, m.n_kv_heads, m.head_dim)

    @cached_property
    def work(self) -> Work:
        r, m = self.row, self.row.model
        if r.phase == "prefill":
            return prefill_work(self.shape, r.context, training_keys(m, r.context), r.batch)
        return decode_work(self.shape, self.keys, r.batch, m.dtype, r.cache)

    @property
    def keys(self) -> float:
        """T_eff."""
        return effective_context(self.row.model.layer_patterns, self.row.context)

    def paper(self, batch: int) -> tuple[float, float]:
        """M in values and C in FLOPs of a token of so many sequences (Chen et al. 2025, eq. 3, 4)."""
        s, n = self.shape, self.shape.n
        memory = inference_memory(n, batch * self.keys, s.n_layers, s.head_dim, s.n_kv_heads)
        return memory, batch * inference_flops(n, self.keys, s.n_layers, s.head_dim, s.n_heads)

    @property
    def cell(self) -> tuple[str, int, int]:
        """What one chooses among: the cache, context and batch."""
        return self.row.cache, self.row.context, self.row.batch


def paper_z(case: Case) -> float:
    """Z of one sequence with the paper's constants, as `frontier` ranks by default."""
    return float(HardwareCost()(*case.paper(1)))


def label(model: ModelConfig) -> str:
    """(8,1)@L24d1536, as `compare` names a whole model."""
    heads = heads_of(model.n_heads, model.n_kv_heads, model.pattern)
    return Side(heads, (model.n_layers, model.d_model)).label


def usual(timings: Timings) -> Machine:
    """The machine at its usual pace: medians of what was measured between the rounds, where it was."""
    flops = dict(timings.machine.flops)
    for dtype in flops:
        peaks = [row.peak for row in timings.timed if row.peak and row.model.dtype == dtype]
        flops[dtype] = float(np.median(peaks)) if peaks else flops[dtype]
    known = [row.bandwidth for row in timings.timed if row.bandwidth]
    bandwidth = float(np.median(known)) if known else timings.machine.bandwidth
    return replace(timings.machine, bandwidth=bandwidth, flops=flops)


def paced(timings: Timings) -> list[Case]:
    """All timings at the pace of `usual`, by the bandwidth that there was just then; 1 if unknown."""
    bandwidth = usual(timings).bandwidth
    return [Case(row, row.bandwidth / bandwidth if row.bandwidth else 1.0) for row in timings.timed]


def each(cases: Sequence[Case], value: Callable[[Case], float]) -> np.ndarray:
    return np.array([value(case) for case in cases], float)


def seconds_of(cases: Sequence[Case]) -> np.ndarray:
    return each(cases, lambda case: case.seconds)


# ------------------------------------------------------------------------------------ judging


def judge(phase: Phase, law: Law, predictor: Predictor, cases: Sequence[Case]) -> Judged:
    """How a law does on cases that it was not fitted to."""
    seconds, said = seconds_of(cases), predictor(cases)
    off = np.abs(said / seconds - 1)
    cells = _cells(cases)
    within = [_rank(said[own], seconds[own]) for own in cells if len(own) > 2]
    pairs = [pair for own in cells for pair in _open_pairs(cases, own)]
    i, j = np.array(pairs, int).reshape(-1, 2).T
    least, most = np.minimum(seconds[i], seconds[j]), np.maximum(seconds[i], seconds[j])
    right = np.sign(said[i] - said[j]) == np.sign(seconds[i] - seconds[j])
    # two that a law cannot tell apart are chosen from at random
    wrong = np.where(said[i] == said[j], 0.5, ~right)
    lost, ratio = wrong * (most - least), np.log(said[i] / said[j] * seconds[j] / seconds[i])
    some = len(pairs) > 0
    return Judged(
        phase=phase,
        law=law,
        shapes=len(cases),
        pairs=len(pairs),
        median=float(np.median(off)),
        most=float(np.quantile(off, LEVEL)),
        rank=_rank(said, seconds),
        rank_within=float(np.mean(within)) if within else math.nan,
        wrong=float(wrong.mean()) if some else math.nan,
        regret=float((lost / least).mean()) if some else math.nan,
        regret_seconds=float(lost.mean()) if some else math.nan,
        ratio=float(np.quantile(np.expm1(np.abs(ratio)), LEVEL)) if some else math.nan,
    )


def _cells(cases: Sequence[Case]) -> list[list[int]]:
    return [
        [k for k, case in enumerate(cases) if case.cell == cell]
        for cell in sorted({case.cell for case in cases})
    ]


def _open_pairs(cases: Sequence[Case], own: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of these of which one has fewer parameters, and the other less cache or attention.

    Of all others one has less of everything: any law prefers it.
    """

    def is_open(i: int, j: int) -> bool:
        a, b = cases[i], cases[j]
        fewer = a.shape.n - b.shape.n
        return any(
            fewer * (getattr(a.work, kind) - getattr(b.work, kind)) < 0
            for kind in ("cache", "attention")
        )

    return [pair for pair in combinations(own, 2) if is_open(*pair)]


def _rank(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation; NaN where either is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return math.nan
    return float(spearmanr(one, other).statistic)


def misled(cases: Sequence[Case]) -> tuple[Misled, ...]:
    """Where the paper's Z prefers the slower of two by more than both timings spread, each cell's worst.

    Nothing of it is fitted, so that all cases count.
    """
    out = []
    for own in _cells(cases):
        found, pairs = [], _open_pairs(cases, own)
        for pair in pairs:
            chosen, other = sorted((cases[k] for k in pair), key=paper_z)
            noise = (chosen.row.spread + other.row.spread) / 2  # half the quartiles' distance each
            if chosen.seconds > other.seconds * (1 + noise):
                found.append((chosen, other))
        if found:
            worst, faster = max(found, key=lambda two: two[0].seconds - two[1].seconds)
            out.append(
                Misled(
                    context=worst.row.context,
                    batch=worst.row.batch,
                    cache=worst.row.cache,
                    wrong=len(found),
                    pairs=len(pairs),
                    chosen=label(worst.row.model),
                    faster=label(faster.row.model),
                    chosen_seconds=worst.seconds,
                    faster_seconds=faster.seconds,
                )
            )
    return tuple(out)
