"""What models cost to serve: memory, FLOPs and Z, and bytes, seconds and dollars.

The costs are those of `costs` (Chen et al. 2025, section 4.1, step 3) at the real-valued shapes that a
study gives its sizes, a whole array of them at once.
"""

import math
from dataclasses import dataclass, field
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
from gqa_scaling.study.results import Heads
from gqa_scaling.study.shapes import Family, effective_context


@dataclass(frozen=True)
class Serving:
    """How the model is served, for costs in bytes, seconds and dollars, and what must hold.

    `batch` sequences share one copy of the weights. What is held are all weights, embeddings
    included, and the KV caches. Decoding one token of each takes the longer of reading the bytes
    of N (without embeddings) and the caches at the hardware's bandwidth and computing at its peak
    times its MFU. `limit_bytes`, of what is held, and `kv_multiple` rule configurations out.
    """

    batch: int = 1
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0
    hardware: Hardware | None = None
    limit_bytes: float = math.inf
    kv_multiple: int = 1

    def __post_init__(self) -> None:
        between("batch", self.batch, 1, 1e9, "sequences")
        between("kv_multiple", self.kv_multiple, 1, MOST_HEADS)
        for name in ("weight_bytes", "cache_bytes"):
            between(name, getattr(self, name), 0.01, 100)
        require(self.limit_bytes > 0, f"limit_bytes={self.limit_bytes} must be greater than 0")
        if self.hardware is not None:
            between("price", self.hardware.price, 0, 1e6, "dollars an hour")

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
        """In words, for what is printed."""
        where = f" on {self.hardware.name}" if self.hardware else ""
        limit = f", at most {self.limit_bytes:.4g} bytes" if math.isfinite(self.limit_bytes) else ""
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
        f"objective={objective!r} needs hardware: name a row such as v5e or h100",
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

    def costs(self, n: np.ndarray | float, heads: Heads) -> Costs:
        """Costs of N*, of the shape that the family gives it.

        Heads with a pattern read and keep T_eff keys (`shapes.effective_context`) of the T in
        `context`.
        """
        n = np.asarray(n, float)
        layers, width = self.family.shape(n, heads)
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
        if s.hardware:
            compute = s.batch * inference_flops(n, effective, *size, n_heads)
            busy = compute / (s.hardware.peak_flops * s.hardware.mfu)
            seconds = np.maximum(busy, read / s.hardware.bandwidth) / s.batch
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


# --------------------------------------------------------------------------------------- in words


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
        "seconds": "per decoded token",
        "dollars": "per million decoded tokens",
        "saving": "1 - cost / baseline's cost",
        "gain": "nats: baseline's loss minus the configuration's, at the largest sizes of that cost",
    }
