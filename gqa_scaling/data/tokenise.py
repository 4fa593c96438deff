"""Documents to tokens on disk: encoded by threads ahead of the writing, written in their order.

A document is held out when its own hash says so, whatever its name and its neighbours.
"""

import array
import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from rich.progress import Progress

from gqa_scaling.config import DataConfig, require
from gqa_scaling.data.corpus import Corpus, Document
from gqa_scaling.data.manifest import SPLITS, Split, file_entry
from gqa_scaling.data.tokenizer import Tokenizer
from gqa_scaling.units import quantity

SHARD_TOKENS = 2**28
TASK_BYTES = 2**20  # text handed to a thread at once


def is_held_out(text_digest: bytes, heldout_fraction: float) -> bool:
    """Whether the document of this sha256 belongs to the held-out split."""
    return int.from_bytes(text_digest[:8]) < heldout_fraction * 2**64


def digest_of_text(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def tokenise(
    folder: Path,
    data: DataConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    workers: int,
    progress: Progress,
) -> tuple[dict[Split, Any], str, list[str]]:
    """Write the shards of both splits into `folder`.

    Returns what store.json says of each split, the sha256 of the corpus (over those of its
    documents, in order), and the names of the files that were left out because they are not UTF-8.
    Raises UserError when a split is empty.
    """
    not_utf8: list[str] = []
    digests = hashlib.sha256()
    bar = progress.add_task("tokenising", total=corpus.total_bytes, note="")
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_thread_for_each_task())
        writers = {split: stack.enter_context(_Writer(folder, split)) for split in SPLITS}
        for documents, read in _encoded(corpus.documents(not_utf8.append), tokenizer, workers):
            for encoded in documents:
                digests.update(encoded.digest)
                held_out = is_held_out(encoded.digest, data.heldout_fraction)
                writers["heldout" if held_out else "train"].write(encoded)
            tokens = sum(writer.tokens for writer in writers.values())
            progress.update(bar, completed=read, note=f"{quantity(tokens)} tokens")
        total = sum(len(writer.ends) for writer in writers.values())
        for split, writer in writers.items():
            require(
                writer.tokens > 0,
                f"the {split} split is empty: none of the {total} documents of "
                f"corpus={data.corpus!r} falls into it at heldout_fraction={data.heldout_fraction}; "
                "change heldout_fraction or add documents",
            )
        progress.update(bar, completed=corpus.total_bytes)
        splits = {split: writer.finish() for split, writer in writers.items()}
    return splits, digests.hexdigest(), not_utf8


# --------------------------------------------------------------------------- encoding


@dataclass(frozen=True)
class _Encoded:
    digest: bytes  # sha256 of the text
    text_bytes: int
    tokens: np.ndarray  # EOS included


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[_Encoded]:
    eos = np.array([tokenizer.eos], tokenizer.dtype)
    return [
        _Encoded(digest_of_text(text), len(text.encode()), np.concatenate([tokens, eos]))
        for text, tokens in zip(texts, tokenizer.encode(texts), strict=True)
    ]


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[_Encoded], int]]:
    """The documents in order, some at a time, and how many bytes of the corpus were read by then.

    Threads encode a few tasks each ahead of the writing. The library encodes without Python's lock,
    so that threads serve as well as processes, with nothing to start and no text to pass about.
    """
    pending: deque[tuple[Future[list[_Encoded]], int]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for texts, read in _tasks(documents):
            pending.append((pool.submit(_encode, tokenizer, texts), read))
            if len(pending) > 4 * workers:
                future, read = pending.popleft()
                yield future.result(), read
        for future, read in pending:
            yield future.result(), read
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _one_thread_for_each_task() -> Iterator[None]:
    """Keep the library from sharing each task among threads of its own: there are enough already."""
    name = "TOKENIZERS_PARALLELISM"  # read anew by each call
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({name: before} if before is not None else {})


def _tasks(documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
    """The texts of neighbouring documents, about TASK_BYTES together."""
    texts: list[str] = []
    held = read = 0
    for document in documents:
        texts.append(document.text)
        held, read = held + len(document.text), document.read
        if held >= TASK_BYTES:
            yield texts, read
            texts, held = [], 0
    if texts:
        yield texts, read


# ------------------------------------------------------------------------------- writing


class _Writer:
    """Appends documents to the shards of one split, hashing as it goes."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder, self.split = folder, split
        self.tokens = self.text_bytes = 0
        self.ends = array.array("q")
        self.shards: list[dict[str, Any]] = []
        self.file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:  # after `finish` it is closed, else it is thrown away
            with contextlib.suppress(OSError):
                self.file.close()

    def write(self, encoded: _Encoded) -> None:
        rest = encoded.tokens
        while len(rest):
            room = SHARD_TOKENS - self.tokens % SHARD_TOKENS
            file = self._next_shard() if room == SHARD_TOKENS else self.file
            assert file is not None  # as the first token begins a shard
            part, rest = rest[:room], rest[room:]
            file.write(part.data)
            self.sha256.update(part.data)
            self.tokens += len(part)
        self.text_bytes += encoded.text_bytes
        self.ends.append(self.tokens)

    def _next_shard(self) -> IO[bytes]:
        self._end_shard()
        self.file = (self.folder / f"{self.split}-{len(self.shards):05d}.bin").open("wb")
        self.sha256 = hashlib.sha256()
        return self.file

    def _end_shard(self) -> None:
        if self.file is None:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        entry = {"file": Path(self.file.name).name, "bytes": self.file.tell()}
        self.shards.append(entry | {"sha256": self.sha256.hexdigest()})
        self.file.close()

    def finish(self) -> dict[str, Any]:
        """End the last shard, write the document ends, and say what was written."""
        self._end_shard()
        ends = self.folder / f"{self.split}.documents.npy"
        np.save(ends, np.array(self.ends, np.int64))
        return {
            "tokens": self.tokens,
            "documents": len(self.ends),
            "text_bytes": self.text_bytes,
            "shards": self.shards,
            "documents_file": file_entry(ends),
        }
