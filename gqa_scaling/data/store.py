"""The token store: a corpus as flat shards of token ids, written once and read by every run.

    store.json                  what it is made of, with sizes and checksums; written last
    tokenizer.json              a copy of the tokenizer, unless that is bytes
    train-00000.bin ...         token ids, little-endian uint16 or uint32; EOS ends each document
    train.documents.npy         where each document ends, int64 [documents], EOS included
    heldout-00000.bin ...       the same for the held-out split
    heldout.documents.npy

`build.py` makes one, `verification.py` tells whether it still is what was written. The files of a
store in a bucket are copied to this machine's cache when they are first read, verified on the way.
"""

import bisect
import fcntl
import functools
import hashlib
import itertools
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gqa_scaling.config import DataConfig, RunConfig, require
from gqa_scaling.data.manifest import AGAIN, Split, file_entries, read_manifest, shard_entries
from gqa_scaling.data.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer
from gqa_scaling.data.verification import verify, verify_file
from gqa_scaling.files.storage import as_path, cache_folder, expanded, files_of, is_remote, sizes


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
        entry = self.manifest["tokenizer"]["file"]
        if entry is None:
            return bytes_tokenizer()
        return read_tokenizer(self._local(entry), self.manifest["tokenizer"]["name"])

    @functools.cached_property
    def _train(self) -> tuple[list[int], list[np.ndarray]]:
        return self._shards("train")

    @functools.cached_property
    def _heldout(self) -> tuple[list[int], list[np.ndarray]]:
        return self._shards("heldout")

    def _shards(self, split: Split) -> tuple[list[int], list[np.ndarray]]:
        """The position each shard of a split begins at, and the shards."""
        files, dtype = self.manifest["splits"][split]["shards"], np.dtype(self.manifest["dtype"])
        maps = [np.memmap(self._local(f), dtype, "r").view(np.ndarray) for f in files]
        starts = itertools.accumulate((len(m) for m in maps[:-1]), initial=0)
        return list(starts), maps

    def tokens(self, split: Split, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of a split, uint16 or uint32 [stop - start], read-only."""
        total = self.manifest["splits"][split]["tokens"]
        if not 0 <= start <= stop <= total:
            raise IndexError(f"tokens {start}..{stop} must lie within the {total} of {split}")
        starts, shards = self._train if split == "train" else self._heldout
        first = bisect.bisect_right(starts, start) - 1
        last = max(bisect.bisect_left(starts, stop) - 1, first)
        parts = [
            shard[max(start - begin, 0) : stop - begin]
            for begin, shard in zip(starts[first : last + 1], shards[first : last + 1], strict=True)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def fetch(self) -> None:
        """Have all tokens on this machine, where they can be memory-mapped."""
        for entry in shard_entries(self.manifest):
            self._local(entry)

    def _local(self, entry: dict[str, Any]) -> Path:
        """Where a file of the store lies on this machine."""
        if not is_remote(self.path):
            return self.path / entry["file"]
        file = cached_store(self.hash) / entry["file"]
        if not _is_whole(file, entry):
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file.with_name(f".{file.name}.lock"), "w") as guard:
                fcntl.flock(guard, fcntl.LOCK_EX)  # of the processes here one fetches it
                if not _is_whole(file, entry):
                    _fetch(self.path / entry["file"], file, entry, self.manifest)
        return file

    def verify(self, again: bool = False) -> None:
        """Have all tokens on this machine, and every file be what was written.

        Files that have not changed since they were last verified are read only if `again`. Raises
        UserError naming a damaged file.
        """
        if not is_remote(self.path):
            verify(self.path, self.manifest, file_entries(self.manifest), AGAIN, again)
            return
        self.fetch()
        remedy = "remove it, and it is copied from the bucket again"
        copies = cached_store(self.hash)
        verify(copies, self.manifest, shard_entries(self.manifest), remedy, again)

    def describe(self) -> dict[str, Any]:
        """What a result records of its data; the same wherever the store lies."""
        return {
            "store_hash": self.hash,
            **self.manifest["declaration"],
            "corpus_hash": self.manifest["corpus"]["sha256"],  # of each document's sha256, in order
            "tokenizer_hash": self.manifest["tokenizer"]["sha256"],
            "vocab_size": self.vocab_size,
            "train_tokens": self.train_tokens,
            "heldout_tokens": self.heldout_tokens,
            "heldout_bytes_per_token": self.heldout_bytes_per_token,
        }


def cached_store(content: str) -> Path:
    """Where this machine keeps copies of the files of a remote store of this hash."""
    return cache_folder() / "tokens" / content


def _is_whole(file: Path, entry: dict[str, Any]) -> bool:
    """Whether a copy is there; it was verified before it got its name."""
    return file.is_file() and file.stat().st_size == entry["bytes"]


def _fetch(remote: Path, file: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Copy a file here: aside, verified, renamed."""
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        files_of(remote).get_file(os.fspath(remote), os.fspath(aside))
        verify_file(aside, entry, manifest, AGAIN, remote)
        aside.rename(file)
    finally:
        aside.unlink(missing_ok=True)


def stores_of(runs: Iterable[RunConfig]) -> dict[str, DataConfig]:
    """What each token store that the runs name is made of, by its path.

    Raises UserError where two runs name one store and would have it made of different text: what is
    there could only be that of one. A store knows its corpus by name alone, as a corpus may move, so
    it could not tell them apart later.
    """
    found: dict[str, DataConfig] = {}
    for run in runs:
        path, text = run.data.store_path, _text_of(run.data)
        first = _text_of(found.setdefault(path, run.data))
        differing = [
            f"{key}: {first[key]!r} and {text[key]!r}" for key in text if first[key] != text[key]
        ]
        require(
            not differing,
            f"runs name one token store, {path}, for different text ({', '.join(differing)}): give each "
            "text a data.store of its own",
        )
    return found


def _text_of(data: DataConfig) -> dict[str, Any]:
    """What a store of it is made of, files by their whole paths."""
    files = {"corpus": data.corpus, "tokenizer": data.tokenizer}
    return data.declaration() | {key: os.path.abspath(expanded(f)) for key, f in files.items()}


def open_store(data: DataConfig) -> TokenStore:
    """The store of `data`. Sizes are checked, contents are not (see `TokenStore.verify`).

    Raises UserError when the store is missing, damaged, or made from another declaration or
    from a tokenizer.json that has changed since.
    """
    path = as_path(data.store_path)
    require(
        (path / "store.json").is_file(),
        f"there is no token store at {path}: make it with `gqa-scaling prepare EXPERIMENT`",
    )
    manifest = read_manifest(path)
    made, wanted = manifest["declaration"], data.declaration()
    differing = [f"{k}: {made.get(k)!r} -> {v!r}" for k, v in wanted.items() if made.get(k) != v]
    require(
        not differing,
        f"the token store {path} was made from another declaration ({', '.join(differing)}): choose "
        f"another data.store or {AGAIN}",
    )
    found = sizes(path)
    for entry in file_entries(manifest):
        file, size = path / entry["file"], found.get(entry["file"])
        require(size is not None, f"{file} of the token store is missing: {AGAIN}")
        require(
            size == entry["bytes"],
            f"{file} has {size} bytes but must have {entry['bytes']}: {AGAIN}",
        )
    if data.tokenizer.endswith(".json") and expanded(data.tokenizer).is_file():
        now = hashlib.sha256(expanded(data.tokenizer).read_bytes()).hexdigest()
        require(
            now == manifest["tokenizer"]["sha256"],
            f"tokenizer={data.tokenizer!r} has changed since the token store {path} was made with "
            f"it: restore the file, choose another data.store, or {AGAIN}",
        )
    return TokenStore(path, manifest)
