"""Checksums of the files of a checkpoint, kept inside it: is it whole, and if not, what is wrong?

A checkpoint is sealed before it counts as saved: `checksums.json` then lists every file with its
size and SHA-256, and a checksum of every array, by which a restored state is verified. Two small
notes that Orbax writes later, in the moment of the commit, and never reads again, are only
required to be there.

No jax here: a run's checkpoints can be verified on any machine that sees its files, also while
it is being trained; nothing is written or removed but by `seal`.
"""

import errno
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gqa_scaling.files.storage import is_remote, size, sizes, sync, write_atomic

SEAL_NAME = "checksums.json"
COMMIT_NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")
UNFINISHED_SUFFIX = ".orbax-checkpoint-tmp"
READERS = 8  # files read at once


class DamagedError(RuntimeError):
    """A checkpoint is not what was saved; the message names the file or array and what is wrong."""


@dataclass(frozen=True)
class Seal:
    """What a checkpoint was when it was saved.

    `files` maps a path inside the checkpoint to (bytes, SHA-256 in hex), `arrays` maps the name of an
    array to its checksum in hex, and `saved` is the time of the save in seconds since 1970.
    """

    files: Mapping[str, tuple[int, str]]
    arrays: Mapping[str, str]
    saved: float

    def text(self) -> str:
        """The file's text; a file that holds any other text is damaged."""
        body = {
            "arrays": dict(self.arrays),
            "files": {name: list(value) for name, value in self.files.items()},
            "saved": self.saved,
        }
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def seal(folder: Path, arrays: Mapping[str, str]) -> None:
    """Write the checksums of everything that lies in `folder` by now, and of its arrays, into it.

    All of it is then on the disk: what is renamed into place is whole also after a power failure.
    """
    found = {n: s for n, s in sizes(folder).items() if n not in (*COMMIT_NOTES, SEAL_NAME)}
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda name: _sha256(folder / name), found)
        files = {n: (s, d) for (n, s), d in zip(found.items(), digests, strict=True)}
    write_atomic(folder / SEAL_NAME, Seal(files, arrays, round(time.time(), 3)).text())
    sync(folder)


def is_saved(folder: Path) -> bool:
    """Whether a checkpoint is there and complete: on a disk it is renamed into place when it is."""
    return (folder / COMMIT_NOTES[1]).exists() if is_remote(folder) else folder.exists()


def read_seal(folder: Path) -> Seal:
    """The checksums of a checkpoint. Raises DamagedError when they are missing or damaged."""
    try:
        text = (folder / SEAL_NAME).read_bytes().decode("utf-8")
        body = json.loads(text)
        files = {name: (size, digest) for name, (size, digest) in body["files"].items()}
        found = Seal(files, body["arrays"], body["saved"])
        if found.text() == text:
            return found
    except OSError as error:
        raise DamagedError(f"{SEAL_NAME} {_unreadable(error, folder)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise DamagedError(f"{SEAL_NAME} is altered")


def damaged_files(folder: Path, seal: Seal, names: Iterable[str] | None = None) -> dict[str, str]:
    """{file: what is wrong with it} of every file that is not as it was sealed; {} if all are whole.

    What is wrong is "is missing", "is truncated", "is too long", "is altered" or "cannot be read".
    `names` limits it to a share of the files (default: all of them and the notes of the commit).
    Raises OSError for what is refused just now and may be granted later.
    """
    names = [*sorted(seal.files), *COMMIT_NOTES] if names is None else list(names)

    def damage(name: str) -> str | None:
        try:
            found = size(folder / name)
            if name in COMMIT_NOTES:
                return None
            expected, digest = seal.files[name]
            if found != expected:
                return "is truncated" if found < expected else "is too long"
            return None if _sha256(folder / name) == digest else "is altered"
        except OSError as error:
            return _unreadable(error, folder)

    with ThreadPoolExecutor(READERS) as pool:
        return {n: text for n, text in zip(names, pool.map(damage, names), strict=True) if text}


def abridged(lines: Iterable[str]) -> str:
    """The first three lines as one, and how many more files there are."""
    lines = list(lines)
    more = [f"and {len(lines) - 3} more files"] if len(lines) > 3 else []
    return "; ".join(lines[:3] + more)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(error: OSError, folder: Path) -> str:
    """The damage that an error while reading a file tells of; raises it where it is none."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is missing"
    if is_remote(folder) or error.errno not in (errno.EIO, errno.EISDIR):
        raise error  # what is refused just now, to this user or process, is no damage
    return "cannot be read"


# ------------------------------------------------------------------------ all that a run has


@dataclass(frozen=True)
class StoredCheckpoint:
    """One checkpoint on disk: of a step, or (`step` None) the trained parameters.

    `damage` says what is wrong with it. An unfinished one is being written just now, or its writing
    was cut short: it never counted, and the next attempt removes it. `saved` is when it was saved,
    in seconds since 1970.
    """

    step: int | None
    state: Literal["whole", "damaged", "unfinished"]
    damage: tuple[str, ...]
    bytes: int
    saved: float | None

    @property
    def name(self) -> str:
        """How people call it: 'step 500' or 'parameters'."""
        return "parameters" if self.step is None else f"step {self.step}"


def examine(folder: Path, step: int | None = None) -> StoredCheckpoint:
    """Verify one checkpoint by its files alone, reading all of them."""
    saved = None
    damage: tuple[str, ...] = ()
    try:
        seal = read_seal(folder)
        saved = seal.saved
        damage = tuple(f"{name} {text}" for name, text in damaged_files(folder, seal).items())
    except DamagedError as error:
        damage = (str(error),)
    return StoredCheckpoint(step, "damaged" if damage else "whole", damage, _size(folder), saved)


def examine_run(checkpoints: Path, parameters: Path) -> list[StoredCheckpoint]:
    """Verify the checkpoints of one run, newest first, then its trained parameters, if any.

    Right also while the run is being trained: a checkpoint that retention removes in the meantime
    is left out.
    """
    out, unfinished = [], []
    for step, folder, saved in sorted(_steps(checkpoints), reverse=True):
        if not saved:
            unfinished.append(StoredCheckpoint(step, "unfinished", (), _size(folder), None))
            continue
        found = examine(folder, step)
        if found.state == "whole" or folder.exists():
            out.append(found)
    out += unfinished
    if is_saved(parameters):
        out.append(examine(parameters))
    return out


def _steps(checkpoints: Path) -> Iterator[tuple[int, Path, bool]]:
    """(step, folder, whether it is saved) of every checkpoint, unfinished ones included."""
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        step = folder.name.removesuffix(UNFINISHED_SUFFIX)
        if step.isdecimal() and folder.is_dir():
            yield int(step), folder, folder.name == step and is_saved(folder)


def _size(folder: Path) -> int:
    return sum(sizes(folder).values())
