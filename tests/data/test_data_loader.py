"""The chunks of an epoch, resuming, sharding over hosts, and the evaluation stream."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_scaling.config import UserError
from gqa_scaling.data.loader import TrainingData, evaluation_hash, heldout_chunks

T, B = 30, 4


@pytest.fixture
def data(store):
    return TrainingData(store, context_length=T, batch_size=B, seed=0)


def chunks(store, context_length=T):
    """Every chunk of the training split, straight from the definition."""
    tokens = store.tokens("train", 0, store.train_tokens).tolist()
    starts = range(0, len(tokens) - context_length, context_length)
    return [tuple(tokens[i : i + context_length + 1]) for i in starts]


def stream(data, first, last):
    """The chunks number first..last of the run, in order, whatever the batch size."""
    size = data.batch_size
    batches = [data.batch(s) for s in range(first // size, -(-last // size))]
    offset = first // size * size
    return [tuple(row) for row in np.concatenate(batches).tolist()][first - offset : last - offset]


def test_an_epoch_holds_every_chunk_once_and_each_epoch_another_order(store, data):
    n = data.chunks_per_epoch
    assert n == len(chunks(store))
    assert n % B, "choose sizes where an epoch ends within a batch"
    epochs = [stream(data, e * n, (e + 1) * n) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(chunks(store))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != chunks(store)


def test_every_token_after_the_first_is_a_target_once_in_an_epoch(store, data):
    n = data.chunks_per_epoch
    targets = sorted(t for chunk in stream(data, 0, n) for t in chunk[1:])
    assert targets == sorted(store.tokens("train", 1, n * T + 1).tolist())


@pytest.mark.parametrize("extra", [0, 1, T - 1])
def test_the_last_short_chunk_is_dropped(store, extra):
    length = (store.train_tokens - 1 - extra) // 3
    data = TrainingData(store, length, 1, seed=0)
    assert data.chunks_per_epoch == len(chunks(store, length)) == (store.train_tokens - 1) // length


@pytest.mark.parametrize("start", [0, 1, 7, 1000])
def test_resuming_at_a_step_continues_exactly(data, start):
    whole = [data.batch(step) for step in range(start, start + 40)]  # past the end of an epoch
    everything = [(range(B), range(T))]
    for expected, (got,) in zip(whole, data.iterate(start, everything), strict=False):
        assert got.dtype == np.int32
        assert np.array_equal(expected, got)


def test_order_depends_on_the_seed_and_not_on_the_batch_size(store, data):
    n = data.chunks_per_epoch + 20
    for size in (1, 3, 16):
        assert stream(TrainingData(store, T, size, seed=0), 0, n) == stream(data, 0, n)
    n = 2 * data.chunks_per_epoch
    other = TrainingData(store, T, B, seed=1)
    assert stream(other, 0, n) != stream(data, 0, n)
    # a neighbouring seed is not the same run one epoch on
    assert stream(other, 0, n // 2) != stream(data, n // 2, n)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_read_their_rows_of_one_global_batch(data, hosts):
    per_host = B // hosts
    readers = [
        data.iterate(5, [(range(h * per_host, (h + 1) * per_host), range(T))]) for h in range(hosts)
    ]
    for step, parts in zip(range(5, 30), zip(*readers, strict=True), strict=False):
        assert np.array_equal(np.concatenate([p for (p,) in parts]), data.batch(step))


@settings(max_examples=50)
@given(
    step=st.integers(0, 10_000),
    rows=st.lists(st.integers(0, B), min_size=2, max_size=2, unique=True),
    positions=st.tuples(st.integers(0, T - 1), st.integers(1, T)),
)
def test_a_block_is_a_block_of_the_whole_batch(store, step, rows, positions):
    data = TrainingData(store, T, B, seed=0)
    rows, (start, stop) = range(*sorted(rows)), positions
    if start >= stop:
        with pytest.raises(IndexError, match="contiguous"):
            data.batch(step, rows, range(start, stop))
        return
    block = data.batch(step, rows, range(start, stop))
    whole, rows = data.batch(step), slice(rows.start, rows.stop)
    assert np.array_equal(block[:, :-1], whole[:, :-1][rows, start:stop])
    assert np.array_equal(block[:, 1:], whole[:, 1:][rows, start:stop])


def test_seeking_far_ahead(data):
    (first,) = next(data.iterate(10**6, [(range(B), range(T))]))
    assert np.array_equal(first, data.batch(10**6))


def test_the_order_never_changes_silently(store):
    """A run that is resumed goes on in the order it began with."""
    rows = TrainingData(store, T, 8, seed=0).batch(0).tolist()
    order = [chunks(store).index(tuple(row)) for row in rows]
    assert order == [190, 159, 250, 350, 417, 134, 74, 175], (
        f"the order of chunks is now {order}: if that is meant, say so in the release notes and write "
        "it here, because runs that began before cannot be resumed"
    )


def test_too_little_text_is_refused(store):
    with pytest.raises(UserError, match=r"context_length=\d+ is too long for the [\d,]+ training"):
        TrainingData(store, store.train_tokens, 1, seed=0)
    assert TrainingData(store, store.train_tokens - 1, 1, seed=0).chunks_per_epoch == 1
    with pytest.raises(UserError, match="a batch of 3 sequences must not exceed the 2"):
        TrainingData(store, (store.train_tokens - 1) // 2, 3, seed=0)


@pytest.mark.parametrize("length", [1, 8, 64, 256])
@pytest.mark.parametrize("tokens", [256, 700, 10**9])
def test_the_same_held_out_targets_once_each_at_any_context_length(store, length, tokens):
    got = heldout_chunks(store, length, tokens, multiple_of=256)
    count = min(tokens, store.heldout_tokens - 1) // 256
    whole = store.tokens("heldout", 0, store.heldout_tokens)
    apart = (len(whole) - 1) // count
    pieces = [whole[start : start + 257] for start in range(0, count * apart, apart)]
    assert got.shape == (count * 256 // length, length + 1)
    assert got.dtype == np.int32
    assert not got.flags.writeable
    assert np.array_equal(got[:, 1:].ravel(), np.concatenate([piece[1:] for piece in pieces]))
    assert np.array_equal(got[:, :-1].ravel(), np.concatenate([piece[:-1] for piece in pieces]))


@given(st.integers(2, 5000), st.integers(1, 5000), st.sampled_from((1, 3, 16)))
def test_held_out_targets_are_spread_over_the_whole_split(held_out, tokens, length):
    """Of a split whose tokens are their own places."""
    places = SimpleNamespace(
        name="places",
        heldout_tokens=held_out,
        tokens=lambda split, start, stop: np.arange(start, stop),
    )
    count = min(tokens, held_out - 1) // length
    if count == 0:
        return
    starts = heldout_chunks(places, length, tokens, multiple_of=length)[:, 0]
    gaps = np.diff(np.r_[starts, held_out - 1])
    assert len(starts) == count
    assert starts[0] == 0
    assert gaps.min() >= length  # no target is there twice
    assert np.ptp(gaps) < count


def test_the_evaluation_hash_names_the_targets(store):
    hashes = [evaluation_hash(store, *a) for a in itertools.product((512, 1000), (256, 512))]
    assert hashes[1] == hashes[3]  # one piece of 512 targets
    assert len(set(hashes)) == 3


def test_a_short_held_out_split_is_refused(store):
    n = store.heldout_tokens
    assert len(heldout_chunks(store, n - 1, n, n - 1)) == 1
    with pytest.raises(UserError, match=r"must hold \d+ targets.*raise heldout_fraction"):
        heldout_chunks(store, n, n, n)
    with pytest.raises(UserError, match="multiple_of=100 must be a multiple of context_length=64"):
        heldout_chunks(store, 64, 1000, 100)
