"""The transformer's equations once more, in plain NumPy and float64, written without the package."""

import numpy as np
from masked_attention import visible


def _norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rope(x_TH, theta):
    T, H = x_TH.shape
    out = np.empty_like(x_TH)
    for i in range(H // 2):
        angle = np.arange(T) * theta ** (-2 * i / H)
        a, b = x_TH[:, i], x_TH[:, i + H // 2]
        out[:, i] = a * np.cos(angle) - b * np.sin(angle)
        out[:, i + H // 2] = a * np.sin(angle) + b * np.cos(angle)
    return out


def _attention(x_TD, p, config, heads):
    K, H = config.n_kv_heads, config.head_dim
    T, out = len(x_TD), 0.0
    for head in range(config.n_heads):
        kv, g = head // config.group_size, head % config.group_size
        q, k = x_TD @ p["q_DKGH"][:, kv, g], x_TD @ p["k_DKH"][:, kv]
        if config.qk_norm:
            q = _norm(q, p["q_norm_H"], config.norm_eps)
            k = _norm(k, p["k_norm_H"], config.norm_eps)
        q, k = _rope(q, config.rope_theta), _rope(k, config.rope_theta)
        scores = np.where(visible(heads[kv], T), q @ k.T / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = out + weights @ (x_TD @ p["v_DKH"][:, kv]) @ p["o_KGHD"][kv, g]
    assert p["k_DKH"].shape[1] == K
    return out


def _ffn(x_TD, p):
    gate = x_TD @ p["gate_DF"]
    return (gate / (1 + np.exp(-gate)) * (x_TD @ p["up_DF"])) @ p["down_FD"]


def logits(params, config, tokens_BT):
    """(B, T, V) logits from a nested dict of arrays named as in the model."""
    out, heads = [], config.layer_patterns
    for tokens_T in tokens_BT:
        x = params["embedding_VD"][tokens_T]
        for i in range(config.n_layers):
            p = {name: stack[i] for name, stack in params["layers"].items()}
            x = x + _attention(
                _norm(x, p["attention_norm_D"], config.norm_eps), p, config, heads[i]
            )
            x = x + _ffn(_norm(x, p["ffn_norm_D"], config.norm_eps), p)
        x = _norm(x, params["final_norm_D"], config.norm_eps)
        out.append(x @ params["embedding_VD" if config.tie_embeddings else "output_VD"].T)
    return np.stack(out)


def nll(params, config, inputs_BT, targets_BT):
    """(B, T) cross-entropy of the targets, in nats."""
    z = logits(params, config, inputs_BT)
    z = z - z.max(-1, keepdims=True)
    return np.log(np.exp(z).sum(-1)) - np.take_along_axis(z, targets_BT[..., None], -1)[..., 0]
