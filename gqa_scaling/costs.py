"""What a model costs: parameters, FLOPs, memory, and the hardware-aware cost Z.

Arithmetic only, no imports of arrays: every function takes Python numbers or NumPy arrays alike.

Symbols are those of Chen et al. 2025 (arXiv 2503.09579): L layers, d hidden size, F FFN size,
d_h head size, n_h query heads, n_kv KV heads, V vocabulary, T context length, N parameters
without embeddings, D training tokens. One multiply-add counts as two FLOPs. Memory is counted in
*values* where the paper does so and in *bytes* where a name ends in `_bytes`; the two never mix.

Where heads read part of the context (`context_sharding`), T_eff stands for T in what attention
computes and keeps, Tbar for T/2 in training: means over layers and KV heads of the keys that a
head reads for the last token of T, and for one token of a training sequence.

Conventions, always named in what is printed:
- `per_token`: the paper's written equations 3 and 4, the cost of one new token at context T.
- `per_sequence`: what its Figure 2 plots, T (N + 2 T L d_h n_h), for a whole sequence.
"""

import typing
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from gqa_scaling.config import Convention, ModelConfig, RunConfig, UserError, require
from gqa_scaling.context_sharding import effective_context, mean_keys
from gqa_scaling.context_sharding import kv_cache_values as allocated

CONVENTIONS: tuple[Convention, ...] = typing.get_args(Convention)
LOGIT_BYTES = 64 * 2**20  # of float32 logits that a loss forms at once, on each device
Number = Any  # a Python number or a NumPy array of them


@dataclass(frozen=True)
class Parameters:
    """Parameters of a built model by component (Chen et al. 2025, table 2, plus the norms)."""

    embedding: int
    output: int
    attention: int
    ffn: int
    norm: int

    @property
    def non_embedding(self) -> int:
        """N: what the loss laws count (`n_exact`)."""
        return self.attention + self.ffn + self.norm

    @property
    def total(self) -> int:
        return self.embedding + self.output + self.non_embedding


def parameters(model: ModelConfig) -> Parameters:
    """Exact parameter counts of the model that `create` builds; `output` is 0 when tied."""
    m, embedding = model, model.vocab_size * model.d_model
    return Parameters(
        embedding=embedding,
        output=0 if m.tie_embeddings else embedding,
        attention=2 * m.n_layers * m.d_model * m.head_dim * (m.n_heads + m.n_kv_heads),
        ffn=3 * m.n_layers * m.d_model * m.ffn_dim,
        norm=(2 * m.n_layers + 1) * m.d_model + (2 * m.n_layers * m.head_dim if m.qk_norm else 0),
    )


def n_exact(model: ModelConfig) -> int:
    """Non-embedding parameters of the built model."""
    return parameters(model).non_embedding


def n_formula(
    n_layers: Number, d_model: Number, n_heads: Number, n_kv_heads: Number, head_dim: Number = 64
) -> Number:
    """8 L d^2 + 2 L d d_h (n_h + n_kv): the count behind the published points, F = 8d/3."""
    return 8 * n_layers * d_model**2 + 2 * n_layers * d_model * head_dim * (n_heads + n_kv_heads)


def training_tokens(run: RunConfig) -> int:
    """D: the token budget, a whole number of batches, at least one."""
    return training_steps(run) * run.batch_tokens


def training_steps(run: RunConfig) -> int:
    """Optimizer steps: the budget divided by the batch, rounded to nearest."""
    # exactly one of the two is given
    wanted = (run.tokens or 0) + (run.tokens_per_param or 0) * n_exact(run.model)
    require(
        wanted >= run.batch_tokens,
        f"a budget of {wanted:,.0f} tokens must hold at least one batch of {run.batch_tokens:,}",
    )
    return round(wanted / run.batch_tokens)


# ------------------------------------------------------------------------------- inference


def inference_memory(
    n: Number, context: Number, n_layers: Number, head_dim: Number, n_kv_heads: Number
) -> Number:
    """Values held to decode one sequence: N + 2 T L d_h n_kv (Chen et al. 2025, eq. 4).

    `context` is T, or T_eff where heads keep part of it.
    """
    return n + kv_cache_values(context, n_layers, head_dim, n_kv_heads)


def kv_cache_values(
    context: Number, n_layers: Number, head_dim: Number, n_kv_heads: Number
) -> Number:
    """Values in the KV cache of one sequence: 2 T L d_h n_kv, T_eff for T as in `inference_memory`.

    What the cache of one model really allocates is `context_sharding.kv_cache_values`: the same for
    dense heads, up to a block more for others.
    """
    return 2 * context * n_layers * head_dim * n_kv_heads


def inference_flops(
    n: Number,
    context: Number,
    n_layers: Number,
    head_dim: Number,
    n_heads: Number,
    convention: Convention = "per_token",
    effective: Number | None = None,
) -> Number:
    """Forward cost at context T, where heads read `effective` = T_eff keys, all T without it.

    per_token: 2 N + 4 T_eff L d_h n_h, FLOPs of one new token (Chen et al. 2025, eq. 3).
    per_sequence: T (N + 2 T_eff L d_h n_h), as plotted in its Figure 2: half of T times per_token.
    """
    keys = context if effective is None else effective
    per_token = 2 * n + 4 * keys * n_layers * head_dim * n_heads
    if convention == "per_token":
        return per_token
    if convention == "per_sequence":
        return context * per_token / 2
    raise UserError(f"convention={convention!r} must be one of {', '.join(CONVENTIONS)}")


@dataclass(frozen=True)
class HardwareCost:
    """Z = weight M^memory_power + (1 - weight) C^compute_power (Chen et al. 2025, section 4.2).

    M in values, C in the units of the named convention. `weight` is the paper's lambda:
    1 counts memory only, 0 compute only.
    """

    weight: float = 0.9
    memory_power: float = 1 / 2
    compute_power: float = 1 / 3

    def __post_init__(self) -> None:
        require(0 <= self.weight <= 1, f"lambda={self.weight} must lie between 0 and 1")
        require(self.memory_power > 0, f"alpha={self.memory_power} must be greater than 0")
        require(self.compute_power > 0, f"beta={self.compute_power} must be greater than 0")

    def __call__(self, memory: Number, flops: Number) -> Number:
        parts = (
            (self.weight, memory, self.memory_power),
            (1 - self.weight, flops, self.compute_power),
        )
        # what has no weight is left out: of a model out of reach it would be 0 times infinity
        return sum(weight * cost**power for weight, cost, power in parts if weight)


# ------------------------------------------------- inference as it is computed, of a built model

VALUE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4  # of each key and each value of a head that int8 keeps, as float32


def weight_bytes(model: ModelConfig) -> int:
    """Bytes of weights that one step reads: all but the embedding, with the output matrix, in the
    model's dtype, norms in float32."""
    p = parameters(model)
    products = p.attention + p.ffn + model.d_model * model.vocab_size
    return VALUE_BYTES[model.dtype] * products + 4 * p.norm


def cache_bytes(model: ModelConfig, context: int, batch: int, cache: str) -> int:
    """Bytes of the keys and values that the caches of sequences of T tokens hold in a type."""
    values = allocated(model.layer_patterns, context, model.head_dim)
    return batch * values // (2 * model.head_dim) * _slot_bytes(model, cache)


def decode_flops(model: ModelConfig, context: int, batch: int) -> int:
    """FLOPs of a step that decodes one token of each sequence, the last of T: 2 N + 2 d V + 4 T_eff L d_h n_h for each sequence, norms left out."""
    p = parameters(model)
    linear = 2 * (p.attention + p.ffn) + 2 * model.d_model * model.vocab_size
    keys = effective_context(model.layer_patterns, context)
    return round(batch * (linear + 4 * keys * model.n_layers * model.head_dim * model.n_heads))


def prefill_bytes(
    model: ModelConfig,
    context: int,
    batch: int,
    cache: str,
    chunk: int,
    shares: int = 1,
    copies: int = 1,
) -> int:
    """Bytes that prompts of T tokens read, taken in chunks: for each of these once the weights, and
    the cache of those before it; all `shares` copies of the weights, and so many of the cache."""
    starts = range(0, context, chunk)
    heads = Counter(
        head and replace(head, offset=0) for layer in model.layer_patterns for head in layer
    )
    # a kind of heads at a time: long prompts have millions of chunks
    slots = sum(
        many * (sum(starts) if head is None else sum(map(head.slots, starts)))
        for head, many in heads.items()
    )
    weights, held = len(starts) * weight_bytes(model), batch * slots * _slot_bytes(model, cache)
    return shares * weights + copies * held


def _slot_bytes(model: ModelConfig, cache: str) -> int:
    """Bytes of the key and the value that a head keeps of a token, in int8 with their scales."""
    scale = SCALE_BYTES if cache == "int8" else 0
    return 2 * (VALUE_BYTES[cache] * model.head_dim + scale)


def prefill_flops(model: ModelConfig, context: int, batch: int) -> int:
    """FLOPs that prompts of T tokens need: 2 N + 4 Tbar L d_h n_h a token, as `training_keys` has Tbar,
    and for the last of each the output matrix."""
    p = parameters(model)
    attention = 4 * model.n_layers * training_keys(model, context) * model.head_dim * model.n_heads
    each = context * (2 * (p.attention + p.ffn) + attention)
    return round(batch * (each + 2 * model.d_model * model.vocab_size))


# -------------------------------------------------------------------------------- training


def training_flops_per_token(model: ModelConfig, context: int, causal: bool = True) -> int:
    """Model FLOPs of forward and backward for one token, the output head included.

    6 N + 6 d V + 12 L Tbar d_h n_h (Chen et al. 2025, eq. 10 with its table 2), where Tbar is the
    mean number of keys a query needs when causal (`training_keys`), and T when the products of all
    queries and keys are counted, those that a mask or a pattern hides too. Norms are parameters
    without products and are left out.
    """
    p = parameters(model)
    keys = training_keys(model, context) if causal else context
    attention = 12 * model.n_layers * keys * model.head_dim * model.n_heads
    return round(6 * (p.attention + p.ffn) + 6 * model.d_model * model.vocab_size + attention)


def training_keys(model: ModelConfig, context: int) -> float:
    """Tbar: keys that a query of a training sequence needs, a mean over positions, layers and KV
    heads, half of its own counted: T/2 when dense, as Chen et al. 2025 count, and
    `context_sharding.mean_keys` - 1/2 for a pattern, about W (1 - W/2T) + (T - W)^2 / (2 T s)."""
    if model.pattern is None:
        return context / 2
    return mean_keys(model.layer_patterns, context) - 1 / 2


def training_flops_formula(
    n: Number,
    context: Number,
    n_layers: Number,
    head_dim: Number,
    n_heads: Number,
    causal: bool = True,
    keys: Number | None = None,
) -> Number:
    """FLOPs of forward and backward for one token as the paper counts: 6 N + 12 L Tbar d_h n_h.

    Chen et al. 2025, eq. 10 with its table 2; Tbar is `keys`, without it T/2 when causal and T
    otherwise. The output matrix, which `training_flops_per_token` includes, is left out, and L may
    be real-valued.
    """
    if keys is None:
        keys = context / 2 if causal else context
    return 6 * n + 12 * n_layers * keys * head_dim * n_heads


def training_flops(run: RunConfig, causal: bool = True) -> int:
    """Model FLOPs of a whole run: `training_flops_per_token` times D."""
    return training_flops_per_token(run.model, run.context_length, causal) * training_tokens(run)


def hardware_flops_per_token(
    model: ModelConfig, context: int, remat: str, full_attention: bool
) -> int:
    """FLOPs an implementation executes for one token, recomputation included.

    `full_attention` says that all T x T products are computed, whatever the pattern. remat "full"
    runs every layer's forward again but for its last product, which no gradient needs; "dots" keeps
    the matrix products of parameters and repeats those of attention. Other attention computes what
    is visible, `training_keys` for each query (tiles cut by the mask count for what they show), and
    forms the scores a second time in its backward pass.
    """
    p = parameters(model)
    keys = context if full_attention else training_keys(model, context)
    attention = 4 * model.n_layers * keys * model.head_dim * model.n_heads
    linear = 2 * (p.attention + p.ffn)
    head = 2 * model.d_model * model.vocab_size
    last = 2 * model.n_layers * model.d_model * model.ffn_dim
    again = {"none": 0, "dots": attention, "full": attention + linear - last}[remat]
    scores = 0 if full_attention else attention / 2
    return round(3 * (attention + linear + head) + again + scores)
