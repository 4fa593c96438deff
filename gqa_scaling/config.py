"""What a run is: frozen dataclasses that refuse nonsense when they are built.

`RunConfig` holds everything that makes one training run. Two digests are taken from it:
`digest` covers only what defines the trained model, `evaluation_digest` only how it is judged,
so neither a different mesh nor a new evaluation ever retrains anything.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from gqa_scaling import baselines
from gqa_scaling.context_sharding import ContextSharding, LayerPattern
from gqa_scaling.fields import (
    INT32_MAX,
    Json,
    between,
    digest_of,
    flat,
    non_default,
    not_negative,
    positive,
    require,
    round_up,
)
from gqa_scaling.fields import UserError as UserError  # others take it from here
from gqa_scaling.text import DataConfig as DataConfig
from gqa_scaling.text import EvaluationConfig as EvaluationConfig
from gqa_scaling.text import Needles as Needles
from gqa_scaling.text import NeedleTask as NeedleTask

SCHEMA_VERSION = 1
DIGEST_LENGTH = 12  # hex digits
# The limits of what a run may name, each far above anything built. Sizes of arrays and the seed are
# int32 on the devices; token counts and the like are int64 (`fields.py`, which also bounds floats).
MOST_LAYERS = MOST_HEADS = 10_000
MOST_DEVICES = 10**6  # along one axis of a mesh
MOST_NAME_BYTES = 255 - len("-0123456789ab")  # the file system's, less what a folder adds
MAX_EPOCHS = 4.0  # more passes over a corpus must be allowed (`DataConfig.allow_repeats`)
Implementation = Literal["reference", "blockwise", "splash", "triton", "cudnn"]  # of attention
Convention = Literal["per_token", "per_sequence"]  # how inference FLOPs are counted (`costs.py`)


@dataclass(frozen=True)
class RopeScaling(Json):
    """RoPE stretched to contexts longer than those trained on, as Llama 3.1 does (Grattafiori et al.
    2024, arXiv 2407.21783).

    A pair that turns less than `low_frequency` times within `trained_context` tokens turns `factor`
    times slower, one that turns more than `high_frequency` times as before, others in between.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    trained_context: int

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "factor", "low_frequency", "trained_context", most=INT32_MAX)
        require(
            self.low_frequency < self.high_frequency,
            f"high_frequency={self.high_frequency} must be greater than "
            f"low_frequency={self.low_frequency}",
        )


@dataclass(frozen=True)
class ModelConfig(Json):
    """A Llama-style GQA transformer (Chen et al. 2025, section 3).

    The head count is decoupled from the hidden size: `n_heads * head_dim` need not equal
    `d_model`. `d_ff` defaults to 8/3 `d_model` rounded up to a multiple of 32. `rope_scaling` None:
    pairs turn as `rope_theta` says. `pattern` says which keys each KV head of each layer sees; None:
    all before it, in every layer.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int = 64
    d_ff: int | None = None
    vocab_size: int = 50304
    tie_embeddings: bool = True
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qk_norm: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    pattern: ContextSharding | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "n_layers", most=MOST_LAYERS)
        positive(self, "n_heads", "n_kv_heads", most=MOST_HEADS)
        positive(self, "d_model", "d_ff", "head_dim", "vocab_size", most=INT32_MAX)
        positive(self, "rope_theta", "norm_eps")
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}: each KV head serves "
            "the same number of query heads",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even: RoPE turns pairs")
        if self.d_ff == self._default_ffn_dim:  # one spelling, one digest
            object.__setattr__(self, "d_ff", None)
        if self.pattern is not None:
            self.pattern.layers(self.n_layers, self.n_kv_heads)  # refuses what does not fit

    @property
    def layer_patterns(self) -> tuple[LayerPattern, ...]:
        """What each KV head of each layer sees, None for all before it."""
        if self.pattern is None:
            return ((None,) * self.n_kv_heads,) * self.n_layers
        return self.pattern.layers(self.n_layers, self.n_kv_heads)

    @property
    def ffn_dim(self) -> int:
        """FFN size F: `d_ff`, or its default."""
        return self.d_ff or self._default_ffn_dim

    @property
    def _default_ffn_dim(self) -> int:
        return round_up(8 * self.d_model / 3, 32)

    @property
    def group_size(self) -> int:
        """Query heads per KV head, G."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True)
class OptimizerConfig(Json):
    """AdamW with a warmup-stable-decay or cosine schedule (Chen et al. 2025, appendix).

    `warmup` and `decay` are fractions of all steps; the decay is a cosine from `learning_rate`
    to `final_fraction` of it. With schedule "cosine" the decay begins where the warmup ends, and
    `decay` stays at its default.
    `warmup_tokens` > 0 is the warmup in tokens instead: the same at every token budget, so that
    runs which differ in their budget alone are one run until the decay (`experiment/branches.py`).
    Weight decay acts on matrices only.
    `spike_factor` > 0 skips steps whose gradient norm exceeds that many times its running mean: off
    by default, as it changes what is learned. Each step skipped so raises that mean by a tenth.
    """

    learning_rate: float = 1e-3
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.1
    warmup_tokens: int = 0
    decay: float = 0.2
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    spike_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "learning_rate", "epsilon", "clip_norm")
        for name in ("warmup", "decay", "final_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{name}={value} must lie between 0 and 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must be at least 0 and less than 1")
        not_negative(self, "weight_decay", "warmup_tokens")
        require(
            not self.warmup_tokens or self.warmup == 0.1,  # one spelling, one digest
            f"give one of warmup={self.warmup} and warmup_tokens={self.warmup_tokens:,}",
        )
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"spike_factor={self.spike_factor} must be 0 (off) or greater than 1",
        )
        require(
            self.schedule == "wsd" or self.decay == 0.2,  # one spelling, one digest
            f"decay={self.decay} is for schedule wsd: with schedule cosine the decay takes all steps "
            "after the warmup, leave it out",
        )
        require(
            self.schedule == "cosine" or self.warmup + self.decay <= 1,
            f"warmup={self.warmup} and decay={self.decay} are fractions of all steps and must not "
            "exceed 1 together",
        )

    def phases(self, steps: int, batch_tokens: int) -> tuple[int, int]:
        """Steps of the warmup and of the decay, of `steps` in all."""
        warmup = round(self.warmup * steps)
        if self.warmup_tokens:
            warmup = max(1, round(self.warmup_tokens / batch_tokens))
        rest = steps - warmup
        return warmup, min(round(self.decay * steps), rest) if self.schedule == "wsd" else rest


@dataclass(frozen=True)
class ParallelConfig(Json):
    """How a run is spread over devices and memory. It may change when a run is resumed.

    `data` -1 takes every device the other axes leave over. `accumulation` splits a batch into
    that many microbatches. `remat` says what the backward pass recomputes: nothing, everything
    but the matrix products ("dots"), or whole layers ("full"). `attention` is the implementation,
    "auto" that of the platform (`layout.attention_implementation`).
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    accumulation: int = 1
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", Implementation] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.data == -1 or self.data > 0, f"data={self.data} must be -1 or greater than 0")
        positive(self, "fsdp", "context", "tensor", most=MOST_DEVICES)
        require(self.data <= MOST_DEVICES, f"data={self.data} must be at most {MOST_DEVICES:,}")
        positive(self, "accumulation")


@dataclass(frozen=True)
class CheckpointConfig(Json):
    """Save the whole training state every `every_steps` steps and keep the last `keep` of them."""

    every_steps: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "every_steps", "keep")


@dataclass(frozen=True)
class RunConfig(Json):
    """One training run. Exactly one of `tokens` and `tokens_per_param` sets its length;
    `tokens_per_param` counts the run's own non-embedding parameters.

    `name` and `note` are for people: neither is part of the digest and neither is ever parsed.
    A step whose loss or gradient is not finite is skipped, and `max_nonfinite_steps` of them in a
    row stop the run, 0 and 1 at the first. So do `max_spike_steps` in a row that were skipped for
    their gradient norm (`optimizer.spike_factor`). A run that ends does so with any higher limit
    too, so both may change when a run is resumed. `profile` names steps to trace, the first and the
    last, such as "20:30".

    `imported` is the hash of parameters that were trained elsewhere and brought in as a run
    (`gqa-scaling import`): no step was taken here, and its token budget says nothing.
    `start_from` is a run whose trained parameters this one begins with, EXPERIMENT/NAME-DIGEST, in
    place of fresh ones; of it the digest alone is part of this one's. The optimizer begins anew.
    """

    name: str
    model: ModelConfig
    context_length: int
    batch_tokens: int
    tokens: int | None = None
    tokens_per_param: float | None = None
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    max_nonfinite_steps: int = 0
    max_spike_steps: int = 50
    profile: str = ""
    note: str = ""
    imported: str = ""
    start_from: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.name), "name must not be empty")
        require(
            self.start_from is None
            or re.fullmatch(r"[^/]+/([^/]+-)?[0-9a-f]{12}", self.start_from) is not None,
            f"start_from={self.start_from!r} must be EXPERIMENT/NAME-DIGEST, as a run's folder is "
            "called, such as smoke/L2-d24-h4-kv1-72e2d64a91e3",
        )
        require(
            re.fullmatch(r"[^\W_][\w.+-]*", self.name) is not None,
            f"name={self.name!r} may hold letters, digits and -_.+ and begins with a letter or digit",
        )
        require(
            len(self.name.encode()) <= MOST_NAME_BYTES,
            f"name={self.name!r} has {len(self.name.encode())} bytes and may have at most "
            f"{MOST_NAME_BYTES}: it names a folder",
        )
        positive(self, "context_length", "batch_tokens", most=INT32_MAX)
        not_negative(self, "seed", "max_nonfinite_steps", "max_spike_steps")
        require(self.seed <= INT32_MAX, f"seed={self.seed} must be at most {INT32_MAX:,}")
        require(
            (self.tokens is None) != (self.tokens_per_param is None),
            "give exactly one of tokens and tokens_per_param",
        )
        positive(self, "tokens", "tokens_per_param")
        _ = self.profiled_steps  # refuses what names none
        require(
            self.batch_tokens % self.context_length == 0,
            f"batch_tokens={self.batch_tokens} must be a multiple of "
            f"context_length={self.context_length}: a batch holds whole sequences",
        )
        require(
            self.batch_size % self.parallel.accumulation == 0,
            f"accumulation={self.parallel.accumulation} must divide the {self.batch_size} "
            f"sequences of a batch ({self.batch_tokens} tokens / {self.context_length})",
        )
        require(
            self.evaluation_context % self.context_length == 0,
            f"evaluation.longest_context={self.evaluation_context} must be a multiple of "
            f"context_length={self.context_length}, so that every run sees the same targets",
        )
        require(
            self.evaluation.tokens >= self.evaluation_context,
            f"evaluation.tokens={self.evaluation.tokens} must be at least "
            f"longest_context={self.evaluation_context}",
        )
        for context in self.evaluation.contexts:
            require(
                self.evaluation_context % context == 0,
                f"evaluation.contexts={context} must divide the longest context of the evaluation, "
                f"{self.evaluation_context}, so that the same targets are judged",
            )

    @property
    def batch_size(self) -> int:
        """Sequences in a batch, B."""
        return self.batch_tokens // self.context_length

    @property
    def evaluation_context(self) -> int:
        """How long the pieces of the evaluation stream are, in targets."""
        return self.evaluation.longest_context or self.context_length

    @property
    def profiled_steps(self) -> range:
        """The steps to trace, counted from 1; none by default."""
        if not self.profile:
            return range(0)
        found = re.fullmatch(r"(\d{1,12}):(\d{1,12})", self.profile)
        first, last = map(int, found.groups()) if found else (0, 0)
        require(
            1 <= first <= last,
            f"profile={self.profile!r} must be FIRST:LAST, steps counted from 1, such as 20:30",
        )
        return range(first, last + 1)

    def definition(self) -> dict[str, Any]:
        """Just the fields that define the trained model, defaults left out."""
        kept = {k: v for k, v in non_default(self).items() if k not in _NOT_DEFINING}
        declared = self.data.declaration()
        data = {k: declared[k] for k in kept["data"] if k in declared}
        if self.data.needles is not None:
            data["needles"] = kept["data"]["needles"]
        return kept | {"data": data} | self._parent

    @property
    def _parent(self) -> dict[str, str]:
        """What of `start_from` is part of a definition."""
        return {} if self.start_from is None else {"start_from": self.start_from[-DIGEST_LENGTH:]}

    @functools.cached_property
    def digest(self) -> str:
        """12 hex digits over `definition`: equal digests mean the same trained model."""
        return digest_of(self.definition())

    @functools.cached_property
    def evaluation_digest(self) -> str:
        """12 hex digits over how the loss is measured."""
        asked = non_default(self.evaluation)
        kept = {"tokens": self.evaluation.tokens, "multiple_of": self.evaluation_context}
        kept |= {name: asked[name] for name in ("contexts", "needles", "average") if name in asked}
        if "average" in kept:  # of states that are saved so far apart
            kept["checkpoint_steps"] = self.checkpoint.every_steps
        return digest_of(kept)


# Fields of a run that may change when it is resumed: they do not define the trained model. Of
# `data` all that `DataConfig.declaration` names does, of the rest every field.
_NOT_DEFINING = {
    "name",
    "note",
    "evaluation",
    "parallel",
    "checkpoint",
    "max_nonfinite_steps",
    "max_spike_steps",
    "profile",
}


def differing_fields(old: RunConfig, new: RunConfig) -> list[str]:
    """The defining fields in which two runs differ, as 'model.n_heads: 8 -> 4'."""
    a, b = defining_fields(old), defining_fields(new)
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def defining_fields(run: RunConfig) -> dict[str, Any]:
    """Every defining field by its dotted name, those at their default too."""
    kept = {k: v for k, v in run.to_dict().items() if k not in _NOT_DEFINING}
    needles = run.data.needles and run.data.needles.to_dict()
    return flat(kept | {"data": run.data.declaration() | {"needles": needles}} | run._parent)


# What a study may be told and asked. The limits are far outside anything that is measured, and
# near enough that no cost computed from them leaves the range of a float.
LOSSES = (0.01, 100.0)  # nats per token
POWERS = (0.01, 4.0)  # of memory and FLOPs in Z
MOST_CONTEXT = 10**12
MOST_TOKENS = 1e18  # of training


@dataclass(frozen=True)
class Question(Json):
    """What a study asks of its runs: the cheapest configuration for each loss and context.

    `losses` are targets in nats (None: chosen inside the range every configuration covers),
    `contexts` the inference context lengths in tokens. Savings are stated against `baseline`: heads,
    (n_heads, n_kv_heads) and pattern if any, or a text that `baselines.named` reads (None: the most
    heads trained). `convention` names how inference FLOPs are counted; `weight`, `memory_power` and
    `compute_power` are lambda, alpha, beta of Chen et al. 2025, section 4.2. Costs that differ by no more than
    `indifference`, a share (0.01 is 1%), are as good as equal. A `demonstration` says so.
    """

    contexts: tuple[int, ...] = (8192, 32768, 131072)
    losses: tuple[float, ...] | None = None
    baseline: tuple[int, int] | tuple[int, int, ContextSharding] | str | None = None
    convention: Convention = "per_token"
    weight: float = 0.9
    memory_power: float = 1 / 2
    compute_power: float = 1 / 3
    indifference: float = 0.01
    demonstration: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.contexts), "contexts must name at least one context length")
        for context in self.contexts:
            between("context", context, 1, MOST_CONTEXT, "tokens")
        for loss in self.losses or ():
            between("target loss", loss, *LOSSES, "nats per token")
        for name in ("contexts", "losses"):  # what is named twice is asked once
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        if isinstance(self.baseline, str):
            baselines.named(self.baseline)
        between("lambda", self.weight, 0, 1)
        between("alpha", self.memory_power, *POWERS)
        between("beta", self.compute_power, *POWERS)
        between("indifference", self.indifference, 0, 1)
