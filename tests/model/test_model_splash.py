import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_attention import assert_equals_masked, differences, kinds_and_offsets
from masked_attention import visible

from gqa_scaling.context_sharding import ContextSharding, HeadPattern
from gqa_scaling.devices import kernel_limits
from gqa_scaling.hardware import slice_of
from gqa_scaling.model.attention import shard, splash
from gqa_scaling.sweep.pods import compiler_environment

DEFAULT = HeadPattern(64, 16, 16)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles at a length that the interpreter can walk."""
    kernel_limits.walk.cache_clear()
    monkeypatch.setattr(kernel_limits, "tile_side", lambda run, S, kind: 128)
    yield
    kernel_limits.walk.cache_clear()


CASES = {
    "dense": (None, (0, 0), (1, 300, 2, 16), 1),
    "stripes": (HeadPattern(32, 3, 4), (0, 2), (2, 450, 1, 16), 1),
    "odd blocks, sinks, context 2": (HeadPattern(24, 5, 3, 0, 2), (2, 1), (1, 600, 2, 16), 2),
    "a window": (HeadPattern(40, 2), (0, 0), (1, 450, 2, 16), 1),
    "sinks, context 3": (HeadPattern(48, 3, sinks=1), (0,), (1, 450, 1, 16), 3),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_masked_reference(case):
    assert_equals_masked(splash, *case)


@pytest.mark.slow
def test_equals_the_masked_reference_everywhere():
    @settings(max_examples=40)
    @given(
        heads=kinds_and_offsets(st.integers(1, 200)),
        parts=st.integers(1, 100),
        B=st.integers(1, 2),
        G=st.integers(1, 3),
        context=st.sampled_from((1, 1, 2, 4)),
        odd=st.integers(0, 1),
        small=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def check(heads, parts, B, G, context, odd, small, seed):
        T = 8 * parts + (odd if context == 1 else 0)
        with pytest.MonkeyPatch.context() as patch:
            kernel_limits.walk.cache_clear()
            if small:
                patch.setattr(kernel_limits, "tile_side", lambda run, S, kind: 128)
            assert_equals_masked(splash, *heads, (B, T, G, 16), context, seed)

    check()
    kernel_limits.walk.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(("K", "T", "context"), [(1, 1500, 1), (8, 1500, 1), (2, 2048, 2)])
def test_equals_the_masked_reference_at_length(K, T, context):
    pattern = ContextSharding(64, 4, stride=8).layers(1, K)[0]
    offsets = tuple(head.offset for head in pattern)
    assert_equals_masked(splash, pattern[0], offsets, (1, T, 8 // K, 64), context)


def test_bfloat16_stays_close():
    """To float64 on the same operands: outputs are up to 2, with an RMS of 0.2, gradients twice."""
    case = HeadPattern(32, 3, 4), (0, 2), (1, 300, 2, 16)
    found = differences(splash, *case, dtype="bfloat16")
    np.testing.assert_array_less(found, [0.01, 0.03, 0.03, 0.03])


AS_LAX = SimpleNamespace(
    div=np.floor_divide, dynamic_index_in_dim=lambda x, i, axis, keepdims: np.take(x, i, axis)
)


@given(
    heads=kinds_and_offsets(st.integers(1, 200)),
    T=st.integers(1, 1500),
    context=st.integers(1, 4),
    device=st.integers(0, 3),
)
def test_each_visible_key_is_seen_in_one_place_and_its_tile_visited(heads, T, context, device):
    (kind, (offset, *_)), parts = heads, 1 if context == 1 else 2
    run = -(-T // (parts * context))
    S = run * parts * context
    walk = kernel_limits.walk(run * parts, parts, S, kind)
    residue = -(offset + walk.sinks) % walk.kind.stride if walk.stripe else 0
    starts = np.array([device % context, 2 * context - 1 - device % context])[:parts] * run
    with pytest.MonkeyPatch.context() as patch:
        for module in (shard, splash):
            patch.setattr(module, "jnp", np)  # which has the same calls and compiles nothing
            patch.setattr(module, "lax", AS_LAX)
        keys = splash._laid(np.arange(1, S + 1)[None, :, None], walk, residue)
        rows = splash._rows(walk, starts, residue)
        columns = [splash._columns_near(walk, starts, residue)]
        if walk.far:
            columns.insert(0, splash._columns_far(walk, starts, residue))
        seen = splash._mask(walk)(rows.q_sequence[:, None], np.arange(walk.far + walk.near))

    here = seen.reshape(parts, -1, seen.shape[1])[:, :run].reshape(run * parts, -1)
    keys = keys[0, :, 0] - 1  # -1 in places that hold no key
    held = keys >= 0
    times = np.zeros((len(here), S), int)
    np.add.at(times, (slice(None), keys[held]), here[:, held])
    positions = (starts[:, None] + np.arange(run)).ravel()
    head = kind and replace(kind, offset=offset)
    np.testing.assert_array_equal(times, visible(head, S)[positions])
    assert not here[:, ~held].any()

    live = seen.reshape(walk.rows, walk.block, -1, walk.block).any(axis=(1, 3))
    visits = [j[busy > 0] for j, busy in zip(rows.data_next[0], rows.block_mask[0], strict=True)]
    assert [list(x) for x in visits] == [list(np.flatnonzero(x)) for x in live]
    n = walk.far // walk.block
    for table, part in zip(columns, (live[:, :n], live[:, n:])[2 - len(columns) :], strict=True):
        pairs = zip(table.data_next[0].T, table.block_mask[0].T, strict=True)
        assert [list(i[busy > 0]) for i, busy in pairs] == [list(np.flatnonzero(x)) for x in part.T]


def test_tables_are_small():
    assert kernel_limits.metadata_bytes(131_072, DEFAULT) == 98_304
    assert kernel_limits.metadata_bytes(32_768, DEFAULT, parts=2, S=131_072) == 24_576
    assert kernel_limits.metadata_bytes(131_072, None) == 32_768
    walk = kernel_limits.walk(131_072, 1, 131_072, DEFAULT)
    tables = splash._rows, splash._columns_far, splash._columns_near
    starts = jnp.zeros(1, jnp.int32)
    rows, far, near = jax.eval_shape(lambda: [table(walk, starts, 3) for table in tables])
    assert rows.data_next.shape == rows.block_mask.shape == (1, 256, 19)
    assert far.data_next.shape == (1, 256, 16)
    assert near.data_next.shape == (1, 3, 256)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_compiles_for_a_tpu(kind):
    """Needs libtpu, which make test-slow brings; without it this fails and says so."""
    asked = [
        {"kind": kind, "T": T, "K": K, "G": 8 // K, "H": 64, "context": context}
        for T in (8192, 32_768, 131_072)
        for K in (1, 2, 8)
        for context in (1, 4)
        if T * context <= 131_072
    ] + [{"kind": kind, "T": 8192, "K": 2, "G": 4, "H": 128}]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tpu_splash.py"))],
        input=json.dumps(asked),
        env=compiler_environment(slice_of(f"{kind}:2x2")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {x["kernels"] for x in found} == {7}  # forward, dQ and dK/dV, near and far ones apart
    assert max(x["metadata"] for x in found) == 98_304
    assert max(x["temporaries"] for x in found) < 8 * 2**30  # T x T scores would take 256 GiB
