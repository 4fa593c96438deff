"""A Llama-style transformer with grouped-query attention (Chen et al. 2025, section 3).

Pre-norm RMSNorm, RoPE, SwiGLU, no biases, no dropout. Array names end in their axes: B batch,
T and S query and key positions, D hidden, K KV heads, G query heads per KV head, H head size,
F FFN, V vocabulary, L layers. All layers lie in one stack of parameters, scanned over, so
that compile time does not grow with depth.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from gqa_scaling.config import Implementation, ModelConfig
from gqa_scaling.devices.layout import zigzag
from gqa_scaling.devices.mesh import axis_size, constrain
from gqa_scaling.model.attention import attend
from gqa_scaling.model.einsum import einsum_f32
from gqa_scaling.model.embedding import embed
from gqa_scaling.model.projection import project
from gqa_scaling.model.swiglu import swiglu

Q_AXES = ("embed", "kv_heads", "group", "head_dim")
KV_AXES = ("embed", "kv_heads", "head_dim")
O_AXES = ("kv_heads", "group", "head_dim", "embed")


def create(config: ModelConfig, seed: int) -> "Transformer":
    """A freshly initialised model, parameters in float32; equal seeds give equal bits on any mesh."""
    return nnx.merge(*_create(config, seed))


@functools.partial(jax.jit, static_argnums=0)
def _create(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(Transformer(config, jax.random.key(seed)))


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit normal, cut at two deviations and rescaled to unit variance."""
    return jax.random.truncated_normal(key, -2, 2, shape) / 0.87962566


def _param(value: jax.Array, *axes: str) -> nnx.Param:
    return nnx.Param(value, out_sharding=axes, eager_sharding=False)


class Layers(nnx.Module):
    """The parameters of all layers stacked along a first axis L; called as one of them."""

    def __init__(self, config: ModelConfig, key: jax.Array) -> None:
        L, D, F = config.n_layers, config.d_model, config.ffn_dim
        K, G, H = config.n_kv_heads, config.group_size, config.head_dim
        # One draw for all matrices, each a slice of rows of size D: eight draws took 2 s to compile.
        sizes = (K * G * H, K * H, K * H, K * G * H, F, F, F)
        rows = jnp.split(
            _normal(key, (L, sum(sizes), D)), list(itertools.accumulate(sizes))[:-1], 1
        )
        q, k, v, o, gate, up, down = rows
        inward, residual = D**-0.5, (2 * L) ** -0.5

        def into(rows_LRD: jax.Array, *shape: int) -> jax.Array:
            return inward * rows_LRD.swapaxes(1, 2).reshape(L, D, *shape)

        self.attention_norm_D = _param(jnp.ones((L, D)), "layers", "embed")
        self.q_DKGH = _param(into(q, K, G, H), "layers", *Q_AXES)
        self.k_DKH = _param(into(k, K, H), "layers", *KV_AXES)
        self.v_DKH = _param(into(v, K, H), "layers", *KV_AXES)
        o_KGHD = residual * (K * G * H) ** -0.5 * o.reshape(L, K, G, H, D)
        self.o_KGHD = _param(o_KGHD, "layers", *O_AXES)
        self.ffn_norm_D = _param(jnp.ones((L, D)), "layers", "embed")
        self.gate_DF = _param(into(gate, F), "layers", "embed", "mlp")
        self.up_DF = _param(into(up, F), "layers", "embed", "mlp")
        self.down_FD = _param(residual * F**-0.5 * down, "layers", "mlp", "embed")
        head_norm = functools.partial(_param, jnp.ones((L, H)), "layers", "head_dim")
        self.q_norm_H = head_norm() if config.qk_norm else None
        self.k_norm_H = head_norm() if config.qk_norm else None
        self.eps = config.norm_eps

    def __call__(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array], attention: Callable
    ) -> jax.Array:
        """One layer on the residual stream; the layer axis L must have been sliced away.

        `attention` takes q_BTKGH, k_BSKH and v_BSKH to o_BTKGH.
        """
        q, k, v = self.qkv(rms_norm(x_BTD, self.attention_norm_D, self.eps), rope)
        x_BTD += self.out(attention(q, k, v))
        x_BTD += self.ffn(rms_norm(x_BTD, self.ffn_norm_D, self.eps))
        return constrain(x_BTD, "batch", "time", None)

    def qkv(
        self, x_BTD: jax.Array, rope: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q_BTKGH, k_BSKH and v_BSKH of normalised inputs, q and k turned by `rope`.

        On a mesh whose `tensor` axis is larger than K, q has that many KV heads, each serving a
        part of a group.
        """
        q_BTKGH = project(x_BTD, self.q_DKGH[...], "BTD,DKGH->BTKGH", Q_AXES)
        k_BSKH = project(x_BTD, self.k_DKH[...], "BSD,DKH->BSKH", KV_AXES)
        v_BSKH = project(x_BTD, self.v_DKH[...], "BSD,DKH->BSKH", KV_AXES)
        if self.q_norm_H is not None:
            q_BTKGH = rms_norm(q_BTKGH, self.q_norm_H, self.eps)
            k_BSKH = rms_norm(k_BSKH, self.k_norm_H, self.eps)
        return rotate(q_BTKGH, *rope), rotate(k_BSKH, *rope), v_BSKH

    def out(self, o_BTKGH: jax.Array) -> jax.Array:
        return project(o_BTKGH, self.o_KGHD[...], "BTKGH,KGHD->BTD", O_AXES)

    def ffn(self, x_BTD: jax.Array) -> jax.Array:
        return swiglu(x_BTD, self.gate_DF[...], self.up_DF[...], self.down_FD[...])


class Transformer(nnx.Module):
    """Tokens to final hidden states; `logits` takes them to the vocabulary."""

    def __init__(self, config: ModelConfig, key: jax.Array) -> None:
        V, D = config.vocab_size, config.d_model
        layers_key, embedding_key, output_key = jax.random.split(key, 3)
        self.config = config
        self.layers = Layers(config, layers_key)
        embedding_VD = D**-0.5 * _normal(embedding_key, (V, D))
        self.embedding_VD = _param(embedding_VD, "vocab", "embed")
        self.final_norm_D = _param(jnp.ones(D), "embed")
        output_VD = D**-0.5 * _normal(output_key, (V, D))
        self.output_VD = None if config.tie_embeddings else _param(output_VD, "vocab", "embed")

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        remat: str = "none",
        attention: Implementation = "blockwise",
    ) -> jax.Array:
        """Hidden states after the final norm, (B, T, D), in the compute dtype.

        On a mesh positions are in zig-zag order over `context` (`layout.zigzag`).

        `remat` says what the backward pass recomputes (see `ParallelConfig`), `attention` is
        the implementation that `attend` takes.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x_BTD = embed(self.embedding_VD[...], tokens_BT, dtype)
        positions_T = zigzag(jnp.arange(tokens_BT.shape[1]), axis_size("context"))
        rope = rope_tables(constrain(positions_T, "time"), config)
        graphdef, stack = nnx.split(self.layers)
        patterns = config.layer_patterns

        def layer(x_BTD: jax.Array, xs: tuple[nnx.State, jax.Array]) -> tuple[jax.Array, None]:
            params, index = xs

            def attention_of_layer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                return attend(q, k, v, patterns, index, implementation=attention)

            return nnx.merge(graphdef, params)(x_BTD, rope, attention_of_layer), None

        xs = stack, jnp.arange(config.n_layers)
        x_BTD, _ = jax.lax.scan(_rematerialised(layer, remat), x_BTD, xs)
        return rms_norm(x_BTD, self.final_norm_D, config.norm_eps)

    def output_table(self) -> jax.Array:
        """The (V, D) matrix that takes hidden states to logits, in float32."""
        return (self.embedding_VD if self.output_VD is None else self.output_VD)[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits of hidden states, (B, T, V), in float32."""
        table_VD = self.output_table().astype(hidden_BTD.dtype)
        return einsum_f32("BTD,VD->BTV", hidden_BTD, table_VD)


def _rematerialised(layer: Callable, remat: str) -> Callable:
    if remat == "none":
        return layer
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    return jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x` over its root mean square along the last axis, times `scale`, computed in float32."""
    x32 = x.astype(jnp.float32)
    norm = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * norm * scale).astype(x.dtype)


def rope_tables(positions_T: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, (T, H/2) in float32: pair i turns by t theta^(-2i/H), or
    slower where `RopeScaling` says so.

    Where each sequence has positions of its own, (B, T), so have the angles: (B, T, H/2).
    """
    pair = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    frequency = config.rope_theta ** (-pair / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.trained_context * frequency / (2 * math.pi)
        between = scaling.high_frequency - scaling.low_frequency
        kept = jnp.clip((turns - scaling.low_frequency) / between, 0, 1)
        frequency *= kept + (1 - kept) / scaling.factor
    angle = positions_T.astype(jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """RoPE on (B, T, ..., H): element i is paired with i + H/2 (the rotate-half convention)."""
    shape = cos.shape[:-1] + (1,) * (x.ndim - 3) + cos.shape[-1:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
