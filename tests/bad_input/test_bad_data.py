"""Corpora, tokenizers and stores that cannot be used, and stores that are damaged."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input_kit import ANY, HUGE, TEXTS, TINY, corpus, shape

from gqa_scaling.config import DataConfig
from gqa_scaling.data import prepare


def _one_document(texts: Path) -> None:
    (texts / "1.txt").write_text("alone")


def _binary(texts: Path) -> None:
    (texts / "1.bin").write_bytes(b"\xff\xfe\x00" * 100)


def _loop(texts: Path) -> None:
    (texts / "loop").symlink_to("loop")
    (texts / "up").symlink_to("..")


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda texts: (texts / name).write_bytes(content) and None


LINES = "\n".join(json.dumps({"text": f"line {i}"}) for i in range(60)).encode()
CORPORA: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda texts: None, "corpus='texts' holds no files"),
    "hidden": (_file(".hidden", b"x"), "corpus='texts' holds no files"),
    "one-document": (_one_document, "split is empty: none of the 1 documents"),
    "empty-files": (_file("1.txt", b""), "none of the 0 documents"),
    "binary": (_binary, "none of the 0 documents"),
    "loops": (_loop, "corpus='texts' holds no files"),
    "bad-json": (_file("a.jsonl", LINES + b"\n{"), "line 61 of texts/a.jsonl is not valid JSON"),
    "json-list": (_file("a.jsonl", b"[1]\n"), "line 1 of texts/a.jsonl must be a JSON object"),
    "no-field": (_file("a.jsonl", b'{"body": "x"}\n'), "has no field 'text', only body"),
    "number": (_file("a.jsonl", b'{"text": 3}\n'), "text=3 in line 1"),
    "null": (_file("a.jsonl", b'{"text": null}\n'), "text=None in line 1"),
    "surrogate": (_file("a.jsonl", b'{"text": "\\ud800"}\n'), "half of a surrogate pair"),
    "deep": (_file("a.jsonl", b"[" * 100_000), "line 1 of texts/a.jsonl is not valid JSON"),
    "long-number": (_file("a.jsonl", b'{"text": ' + b"9" * 5000), "line 1 of texts/a.jsonl is"),
    "not-utf8": (_file("a.jsonl", b'{"text": "\xff"}\n'), "line 1 of texts/a.jsonl is not valid"),
    "no-gzip": (_file("a.jsonl.gz", b"plain"), "texts/a.jsonl.gz is damaged"),
    "cut-gzip": (_file("a.jsonl.gz", b"\x1f\x8b\x08\0"), "texts/a.jsonl.gz is damaged"),
    "no-zst": (_file("a.jsonl.zst", b"plain"), "texts/a.jsonl.zst is damaged"),
    "no-parquet": (_file("a.parquet", b"plain"), "texts/a.parquet is damaged"),
    "empty-parquet": (_file("a.parquet", b""), "texts/a.parquet is damaged"),
    "folder-as-records": (lambda texts: (texts / "a.jsonl").mkdir(), "holds no files"),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_corpora(refused, workplace, kind):
    make, said = CORPORA[kind]
    make(corpus(workplace, documents=0))
    store = "data/made"  # its folder stays: making it is no damage
    (workplace / "data").mkdir()
    refused(said, "prepare", TINY, *TEXTS, "--data.store", store)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("corpus='absent' does not exist", "absent"),
        ("corpus='texts/1.txt' must end in one of", "texts/1.txt"),
        ("corpus='pipe.jsonl' must end in one of", "pipe.jsonl"),
        ("corpus='loop' does not exist", "loop"),
        ("names no home folder", "~nobody-of-that-name/texts"),
        ("File name too long", "n" * 300),
        ("must lie on this machine", "s3://bucket/texts"),
        ("must lie on this machine", "https://example.org/texts"),
    ],
)
def test_names_of_corpora(refused, workplace, said, name):
    corpus(workplace)
    os.mkfifo(workplace / "pipe.jsonl")
    (workplace / "loop").symlink_to("loop")
    refused(said, "prepare", TINY, "--data.corpus", name)


WORDS = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "`tokenizers` reads"),
    "text": (b"hello", "`tokenizers` reads"),
    "list": (b"[]", "`tokenizers` reads"),
    "null": (b"null", "`tokenizers` reads"),
    "table": (b"{}", "`tokenizers` reads"),
    "deep": (b"[" * 100_000, "`tokenizers` reads"),
    "binary": (b"\xff\xfe\0", "tokenizer='own.json' must be a tokenizer.json"),
    "model": (b'{"version": "1.0", "model": {"type": "Nothing"}}', "`tokenizers` reads"),
    "no-eos": (json.dumps(WORDS).encode(), "has no end-of-text token"),
    "negative": (json.dumps(WORDS).replace("0}", "-1}").encode(), "`tokenizers` reads"),
    "huge-id": (json.dumps(WORDS).replace("0}", HUGE + "}").encode(), "`tokenizers` reads"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(refused, workplace, kind):
    content, said = TOKENIZERS[kind]
    corpus(workplace)
    (workplace / "data").mkdir()
    (workplace / "own.json").write_bytes(content)
    refused(said, "prepare", TINY, *TEXTS, "--data.tokenizer", "own.json")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("cannot read tokenizer='absent.json'", "absent.json"),
        ("cannot read tokenizer='folder.json'", "folder.json"),
        ("cannot read tokenizer='pipe.json'", "pipe.json"),
        ("cannot read tokenizer='loop.json'", "loop.json"),
        ("names no home folder", "~nobody-of-that-name/t.json"),
        ("File name too long", "n" * 300 + ".json"),
        ("needs 4000000 tokens but", "bpe-4000000"),
    ],
)
def test_names_of_tokenizers(refused, workplace, said, name):
    texts = workplace / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text("ab" * (i + 1))
    (workplace / "data").mkdir()
    (workplace / "folder.json").mkdir()
    os.mkfifo(workplace / "pipe.json")
    (workplace / "loop.json").symlink_to("loop.json")
    refused(said, "prepare", TINY, *TEXTS, "--data.tokenizer", name)


@pytest.mark.parametrize(
    ("said", "store"),
    [
        ("texts is in the way", "texts"),
        ("a-file is in the way", "a-file"),
        ("a-file/x", "a-file/x"),
        ("File name too long", "data/" + "n" * 300),
        ("/proc/x", "/proc/x/y"),
        ("is in the way", "."),
        ("is in the way", ".."),
        ("is in the way", "/"),
        ("must be a path of this machine", "http://x/y"),
    ],
)
def test_places_of_stores(refused, workplace, said, store):
    corpus(workplace)
    (workplace / "data").mkdir()
    (workplace / "a-file").write_text("x")
    refused(said, "prepare", TINY, *TEXTS, "--data.store", store)


STORES = ANY | {
    "schema": shape(schema=2),
    "schema-list": shape(schema=[1]),
    "splits-list": shape(splits=[]),
    "tokenizer-text": shape(tokenizer="bytes"),
    "declaration-list": shape(declaration=[]),
    "declaration-absent": shape(declaration=...),
    "corpus-absent": shape(corpus=...),
    "dtype-number": shape(dtype=2),
    "hash-other": shape(hash="0" * 64),
    "hash-number": shape(hash=3),
}


TWO_TEXTS = """
from gqa_scaling.config import DataConfig, ModelConfig, RunConfig

def runs():
    model = ModelConfig(1, 32, 1, 1, head_dim=8, vocab_size=264)
    return [
        RunConfig(f"seed{seed}", model, 32, 128, 1280, seed=seed, data=data)
        for seed, data in enumerate((DataConfig(corpus="a/texts"), DataConfig(%s)))
    ]
"""
OTHER_TEXTS = {
    "corpus": ("corpus='b/texts'", "a/texts' and '"),
    "share": ("corpus='a/texts', heldout_fraction=0.5", "heldout_fraction: 0.05 and 0.5"),
    "tokenizer": (
        "corpus='a/texts', tokenizer='bpe-300', store='data/texts-bytes'",
        "tokenizer: ",
    ),
}


@pytest.mark.parametrize("verb", ["plan", "prepare", "run"])
@pytest.mark.parametrize("kind", OTHER_TEXTS)
def test_two_texts_in_one_store(refused, workplace, kind, verb):
    """Both would be trained on the text that the store is made of, and say that it is their own."""
    (workplace / "experiments/two.py").write_text(TWO_TEXTS % OTHER_TEXTS[kind][0])
    for place in "ab":
        (workplace / place).mkdir()
        corpus(workplace).rename(workplace / place / "texts")
    said = refused("one token store, data/texts-bytes, for different text", verb, "experiments.two")
    assert OTHER_TEXTS[kind][1] in said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder of texts and its store."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = corpus(folder)
    data = DataConfig(corpus=str(texts), store=str(folder / "store"))
    prepare(data, workers=1, show=False)
    return folder


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("verb", ["plan", "prepare", "run"])
def test_damaged_stores(refused, workplace, prepared, kind, verb):
    shutil.copytree(prepared, workplace, dirs_exist_ok=True)
    file = workplace / "store/store.json"
    file.write_bytes(STORES[kind](file.read_bytes()))
    said = "has schema 2" if kind == "schema" else f"{Path('store/store.json')} is damaged"
    refused(said, verb, TINY, *TEXTS, "--data.store", "store")
