"""What the Llama, Mistral and Qwen3 formats of Hugging Face say of a model, both ways.

The three hold the same network in the same arrays: Qwen3 adds norms of queries and keys, and the
Mistral config takes a hidden size that is no multiple of the query heads, which the Llama config
refuses. `ARRAYS_OF_LAYER` and `ARRAYS` are the one table of which array is which.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import ModelConfig, RopeScaling, UserError, require
from gqa_scaling.fields import JsonShape, misfit

Architecture = Literal["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"]
MODEL_TYPES: dict[Architecture, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
}
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"  # where there is one file only


@dataclass(frozen=True)
class Place:
    """Where an array of ours lies in the format.

    `inputs` are the leading axes of ours that a projection sums over: the format keeps a matrix
    (outputs, inputs), all axes of each side as one. 0: the array is the same in both.
    """

    name: str
    inputs: int = 0

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        if not self.inputs:
            return ours
        return ours.reshape(math.prod(ours.shape[: self.inputs]), -1).T

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of theirs."""
        if not self.inputs:
            return ours
        return math.prod(ours[self.inputs :]), math.prod(ours[: self.inputs])

    def ours(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (theirs.T if self.inputs else theirs).reshape(shape)


ARRAYS_OF_LAYER = {  # the names of theirs follow "model.layers.N."
    "attention_norm_D": Place("input_layernorm.weight"),
    "q_DKGH": Place("self_attn.q_proj.weight", 1),
    "k_DKH": Place("self_attn.k_proj.weight", 1),
    "v_DKH": Place("self_attn.v_proj.weight", 1),
    "o_KGHD": Place("self_attn.o_proj.weight", 3),
    "q_norm_H": Place("self_attn.q_norm.weight"),
    "k_norm_H": Place("self_attn.k_norm.weight"),
    "ffn_norm_D": Place("post_attention_layernorm.weight"),
    "gate_DF": Place("mlp.gate_proj.weight", 1),
    "up_DF": Place("mlp.up_proj.weight", 1),
    "down_FD": Place("mlp.down_proj.weight", 1),
}
ARRAYS = {
    "embedding_VD": Place("model.embed_tokens.weight"),
    "final_norm_D": Place("model.norm.weight"),
    "output_VD": Place("lm_head.weight"),
}


def name_in_layer(place: Place, layer: int) -> str:
    return f"model.layers.{layer}.{place.name}"


# ------------------------------------------------------------------------- config.json, written


def architecture_of(model: ModelConfig) -> Architecture:
    """The format that expresses a dense model. Raises UserError naming what none expresses."""
    if model.pattern is not None:
        raise UserError(
            f"model.pattern={model.pattern} is context sharding, which no Hugging Face format "
            "expresses: only models whose heads all read the whole context are exported"
        )
    if model.qk_norm:
        return "Qwen3ForCausalLM"
    return "MistralForCausalLM" if model.d_model % model.n_heads else "LlamaForCausalLM"


def config_of(
    model: ModelConfig, context_length: int, eos: list[int], dtype: str, bos: int | None = None
) -> dict[str, Any]:
    """The config.json of a model that was trained at this context length, with `bos` before a text,
    which one of `eos` ends."""
    architecture = architecture_of(model)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    scaling = model.rope_scaling
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.trained_context,
        }
    config = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": context_length,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "rope_theta": model.rope_theta,  # where readers of transformers 4 look for it
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": None,
        "use_cache": True,
    }
    if scaling is not None:  # and again for those of transformers 4
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if architecture != "LlamaForCausalLM":
        config["sliding_window"] = None
    if architecture != "MistralForCausalLM":
        config["attention_bias"] = False
    return config


# ---------------------------------------------------------------------------- config.json, read

_NEEDED: JsonShape = {
    "vocab_size": int,
    "hidden_size": int,
    "intermediate_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "num_key_value_heads?": (int,),
    "head_dim?": (int,),
    "max_position_embeddings": int,
    "rms_norm_eps?": float,
    "rope_theta?": (float,),
    "rope_parameters?": (dict,),
    "rope_scaling?": (dict,),
}
_ROPE: JsonShape = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}
# What a config may say beside the sizes, and the one value of each with which it is this network.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON table of the folder. Raises UserError where it is missing or damaged."""
    try:
        value = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    require(isinstance(value, dict), f"{path} must hold a JSON table")
    return value


def architecture_named(config: Mapping[str, Any], file: Path) -> Architecture:
    """Whose format a config.json is. Raises UserError where it is none of the three."""
    named = config.get("architectures") or []
    kind = config.get("model_type")
    for architecture, model_type in MODEL_TYPES.items():
        if named == [architecture] or (not named and kind == model_type):
            return architecture
    found = ", ".join(map(str, named)) if isinstance(named, list) and named else repr(kind)
    raise UserError(f"{file} is of {found}: only {', '.join(MODEL_TYPES)} are read")


def model_of(
    config: Mapping[str, Any], file: Path, dtype: Literal["bfloat16", "float32"]
) -> ModelConfig:
    """The model that a config.json describes, computing in `dtype`; `file` is named in errors.

    What is not said has the default of the format. Raises UserError naming what this package cannot
    compute: another architecture, biases, a sliding window, a scaling of RoPE but llama3's.
    """
    architecture = architecture_named(config, file)
    wrong = misfit(dict(config), _NEEDED)
    require(not wrong, f"{file} is damaged ({wrong})")
    for key, values in _ONLY.items():
        value = config.get(key, values[0])
        require(
            value in values,
            f"{file}: {key}={value!r} is not supported; it must be {values[0]!r} or absent",
        )
    _refuse_windows(config, architecture, file)
    tied = config.get("tie_word_embeddings") or False
    require(isinstance(tied, bool), f"{file}: tie_word_embeddings={tied!r} must be true or false")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    require(heads > 0, f"{file}: num_attention_heads={heads} must be greater than 0")
    default_head = 128 if architecture == "Qwen3ForCausalLM" else width // heads
    theta, scaling = _rope(config, file)
    try:
        return ModelConfig(
            n_layers=config["num_hidden_layers"],
            d_model=width,
            n_heads=heads,
            n_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_head,
            d_ff=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tie_embeddings=tied,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            qk_norm=architecture == "Qwen3ForCausalLM",
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _refuse_windows(config: Mapping[str, Any], architecture: Architecture, file: Path) -> None:
    window = None
    if architecture == "MistralForCausalLM":
        window = config.get("sliding_window", 4096)  # where absent, the format's default
    elif config.get("use_sliding_window"):
        window = config.get("sliding_window")
    require(
        window is None,
        f"{file}: sliding_window={window!r} is not supported; contexts up to that length read the "
        "same keys without it: set it to null to use the model for those",
    )
    kinds = config.get("layer_types") or []
    require(
        isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds),
        f"{file}: layer_types={kinds!r} is not supported; every layer must be full_attention",
    )


def _rope(config: Mapping[str, Any], file: Path) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, as transformers 5 (`rope_parameters`) or as 4 writes them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10_000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    wrong = misfit({"rope_theta": theta}, {"rope_theta": float})
    require(not wrong, f"{file} is damaged ({wrong})")
    share = rope.get("partial_rotary_factor") or 1  # where transformers 5 writes it
    require(
        share == 1,
        f"{file}: partial_rotary_factor={share!r} is not supported; it must be 1 or absent",
    )
    if kind == "default":
        return theta, None
    require(
        kind == "llama3",
        f"{file}: rope_type={kind!r} is not supported; it must be 'default' or 'llama3'",
    )
    wrong = misfit(rope, _ROPE)
    require(not wrong, f"{file} is damaged ({wrong})")
    try:
        return theta, RopeScaling(
            factor=rope["factor"],
            low_frequency=rope["low_freq_factor"],
            high_frequency=rope["high_freq_factor"],
            trained_context=rope["original_max_position_embeddings"],
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
