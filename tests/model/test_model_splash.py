import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from masked_attention import assert_equals_masked, masked, operands, visible

from gqa_scaling.context_sharding import BlockPattern, HeadPattern, strided
from gqa_scaling.hardware import topology
from gqa_scaling.model import splash
from gqa_scaling.pods import compiler_environment

attend = functools.partial(splash.splash_attend, interpret=True)
STRIPES = (HeadPattern(32, 3, 4), HeadPattern(32, 3, 4, 2))


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles at a length that the interpreter can walk."""
    splash._walk.cache_clear()
    monkeypatch.setattr(splash, "_block", lambda T, head: 128)
    yield
    splash._walk.cache_clear()


PATTERNS = {
    "one dense head": (None,),
    "dense heads": (None,) * 2,
    "a stripe each": STRIPES,
    "odd blocks, sinks, a window, a dense head": (
        HeadPattern(24, 5, 3, 1, sinks=2),
        HeadPattern(48, 3, sinks=1),
        HeadPattern(40, 2),
        None,
    ),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_equals_the_masked_reference(pattern):
    assert_equals_masked(lambda *x: attend(*x, pattern), (1, 450, 2, 16), pattern)


def test_equals_the_masked_reference_with_its_own_tiles():
    pattern = (STRIPES[0], None)
    assert_equals_masked(lambda *x: attend(*x, pattern), (2, 600, 1, 16), pattern)


@pytest.mark.slow
@pytest.mark.parametrize("K", [1, 2, 8])
@pytest.mark.parametrize("T", [1500, 4096])
def test_equals_the_masked_reference_at_length(K, T):
    pattern = strided(window=256, stride=8).layer(0, 1, K)
    assert_equals_masked(lambda *x: attend(*x, pattern), (1, T, 8 // K, 64), pattern)


def test_bfloat16_stays_close():
    pattern = (STRIPES[0], None)
    q, k, v, _ = operands(1, 300, 2, 2, 16)
    got = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), pattern)
    assert got.dtype == jnp.bfloat16
    want = masked(q, k, v, np.stack([visible(head, 300) for head in pattern]))
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)


HEADS = st.builds(
    lambda block, local, stride, turn, sinks: HeadPattern(
        block, local, stride, turn % stride if stride else 0, sinks
    ),
    st.integers(1, 200),
    st.integers(1, 8),
    st.none() | st.integers(2, 9),
    st.integers(0, 8),
    st.integers(0, 4),
)


@given(head=HEADS, T=st.integers(1, 1500))
def test_each_visible_key_is_seen_in_one_place_and_its_tile_visited(head, T):
    walk = splash._walk(T, head)
    places = np.arange(walk.far + walk.near)
    since, until = splash._seen(places, head, walk.far, walk.sinks + walk.stripe)
    t = np.arange(walk.near)[:, None]
    seen = (since <= t) & (t < until)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splash, "jnp", np)  # which has the same calls and compiles nothing
        keys = splash._keys(np.arange(1, T + 1)[None, :, None, None], head, walk)[0, :, 0]
    keys -= 1  # -1 in places that hold no key
    times = np.zeros((T, T), int)
    held = keys >= 0
    np.add.at(times, (slice(None), keys[held]), seen[:T, held])
    np.testing.assert_array_equal(times, visible(head, T))
    assert not seen[:T, ~held].any()

    b = walk.block
    live = seen.reshape(walk.near // b, b, -1, b).any(axis=(1, 3))
    n = walk.far // b
    rows = walk.rows.data_next[0], walk.rows.block_mask[0]
    assert [list(j[busy > 0]) for j, busy in zip(*rows, strict=True)] == [
        list(np.flatnonzero(row)) for row in live
    ]
    for table, part in ((walk.columns_far, live[:, :n]), (walk.columns_near, live[:, n:])):
        assert (table is None) == (part.size == 0)
        if table is not None:
            columns = table.data_next[0].T, table.block_mask[0].T
            assert [list(i[busy > 0]) for i, busy in zip(*columns, strict=True)] == [
                list(np.flatnonzero(column)) for column in part.T
            ]


def test_tables_are_small():
    (head,) = strided().layer(0, 1, 1)
    assert splash.metadata_bytes(131_072, head) == 98_304
    walk = splash._walk(131_072, head)
    assert walk.rows.data_next.shape == (1, 256, 19)
    assert walk.columns_far.data_next.shape == (1, 254, 16)
    assert walk.columns_near.data_next.shape == (1, 3, 256)


def test_what_does_not_fit_is_told():
    q, k, v, _ = operands(1, 32, 2, 1, 8)
    for pattern, wrong, words in [
        ((None,), (q, k, v), "a pattern of 1 heads must have one for each of 2 KV heads"),
        ((None, None), (q, k[:, :16], v), r"must both be \(1, 32, 2, 8\)"),
        ((None, None), (q, k, v.astype(jnp.bfloat16)), "bfloat16, float32: they must all be"),
        ((None, BlockPattern(32, ((0,),))), (q, k, v), "BlockPattern: it must be a HeadPattern"),
    ]:
        with pytest.raises(ValueError, match=words):
            attend(*wrong, pattern)
    long = [jax.ShapeDtypeStruct((1, 2**21, 1, *rest, 8), jnp.float32) for rest in ((1,), (), ())]
    with pytest.raises(ValueError, match=r"T=2097152 needs .* bytes of tables for a dense head"):
        jax.eval_shape(lambda *x: attend(*x, (None,)), *long)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
def test_compiles_for_a_tpu(kind):
    """Needs libtpu, which make test-slow brings; without it this fails and says so."""
    asked = [
        {"kind": kind, "T": T, "K": 2, "G": 4, "H": H, "sparse": sparse}
        for T, H, sparse in ((8192, 128, True), (131_072, 64, True), (131_072, 64, False))
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tpu_splash.py"))],
        input=json.dumps(asked),
        env=compiler_environment(topology(f"{kind}:2x2")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [x["kernels"] for x in found] == [8, 8, 3]
    assert max(x["temporaries"] for x in found) < 3 * 2**30  # T x T scores would take 256 GiB
