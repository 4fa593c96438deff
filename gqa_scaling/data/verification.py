"""Are the files of a token store those that were written? Read once, then again when they change.

Every file is held to its SHA-256 and, on the same way over its bytes, every token to the vocabulary.
A store that was found whole gets a note of the size and the times of each file (`.verified`), by
which the next run, and the other processes of a job, know that they need not read it all again.
Bits that turn on the disk itself change no time: those only `prepare` finds, which always reads.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gqa_scaling.config import UserError, require
from gqa_scaling.data.manifest import shard_entries
from gqa_scaling.files.storage import cache_folder
from gqa_scaling.hardware import cores
from gqa_scaling.units import byte_size

NOTE = ".verified"
READERS = 16  # files read at once, on a machine with as many cores
BUFFER = 2**22
SAID_FROM = 2**32  # bytes: less is read in seconds


def verify(
    folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]], remedy: str, again: bool
) -> None:
    """Verify these files of a store, unless none has changed since it was last done; if `again`, always.

    Several processes that come here at once wait for the one that reads. Where the folder cannot be
    written, the note is kept in this machine's cache, and where that cannot be either, it is not.
    Raises UserError naming a file that is not what was written; `remedy` says what then helps.
    """
    places = [folder / NOTE]
    with contextlib.suppress(UserError):  # a user without a home has no cache
        name = hashlib.sha256(os.fspath(folder.absolute()).encode()).hexdigest()[:16]
        places.append(cache_folder() / "verified" / name)
    for place in places:
        pipe = os.path.exists(place) and place.is_fifo()  # reading it would wait for ever
        require(not pipe, f"{place} must be a plain file, and is a pipe: remove it")
    state = _state(folder, manifest, files)
    if not again and any(_text(place) == state for place in places):
        return
    with _held(places) as note:
        state = _state(folder, manifest, files)  # before it is read: what changes later will differ
        if not again and note is not None and note.read() == state:
            return  # another process has read it while this one waited
        try:
            _read_all(folder, manifest, files, remedy)
        except UserError:
            for place in places:  # what an earlier note says of it is no longer so
                with contextlib.suppress(OSError):
                    place.unlink(missing_ok=True)
            raise
        if note is not None:
            with contextlib.suppress(OSError):  # a full disk: it will be read again
                note.seek(0)
                note.truncate()
                note.write(state)
                note.flush()


def verify_file(
    file: Path,
    entry: dict[str, Any],
    manifest: dict[str, Any],
    remedy: str,
    named: Path | None = None,
) -> None:
    """Hold one file to its entry of store.json, its tokens to the vocabulary. Raises UserError.

    `named` is what it is called in the message, should that be another path.
    """
    named, vocabulary = named or file, manifest["tokenizer"]["vocab_size"]
    holds_tokens = entry in shard_entries(manifest)
    dtype = np.dtype(manifest["dtype"])
    digest, largest = hashlib.sha256(), 0
    buffer = bytearray(BUFFER)
    try:
        with file.open("rb") as content:
            while size := content.readinto(buffer):
                part = memoryview(buffer)[:size]
                digest.update(part)
                if holds_tokens:
                    tokens = np.frombuffer(part[: size - size % dtype.itemsize], dtype)
                    largest = max(largest, int(tokens.max(initial=0)))
    except OSError as error:  # a failed read does not say of which file
        raise OSError(error.errno, error.strerror, os.fspath(named)) from error
    require(
        digest.hexdigest() == entry["sha256"],
        f"{named} is damaged, its sha256 is not the one recorded: {remedy}",
    )
    require(
        largest < vocabulary,
        f"{named} holds token {largest}, but the tokenizer's vocabulary ends at {vocabulary - 1}: "
        f"{remedy}",
    )
    for split in manifest["splits"].values():
        if entry == split["documents_file"]:
            _check_ends(file, split, named, remedy)


def _check_ends(file: Path, split: dict[str, Any], named: Path, remedy: str) -> None:
    ends = np.load(file)
    rising = len(ends) > 0 and ends[0] > 0 and bool((np.diff(ends) > 0).all())
    require(
        rising and ends[-1] == split["tokens"],
        f"{named} must say where documents end, each later than the one before, the last at "
        f"{split['tokens']}, where the tokens end: {remedy}",
    )


def _read_all(
    folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]], remedy: str
) -> None:
    size = sum(entry["bytes"] for entry in files)
    if size >= SAID_FROM:
        print(f"verifying the {byte_size(size)} of {folder}, once", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(min(READERS, len(cores()))) as pool:
        reading = [
            pool.submit(verify_file, folder / entry["file"], entry, manifest, remedy)
            for entry in files
        ]
        try:
            for each in reading:
                each.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _state(folder: Path, manifest: dict[str, Any], files: list[dict[str, Any]]) -> str:
    """What the note of a whole store says: its hash, and of each file the size and the times.

    The time of the inode is among them, which no program can set back.
    """
    found = {}
    for entry in files:
        stat = (folder / entry["file"]).stat()
        found[entry["file"]] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    return json.dumps({"store": manifest["hash"], "files": found}, sort_keys=True) + "\n"


def _text(place: Path) -> str:
    """What the note says, "" where there is none."""
    try:
        return place.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def _held(places: Sequence[Path]) -> Iterator[TextIO | None]:
    """The first note that can be written, opened and locked; None where none can."""
    for place in places:
        with contextlib.ExitStack() as stack:
            try:
                if place.name != NOTE:
                    place.parent.mkdir(parents=True, exist_ok=True)
                note = stack.enter_context(place.open("a+", encoding="utf-8", errors="replace"))
                fcntl.flock(note, fcntl.LOCK_EX)
                note.seek(0)
            except OSError:  # read-only, full, somebody else's, or a file system without locks
                continue
            yield note
            return
    yield None
