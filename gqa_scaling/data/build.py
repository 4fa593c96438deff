"""Makes a token store: read, tokenise, write, rename.

A store is built beside its place and renamed when it is complete, so that it is there entirely or
not at all. One in a bucket is built on this machine first, and its store.json copied last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gqa_scaling.config import DataConfig, UserError, require
from gqa_scaling.data.corpus import FETCHED, Corpus, open_corpus
from gqa_scaling.data.manifest import AGAIN, SCHEMA, content_hash, file_entry
from gqa_scaling.data.store import TokenStore, cached_store, open_store
from gqa_scaling.data.tokenise import digest_of_text, is_held_out, tokenise
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
from gqa_scaling.units import count


def prepare(
    data: DataConfig, *, workers: int | None = None, show: bool = True, rebuild: bool = False
) -> TokenStore:
    """Make the token store of `data`, or verify and return the one that is there.

    The store is the same to the byte for every number of `workers`, threads that encode (default:
    one for each core; for bytes, which take no time to encode, one).
    `show` draws a progress bar on a terminal and says which files were left out. `rebuild`
    replaces a store.

    Raises UserError when the corpus or the tokenizer cannot be used, when a store from another
    declaration or of a corpus that has changed since is in the place, or when it cannot be written.
    """
    path = as_path(data.store_path)
    if not rebuild and (path / "store.json").exists():
        return _existing(data, path)
    _require_no_other_files(path)
    require(
        bool(path.name),
        f"data.store={data.store_path!r} is the folder of this command, and a store replaces its whole "
        "folder: name another",
    )
    workers = workers or (1 if data.tokenizer == "bytes" else len(cores()))
    if is_remote(path):
        return _prepare_remote(data, path, workers, show, rebuild)
    return _prepare_here(data, path, workers, show, rebuild)


def _existing(data: DataConfig, path: Path) -> TokenStore:
    """The store in place, verified, unless its corpus is at hand and has changed since."""
    store = open_store(data)
    if data.corpus == "stdlib" or expanded(FETCHED.get(data.corpus, data.corpus)).exists():
        require(
            open_corpus(data).fingerprint == store.manifest["corpus"]["fingerprint"],
            f"corpus={data.corpus!r} has changed since the token store {path} was made of it: choose "
            f"another data.store or {AGAIN}",
        )
    if not is_remote(path):  # what lies in a bucket is verified when it is copied from there
        store.verify(again=True)
    return store


def _prepare_here(
    data: DataConfig, path: Path, workers: int, show: bool, rebuild: bool
) -> TokenStore:
    """Make the store on this machine, unless another process makes it meanwhile.

    A link stays a link: the store is built beside the folder that it leads to, on that folder's disk.
    """
    corpus, path = open_corpus(data), Path(os.path.realpath(path))
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock"), show):
            if not rebuild and (path / "store.json").exists():  # another process has made it
                return _existing(data, path)
            # We hold the lock, so anything lying here is from a process that was killed.
            with _removed(partial), _removed(old):
                partial.mkdir()
                # A path with ".." leads to a folder of its own only once those above it are there.
                _require_no_other_files(path)
                _build(partial, data, corpus, workers, show)
                _require_no_other_files(path)  # that may have taken hours
                if path.exists():
                    path.rename(old)
                partial.rename(path)
    except OSError as error:
        raise UserError(
            f"cannot write the token store {path} ({error.strerror or error}): make room there or "
            "choose another data.store"
        ) from error
    store = open_store(data)
    store.verify(again=True)
    return store


def _prepare_remote(
    data: DataConfig, path: Path, workers: int, show: bool, rebuild: bool
) -> TokenStore:
    """Make the store on this machine, then put it there."""
    check_writable(path)
    name = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    place = cache_folder() / "prepared" / name
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_name(f".{name}.upload"), show):
        if not rebuild and (path / "store.json").exists():  # another process here has put it there
            return _existing(data, path)
        here = replace(data, store=os.fspath(place))
        made = prepare(here, workers=workers, show=show, rebuild=rebuild)
        _say(show, f"writing {path}")
        # Until all of the new one is there, there is none.
        (path / "store.json").unlink(missing_ok=True)
        names = sizes(made.path).keys() - {NOTE}
        for stale in sizes(path).keys() - names:
            (path / stale).unlink()
        for file in names - {"store.json"}:
            files_of(path).put_file(os.fspath(made.path / file), os.fspath(path / file))
        write_atomic(path / "store.json", (made.path / "store.json").read_bytes())
        cached = cached_store(made.hash)
        shutil.rmtree(cached, ignore_errors=True)
        cached.parent.mkdir(parents=True, exist_ok=True)
        made.path.rename(cached)
        return open_store(data)


# ----------------------------------------------------------------------- the place of a store


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
        except (ValueError, TypeError, RecursionError):
            known = False
        others += [] if known else ["store.json"]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    require(
        not others,
        f"{path} is in the way: {others[0] if others else ''}{more} in it is no part of a token store "
        "and would be removed: move that away, or choose another data.store",
    )
    nothing = not found and (path.is_dir() or not path.exists())
    require(
        is_remote(path) or nothing or "store.json" in found,
        f"{path} is in the way, it is no token store: move it or choose another data.store",
    )


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


# ------------------------------------------------------------------------- what is written


def _build(folder: Path, data: DataConfig, corpus: Corpus, workers: int, show: bool) -> None:
    """Write a complete store into `folder`, its store.json last."""
    with _progress(show) as progress:
        tokenizer = _tokenizer(data, corpus, progress)
        splits, digest, not_utf8 = tokenise(folder, data, corpus, tokenizer, workers, progress)
    if corpus.left_out:
        _say(show, f"left out {corpus.left_out} files that lie beside the records")
    if not_utf8:
        names = ", ".join(not_utf8[:3]) + (", ..." if len(not_utf8) > 3 else "")
        _say(show, f"left out {count(len(not_utf8), 'file')} not in UTF-8: {names}")
    file = folder / "tokenizer.json"
    if tokenizer.definition is not None:
        file.write_bytes(tokenizer.definition.encode())
    manifest = {
        "schema": SCHEMA,
        "declaration": data.declaration(),
        "corpus": {
            "sha256": digest,
            "documents": sum(split["documents"] for split in splits.values()),
            "fingerprint": corpus.fingerprint,
            "files": len(corpus.files),
            "left_out": corpus.left_out,
            "not_utf8": not_utf8,
            "python": platform.python_version(),
        },
        "tokenizer": {
            "name": tokenizer.name,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eos": tokenizer.eos,
            "file": None if tokenizer.definition is None else file_entry(file),
        },
        "dtype": tokenizer.dtype.str,
        "splits": splits,
    }
    manifest["hash"] = content_hash(manifest)
    (folder / "store.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _tokenizer(data: DataConfig, corpus: Corpus, progress: Progress) -> Tokenizer:
    """The tokenizer that is declared; a BPE is trained on what is not held out."""
    if data.tokenizer == "bytes":
        return bytes_tokenizer()
    if data.tokenizer.endswith(".json"):
        tokenizer = read_tokenizer(data.tokenizer)
        tokenizer.require_unforgeable()
        return tokenizer
    bar = progress.add_task(f"training {data.tokenizer}", total=None, note="")
    texts = (
        document.text
        for document in corpus.documents()
        if not is_held_out(digest_of_text(document.text), data.heldout_fraction)
    )
    tokenizer = train_bpe(int(data.tokenizer.removeprefix("bpe-")), texts, data.tokenizer)
    progress.update(bar, total=1, completed=1)
    return tokenizer


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
