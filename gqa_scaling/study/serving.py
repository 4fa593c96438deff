"""What models cost to serve: memory, FLOPs and Z, and bytes, seconds and dollars.

The costs are those of `costs` (Chen et al. 2025, section 4.1, step 3) at the real-valued shapes that a
study gives its sizes, a whole array of them at once.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gqa_scaling.config import MOST_HEADS, Question, between, require
from gqa_scaling.costs import (
    HardwareCost,
    Number,
    inference_flops,
    inference_memory,
    kv_cache_values,
)
from gqa_scaling.hardware import Hardware
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.clock import Clock
from gqa_scaling.study.results import Heads
from gqa_scaling.study.roofline import Shape
from gqa_scaling.study.shapes import Family, effective_context, training_keys
from gqa_scaling.units import byte_size


@dataclass(frozen=True)
class Serving:
    """How the model is served, for costs in bytes, seconds and dollars, and what must hold.

    `batch` sequences share one copy of the weights. What is held are all weights, embeddings
    included, and the KV caches. Decoding one token of each takes the longer of reading the bytes
    of N (without embeddings) and the caches at the hardware's bandwidth and computing at its peak
    times its MFU; on a calibrated machine (`Clock`) it takes what its timings say, and where
    `output_tokens` are named these also pay for the prefill of a prompt that fills the rest of the
    context. `limit_bytes`, of what is held, and `kv_multiple` rule configurations out.
    """

    batch: int = 1
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0
    hardware: Hardware | Clock | None = None
    limit_bytes: float = math.inf
    kv_multiple: int = 1
    output_tokens: int | None = None

    def __post_init__(self) -> None:
        between("batch", self.batch, 1, 1e9, "sequences")
        between("kv_multiple", self.kv_multiple, 1, MOST_HEADS)
        for name in ("weight_bytes", "cache_bytes"):
            between(name, getattr(self, name), 0.01, 100)
        require(self.limit_bytes > 0, f"limit_bytes={self.limit_bytes} must be greater than 0")
        if self.hardware is not None:
            between("price", self.hardware.price, 0, 1e6, "dollars an hour")
        if self.output_tokens is not None:
            between("output_tokens", self.output_tokens, 1, 1e9, "tokens")
            clock = self.clock
            require(
                clock is not None and clock.prefill is not None,
                "output_tokens need the time of prefill: a calibration that has it",
            )

    @property
    def clock(self) -> Clock | None:
        """The calibrated machine, if it is one."""
        return self.hardware if isinstance(self.hardware, Clock) else None

    def allows(self, heads: Heads) -> bool:
        """Whether these heads may be served at all, whatever a model of them holds."""
        return heads[1] % self.kv_multiple == 0

    def sizes(self) -> str:
        """The batch and the bytes of weights and cached values, in words."""
        return (
            f"batch {self.batch}, {self.weight_bytes:g} bytes a weight, "
            f"{self.cache_bytes:g} a cached value"
        )

    def describe(self) -> str:
        where = f" on {self.hardware.name}" if self.hardware else ""
        where += f", prompts read for {self.output_tokens:,} tokens" if self.output_tokens else ""
        limit = (
            f", at most {byte_size(self.limit_bytes)}" if math.isfinite(self.limit_bytes) else ""
        )
        many = f", n_kv a multiple of {self.kv_multiple}" if self.kv_multiple > 1 else ""
        return f"{self.sizes()}{where}{limit}{many}"


def require_costs(objective: Objective, serving: Serving) -> None:
    """Raise UserError where the objective is not one, or where its costs need what is not said."""
    require(
        objective in OBJECTIVES, f"objective={objective!r} must be one of {', '.join(OBJECTIVES)}"
    )
    hardware = serving.hardware
    require(
        hardware is not None or objective not in ("seconds", "dollars"),
        f"objective={objective!r} needs hardware: name a row such as v5e or h100, or a calibration",
    )
    require(
        objective != "dollars" or (hardware is not None and hardware.price > 0),
        "objective='dollars' needs a price above 0: name one, or rank by 'seconds'",
    )


# ---------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class Costs:
    """What models of real-valued (L, d) cost, as arrays of one shape; infinite where N is.

    `effective` is T_eff, the keys that a head reads and keeps, in tokens. Memory is in values and
    FLOPs in the question's convention; `memory_fixed` and `flops_fixed` are the parts that no context
    enters. `bytes` held (embeddings included), `seconds` per decoded token and `dollars` per million
    of them are those of `Serving`; the last two are NaN when it names no hardware.
    """

    n_layers: Any
    d_model: Any
    effective: Any
    memory: Any
    flops: Any
    z: Any
    memory_fixed: Any
    flops_fixed: Any
    bytes: Any
    seconds: Any
    dollars: Any


@dataclass(frozen=True)
class Deployment:
    """Where models of a family are served: at one context, by one objective, within limits."""

    family: Family
    question: Question
    context: int
    objective: Objective = "z"
    serving: Serving = field(default_factory=Serving)

    def __post_init__(self) -> None:
        tokens = self.serving.output_tokens
        require(
            tokens is None or tokens < self.context,
            f"output_tokens={tokens} must be less than the context, {self.context} tokens: a prompt "
            "fills the rest of it",
        )

    def costs(self, n: np.ndarray | float, heads: Heads) -> Costs:
        """Costs of N*, of the shape that the family gives it."""
        n = np.asarray(n, float)
        layers, width = self.family.shape(n, heads)
        keys = effective_context(heads, layers, self.context)
        return self.costs_of_shape(n, heads, layers, width, keys)

    def costs_of_model(self, n: np.ndarray, heads: Heads, shape: tuple[int, int]) -> Costs:
        """Costs of one whole model of N parameters and this (L, d), the same in every row (rows,)."""
        layers, width = (np.full_like(n, v) for v in shape)
        keys = effective_context(heads, layers, self.context)
        return self.costs_of_shape(n, heads, layers, width, keys)

    def costs_of_shape(
        self, n: Number, heads: Heads, n_layers: Number, d_model: Number, effective: Number
    ) -> Costs:
        """Costs of models of N parameters whose shape and T_eff are known."""
        q, s, head_dim = self.question, self.serving, self.family.head_dim
        size, n_heads = (n_layers, head_dim), heads[0]
        memory = inference_memory(n, effective, *size, heads[1])
        flops = inference_flops(n, self.context, *size, n_heads, q.convention, effective)
        cached = kv_cache_values(effective, *size, heads[1])
        read = s.weight_bytes * n + s.cache_bytes * s.batch * cached
        seconds = dollars = np.full_like(n, math.nan)
        if isinstance(s.hardware, Clock):
            seconds = self._timed(s.hardware, n, heads, n_layers, d_model, effective)
        elif s.hardware:
            compute = s.batch * inference_flops(n, effective, *size, n_heads)
            busy = compute / (s.hardware.peak_flops * s.hardware.mfu)
            seconds = np.maximum(busy, read / s.hardware.bandwidth) / s.batch
        if s.hardware:
            dollars = seconds * s.hardware.price / 3600 * 1e6
        return Costs(
            n_layers=n_layers,
            d_model=d_model,
            effective=effective,
            memory=memory,
            flops=flops,
            z=HardwareCost(q.weight, q.memory_power, q.compute_power)(memory, flops),
            memory_fixed=n,
            flops_fixed=inference_flops(n, self.context, 0, head_dim, n_heads, q.convention),
            bytes=read + s.weight_bytes * self.family.embeddings(d_model),
            seconds=seconds,
            dollars=dollars,
        )

    def _timed(
        self, clock: Clock, n: Number, heads: Heads, layers: Number, width: Number, keys: Number
    ) -> Any:
        """Seconds of an output token on a calibrated machine."""
        batch, tokens = self.serving.batch, self.serving.output_tokens
        output = self.family.template.vocab_size * width
        shape = Shape(n, output, layers, heads[0], heads[1], self.family.head_dim)
        seconds = clock.decode_seconds(shape, keys, batch) / batch
        if tokens is None:
            return seconds
        prompt = self.context - tokens
        read = training_keys(heads, layers, prompt)
        return seconds + clock.prefill_seconds(shape, prompt, read, batch) / (batch * tokens)

    @property
    def by_clock(self) -> Clock | None:
        """The calibrated machine, where what is to be least is counted by its seconds."""
        return self.serving.clock if self.objective in ("seconds", "dollars") else None

    def off(self, whose: str, rows: int) -> np.ndarray | float:
        """What the objective of `whose` model may be off by, a factor (rows,): 1 but by a clock."""
        return np.exp(self.by_clock.errors(whose, rows)) if self.by_clock else 1.0

    def drawn(self, costs: Costs, whose: str) -> Costs:
        """Costs (rows,) of the point estimate and every refit, with the error of the clock drawn."""
        if self.serving.clock is None:
            return costs
        off = np.exp(self.serving.clock.errors(whose, len(costs.seconds)))
        return replace(costs, seconds=off * costs.seconds, dollars=off * costs.dollars)

    def objective_of(self, costs: Costs) -> Any:
        """The cost that is to be least."""
        return getattr(costs, self.objective)

    def cost(self, costs: Costs, heads: Heads) -> np.ndarray:
        """The cost that is to be least, infinite where what must hold does not."""
        holds = (costs.bytes <= self.serving.limit_bytes) & self.serving.allows(heads)
        return np.where(holds, self.objective_of(costs), math.inf)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The costs that savings are stated of: always Z, memory and FLOPs, and the objective."""
        return tuple(dict.fromkeys(("z", "memory", "flops", self.objective)))


def units(
    question: Question, serving: Serving | None = None, sharded: bool = False
) -> dict[str, str]:
    """The unit of every kind of number in an answer; `sharded` where a configuration has a pattern."""
    flops = {
        "per_token": "FLOPs of one token at the context, per_token: 2 N + 4 T L d_h n_h",
        "per_sequence": "FLOPs as plotted by the paper, per_sequence: T (N + 2 T L d_h n_h)",
    }[question.convention]
    q, s = question, serving or Serving()
    effective = (
        "tokens: the keys that a head reads and keeps at the context, a mean over layers and KV heads; "
        "for a configuration with a pattern it stands for T in T L d_h n_kv and T L d_h n_h"
    )
    return {
        **({"effective": effective} if sharded else {}),
        "loss": "nats per token",
        "context": "tokens",
        "n": "parameters without embeddings",
        "memory": "values: N + 2 T L d_h n_kv",
        "flops": flops,
        "z": f"{q.weight:g} memory^{q.memory_power:.3g} + {1 - q.weight:.3g} flops^{q.compute_power:.3g}",
        "bytes": f"bytes held, embeddings included: {s.sizes()}",
        "weight_bytes": f"bytes of the built model, embeddings included: {s.weight_bytes:g} a weight",
        "cache_bytes": f"bytes of {s.batch} KV caches: {s.cache_bytes:g} a value",
        "seconds": "per decoded token" + (f", {s.clock.how}" if s.clock else ""),
        "dollars": "per million decoded tokens",
        "saving": "1 - cost / baseline's cost",
        "gain": "nats: baseline's loss minus the configuration's, at the largest sizes of that cost",
    }
