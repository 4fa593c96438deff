"""What a model costs: parameters, FLOPs, memory, and the hardware-aware cost Z.

Arithmetic only, no imports of arrays: every function takes Python numbers or NumPy arrays alike.

Symbols are those of Chen et al. 2025 (arXiv 2503.09579): L layers, d hidden size, F FFN size,
d_h head size, n_h query heads, n_kv KV heads, V vocabulary, T context length, N parameters
without embeddings, D training tokens. One multiply-add counts as two FLOPs. Memory is counted in
*values* where the paper does so and in *bytes* where a name ends in `_bytes`; the two never mix.

Conventions, always named in what is printed:
- `per_token`: the paper's written equations 3 and 4, the cost of one new token at context T.
- `per_sequence`: what its Figure 2 plots, T (N + 2 T L d_h n_h), for a whole sequence.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from gqa_scaling.config import ModelConfig, RunConfig, UserError, require

Convention = Literal["per_token", "per_sequence"]
CONVENTIONS: tuple[Convention, ...] = ("per_token", "per_sequence")
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
    wanted = run.tokens if run.tokens is not None else run.tokens_per_param * n_exact(run.model)
    require(
        wanted >= run.batch_tokens,
        f"a budget of {wanted:,.0f} tokens must hold at least one batch of {run.batch_tokens:,}",
    )
    return round(wanted / run.batch_tokens)


# ------------------------------------------------------------------------------- inference


def inference_memory(
    n: Number, context: Number, n_layers: Number, head_dim: Number, n_kv_heads: Number
) -> Number:
    """Values held to decode one sequence: N + 2 T L d_h n_kv (Chen et al. 2025, eq. 4)."""
    return n + kv_cache_values(context, n_layers, head_dim, n_kv_heads)


def kv_cache_values(
    context: Number, n_layers: Number, head_dim: Number, n_kv_heads: Number
) -> Number:
    """Values in the KV cache of one sequence: 2 T L d_h n_kv."""
    return 2 * context * n_layers * head_dim * n_kv_heads


def inference_flops(
    n: Number,
    context: Number,
    n_layers: Number,
    head_dim: Number,
    n_heads: Number,
    convention: Convention = "per_token",
) -> Number:
    """Forward cost at context T.

    per_token: 2 N + 4 T L d_h n_h, FLOPs of one new token (Chen et al. 2025, eq. 3).
    per_sequence: T (N + 2 T L d_h n_h), as plotted in its Figure 2: half of T times per_token.
    """
    per_token = 2 * n + 4 * context * n_layers * head_dim * n_heads
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
        return (
            self.weight * memory**self.memory_power + (1 - self.weight) * flops**self.compute_power
        )


# -------------------------------------------------------------------------------- training


def training_flops_per_token(model: ModelConfig, context: int, causal: bool = True) -> int:
    """Model FLOPs of forward and backward for one token, the output head included.

    6 N + 6 d V + 12 L Tbar d_h n_h (Chen et al. 2025, eq. 10 with its table 2), where Tbar is the
    mean number of keys a query needs: T/2 when causal, T when every product is counted. Norms are
    parameters without products and are left out.
    """
    p = parameters(model)
    keys = context / 2 if causal else context
    attention = 12 * model.n_layers * keys * model.head_dim * model.n_heads
    return round(6 * (p.attention + p.ffn) + 6 * model.d_model * model.vocab_size + attention)


def training_flops(run: RunConfig, causal: bool = True) -> int:
    """Model FLOPs of a whole run: `training_flops_per_token` times D."""
    return training_flops_per_token(run.model, run.context_length, causal) * training_tokens(run)


def hardware_flops_per_token(
    model: ModelConfig, context: int, remat: str, full_attention: bool
) -> int:
    """FLOPs an implementation executes for one token, recomputation included.

    `full_attention` says that all T x T products are computed. remat "full" runs every layer's
    forward again but for its last product, which no gradient needs; "dots" keeps the matrix
    products of parameters and repeats those of attention.
    """
    p = parameters(model)
    keys = context if full_attention else context / 2
    attention = 4 * model.n_layers * keys * model.head_dim * model.n_heads
    linear = 2 * (p.attention + p.ffn)
    head = 2 * model.d_model * model.vocab_size
    last = 2 * model.n_layers * model.d_model * model.ffn_dim
    again = {"none": 0, "dots": attention, "full": attention + linear - last}[remat]
    return round(3 * (attention + linear + head) + again)


def training_memory(n: Number, context: Number, d_model: Number, n_layers: Number) -> Number:
    """Values held in training: 4 N + T d L (Chen et al. 2025, eqs. 11 and 12)."""
    return 4 * n + context * d_model * n_layers


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes that one device holds while training, an estimate from shapes alone."""

    state: int
    gradients: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.activations + self.logits


LOGIT_BUDGET_BYTES = 64 * 2**20


def training_bytes(run: RunConfig, devices: int = 1) -> TrainingBytes:
    """Predicted bytes on one of `devices`.

    fp32 parameters and two moments (12 bytes a parameter) and fp32 gradients (4, twice that when
    accumulating), shared by the fsdp, context and tensor axes; activations kept for the backward
    pass by the remat policy, shared by all devices; a chunk of fp32 logits with its gradient.
    """
    m, p, axes = run.model, parameters(run.model), run.parallel
    width = 2 if m.dtype == "bfloat16" else 4
    shards = axes.fsdp * axes.context * axes.tensor
    tokens = run.batch_tokens / axes.accumulation / devices
    q, kv = m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    products = q + 2 * kv + 2 * m.d_model + 2 * m.ffn_dim  # outputs of the layer's matrices
    kept = {
        "full": m.d_model,
        "dots": m.d_model + products,
        "none": 5 * m.d_model + products + 2 * (q + kv) + 2 * m.ffn_dim,
    }[axes.remat]
    layer_again = 0 if axes.remat == "none" else 5 * m.d_model + 2 * products
    return TrainingBytes(
        state=math.ceil(12 * p.total / shards),
        gradients=math.ceil(4 * (2 if axes.accumulation > 1 else 1) * p.total / shards),
        activations=math.ceil(tokens * width * (kept * m.n_layers + layer_again)),
        logits=math.ceil(2 * min(LOGIT_BUDGET_BYTES, 4 * tokens * m.vocab_size)),
    )


def checkpoint_bytes(run: RunConfig) -> int:
    """Disk that a run needs while it trains: its checkpoints, fp32 parameters and moments."""
    return (run.checkpoint.keep + 1) * 12 * parameters(run.model).total


def finished_bytes(run: RunConfig) -> int:
    """Disk that a finished run keeps: fp32 parameters."""
    return 4 * parameters(run.model).total
