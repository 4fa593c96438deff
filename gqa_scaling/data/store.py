"""The token store: a corpus as flat shards of token ids, written once and read by every run.

    store.json                  what it is made of, with sizes and checksums; written last
    tokenizer.json              a copy of the tokenizer, unless that is bytes
    train-00000.bin ...         token ids, little-endian uint16 or uint32; EOS ends each document
    train.documents.npy         where each document ends, int64 [documents], EOS included
    heldout-00000.bin ...       the same for the held-out split
    heldout.documents.npy

A document is held out when its own hash says so, whatever its name and its neighbours. A store
is built beside its place and renamed when it is complete, so it is there entirely or not at all.
"""

import array
import bisect
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gqa_scaling.config import DataConfig, UserError, require
from gqa_scaling.data.corpus import Corpus, Document, open_corpus
from gqa_scaling.data.tokenizer import (
    Tokenizer,
    bytes_tokenizer,
    read_tokenizer,
    train_bpe,
)

SCHEMA = 1
SHARD_TOKENS = 2**28
TASK_BYTES = 2**20  # text handed to a worker at once

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")


@dataclass(frozen=True)
class TokenStore:
    """An open token store. `manifest` is its store.json. Reading is memory-mapped."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """A name for people: the corpus and the tokenizer."""
        declared = self.manifest["declaration"]
        return f"{declared['corpus']} ({declared['tokenizer']})"

    @property
    def hash(self) -> str:
        """64 hex digits over every token, every document end and what the ids mean."""
        return self.manifest["hash"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["tokenizer"]["vocab_size"]

    @property
    def eos(self) -> int:
        return self.manifest["tokenizer"]["eos"]

    @property
    def tokenizer_hash(self) -> str:
        return self.manifest["tokenizer"]["sha256"]

    @property
    def corpus_hash(self) -> str:
        """sha256 over the sha256 of each document, in order."""
        return self.manifest["corpus"]["sha256"]

    @property
    def train_tokens(self) -> int:
        return self.manifest["splits"]["train"]["tokens"]

    @property
    def heldout_tokens(self) -> int:
        return self.manifest["splits"]["heldout"]["tokens"]

    @property
    def heldout_bytes_per_token(self) -> float:
        """Bytes of text for each token of the held-out split, EOS tokens counted."""
        heldout = self.manifest["splits"]["heldout"]
        return heldout["text_bytes"] / heldout["tokens"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer the store was made with."""
        if self.manifest["tokenizer"]["file"] is None:
            return bytes_tokenizer()
        return read_tokenizer(self.path / "tokenizer.json", self.manifest["tokenizer"]["name"])

    @functools.cached_property
    def _shards(self) -> dict[str, tuple[list[int], list[np.ndarray]]]:
        """For each split the position each shard begins at, and the shards."""
        dtype, out = np.dtype(self.manifest["dtype"]), {}
        for split in SPLITS:
            files = self.manifest["splits"][split]["shards"]
            maps = [np.memmap(self.path / f["file"], dtype, "r").view(np.ndarray) for f in files]
            starts = itertools.accumulate((len(m) for m in maps[:-1]), initial=0)
            out[split] = (list(starts), maps)
        return out

    def tokens(self, split: Split, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of a split, uint16 or uint32 [stop - start], read-only."""
        total = self.manifest["splits"][split]["tokens"]
        if not 0 <= start <= stop <= total:
            raise IndexError(f"tokens {start}..{stop} must lie within the {total} of {split}")
        starts, shards = self._shards[split]
        first = bisect.bisect_right(starts, start) - 1
        last = max(bisect.bisect_left(starts, stop) - 1, first)
        parts = [
            shard[max(start - begin, 0) : stop - begin]
            for begin, shard in zip(starts[first : last + 1], shards[first : last + 1], strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document_ends(self, split: Split) -> np.ndarray:
        """Where each document of a split ends, its EOS included, int64 [documents]."""
        return np.load(self.path / f"{split}.documents.npy")

    def verify(self) -> None:
        """Read every file and compare its checksum. Raises UserError naming a damaged file."""
        for entry in _files(self.manifest):
            with (self.path / entry["file"]).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            require(
                digest == entry["sha256"],
                f"{self.path / entry['file']} is damaged, its sha256 is not the one recorded: "
                f"{_AGAIN}",
            )

    def describe(self) -> dict[str, Any]:
        """What a result records of its data; the same wherever the store lies."""
        return {
            "hash": self.hash,
            **self.manifest["declaration"],
            "corpus_sha256": self.corpus_hash,
            "tokenizer_sha256": self.tokenizer_hash,
            "vocab_size": self.vocab_size,
            "train_tokens": self.train_tokens,
            "heldout_tokens": self.heldout_tokens,
            "heldout_bytes_per_token": self.heldout_bytes_per_token,
        }


_AGAIN = "build it again with `gqa-scaling prepare EXPERIMENT --rebuild`"


# --- opening -----------------------------------------------------------------------------------


def open_store(data: DataConfig) -> TokenStore:
    """The store of `data`. Sizes are checked, contents are not (see `TokenStore.verify`).

    Raises UserError when the store is missing, damaged, or made from another declaration or
    from a tokenizer.json that has changed since.
    """
    path = Path(data.store_path)
    require(
        (path / "store.json").is_file(),
        f"there is no token store at {path}: make it with `gqa-scaling prepare EXPERIMENT`",
    )
    manifest = _read_manifest(path)
    _same_declaration(data, path, manifest)
    for entry in _files(manifest):
        file = path / entry["file"]
        require(file.is_file(), f"{file} of the token store is missing: {_AGAIN}")
        size = file.stat().st_size
        require(
            size == entry["bytes"],
            f"{file} has {size} bytes but must have {entry['bytes']}: {_AGAIN}",
        )
    if data.tokenizer.endswith(".json") and Path(data.tokenizer).expanduser().is_file():
        now = hashlib.sha256(Path(data.tokenizer).expanduser().read_bytes()).hexdigest()
        require(
            now == manifest["tokenizer"]["sha256"],
            f"tokenizer={data.tokenizer!r} has changed since the token store {path} was made with "
            f"it: restore the file, choose another data.store, or {_AGAIN}",
        )
    return TokenStore(path, manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "store.json"
    try:
        manifest = json.loads(file.read_bytes())
        schema = manifest["schema"]
        whole = schema != SCHEMA or manifest["hash"] == _hash(manifest)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: {_AGAIN}") from None
    require(schema == SCHEMA, f"{file} has schema {schema}, this version reads {SCHEMA}: {_AGAIN}")
    require(whole, f"{file} is damaged, its hash is not that of its content: {_AGAIN}")
    return manifest


def _hash(manifest: dict[str, Any]) -> str:
    """Over what a training run can see: the files and what the ids in them mean."""
    seen = {
        "dtype": manifest["dtype"],
        "tokenizer": {k: manifest["tokenizer"][k] for k in ("sha256", "vocab_size", "eos")},
        "corpus": manifest["corpus"]["sha256"],
        "splits": manifest["splits"],
    }
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


def _files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    splits = [manifest["splits"][name] for name in SPLITS]
    files = [entry for split in splits for entry in (*split["shards"], split["documents_file"])]
    tokenizer = manifest["tokenizer"]["file"]
    return files if tokenizer is None else [*files, tokenizer]


def _declaration(data: DataConfig) -> dict[str, Any]:
    """Names without folders, so that a corpus may move."""
    return {
        "corpus": Path(data.corpus).name,
        "tokenizer": Path(data.tokenizer).name,
        "text_field": data.text_field,
        "heldout_fraction": data.heldout_fraction,
    }


def _same_declaration(data: DataConfig, path: Path, manifest: dict[str, Any]) -> None:
    made, wanted = manifest["declaration"], _declaration(data)
    differing = [f"{k}: {made[k]!r} -> {wanted[k]!r}" for k in wanted if made[k] != wanted[k]]
    require(
        not differing,
        f"the token store {path} was made from another declaration ({', '.join(differing)}): choose "
        f"another data.store or {_AGAIN}",
    )


# --- preparing ---------------------------------------------------------------------------------


def prepare(
    data: DataConfig, *, workers: int | None = None, show: bool = True, rebuild: bool = False
) -> TokenStore:
    """Make the token store of `data`, or return the one that is there.

    The store is the same to the byte for every number of `workers` (default: one for each core;
    for bytes, where encoding costs less than passing text about, one). One means this process.
    `show` draws a progress bar on a terminal and says which files were left out. `rebuild`
    replaces a store.

    Raises UserError when the corpus or the tokenizer cannot be used, when a store from another
    declaration or of a corpus that has changed since is in the place, or when it cannot be written.
    """
    path = Path(data.store_path)
    if not rebuild and (path / "store.json").exists():
        return _existing(data, path)
    empty = path.is_dir() and not any(path.iterdir())
    require(
        not path.exists() or empty or (path / "store.json").exists(),
        f"{path} is in the way, it is no token store: move it or choose another data.store",
    )
    corpus = open_corpus(data)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock"), show):
            if not rebuild and (path / "store.json").exists():  # another process made it meanwhile
                return _existing(data, path)
            try:
                shutil.rmtree(
                    partial, ignore_errors=True
                )  # its process was killed: we hold the lock
                partial.mkdir()
                _build(partial, data, corpus, workers or _default_workers(data), show)
                if path.exists():
                    shutil.rmtree(path)
                partial.rename(path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write the token store {path} ({error.strerror or error}): make room there or "
            "choose another data.store"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker died while it tokenised {data.corpus!r}, most likely for want of memory: use "
            "fewer workers"
        ) from error
    return open_store(data)


def _existing(data: DataConfig, path: Path) -> TokenStore:
    """The store in place, unless its corpus is at hand and has changed since."""
    store = open_store(data)
    if data.corpus == "stdlib" or Path(data.corpus).expanduser().exists():
        require(
            open_corpus(data).fingerprint == store.manifest["corpus"]["fingerprint"],
            f"corpus={data.corpus!r} has changed since the token store {path} was made of it: choose "
            f"another data.store or {_AGAIN}",
        )
    return store


def _default_workers(data: DataConfig) -> int:
    return 1 if data.tokenizer == "bytes" else len(os.sched_getaffinity(0))


@contextlib.contextmanager
def _locked(path: Path, show: bool) -> Iterator[None]:
    """Wait for any other prepare of the same store. The lock ends with its process."""
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _say(show, f"waiting for another process that holds {path}")
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock has removed the file by now: then it is no lock any more.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                try:
                    yield
                finally:
                    path.unlink()
                return


def _build(folder: Path, data: DataConfig, corpus: Corpus, workers: int, show: bool) -> None:
    """Write a complete store into `folder`, its store.json last."""
    with _progress(show) as progress:
        tokenizer = _tokenizer(data, corpus, progress)
        text, splits = _tokenise(folder, data, corpus, tokenizer, workers, progress)
    if text["left_out"]:
        _say(show, f"left out {text['left_out']} files that lie beside the records")
    if text["not_utf8"]:
        names = ", ".join(text["not_utf8"][:3]) + (", ..." if len(text["not_utf8"]) > 3 else "")
        _say(show, f"left out {len(text['not_utf8'])} files that are not UTF-8: {names}")
    file = folder / "tokenizer.json"
    if tokenizer.definition is not None:
        file.write_bytes(tokenizer.definition.encode())
    manifest = {
        "schema": SCHEMA,
        "declaration": _declaration(data),
        "corpus": text,
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "file": None if tokenizer.definition is None else _entry(file),
        },
        "dtype": tokenizer.dtype.str,
        "splits": splits,
    }
    manifest["hash"] = _hash(manifest)
    (folder / "store.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _tokenise(
    folder: Path,
    data: DataConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    workers: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the shards; returns what store.json says of the corpus and of each split."""
    skipped: list[str] = []
    digests = hashlib.sha256()
    bar = progress.add_task("tokenising", total=corpus.total_bytes, note="")
    with _Writer(folder, "train") as train, _Writer(folder, "heldout") as heldout:
        for task in _encoded(corpus.documents(skipped.append), tokenizer, workers):
            for encoded in task.documents:
                digests.update(encoded.digest)
                held_out = _held_out(encoded.digest, data.heldout_fraction)
                (heldout if held_out else train).write(encoded)
            tokens = train.tokens + heldout.tokens
            progress.update(bar, completed=task.read, note=f"{tokens / 1e6:,.1f}M tokens")
        documents = len(train.ends) + len(heldout.ends)
        for writer in (train, heldout):
            require(
                writer.tokens > 0,
                f"the {writer.split} split is empty: none of the {documents} documents of "
                f"corpus={data.corpus!r} falls into it at heldout_fraction={data.heldout_fraction}; "
                "change heldout_fraction or add documents",
            )
        progress.update(bar, completed=corpus.total_bytes)
        splits = {writer.split: writer.finish() for writer in (train, heldout)}
    text = {
        "sha256": digests.hexdigest(),
        "documents": documents,
        "fingerprint": corpus.fingerprint,
        "files": len(corpus.files),
        "left_out": corpus.left_out,
        "not_utf8": skipped,
        "python": platform.python_version(),
    }
    return text, splits


def _tokenizer(data: DataConfig, corpus: Corpus, progress: Progress) -> Tokenizer:
    if data.tokenizer == "bytes":
        return bytes_tokenizer()
    if not data.tokenizer.startswith("bpe-"):
        return read_tokenizer(data.tokenizer)
    bar = progress.add_task(f"training {data.tokenizer}", total=None, note="")
    texts = (
        document.text
        for document in corpus.documents()
        if not _held_out(_digest(document.text), data.heldout_fraction)
    )
    tokenizer = train_bpe(int(data.tokenizer.removeprefix("bpe-")), texts, data.tokenizer)
    progress.update(bar, total=1, completed=1)
    return tokenizer


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _held_out(digest: bytes, heldout_fraction: float) -> bool:
    return int.from_bytes(digest[:8]) < heldout_fraction * 2**64


def _entry(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": path.name, "bytes": len(content), "sha256": digest}


def _say(show: bool, message: str) -> None:
    if show:
        print(message, file=sys.stderr)


def _progress(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not (show and sys.stderr.isatty()),
    )


# --- encoding, in this process or in workers ---------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    digest: bytes
    text_bytes: int
    tokens: np.ndarray


@dataclass(frozen=True)
class _Task:
    documents: list[_Encoded]
    read: int  # bytes of the corpus read when its last document was complete


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[_Encoded]:
    eos = np.array([tokenizer.eos], tokenizer.dtype)
    return [
        _Encoded(_digest(text), len(text.encode()), np.concatenate([tokens, eos]))
        for text, tokens in zip(texts, tokenizer.encode(texts), strict=True)
    ]


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer, workers: int) -> Iterator[_Task]:
    """Encode the documents in order, a few tasks for each worker ahead of the writing."""
    tasks = _tasks(documents)
    if workers == 1:
        for texts, read in tasks:
            yield _Task(_encode(tokenizer, texts), read)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # forking a process with threads hangs
        initializer=_start_worker,
        initargs=(tokenizer,),
    )
    pending: deque = deque()
    try:
        for texts, read in tasks:
            pending.append((pool.submit(_encode_in_worker, texts), read))
            if len(pending) > 4 * workers:
                future, done = pending.popleft()
                yield _Task(future.result(), done)
        for future, done in pending:
            yield _Task(future.result(), done)
    finally:
        pool.shutdown(cancel_futures=True)


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


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for each core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> list[_Encoded]:
    return _encode(_worker_tokenizer, texts)


# --- writing -----------------------------------------------------------------------------------


class _Writer:
    """Appends documents to the shards of one split, hashing as it goes."""

    def __init__(self, folder: Path, split: Split) -> None:
        self.folder, self.split = folder, split
        self.tokens = self.text_bytes = 0
        self.ends = array.array("q")
        self.shards: list[dict[str, Any]] = []
        self.file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            with contextlib.suppress(
                OSError
            ):  # after `finish` it is closed, else it is thrown away
                self.file.close()

    def write(self, encoded: _Encoded) -> None:
        rest = encoded.tokens
        while len(rest):
            room = SHARD_TOKENS - self.tokens % SHARD_TOKENS
            if room == SHARD_TOKENS:
                self._end_shard()
                self.file = (self.folder / f"{self.split}-{len(self.shards):05d}.bin").open("wb")
                self.sha256 = hashlib.sha256()
            part, rest = rest[:room], rest[room:]
            self.file.write(part.data)
            self.sha256.update(part.data)
            self.tokens += len(part)
        self.text_bytes += encoded.text_bytes
        self.ends.append(self.tokens)

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
            "documents_file": _entry(ends),
        }
