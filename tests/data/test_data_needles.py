"""Needles in training text, and prompts that ask for one."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import Needles, UserError
from gqa_scaling.data import TokenStore, prepare
from gqa_scaling.data.loader import TrainingData, evaluation_hash
from gqa_scaling.data.needles import Mixture, needle_prompt

ANSWERS = {
    "repeated": r" \d{7}",
    "number": r" \d{7}",
    "uuid": r" [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}


def data(store: TokenStore, needles: Needles | None, length: int = 256) -> TrainingData:
    return TrainingData(store, length, batch_size=4, seed=0, needles=needles)


def text_of(tokens: np.ndarray) -> bytes:
    return bytes((tokens % 256).tolist())  # the end of a document is 256


# ------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("form", ANSWERS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_prompt_states_the_value_at_its_depth_and_asks_for_it_at_the_end(store, form, depth):
    prompt = needle_prompt(store, 400, depth, form, seed=0, trial=1)
    assert prompt.tokens.shape == (401,)
    text, answer = (text_of(x) for x in (prompt.tokens, prompt.answer))
    assert re.fullmatch(ANSWERS[form], answer.decode())
    (question,) = re.findall(rb"\nThe code of [a-z]+:$", text.removesuffix(answer))
    statement = question + answer + b"\n"
    assert text.count(statement) == 1
    hay = text.removesuffix(question + answer)
    place = hay.index(statement)
    assert place == round(depth * (len(hay) - len(statement)))
    hay = hay.replace(statement, b"")
    if form == "repeated":
        assert set(hay.split(b". ")[1:-1]) == {hay.split(b". ")[0]}
    else:
        assert hay in text_of(store.tokens("heldout", 0, store.heldout_tokens))


def test_prompts_of_one_trial_differ_in_depth_alone_and_trials_in_all(store):
    def hay(depth: float, trial: int) -> tuple[bytes, bytes]:
        prompt = needle_prompt(store, 300, depth, "number", 0, trial)
        text, answer = (text_of(x) for x in (prompt.tokens, prompt.answer))
        statement = re.search(rb"\nThe code of [a-z]+:" + answer + b"\n", text)[0]
        return text.replace(statement, b""), answer

    assert hay(0.0, 0) == hay(0.5, 0) == hay(1.0, 0)
    assert len({hay(0.0, trial) for trial in range(20)}) == 20


def test_in_associative_recall_one_rare_token_follows_another(store):
    asked, answers = set(), set()
    for trial in range(400):
        prompt = needle_prompt(store, 100, 0.5, "tokens", 3, trial)
        assert prompt.tokens[-1:].tolist() == prompt.answer.tolist()
        pairs = np.lib.stride_tricks.sliding_window_view(prompt.tokens, 2).tolist()
        assert pairs.count(prompt.tokens[-2:].tolist()) == 2
        asked.add(prompt.tokens[-2])
        answers.add(prompt.answer[0])
    assert asked == set(range(224, 256))  # 256 ends documents
    assert answers == set(range(192, 224))


def test_rare_tokens_of_a_vocabulary_that_has_too_few_are_refused(store):
    few = dataclasses.replace(store.tokenizer, vocab_size=64)
    with pytest.raises(UserError, match="need a tokenizer of more than 64 tokens"):
        Mixture(Needles(form="tokens", share=0.1), few, 200)


@pytest.mark.parametrize(
    ("length", "said"),
    [(40, "lengths=40 is too short"), (10**6, "needs .* tokens of held-out text")],
)
def test_lengths_that_no_prompt_can_have_are_refused(store, length, said):
    with pytest.raises(UserError, match=said):
        needle_prompt(store, length, 0.5, "number", 0, 0)


# ------------------------------------------------------------------------------ training text


@given(
    share=st.floats(0.05, 0.25),
    form=st.sampled_from(["number", "uuid", "tokens"]),
    length=st.integers(250, 500),
    sequence=st.integers(0, 10**6),
)
def test_every_needle_is_told_and_asked_for_thrice(store, share, form, length, sequence):
    parts = Mixture(Needles(share, form), store.tokenizer, length).segments(sequence)
    starts = [start for start, _ in parts]
    ends = [start + len(part) for start, part in parts]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert not parts or (starts[0] >= 0 and ends[-1] <= length)
    written = [part.tobytes() for _, part in parts]
    assert all(written.count(part) == 4 for part in written)


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7])
def test_needles_make_up_their_share(store, share):
    mixture = Mixture(Needles(share, "number"), store.tokenizer, 512)
    written = [sum(len(part) for _, part in mixture.segments(i)) for i in range(400)]
    assert np.mean(written) / 512 == pytest.approx(share, rel=0.1)


def test_the_rest_of_a_sequence_is_the_text_as_it_was(store):
    plain, mixed = data(store, None), data(store, Needles(0.3, "number", seed=5))
    changed = 0
    for step in range(3):
        for row, chunk in enumerate(mixed.chunks(step)):
            kept = np.ones(257, bool)
            for start, part in Mixture(Needles(0.3, "number", 5), store.tokenizer, 257).segments(
                chunk
            ):
                np.testing.assert_array_equal(
                    mixed.batch(step)[row, start : start + len(part)], part
                )
                kept[start : start + len(part)] = False
            assert (mixed.batch(step)[row] == plain.batch(step)[row])[kept].all()
            changed += (~kept).sum()
    assert changed > 0


def test_pieces_of_a_batch_hold_the_needles_of_the_whole(store):
    mixed = data(store, Needles(0.3, "tokens"))
    whole = mixed.batch(2)
    pieces = [
        (range(1, 3), range(0, 100)),
        (range(0, 4), range(100, 256)),
        (range(3, 4), range(7, 8)),
    ]
    for (rows, time), found in zip(pieces, next(mixed.iterate(2, pieces)), strict=True):
        wanted = whole[rows.start : rows.stop, time.start : time.stop + 1]
        np.testing.assert_array_equal(found, wanted)


def test_seeds_and_sequences_have_needles_of_their_own(store):
    def first(seed: int, sequence: int) -> bytes:
        mixture = Mixture(Needles(0.9, "number", seed), store.tokenizer, 256)
        return b"".join(part.tobytes() for _, part in mixture.segments(sequence))

    assert len({first(seed, sequence) for seed in (0, 1) for sequence in range(5)}) == 10
    assert first(1, 4) == first(1, 4)


def test_store_and_evaluation_stream_are_the_same_with_needles(config, store):
    made = prepare(config(needles=Needles(0.5)), show=False)
    assert made.hash == store.hash
    assert made.describe() == store.describe()
    assert evaluation_hash(made, 512, 256) == evaluation_hash(store, 512, 256)


@pytest.mark.parametrize(
    ("needles", "length", "said"),
    [
        (Needles(0.5, "number"), 32, "need sequences of 1[0-2][0-9] tokens"),
        (Needles(1.0, "tokens"), 2**10, "at most 31 are put into a sequence: take at most 0.24"),
    ],
)
def test_needles_that_do_not_fit_are_refused(store, needles, length, said):
    with pytest.raises(UserError, match=said):
        Mixture(needles, store.tokenizer, length)
