"""Text to token ids and back: bytes, or a `tokenizers` JSON file trained here or elsewhere."""

import functools
import hashlib
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import ArrayLike

from gqa_scaling.config import UserError, require
from gqa_scaling.files.storage import expanded

EOS = "<|endoftext|>"
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")

# More text than this hardly changes which merges a BPE learns.
SAMPLE_BYTES = 2**26


@dataclass(frozen=True)
class Tokenizer:
    """`vocab_size` is one more than the greatest id; `eos` ends every document.

    `definition` is the text of a tokenizer.json, None for bytes. `sha256` is the hash of that
    text, so that it equals the hash of the file.
    """

    name: str
    vocab_size: int
    eos: int
    sha256: str
    definition: str | None

    @property
    def dtype(self) -> np.dtype:
        """The little-endian unsigned type that tokens are stored as."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @functools.cached_property
    def _library(self) -> tokenizers.Tokenizer:
        assert self.definition is not None  # bytes need no library
        return _library(self.definition)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The token ids of each text, without EOS. A text cannot forge a special token."""
        if self.definition is None:
            return [np.frombuffer(t.encode(), np.uint8).astype(self.dtype) for t in texts]
        encoded = self._library.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, self.dtype) for e in encoded]

    def require_unforgeable(self) -> None:
        """Raise UserError where a text that holds the name of the end-of-text token has that token in
        it, and so ends a document in its middle.

        Models of words and Unigram have it among their own pieces, whatever is said of special tokens.
        """
        if self.definition is None:
            return
        text = self._library.id_to_token(self.eos)
        require(
            self.eos not in self.encode([f"a {text} a"])[0],
            f"tokenizer={self.name!r} takes the text {text!r} for its end-of-text token, by which a "
            "document would end in its middle: choose another, such as a BPE",
        )

    @property
    def put_before(self) -> list[int]:
        """What the tokenizer.json itself puts before a text; nothing in training here does."""
        if self.definition is None:
            return []
        alone, whole = (
            self._library.encode("a", add_special_tokens=added).ids for added in (False, True)
        )
        ways = range(len(whole) - len(alone) + 1)
        return next((whole[:k] for k in ways if whole[k : k + len(alone)] == alone), [])

    def decode(self, tokens: ArrayLike) -> str:
        """The text of some tokens; EOS and numbers of no token are left out, cut characters become
        U+FFFD."""
        ids = [int(t) for t in np.asarray(tokens) if t != self.eos]
        if self.definition is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return self._library.decode(ids)


def bytes_tokenizer() -> Tokenizer:
    """The 256 bytes of UTF-8 text, and EOS = 256."""
    return Tokenizer("bytes", 257, 256, hashlib.sha256(b"256 bytes, EOS=256").hexdigest(), None)


def read_tokenizer(path: str | Path, name: str | None = None) -> Tokenizer:
    """A tokenizer.json. Raises UserError when it cannot be read or names no EOS token."""
    file = expanded(path)
    plain = file.is_file() or not file.exists()  # a pipe would be waited for
    require(plain, f"cannot read tokenizer={str(path)!r}: it is no plain file")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer={str(path)!r}: {error.strerror}") from error
    try:
        return from_definition(content.decode(), name or Path(path).name)
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer={str(path)!r} must be a tokenizer.json: {error}") from error


def from_definition(definition: str, name: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json."""
    library = _library(definition)
    special = {t.content: i for i, t in library.get_added_tokens_decoder().items() if t.special}
    eos = next((special[known] for known in EOS_NAMES if known in special), None)
    if eos is None:
        raise UserError(
            f"tokenizer={name!r} has no end-of-text token: one of its special tokens must be "
            f"{' or '.join(EOS_NAMES)}; it has {', '.join(special) or 'none'}"
        )
    vocab_size = max(library.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.sha256(definition.encode()).hexdigest()
    return Tokenizer(name, vocab_size, eos, digest, definition)


def _library(definition: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"a tokenizer.json must be one that `tokenizers` reads: {error}") from error
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # "<|endoftext|>" within a text stays text
    return library


def train_bpe(vocab_size: int, texts: Iterable[str], name: str) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, the same one for the same set of texts.

    From more than SAMPLE_BYTES of text a sample is taken: the documents of least hash, which
    depends neither on their order nor on where they lie. Raises UserError when the texts hold
    too few distinct words for `vocab_size`.
    """
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_sample(texts, SAMPLE_BYTES), trainer)
    learnt = library.get_vocab_size()
    require(
        learnt == vocab_size,
        f"tokenizer={name!r} needs {vocab_size} tokens but the training text only yields {learnt}: "
        "choose a smaller N or a larger corpus",
    )
    # Read and written again: sorted keys, so that equal tokenizers are equal files.
    definition = json.dumps(json.loads(library.to_str()), ensure_ascii=False, indent=1)
    return from_definition(definition, name)


def _sample(texts: Iterable[str], limit: int) -> list[str]:
    """As many texts, by ascending sha256, as hold at most `limit` characters; at least one."""
    kept: list[tuple[int, str]] = []  # a heap whose first element has the greatest hash
    held, bound = 0, 2**256
    for text in texts:
        key = int.from_bytes(hashlib.sha256(text.encode()).digest())
        if key < bound:
            heapq.heappush(kept, (-key, text))
            held += len(text)
        while held > limit and len(kept) > 1:
            key, dropped = heapq.heappop(kept)
            held, bound = held - len(dropped), -key
    return [text for _, text in sorted(kept, reverse=True)]
