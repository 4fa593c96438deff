import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_scaling import context_sharding, costs
from gqa_scaling.config import UserError
from gqa_scaling.context_sharding import (
    ContextSharding,
    HeadPattern,
    density,
    effective_context,
    keys_by_depth,
    kv_cache_values,
    mean_keys,
)


def sees(p: HeadPattern | None, t: int, u: int) -> bool:
    """The definition, token by token: whether the query at t reads the key at u."""
    if u > t:
        return False
    if p is None:
        return True
    i, j = t // p.block, u // p.block
    stripe = p.stride is not None and (j + p.offset) % p.stride == 0
    return i - j < p.local or j < p.sinks or stripe


def reads(p: HeadPattern | None, t: int) -> int:
    return sum(sees(p, t, u) for u in range(t + 1))


@st.composite
def head_patterns(draw):
    stride = draw(st.none() | st.integers(1, 7))
    return HeadPattern(
        block=draw(st.integers(1, 4)),
        local=draw(st.integers(1, 5)),
        stride=stride,
        offset=draw(st.integers(0, (stride or 1) - 1)),
        sinks=draw(st.integers(0, 4)),
    )


# ------------------------------------------------------------------------------ what a head sees


@given(head_patterns(), st.integers(1, 100))
def test_keys_and_their_mean_count_what_the_definition_sees(p, context):
    counts = [reads(p, t) for t in range(context)]
    assert p.keys(context) == counts[-1]
    assert p.mean_keys(context) == pytest.approx(np.mean(counts), rel=1e-12)


@given(head_patterns(), st.integers(1, 30))
def test_block_counts_and_lists_agree_with_visible(p, n_blocks):
    i, j = np.arange(n_blocks)[:, None], np.arange(n_blocks)
    visible = np.array([[sees(p, b * p.block, a * p.block) for a in j] for b in i[:, 0]])
    assert (p.visible(i, j) == visible).all()
    assert (p.live_blocks(i[:, 0]) == visible.sum(1)).all()
    args = p.stride, p.offset, p.sinks
    distant = [j for j in range(n_blocks) if context_sharding.is_distant(j, *args)]
    assert distant == [j for j in range(n_blocks) if p.visible(10**6, j)]  # what all later ones see
    for n, block in enumerate(distant):
        assert context_sharding.distant_block(n, *args) == block
        assert context_sharding.distant_before(block, *args) == n


@given(head_patterns())
def test_arrays_and_integers_give_the_same(p):
    contexts = np.arange(1, 60)
    for f in (p.keys, p.slots, p.mean_keys):
        assert f(contexts).tolist() == [f(int(T)) for T in contexts]


@given(head_patterns(), st.integers(1, 200))
def test_slots_hold_every_offset_and_at_most_a_block_more(p, context):
    offsets = [dataclasses.replace(p, offset=o) for o in range(p.stride or 1)]
    end = -(-context // p.block) * p.block
    assert {q.slots(context) for q in offsets} == {p.slots(context)}
    needed = max(q.keys(end) for q in offsets)
    assert needed - p.block < p.slots(context) <= needed
    if context % p.block == 0:
        assert p.slots(context) == needed
        assert p.slots(context) - p.block <= p.keys(context)


@pytest.mark.parametrize(
    ("context", "keys", "decoding", "training"),
    [(8192, 1472, 5.6, 3.5), (32768, 3008, 10.9, 8.3), (131072, 9152, 14.3, 12.9)],
)
def test_a_window_of_1024_with_stride_16(context, keys, decoding, training):
    """The sizes and gains of W = 1,024 and s = 16 in blocks of 64, whatever the offset."""
    for offset in range(16):
        p = HeadPattern(64, 16, 16, offset)
        assert p.keys(context) == p.slots(context) == keys
    assert round(context / keys, 1) == decoding
    W, s = 1024, 16
    formula = W * (1 - W / (2 * context)) + (context - W) ** 2 / (2 * context * s)
    gain = context / 2 / formula
    assert math.floor(10 * gain) / 10 == training
    mean = np.mean([HeadPattern(64, 16, 16, offset).mean_keys(context) for offset in range(16)])
    assert mean == pytest.approx(formula, rel=0.03)
    assert math.floor(10 * context / 2 / mean) / 10 == pytest.approx(training, abs=0.11)


def test_the_counts_of_very_long_contexts_need_no_loop():
    p = HeadPattern(64, 16, 16, 3, 2)
    assert p.keys(2**40) == pytest.approx(2**36, rel=1e-3)
    assert p.mean_keys(2**40) == pytest.approx(2**35, rel=1e-3)


# ----------------------------------------------------------------------------- whole models


@given(
    n_kv=st.integers(1, 12),
    dense=st.integers(0, 3),
    stride=st.integers(1, 20),
    dense_layers=st.sampled_from(["", "every 2", "first 1, last 2", "3", "every 3, 0"]),
)
@settings(max_examples=60)
def test_heads_of_consecutive_sparse_layers_cover_the_context(n_kv, dense, stride, dense_layers):
    sharding = ContextSharding(4, 1, stride, 0, dense, dense_layers)
    layers = sharding.layers(48, n_kv + dense)
    heads = [layer for layer in layers if any(layer)]
    assert all(layer.count(None) == dense for layer in heads)
    parts = math.gcd(n_kv + dense, dense)  # each has as many dense ones, at the same places
    kinds = [head is None for head in heads[0]]
    assert kinds == kinds[: len(kinds) // parts] * parts
    sparse = [[head for head in layer if head] for layer in heads]
    needed = -(-stride // n_kv)
    assert len(sparse) >= needed
    for start in range(len(sparse) - needed + 1):
        stripes = {head.offset for layer in sparse[start : start + needed] for head in layer}
        assert stripes == set(range(stride))
    for layer in sparse:  # no stripe twice where there are enough for all
        assert len({head.offset for head in layer}) == min(n_kv, stride)
    blocks = np.arange(3 * stride + 2)
    seen = [head.visible(blocks[-1], blocks) for layer in sparse[:needed] for head in layer]
    assert np.any(seen, axis=0).all()


def test_offsets_are_a_whole_step_apart_and_turn_with_the_sparse_layers():
    sharding = ContextSharding(64, 16, 16, dense_layers="every 3")
    offsets = [
        [None if head is None else head.offset for head in layer] for layer in sharding.layers(7, 2)
    ]
    assert offsets == [[0, 8], [1, 9], [None] * 2, [2, 10], [3, 11], [None] * 2, [4, 12]]
    single = [layer[0].offset for layer in ContextSharding(64, 16, 4).layers(6, 1)]
    assert single == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("text", "dense"),
    [
        ("", []),
        ("every 4", [3, 7]),
        ("first 2", [0, 1]),
        ("last 1", [9]),
        ("0,5", [0, 5]),
        (" first  1 ,last 2,4 ", [0, 4, 8, 9]),
    ],
)
def test_dense_layers(text, dense):
    sharding = ContextSharding(64, 16, 8, dense_layers=text)
    layers = sharding.layers(10, 2)
    assert [n for n, layer in enumerate(layers) if layer == (None, None)] == dense


def test_one_spelling_of_dense_layers():
    a, b = (ContextSharding(64, 16, 8, dense_layers=text) for text in ("first 1,7", " first 1 , 7"))
    assert a == b
    assert a.dense_layers == "first 1, 7"


PHI3_SMALL = ContextSharding(64, 16, 8, dense_layers="every 2")
STRIDED = ContextSharding(64, 16, 16)


@pytest.mark.parametrize("sharding", [PHI3_SMALL, STRIDED, ContextSharding(128, 4, sinks=1)])
def test_a_pattern_survives_json_and_is_hashable(sharding):
    assert ContextSharding.from_dict(json.loads(json.dumps(sharding.to_dict()))) == sharding
    assert len({*sharding.layers(4, 2), *sharding.layers(4, 2)}) <= 4


def test_published_patterns():
    layers = PHI3_SMALL.layers(32, 8)
    assert layers[1] == (None,) * 8
    assert sorted(head.offset for head in layers[0]) == list(range(8))
    assert layers[0][0] == HeadPattern(64, 16, 8)
    assert ContextSharding(64, 8, sinks=2).layers(1, 1) == ((HeadPattern(64, 8, sinks=2),),)


@given(head_patterns(), st.integers(1, 3), st.integers(1, 60))
def test_means_over_a_model(p, n_dense, context):
    layers = [(p, None), (None,) * n_dense]
    heads = 2 + n_dense
    keys = [reads(p, t) for t in range(context)]
    dense = [t + 1 for t in range(context)]
    expected = (keys[-1] + (1 + n_dense) * context) / heads
    assert effective_context(layers, context) == pytest.approx(expected)
    expected = (np.mean(keys) + (1 + n_dense) * np.mean(dense)) / heads
    assert mean_keys(layers, context) == pytest.approx(expected)
    assert density(layers, context) == pytest.approx(expected / np.mean(dense))
    slots = p.slots(context) + (1 + n_dense) * context
    assert kv_cache_values(layers, context, 8) == 2 * 8 * slots


@pytest.mark.parametrize(("T", "keys"), [(8192, 1472), (32768, 3008), (131072, 9152)])
def test_costs_take_the_effective_context(T, keys):
    """W = 1,024 and s = 16 (arXiv 2407.17678): keys read for one token, of 8K, 32K and 128K."""
    L, head_dim, n_heads, n_kv, n = 24, 64, 8, 2, 10**9
    layers = STRIDED.layers(L, n_kv)
    effective = effective_context(layers, T)
    assert effective == keys
    memory = costs.inference_memory(n, effective, L, head_dim, n_kv)
    assert memory == n + kv_cache_values(layers, T, head_dim)
    assert memory == n + 2 * keys * L * head_dim * n_kv
    flops = costs.inference_flops(n, T, L, head_dim, n_heads, effective=effective)
    assert flops == 2 * n + 4 * keys * L * head_dim * n_heads
    whole = costs.inference_flops(n, T, L, head_dim, n_heads, "per_sequence", effective)
    assert whole == pytest.approx(T * (n + 2 * keys * L * head_dim * n_heads), rel=1e-12)


@pytest.mark.parametrize("convention", costs.CONVENTIONS)
def test_a_dense_model_costs_what_it_did(convention):
    T, shape = 8192, (24, 64, 8)
    effective = effective_context([(None, None)] * 24, T)
    given_ = costs.inference_flops(10**8, T, *shape, convention, effective)
    assert given_ == costs.inference_flops(10**8, T, *shape, convention)


@st.composite
def shardings(draw):
    terms = draw(st.lists(st.sampled_from(["every 2", "every 3", "first 1", "last 2", "4"])))
    return ContextSharding(
        block=draw(st.sampled_from([1, 4, 16])),
        local=draw(st.integers(1, 4)),
        stride=draw(st.none() | st.integers(1, 9)),
        sinks=draw(st.integers(0, 2)),
        dense_kv_heads=draw(st.integers(0, 2)),
        dense_layers=", ".join(terms),
    )


@given(shardings(), st.integers(3, 5), st.integers(1, 300), st.integers(0, 24))
def test_keys_by_depth_are_those_of_every_depth(pattern, n_kv, context, most):
    keys = keys_by_depth(pattern, n_kv, context, most)
    means = keys_by_depth(pattern, n_kv, context, most, training=True)
    assert len(keys) == len(means) == most + 1
    assert all(a < b for a, b in itertools.pairwise(keys))  # a layer more always reads more
    for L in range(1, most + 1):
        try:
            layers = pattern.layers(L, n_kv)
        except UserError:  # all dense, or too shallow for the layer that is named
            assert keys[L] <= L * context
            continue
        assert keys[L] == pytest.approx(L * effective_context(layers, context), rel=1e-12)
        assert means[L] == pytest.approx(L * mean_keys(layers, context), rel=1e-12)


@given(shardings(), shardings())
def test_a_label_names_one_pattern_and_patterns_have_an_order(a, b):
    assert (a.label == b.label) == (a == b)
    assert [a < b, b < a].count(True) == (a != b)
    assert a.label.isascii()
    assert "\n" not in a.label


def test_labels_are_short():
    assert PHI3_SMALL.label == "b64 w16 s8 +dense every 2"
    assert STRIDED.label == "b64 w16 s16"
    assert ContextSharding(64, 16, sinks=1).label == "b64 w16 k1"
    hybrid = ContextSharding(64, 4, 8, dense_kv_heads=1, dense_layers="first 2,every 4")
    assert hybrid.label == "b64 w4 s8 +1 dense KV +dense first 2, every 4"


# --------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HeadPattern(0, 1), "block=0 must be an integer of at least 1"),
        (lambda: HeadPattern(64, 0), "local=0 must be an integer of at least 1"),
        (lambda: HeadPattern(64, 1.0), "local=1.0 must be an integer"),
        (lambda: HeadPattern(64, 1, 0), "stride=0 must be an integer of at least 1"),
        (
            lambda: HeadPattern(64, 1, 2**25),
            "stride=33554432 must be at most 33,554,431 blocks of 64",
        ),
        (
            lambda: ContextSharding(64, 1, 2**27),
            "stride=134217728 must be at most 33,554,431 blocks of 64",
        ),
        (lambda: HeadPattern(64, 1, 8, 8), "offset=8 must be less than stride=8"),
        (lambda: HeadPattern(64, 1, 8, -1), "offset=-1 must be an integer of at least 0"),
        (lambda: HeadPattern(64, 1, None, 1), "offset=1 must be 0 where stride is None"),
        (lambda: HeadPattern(64, 1, sinks=-1), "sinks=-1 must be an integer of at least 0"),
        (lambda: ContextSharding(64, 0, 8), "local=0 must be an integer of at least 1"),
        (lambda: ContextSharding(64, 16, "8"), "stride='8' must be of type int"),
        (lambda: ContextSharding(64, 16, 8, dense_kv_heads=-1), "dense_kv_heads=-1"),
        (lambda: ContextSharding(64, 16, 8, dense_layers="all"), "'all' is none of them"),
        (lambda: ContextSharding(64, 16, 8, dense_layers="every"), "'every' is none of them"),
        (lambda: ContextSharding(64, 16, 8, dense_layers="-1"), "'-1' is none of them"),
        (lambda: ContextSharding(64, 16, 8, dense_layers="every 1"), "number of at least 2"),
        (lambda: ContextSharding(64, 16, 8, dense_layers="last 0"), "number of at least 1"),
        (
            lambda: ContextSharding(64, 16, 8, dense_layers="12").layers(12, 2),
            "names layer 12, but the 12 layers are 0 to 11",
        ),
        (
            lambda: ContextSharding(64, 16, 8, dense_layers="first 12").layers(12, 2),
            "makes all 12 layers dense: name fewer, or leave out the pattern",
        ),
        (
            lambda: ContextSharding(64, 16, 8, dense_kv_heads=2).layers(12, 2),
            "dense_kv_heads=2 must be less than n_kv_heads=2",
        ),
        (
            lambda: ContextSharding.from_dict({"block": 64, "local": 1, "stripe": 8}),
            r"unknown field stripe \(did you mean stride\?\)",
        ),
    ],
)
def test_refusals_name_the_value_and_the_rule(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
