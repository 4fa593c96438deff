"""The forward pass of Hugging Face's Llama, Mistral and Qwen3, from a folder alone, in float64.

Written from the formats, without the package and without the libraries: files are parsed here, and
the loops are over layers and heads.
"""

import json
import struct

import numpy as np


def read_weights(folder):
    """{name: float64 array} of every *.safetensors file of a folder; F32 and BF16 are read."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        ends = [0]
        for name, entry in header.items():
            if name == "__metadata__":
                assert entry == {"format": "pt"}
                continue
            begin, end = entry["data_offsets"]
            assert begin == ends[-1], "arrays must follow one another without gaps"
            ends.append(end)
            if entry["dtype"] == "F32":
                values = np.frombuffer(body[begin:end], "<f4")
            else:
                assert entry["dtype"] == "BF16"
                high = np.frombuffer(body[begin:end], "<u2").astype(np.uint32)
                values = (high << 16).view(np.float32)
            out[name] = values.reshape(entry["shape"]).astype(np.float64)
        assert ends[-1] == len(body)
    return out


def _norm(x, weight, eps):
    return weight * (x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps))


def _frequencies(config):
    rope, size = config["rope_parameters"], config["head_dim"]
    out = rope["rope_theta"] ** (-np.arange(0, size, 2) / size)
    if rope["rope_type"] == "default":
        return out
    assert rope["rope_type"] == "llama3"
    scaled = []
    for frequency in out:
        wavelength = 2 * np.pi / frequency
        context = rope["original_max_position_embeddings"]
        if wavelength < context / rope["high_freq_factor"]:
            scaled.append(frequency)
        elif wavelength > context / rope["low_freq_factor"]:
            scaled.append(frequency / rope["factor"])
        else:
            smooth = context / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            scaled.append((1 - smooth) * frequency / rope["factor"] + smooth * frequency)
    return np.array(scaled)


def _turned(x_TH, config):
    """cos and sin of both halves are the same; the second half is turned against the first."""
    angle = np.arange(len(x_TH))[:, None] * np.tile(_frequencies(config), 2)
    half = x_TH.shape[1] // 2
    against = np.concatenate([-x_TH[:, half:], x_TH[:, :half]], axis=1)
    return x_TH * np.cos(angle) + against * np.sin(angle)


def _attention(x_TD, weights, prefix, config):
    size, eps = config["head_dim"], config["rms_norm_eps"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    q, k, v = (x_TD @ weights[f"{prefix}.{name}_proj.weight"].T for name in "qkv")
    mask = np.where(np.tri(len(x_TD), dtype=bool), 0.0, -np.inf)
    heads = []
    for head in range(config["num_attention_heads"]):
        mine, shared = (slice(i * size, (i + 1) * size) for i in (head, head // group))
        queries, keys = q[:, mine], k[:, shared]
        if config["model_type"] == "qwen3":
            queries = _norm(queries, weights[f"{prefix}.q_norm.weight"], eps)
            keys = _norm(keys, weights[f"{prefix}.k_norm.weight"], eps)
        scores = _turned(queries, config) @ _turned(keys, config).T * size**-0.5 + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, shared])
    return np.concatenate(heads, axis=1) @ weights[f"{prefix}.o_proj.weight"].T


def _mlp(x_TD, weights, prefix):
    gate = x_TD @ weights[f"{prefix}.gate_proj.weight"].T
    up = x_TD @ weights[f"{prefix}.up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ weights[f"{prefix}.down_proj.weight"].T


def logits(folder, tokens_T):
    """(T, vocabulary) logits of one sequence."""
    config = json.loads((folder / "config.json").read_text())
    weights, eps = read_weights(folder), config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][tokens_T]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        before = _norm(x, weights[f"{at}.input_layernorm.weight"], eps)
        x = x + _attention(before, weights, f"{at}.self_attn", config)
        before = _norm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        x = x + _mlp(before, weights, f"{at}.mlp")
    x = _norm(x, weights["model.norm.weight"], eps)
    tied = config["tie_word_embeddings"]
    assert tied == ("lm_head.weight" not in weights)
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T
