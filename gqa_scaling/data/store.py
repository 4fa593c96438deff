"""The token store: a corpus as flat shards of token ids, written once and read by every run.

    store.json                  what it is made of, with sizes and checksums; written last
    tokenizer.json              a copy of the tokenizer, unless that is bytes
    train-00000.bin ...         token ids, little-endian uint16 or uint32; EOS ends each document
    train.documents.npy         where each document ends, int64 [documents], EOS included
    heldout-00000.bin ...       the same for the held-out split
    heldout.documents.npy

`build.py` makes one, `verification.py` tells whether it still is what was written. The files of one
in a bucket are copied to this machine's cache when they are first read, verified on the way.
"""

import bisect
import fcntl
import functools
import hashlib
import itertools
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gqa_scaling.config import DataConfig, UserError, require
from gqa_scaling.data.tokenizer import Tokenizer, bytes_tokenizer, read_tokenizer
from gqa_scaling.data.verification import verify, verify_file
from gqa_scaling.fields import Shape, misfit
from gqa_scaling.files.storage import as_path, cache_folder, expanded, files_of, is_remote, sizes

SCHEMA = 1

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
DTYPES = ("<u2", "<u4")

_FILE: Shape = {"file": str, "bytes": int, "sha256": str}
_SPLIT: Shape = {"tokens": int, "text_bytes": int, "shards": [_FILE], "documents_file": _FILE}
_MANIFEST: Shape = {
    "hash": str,
    "dtype": str,
    "declaration": dict,
    "corpus": {"sha256": str, "fingerprint": str},
    "tokenizer": {"name": str, "sha256": str, "vocab_size": int, "eos": int, "file": (_FILE,)},
    "splits": {"train": _SPLIT, "heldout": _SPLIT},
}

AGAIN = "build it again with `gqa-scaling prepare EXPERIMENT --rebuild`"


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

    def document_ends(self, split: Split) -> np.ndarray:
        """Where each document of a split ends, its EOS included, int64 [documents]."""
        return np.load(self._local(self.manifest["splits"][split]["documents_file"]))

    def fetch(self) -> None:
        """Have all tokens on this machine, where they can be memory-mapped."""
        for split in SPLITS:
            for entry in self.manifest["splits"][split]["shards"]:
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
            verify(self.path, self.manifest, _files(self.manifest), AGAIN, again)
            return
        self.fetch()
        shards = [entry for split in SPLITS for entry in self.manifest["splits"][split]["shards"]]
        remedy = "remove it, and it is copied from the bucket again"
        verify(cached_store(self.hash), self.manifest, shards, remedy, again)

    def describe(self) -> dict[str, Any]:
        """What a result records of its data; the same wherever the store lies."""
        return {
            "store_hash": self.hash,
            **self.manifest["declaration"],
            "corpus_hash": self.corpus_hash,
            "tokenizer_hash": self.tokenizer_hash,
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
    manifest = _read_manifest(path)
    _same_declaration(data, path, manifest)
    found = sizes(path)
    for entry in _files(manifest):
        file = path / entry["file"]
        size = found.get(entry["file"])
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


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / "store.json"
    try:
        manifest = json.loads(file.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): {AGAIN}") from None
    wrong = misfit(manifest, {"schema": int})
    require(not wrong, f"{file} is damaged ({wrong}): {AGAIN}")
    schema = manifest["schema"]
    require(schema == SCHEMA, f"{file} has schema {schema}, this version reads {SCHEMA}: {AGAIN}")
    wrong = misfit(manifest, _MANIFEST)
    require(not wrong, f"{file} is damaged ({wrong}): {AGAIN}")
    whole = manifest["hash"] == content_hash(manifest)
    require(whole, f"{file} is damaged, its hash is not that of its content: {AGAIN}")
    known = manifest["dtype"] in DTYPES
    require(known, f"{file} is damaged (dtype={manifest['dtype']!r} is no token's): {AGAIN}")
    for name in SPLITS:
        split, size = manifest["splits"][name], np.dtype(manifest["dtype"]).itemsize
        held = sum(shard["bytes"] for shard in split["shards"])
        require(
            held == split["tokens"] * size,
            f"{file} is damaged ({name} has {split['tokens']} tokens of {size} bytes in {held} "
            f"bytes): {AGAIN}",
        )
    return manifest


def content_hash(manifest: dict[str, Any]) -> str:
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


def declaration(data: DataConfig) -> dict[str, Any]:
    """Names without folders, so that a corpus may move."""
    return {
        "corpus": Path(data.corpus).name,
        "tokenizer": Path(data.tokenizer).name,
        "text_field": data.text_field,
        "heldout_fraction": data.heldout_fraction,
    }


def _same_declaration(data: DataConfig, path: Path, manifest: dict[str, Any]) -> None:
    made, wanted = manifest["declaration"], declaration(data)
    differing = [f"{k}: {made.get(k)!r} -> {v!r}" for k, v in wanted.items() if made.get(k) != v]
    require(
        not differing,
        f"the token store {path} was made from another declaration ({', '.join(differing)}): choose "
        f"another data.store or {AGAIN}",
    )
