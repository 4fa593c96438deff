import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import MODEL
from published import published_run as run

from gqa_scaling import costs
from gqa_scaling.config import (
    ModelConfig,
    UserError,
)
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.ladder import TRAINED_SIZES

# ---------------------------------------------------------------------------------- parameters


def parameters_by_matrix(m: ModelConfig) -> dict[str, int]:
    """Every array of Chen et al. 2025, section 3, written out one by one."""
    d, q, kv = m.d_model, m.n_heads * m.head_dim, m.n_kv_heads * m.head_dim
    f = m.d_ff if m.d_ff else (8 * d + 95) // 96 * 32  # 8d/3 up to the next multiple of 32
    layer = {
        "attention": d * q + d * kv + d * kv + q * d,
        "ffn": d * f + d * f + f * d,
        "norm": d + d + (2 * m.head_dim if m.qk_norm else 0),
    }
    whole = {name: m.n_layers * count for name, count in layer.items()}
    whole["norm"] += d
    whole["embedding"] = m.vocab_size * d
    whole["output"] = 0 if m.tie_embeddings else m.vocab_size * d
    return whole


@pytest.mark.parametrize("size", TRAINED_SIZES, ids=lambda s: s.name)
def test_parameters_of_the_published_grid(size):
    candidates = head_candidates(32)
    assert len(candidates) == 21
    for n_h, n_kv in candidates:
        model = ModelConfig(size.n_layers, size.d_model, n_h, n_kv)
        expected = parameters_by_matrix(model)
        counted = costs.parameters(model)
        assert dataclasses.asdict(counted) == expected
        assert counted.total == sum(expected.values())
        assert costs.n_exact(model) == sum(expected.values()) - expected["embedding"]
        rounding = 3 * size.n_layers * size.d_model * (model.ffn_dim - 8 * size.d_model / 3)
        formula = costs.n_formula(size.n_layers, size.d_model, n_h, n_kv)
        assert costs.n_exact(model) - formula == pytest.approx(rounding + expected["norm"])


@pytest.mark.parametrize(
    "changes",
    [{"tie_embeddings": False}, {"qk_norm": True}, {"d_ff": 1000}, {"head_dim": 32}],
    ids=str,
)
def test_parameters_of_variants(changes):
    model = dataclasses.replace(MODEL, **changes)
    assert dataclasses.asdict(costs.parameters(model)) == parameters_by_matrix(model)


def test_the_smallest_published_size_has_16m_parameters_with_embeddings():
    assert costs.parameters(ModelConfig(4, 256, 4, 4)).total == pytest.approx(16.0e6, rel=0.01)


# ----------------------------------------------------------------------------------- inference


@pytest.mark.parametrize(
    ("heads", "n_layers", "memory", "flops", "z"),
    [(8, 12, 1.68611e9, 2.21002e14, 43_002), (1, 32, 1.62739e9, 2.13305e14, 42_281.8)],
)
def test_published_figure_2(heads, n_layers, memory, flops, z):
    """Two points of Chen et al. 2025, Figure 2: n_h = n_kv, d = 64 L, T = 131,072."""
    context = 131_072
    n = costs.n_formula(n_layers, 64 * n_layers, heads, heads)
    m = costs.inference_memory(n, context, n_layers, 64, heads)
    c = costs.inference_flops(n, context, n_layers, 64, heads, "per_sequence")
    assert m == pytest.approx(memory, rel=1e-5)
    assert c == pytest.approx(flops, rel=1e-5)
    assert costs.HardwareCost()(m, c) == pytest.approx(z, rel=1e-5)


sizes = st.integers(1, 10**6)


@given(sizes, sizes, sizes, sizes, sizes)
def test_inference_equations(n, context, n_layers, head_dim, heads):
    per_token = costs.inference_flops(n, context, n_layers, head_dim, heads)
    assert per_token == 2 * n + 4 * context * n_layers * head_dim * heads
    per_sequence = costs.inference_flops(n, context, n_layers, head_dim, heads, "per_sequence")
    assert per_sequence == pytest.approx(context / 2 * per_token, rel=1e-12)
    cache = costs.kv_cache_values(context, n_layers, head_dim, heads)
    assert cache == 2 * context * n_layers * head_dim * heads
    assert costs.inference_memory(n, context, n_layers, head_dim, heads) == n + cache


def test_equations_take_arrays():
    contexts = np.array([1024, 8192, 131_072])
    rows = costs.inference_flops(10**9, contexts, 24, 64, 8, "per_sequence")
    each = [costs.inference_flops(10**9, int(t), 24, 64, 8, "per_sequence") for t in contexts]
    np.testing.assert_allclose(rows, each)


def test_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'per_batch' must be one of per_token, per_sequence"):
        costs.inference_flops(1, 1, 1, 1, 1, "per_batch")


def test_hardware_cost_ends():
    memory, flops = 4e9, 8e12
    assert costs.HardwareCost(weight=1)(memory, flops) == pytest.approx(math.sqrt(memory))
    assert costs.HardwareCost(weight=0)(memory, flops) == pytest.approx(flops ** (1 / 3))
    assert costs.HardwareCost(weight=0.5, memory_power=1, compute_power=1)(3, 5) == 4
    for weight in (0, 1):  # a model out of reach is endlessly dear, also by what has all the weight
        assert costs.HardwareCost(weight=weight)(np.array([math.inf]), math.inf) == math.inf


@pytest.mark.parametrize(
    "fields", [{"weight": 1.1}, {"weight": -0.1}, {"memory_power": 0}, {"compute_power": -1}]
)
def test_hardware_cost_refuses(fields):
    with pytest.raises(UserError):
        costs.HardwareCost(**fields)


# ------------------------------------------------------------------------------------ training


def test_budget_is_a_whole_number_of_batches():
    assert costs.training_steps(run(tokens=10 * 2**19, tokens_per_param=None)) == 10
    assert costs.training_steps(run(tokens=10 * 2**19 + 2**17, tokens_per_param=None)) == 10
    assert costs.training_steps(run(tokens=10 * 2**19 - 2**17, tokens_per_param=None)) == 10
    per_parameter = run(tokens_per_param=20.0)
    assert costs.training_tokens(per_parameter) % 2**19 == 0
    assert costs.training_tokens(per_parameter) == pytest.approx(
        20 * costs.n_exact(MODEL), abs=2**18
    )


def test_budget_below_one_batch_is_refused():
    with pytest.raises(UserError, match="at least one batch of 524,288"):
        costs.training_steps(run(tokens=2**19 - 1, tokens_per_param=None))


def test_training_flops_are_those_of_the_paper_and_the_output_head():
    """6 N D + 12 L Tbar d_h n_h D (Chen et al. 2025, eq. 10), and 6 d V D of the head."""
    context = 8192
    matrices = parameters_by_matrix(MODEL)
    linear = 6 * (matrices["attention"] + matrices["ffn"])
    head = 6 * 1280 * 50304
    attention = 12 * 24 * 64 * 8  # for each key that a query reads
    causal = costs.training_flops_per_token(MODEL, context)
    assert causal == linear + head + attention * context // 2
    full = costs.training_flops_per_token(MODEL, context, causal=False)
    assert full == linear + head + attention * context
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    assert costs.training_flops_per_token(untied, context) == causal


def _keys_by_definition(pattern: ContextSharding | None, model: ModelConfig, context: int) -> float:
    """Keys of a query, its own counting half: a mean over positions, layers and KV heads."""
    seen = []
    for layer in replace_pattern(model, pattern).layer_patterns:
        for head in layer:
            for t in range(context):
                keys = [
                    u
                    for u in range(t)
                    if not head or head.visible(t // head.block, u // head.block)
                ]
                seen.append(len(keys) + 0.5)
    return float(np.mean(seen))


def replace_pattern(model: ModelConfig, pattern: ContextSharding | None) -> ModelConfig:
    return dataclasses.replace(model, pattern=pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        None,
        ContextSharding(4, 2, 3),
        ContextSharding(8, 1, 4, sinks=1, dense_kv_heads=1),
        ContextSharding(4, 3, dense_layers="every 2"),
    ],
    ids=str,
)
def test_training_flops_of_a_pattern_count_the_keys_that_are_seen(pattern):
    small, context = ModelConfig(4, 64, 4, 2, head_dim=16, vocab_size=96), 70
    model = replace_pattern(small, pattern)
    keys = costs.training_keys(model, context)
    assert keys == pytest.approx(_keys_by_definition(pattern, small, context), rel=1e-12)
    attention = 12 * 4 * 16 * 4
    rest = costs.training_flops_per_token(small, context) - attention * context // 2
    flops = costs.training_flops_per_token(model, context)
    assert flops == pytest.approx(rest + attention * keys, abs=1)
    formula = costs.training_flops_formula(1000, context, 4, 16, 4, keys=keys)
    assert formula == 6000 + attention * keys
    # a mask that hides what was computed saves nothing
    every = costs.training_flops_per_token(model, context, causal=False)
    assert every == costs.training_flops_per_token(small, context, causal=False)
    for remat in ("none", "dots", "full"):
        executed, dense = (
            costs.hardware_flops_per_token(m, context, remat, full_attention=False)
            for m in (model, small)
        )
        times = {"none": 3.5, "dots": 4.5, "full": 4.5}[remat]  # attention runs forward 1, back 2.5
        assert dense - executed == pytest.approx(
            times * attention / 3 * (context / 2 - keys), abs=1
        )
        full = costs.hardware_flops_per_token(model, context, remat, full_attention=True)
        assert full == costs.hardware_flops_per_token(small, context, remat, full_attention=True)


@pytest.mark.parametrize(("T", "gain"), [(8192, 3.5), (32768, 8.3), (131072, 12.9)])
def test_training_keys_of_the_published_window_and_stride(T, gain):
    """W = 1,024, s = 16 (arXiv 2407.17678): W (1 - W/2T) + (T - W)^2 / (2 T s), where windows slide
    by tokens; by blocks of b they reach b/2 less far on average."""
    keys = costs.training_keys(replace_pattern(MODEL, ContextSharding(64, 16, stride=16)), T)
    W, s, b = 1024, 16, 64
    sliding = W * (1 - W / 2 / T) + (T - W) ** 2 / (2 * T * s)
    assert T / 2 / sliding == pytest.approx(gain, abs=0.08)
    assert keys == pytest.approx(sliding - b / 2, abs=b / 8)


def test_training_flops_are_linear_in_tokens():
    one = run(tokens=100 * 2**19, tokens_per_param=None)
    ten = run(tokens=1000 * 2**19, tokens_per_param=None)
    assert costs.training_flops(ten) == 10 * costs.training_flops(one)
    per_token = costs.training_flops_per_token(MODEL, 8192)
    assert costs.training_flops(one) == 100 * 2**19 * per_token


def test_hardware_flops_equal_model_flops_when_nothing_is_repeated():
    executed = costs.hardware_flops_per_token(MODEL, 8192, "none", full_attention=True)
    assert executed == costs.training_flops_per_token(MODEL, 8192, causal=False)


def test_blockwise_attention_forms_its_scores_twice():
    executed = costs.hardware_flops_per_token(MODEL, 8192, "none", full_attention=False)
    scores = 2 * 24 * 8 * 64 * 8192 // 2  # one of its six causal products
    assert executed == costs.training_flops_per_token(MODEL, 8192) + scores


def test_remat_repeats_more():
    executed = [
        costs.hardware_flops_per_token(MODEL, 8192, remat, True)
        for remat in ("none", "dots", "full")
    ]
    assert executed == sorted(set(executed))
