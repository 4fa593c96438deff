"""Prefill and decoding timed with random weights, by what `generate` runs.

    meter = Meter(jax.devices())
    for rows in time_cases(cases, meter, meter.machine(), longest=10):
        ...

Cases of one group take turns: in each of a few rounds every one decodes some tokens and takes its
prompts in, and the machine's bandwidth and FLOP/s are sampled, so that a busy moment meets all alike.
"""

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gqa_scaling.config import ModelConfig
from gqa_scaling.costs import decode_flops, prefill_bytes, prefill_flops
from gqa_scaling.files.timings import Machine, Phase, Timing
from gqa_scaling.inference.cases import (
    Case,
    copies,
    needed_bytes,
    packs,
    read_bytes,
    shares,
    unfit,
)
from gqa_scaling.inference.decode import (
    CHUNK,
    Parameters,
    empty_cache,
    prefill,
    random_parameters,
    read,
    serving_mesh,
    write,
)
from gqa_scaling.inference.generate import next_tokens
from gqa_scaling.inference.machine import Meter
from gqa_scaling.inference.sampling import GREEDY
from gqa_scaling.units import byte_size, duration

ROUNDS = 5
ROUND_SECONDS = 0.1  # that decoding takes in a round at the least, if `MOST_STEPS` are enough
MOST_STEPS = 32
MOST_TURNS = 8  # cases that take turns
USUAL_SHARE = 0.5  # of the machine's FLOP/s and bandwidth, to tell what would take too long

PHASES: tuple[Phase, ...] = ("prefill", "decode")
Key = tuple[Any, ...]


def key_of(row: Case | Timing, phase: Phase) -> Key:
    """What tells a row from others of one machine."""
    return row.model, phase, row.context, row.batch, row.cache


def time_cases(
    cases: Sequence[Case],
    meter: Meter,
    machine: Machine,
    longest: float,
    done: Collection[Key] = (),
) -> Iterator[list[Timing]]:
    """The rows of all cases, as they are known; those that were `done` already are left out.

    What does not fit, or would take longer than `longest` seconds at a time, is skipped with the reason.
    """
    devices, free = len(meter.devices), meter.free_bytes()
    left = [case for case in cases if any(key_of(case, phase) not in done for phase in PHASES)]
    parameters: dict[ModelConfig, Parameters] = {}
    for pack in packs(left, free, devices, MOST_TURNS):
        rows, ready = [], []
        for case in pack:
            reason, planned = unfit(case, free, devices), {}
            for phase in PHASES:
                if key_of(case, phase) in done:
                    continue
                row = _planned(case, phase, devices)
                why = reason or _too_long(row, machine, longest)
                if why:
                    rows.append(replace(row, skipped=why))
                else:
                    planned[phase] = row
            ready += [(case, planned)] if planned else []
        needed = {case.model for case, _ in ready}
        for model in parameters.keys() - needed:
            del parameters[model]
        yield rows + _timed(ready, meter, parameters, longest)


def _planned(case: Case, phase: Phase, devices: int) -> Timing:
    """The row as arithmetic has it, not timed yet."""
    m, context, batch = case.model, case.context, case.batch
    if phase == "decode":
        read, flops = read_bytes(case, devices), decode_flops(m, context, batch)
    else:
        kept = shares(m, devices), copies(m, devices)
        read = prefill_bytes(m, context, batch, case.cache, CHUNK, *kept)
        flops = prefill_flops(m, context, batch)
    needed = needed_bytes(case, devices)
    return Timing(
        m, phase, context, batch, case.cache, 0.0, 0.0, 0, read, flops, needed, "not timed yet"
    )


def _too_long(row: Timing, machine: Machine, longest: float) -> str | None:
    working = row.flops / machine.flops[row.model.dtype]
    seconds = max(working, row.bytes / machine.bandwidth) / USUAL_SHARE
    return f"would take about {duration(seconds)} at a time" if seconds > longest else None


# ---------------------------------------------------------------------------------- taking turns


@dataclass
class _Run:
    """A phase of a case, compiled and ready: `once` runs it and says how long a step took."""

    row: Timing
    once: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    failed: str = ""


class _NoRoom(Exception):
    """The compiler found that a case needs more than there is."""


def _timed(
    ready: Sequence[tuple[Case, Mapping[Phase, Timing]]],
    meter: Meter,
    parameters: dict[ModelConfig, Parameters],
    longest: float,
) -> list[Timing]:
    """The rows of cases that take turns; of prefill fewer rounds where they fill `longest` seconds."""
    rows: list[Timing] = []
    runs: list[_Run] = []
    for case, planned in ready:
        with _memory_may_end() as failed:
            runs += _warm(case, planned, meter, parameters)
        if failed:
            rows += [replace(row, skipped=failed[0]) for row in planned.values()]
    speeds: list[float] = []
    peaks: dict[str, list[float]] = {run.row.model.dtype: [] for run in runs}
    for turn in range(ROUNDS if runs else 0):
        speeds.append(meter.bandwidth())
        for dtype, samples in peaks.items():
            samples.append(meter.product(dtype))
        for run in runs if turn % 2 == 0 else reversed(runs):
            if run.failed or (run.row.phase == "prefill" and sum(run.seconds) >= longest):
                continue
            with _memory_may_end() as failed:
                run.seconds.append(run.once())
            run.failed = "".join(failed)
    return rows + [_result(run, speeds, peaks[run.row.model.dtype]) for run in runs]


@contextlib.contextmanager
def _memory_may_end() -> Iterator[list[str]]:
    """Has devices whose memory is full told in the list that is given."""
    why: list[str] = []
    try:
        yield why
    except _NoRoom as error:
        why.append(str(error))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why.append(f"the devices' memory was full: {str(error).partition(chr(10))[0][:160]}")


def _result(run: _Run, speeds: Sequence[float], peaks: Sequence[float]) -> Timing:
    if run.failed:
        return replace(run.row, skipped=run.failed)
    low, middle, high = np.percentile(run.seconds, [25, 50, 75]).tolist()
    return replace(
        run.row,
        seconds=middle,
        spread=(high - low) / middle,
        rounds=len(run.seconds),
        skipped=None,
        bandwidth=statistics.median(speeds),
        peak=statistics.median(peaks),
    )


# ------------------------------------------------------------------------------- a case, warmed up


def _warm(
    case: Case,
    planned: Mapping[Phase, Timing],
    meter: Meter,
    parameters: dict[ModelConfig, Parameters],
) -> list[_Run]:
    """The phases of a case, compiled, each with the bytes that its program holds."""
    mesh = serving_mesh(case.model, meter.devices)
    with jax.set_mesh(mesh):
        if case.model not in parameters:
            parameters[case.model] = random_parameters(case.model)
        bench = Bench(case, parameters[case.model], mesh)
        make = {"prefill": bench.prefill, "decode": bench.decode}
        runs = []
        for phase, row in planned.items():
            program, once = make[phase]()
            runs.append(_Run(replace(row, memory_bytes=_held(program, row, meter)), once))
        return runs


def _held(program: Any, row: Timing, meter: Meter) -> int:
    """Bytes of weights, cache and all that a compiled program works with, on all devices."""
    m = program.memory_analysis()
    if m is None:  # a compiler that does not tell
        return row.memory_bytes
    working = len(meter.devices) * (m.temp_size_in_bytes + m.output_size_in_bytes)
    free = meter.free_bytes()
    if working > free:
        raise _NoRoom(f"works with {byte_size(working)} and there is room for {byte_size(free)}")
    return len(meter.devices) * m.argument_size_in_bytes + working


class Bench:
    """A case on its devices: weights, and a cache whose tokens are those of no text."""

    def __init__(self, case: Case, parameters: Parameters, mesh: Mesh) -> None:
        self.case, self.mesh, self.parameters = case, mesh, parameters
        self.cache = empty_cache(case.model, case.batch, case.context, case.cache)
        self.tokens_B = jnp.zeros(case.batch, jnp.int32)
        self.none_B, self.one_B = (np.full(case.batch, n, np.int32) for n in (0, 1))
        self.prompts_BT = np.zeros((case.batch, case.context), np.int32)

    def decode(self) -> tuple[Any, Callable[[], float]]:
        """The compiled step, and what takes so many that a round is long enough to be timed."""
        self.decoded(1)  # the first time the arrays come from elsewhere
        steps = min(MOST_STEPS, self.case.context - 1)
        steps = max(1, min(steps, math.ceil(ROUND_SECONDS / self.decoded(1))))
        program = next_tokens.lower(*self._asked()).compile()
        return program, functools.partial(self.decoded, steps)

    def prefill(self) -> tuple[Any, Callable[[], float]]:
        """The compiled program that takes in a chunk of the prompts, and what takes in all of them."""
        chunk_BT = self.prompts_BT[:, :CHUNK]
        program = read.lower(
            self.case.model, self.parameters, self.cache, chunk_BT, self.none_B
        ).compile()
        self.filled()
        return program, self.filled

    def _asked(self) -> tuple[Any, ...]:
        m, none_B = self.case.model, self.none_B
        return m, GREEDY, m.vocab_size, self.parameters, self.cache, self.tokens_B, none_B, none_B

    def decoded(self, steps: int) -> float:
        """Seconds of a step, of so many at the end of the context."""
        with jax.set_mesh(self.mesh):
            self._hold(self.case.context - steps)
            start = time.perf_counter()
            for _ in range(steps):
                self.tokens_B, new = next_tokens(*self._asked())
                self.cache = write(self.case.model, self.cache, new, self.one_B)
            jax.block_until_ready((self.tokens_B, self.cache))
            return (time.perf_counter() - start) / steps

    def filled(self) -> float:
        """Seconds until the logits after the prompts are there."""
        with jax.set_mesh(self.mesh):
            self._hold(0)
            start = time.perf_counter()
            logits_BV, self.cache = prefill(
                self.case.model, self.parameters, self.cache, self.prompts_BT
            )
            jax.block_until_ready((logits_BV, self.cache))
            return time.perf_counter() - start

    def _hold(self, tokens: int) -> None:
        """Have the cache say that it holds so many tokens of each sequence."""
        length_B = self.cache.length_B * 0 + tokens
        self.cache = jax.block_until_ready(replace(self.cache, length_B=length_B))
