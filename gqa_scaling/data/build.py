"""Makes a token store: read, tokenise in parallel, write, rename.

A document is held out when its own hash says so, whatever its name and its neighbours. A store
is built beside its place and renamed when it is complete, so it is there entirely or not at all.
"""

import array
import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.spawn
import os
import platform
import re
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gqa_scaling.config import DataConfig, UserError, require
from gqa_scaling.data.corpus import Corpus, Document, open_corpus
from gqa_scaling.data.store import (
    AGAIN,
    SCHEMA,
    Split,
    TokenStore,
    cached_store,
    content_hash,
    declaration,
    open_store,
)
from gqa_scaling.data.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer, train_bpe
from gqa_scaling.data.verification import NOTE
from gqa_scaling.files.storage import (
    as_path,
    cache_folder,
    check_writable,
    expanded,
    files_of,
    is_remote,
    sizes,
    write_atomic,
)
from gqa_scaling.hardware import cores

SHARD_TOKENS = 2**28
TASK_BYTES = 2**20  # text handed to a worker at once


def prepare(
    data: DataConfig, *, workers: int | None = None, show: bool = True, rebuild: bool = False
) -> TokenStore:
    """Make the token store of `data`, or verify and return the one that is there.

    The store is the same to the byte for every number of `workers` (default: one for each core;
    for bytes, where encoding costs less than passing text about, one). One means this process.
    `show` draws a progress bar on a terminal and says which files were left out. `rebuild`
    replaces a store.

    Raises UserError when the corpus or the tokenizer cannot be used, when a store from another
    declaration or of a corpus that has changed since is in the place, or when it cannot be written.
    """
    path = as_path(data.store_path)
    if not rebuild and (path / "store.json").exists():
        return _existing(data, path)
    _require_no_other_files(path)
    if is_remote(path):
        return _prepare_remote(data, path, workers, show, rebuild)
    # A script without `if __name__ == "__main__"` comes here again in each worker, where it would
    # wait for its parent's lock for ever: this raises RuntimeError there instead.
    multiprocessing.spawn.get_preparation_data("")
    corpus = open_corpus(data)
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock"), show):
            if not rebuild and (path / "store.json").exists():  # another process made it meanwhile
                return _existing(data, path)
            # We hold the lock, so anything lying here is from a process that was killed.
            with _removed(partial), _removed(old):
                partial.mkdir()
                # A path with ".." leads to a folder of its own only once those above it are there.
                _require_no_other_files(path)
                _build(partial, data, corpus, workers or _default_workers(data), show)
                _require_no_other_files(path)  # that may have taken hours
                if path.exists():
                    path.rename(old)
                partial.rename(path)
    except OSError as error:
        raise UserError(
            f"cannot write the token store {path} ({error.strerror or error}): make room there or "
            "choose another data.store"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker died while it tokenised {data.corpus!r}: if it printed nothing above, it most "
            "likely wanted for memory; use fewer workers"
        ) from error
    store = open_store(data)
    store.verify(again=True)
    return store


def _prepare_remote(
    data: DataConfig, path: Path, workers: int | None, show: bool, rebuild: bool
) -> TokenStore:
    """Make the store on this machine, then put it there, its store.json last."""
    check_writable(path)
    name = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    here = replace(data, store=os.fspath(cache_folder() / "prepared" / name))
    made = prepare(here, workers=workers, show=show, rebuild=rebuild)
    _say(show, f"writing {path}")
    (path / "store.json").unlink(
        missing_ok=True
    )  # until all of the new one is there, there is none
    names = {n: s for n, s in sizes(made.path).items() if n != NOTE}
    for stale in sizes(path).keys() - names:
        (path / stale).unlink()
    for file in names.keys() - {"store.json"}:
        files_of(path).put_file(os.fspath(made.path / file), os.fspath(path / file))
    write_atomic(path / "store.json", (made.path / "store.json").read_bytes())
    cached = cached_store(made.hash)
    shutil.rmtree(cached, ignore_errors=True)
    cached.parent.mkdir(parents=True, exist_ok=True)
    made.path.rename(cached)
    return open_store(data)


# What a store is made of (`store.py`), and the note that its files were verified.
_OF_A_STORE = re.compile(
    r"(store|tokenizer)\.json|(train|heldout)(-\d+\.bin|\.documents\.npy)|\.verified"
)


def _require_no_other_files(path: Path) -> None:
    """Raise UserError where a new store would remove files that belong to none.

    A store replaces its whole folder, or in a bucket every object below its name.
    """
    if is_remote(path):
        found = set(sizes(path))
    else:  # a store has no folders in it: what lies deeper need not be looked through
        found = set(os.listdir(path)) if path.is_dir() else set()
    others = sorted(name for name in found if not _OF_A_STORE.fullmatch(name))
    if "store.json" in found and not any(name.endswith(".bin") for name in found):
        try:
            known = "splits" in json.loads((path / "store.json").read_bytes())
        except (ValueError, TypeError):
            known = False
        others += [] if known else ["store.json"]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    require(
        not others,
        f"{path} is in the way: {others[0] if others else ''}{more} in it is no part of a token store "
        "and would be removed: move that away, or choose another data.store",
    )
    if is_remote(path):
        return
    empty = path.is_dir() and not any(path.iterdir())
    require(
        not path.exists() or empty or (path / "store.json").exists(),
        f"{path} is in the way, it is no token store: move it or choose another data.store",
    )


def _existing(data: DataConfig, path: Path) -> TokenStore:
    """The store in place, verified, unless its corpus is at hand and has changed since."""
    store = open_store(data)
    if data.corpus == "stdlib" or expanded(data.corpus).exists():
        require(
            open_corpus(data).fingerprint == store.manifest["corpus"]["fingerprint"],
            f"corpus={data.corpus!r} has changed since the token store {path} was made of it: choose "
            f"another data.store or {AGAIN}",
        )
    if not is_remote(path):  # what lies in a bucket is verified when it is copied from there
        store.verify(again=True)
    return store


def _default_workers(data: DataConfig) -> int:
    return 1 if data.tokenizer == "bytes" else len(cores())


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Without that folder before, and without it after."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        "declaration": declaration(data),
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
    manifest["hash"] = content_hash(manifest)
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
