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
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gqa_scaling.files.storage import is_remote, size, sizes, sync, write_atomic

SEAL_NAME = "checksums.json"
COMMIT_NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")
UNFINISHED_SUFFIX = ".orbax-checkpoint-tmp"
READERS = 8  # files read at once
WRONG = ("is missing", "is truncated", "is too long", "is altered", "cannot be read")


class DamagedError(RuntimeError):
    """A checkpoint is not what was saved; the message names the file or array and what is wrong."""


@dataclass(frozen=True)
class Seal:
    """What a checkpoint was when it was saved.

    `files` maps a path inside the checkpoint to (bytes, SHA-256 in hex), `arrays` the name of an
    array to its checksum in hex, `saved` is the time of the save in seconds since 1970.
    """

    files: Mapping[str, tuple[int, str]]
    arrays: Mapping[str, str]
    saved: float

    def text(self) -> str:
        """The one text that says this: whatever else stands in the file is damage."""
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


def what_is_wrong(folder: Path, seal: Seal, names: Iterable[str] | None = None) -> dict[str, str]:
    """{file: one of WRONG} for every file that is not as it was sealed; {} for a whole checkpoint.

    `names` limits it to a share of the files (default: all of them and the notes of the commit).
    """
    if names is None:
        names = (*sorted(seal.files), *COMMIT_NOTES)

    def wrong(name: str) -> str | None:
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

    names = list(names)
    with ThreadPoolExecutor(READERS) as pool:
        return {n: text for n, text in zip(names, pool.map(wrong, names), strict=True) if text}


def few(lines: Iterable[str], most: int = 3) -> str:
    """The first of the lines as one, and how many more there are."""
    lines = list(lines)
    more = [f"and {len(lines) - most} more files"] if len(lines) > most else []
    return "; ".join(lines[:most] + more)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(error: OSError, folder: Path) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is missing"
    if is_remote(folder) or error.errno not in (errno.EIO, errno.EISDIR):
        raise error  # what is refused just now, to this user or process, is no damage
    return "cannot be read"


# --------------------------------------------------------------------------------- a whole run

State = Literal["whole", "damaged", "unfinished"]


@dataclass(frozen=True)
class Kept:
    """One checkpoint on disk: of a step, or (`step` None) the trained parameters.

    `damage` says what is wrong with it. Unfinished is one that is being written just now, or
    whose writing was cut short: it never counted and the next attempt removes it.
    """

    step: int | None
    state: State
    damage: tuple[str, ...]
    bytes: int
    saved: float | None

    @property
    def name(self) -> str:
        """How people call it: 'step 500' or 'parameters'."""
        return "parameters" if self.step is None else f"step {self.step}"


def examine(folder: Path, step: int | None = None) -> Kept:
    """Verify one checkpoint by its files alone, reading all of them."""
    saved, damage = None, ()
    try:
        seal = read_seal(folder)
        saved = seal.saved
        damage = tuple(f"{name} {wrong}" for name, wrong in what_is_wrong(folder, seal).items())
    except DamagedError as error:
        damage = (str(error),)
    return Kept(step, "damaged" if damage else "whole", damage, _size(folder), saved)


def examine_run(checkpoints: Path, parameters: Path) -> list[Kept]:
    """Verify the checkpoints of one run, newest first, then its trained parameters, if any.

    Right also while the run is being trained: a checkpoint that retention removes in the meantime
    is left out.
    """
    out = []
    for step, folder in reversed(_steps(checkpoints)):
        kept = examine(folder, step)
        if kept.state == "whole" or folder.exists():
            out.append(kept)
    for folder in _unfinished(checkpoints):
        step = int(folder.name.removesuffix(UNFINISHED_SUFFIX))
        out.append(Kept(step, "unfinished", (), _size(folder), None))
    if is_saved(parameters):
        out.append(examine(parameters))
    return out


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    found = (f for f in _folders(checkpoints) if f.name.isdecimal() and is_saved(f))
    return sorted((int(f.name), f) for f in found)


def _unfinished(checkpoints: Path) -> list[Path]:
    if is_remote(checkpoints):
        found = (f for f in _folders(checkpoints) if f.name.isdecimal() and not is_saved(f))
    else:
        pattern = re.compile(rf"\d+{re.escape(UNFINISHED_SUFFIX)}")
        found = (f for f in _folders(checkpoints) if pattern.fullmatch(f.name))
    return sorted(found)


def _folders(checkpoints: Path) -> list[Path]:
    return [f for f in checkpoints.iterdir() if f.is_dir()] if checkpoints.is_dir() else []


def _size(folder: Path) -> int:
    return sum(sizes(folder).values())
