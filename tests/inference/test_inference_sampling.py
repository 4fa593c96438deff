import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import UserError
from gqa_scaling.data.tokenizer import bytes_tokenizer, train_bpe
from gqa_scaling.inference.sampling import Sampling, choose
from gqa_scaling.inference.text import TextStream

P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 4000


def drawn(sampling: Sampling) -> np.ndarray:
    """Shares of the tokens in many draws, each at a position of its own."""
    logits = jnp.tile(jnp.log(jnp.asarray(P)), (DRAWS, 1))
    tokens = choose(sampling, logits, jnp.zeros(DRAWS, jnp.int32), jnp.arange(DRAWS))
    return np.bincount(tokens, minlength=len(P)) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling(1.0), P),
        (Sampling(0.5), P**2),
        (Sampling(1.0, top_k=2), P * [0, 1, 0, 1, 0]),
        (Sampling(1.0, top_k=9), P),
        (Sampling(1.0, top_p=0.6), P * [0, 1, 0, 1, 0]),  # 0.4 + 0.25 are the first to hold it
        (Sampling(1.0, top_p=0.7), P * [0, 1, 0, 1, 1]),
        (Sampling(1.0, top_p=0.01), P * [0, 1, 0, 0, 0]),
        (Sampling(1.0, top_k=3, top_p=0.7), P * [0, 1, 0, 1, 0]),  # 0.65 of the 0.85 that are left
        (Sampling(0.0, top_k=3), P * [0, 1, 0, 0, 0]),
        (Sampling(1e-40), P * [0, 1, 0, 0, 0]),
        (Sampling(1e-40, top_k=3, top_p=0.7), P * [0, 1, 0, 0, 0]),
    ],
)
def test_shares_are_those_of_the_truncated_distribution(sampling, wanted):
    wanted = wanted / wanted.sum()
    found = drawn(sampling)
    assert (found[wanted == 0] == 0).all()
    np.testing.assert_allclose(found, wanted, atol=5 * (0.25 / DRAWS) ** 0.5)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"temperature": -1}, "temperature=-1 must be a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 must be greater than 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be greater than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p=1.5"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(how, said):
    with pytest.raises(UserError, match=said):
        Sampling(**how)


# ------------------------------------------------------------------------------- text as it comes

BYTES = bytes_tokenizer()
BPE = train_bpe(280, ["to be or not to be " * 50, "über größe naïve 日本語 😀" * 20], "bpe-280")
TEXTS = st.text(st.sampled_from("ab ü日😀\n\ufffd"), max_size=12)


@given(TEXTS, TEXTS, st.sampled_from([BYTES, BPE]))
def test_pieces_make_the_whole_text_and_hold_no_cut_character(prompt, text, tokenizer):
    before, tokens = (tokenizer.encode([each])[0] for each in (prompt, text))
    stream = TextStream(tokenizer, before)
    pieces = [stream.add(token) for token in tokens]
    said = "".join(pieces)
    assert text.startswith(said)
    assert said + stream.end() == text


@given(st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_text_are_said_as_well(tokens):
    stream = TextStream(BYTES, [])
    said = "".join(stream.add(token) for token in tokens) + stream.end()
    assert said == BYTES.decode(tokens)
    assert stream.end() == ""
