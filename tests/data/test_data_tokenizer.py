"""Tokenizers lose nothing, cannot be fooled by a text, and are the same every time."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import DataConfig, UserError
from gqa_scaling.data import prepare
from gqa_scaling.data import tokenizer as module
from gqa_scaling.data.tokenizer import bytes_tokenizer, read_tokenizer, train_bpe

SOURCE = [Path(m.__file__).read_text(encoding="utf-8") for m in (json, random, subprocess)]
BPE = train_bpe(500, SOURCE, "bpe-500")


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer(), BPE], ids=lambda t: t.name)
@given(text=st.text())
def test_round_trip(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert tokens.dtype == np.uint16
    assert tokenizer.eos not in tokens
    assert tokenizer.decode(tokens) == text


def test_bytes_are_bytes():
    tokenizer = bytes_tokenizer()
    (tokens,) = tokenizer.encode(["aé"])
    assert tokens.tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.eos) == (257, 256)
    assert tokenizer.decode([97, 0xC3, 256]) == "a\ufffd"


def test_a_text_cannot_forge_the_end_of_a_document():
    text = "before <|endoftext|> after"
    (tokens,) = BPE.encode([text])
    assert BPE.eos not in tokens
    assert BPE.decode([*tokens, BPE.eos]) == text


UNIGRAM = tokenizers.models.Unigram([("</s>", 0.0), ("?", -9.0), ("a", -3.0)], 1, False)
WORDS = tokenizers.models.WordLevel({"</s>": 0, "a": 1, "?": 2}, "?")


@pytest.mark.parametrize("model", [UNIGRAM, WORDS], ids=["unigram", "words"])
def test_a_model_that_has_the_end_of_a_document_among_its_pieces_is_refused(tmp_path, model):
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "t.json"))
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{'a ' * i}</s> a")
    data = DataConfig(str(tmp_path / "texts"), str(tmp_path / "t.json"), store=str(tmp_path / "s"))
    with pytest.raises(UserError, match="takes the text '</s>' for its end-of-text token"):
        prepare(data, show=False)
    BPE.require_unforgeable()


def test_bpe_has_its_size_and_compresses():
    assert BPE.vocab_size == 500
    text = SOURCE[0]
    assert len(BPE.encode([text])[0]) < 0.6 * len(text)


def test_bpe_is_the_same_in_any_order_and_any_process():
    assert train_bpe(500, reversed(SOURCE), "bpe-500").sha256 == BPE.sha256
    script = (
        "import json, random, subprocess; from pathlib import Path;"
        "from gqa_scaling.data.tokenizer import train_bpe;"
        "s = [Path(m.__file__).read_text(encoding='utf-8') for m in (json, random, subprocess)];"
        "print(train_bpe(500, s, 'bpe-500').sha256)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "1"},
    )
    assert other.stdout.strip() == BPE.sha256


@given(
    texts=st.lists(st.text("ab", max_size=8), max_size=20),
    limit=st.integers(1, 60),
    order=st.randoms(),
)
def test_sample_is_bounded_and_knows_no_order(texts, limit, order):
    sample = module._sample(texts, limit)
    assert sum(map(len, sample)) <= limit or len(sample) == 1
    by_hash = sorted(texts, key=lambda t: hashlib.sha256(t.encode()).hexdigest())
    assert sample == by_hash[: len(sample)]
    rest = by_hash[len(sample) :]
    assert not rest or sum(map(len, sample)) + len(rest[0]) > limit
    order.shuffle(texts)
    assert module._sample(texts, limit) == sample


def test_too_little_text_for_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"bpe-4096.*only yields \d+: choose a smaller N"):
        train_bpe(4096, ["a short text"], "bpe-4096")


def made(path, tokens, specials):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in tokens}, "a"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.add_special_tokens(specials)
    library.enable_truncation(2)
    library.enable_padding()
    library.save(str(path))
    return path


def test_tokenizer_json_is_identified_by_its_bytes_and_read_without_its_truncation(tmp_path):
    path = made(tmp_path / "t.json", [(0, "a"), (70_000, "b")], ["<s>", "</s>"])
    tokenizer = read_tokenizer(path)
    assert tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert tokenizer.eos == tokenizers.Tokenizer.from_file(str(path)).token_to_id("</s>")
    assert tokenizer.vocab_size == 70_001  # ids may have gaps
    encoded = tokenizer.encode(["a b a b b", "a"])
    assert [e.tolist() for e in encoded] == [[0, 70_000, 0, 70_000, 70_000], [0]]
    assert encoded[0].dtype == np.uint32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no end-of-text token.*it has <s>"),
        (b"{}", "must be one that `tokenizers` reads"),
        (b"\xff", "must be a tokenizer.json"),
    ],
)
def test_unusable_tokenizer_json_is_refused(tmp_path, content, words):
    path = made(tmp_path / "t.json", [(0, "a")], ["<s>"])
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_tokenizer(path)


def test_missing_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read tokenizer="):
        read_tokenizer(tmp_path / "t.json")
