"""Which files the report wrote itself: those it replaces, and never any other.

A page ends in a line with the SHA-256 of all before it. What is written beside it on request cannot
say so of itself: a manifest lists every such file with its SHA-256. A page without its line, a file that is
not listed, and one that was edited since are somebody else's: they are refused before anything
is computed, and once more before anything is written. The manifest is written before the files, with
the old and the new hashes, so that a report that was killed half way can be given again.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from gqa_scaling.config import UserError, require
from gqa_scaling.files.storage import absolute, is_remote, make_folder, write_atomic, write_json

MANIFEST = "report-manifest.json"
TENSORBOARD = "study/events.out.tfevents."  # for TensorBoard; the time follows
_SIGNED = b"<!-- written by gqa-scaling report; SHA-256 of all above: "
_ABOUT = "files that gqa-scaling report wrote in this folder; it replaces these and no others"
_ELSEWHERE = "name a page in another folder with --output"


def settled(path: Path) -> Path:
    """The same place without "..", which leads elsewhere once a folder before it has been made.

    The last name stays what it is, also where that is a link.
    """
    if is_remote(path) or ".." not in path.parts:
        return path
    return path.parent.resolve() / path.name


def require_page(text: str, page: Path, reserved: Iterable[str]) -> None:
    """Raise UserError unless the text of --output can name a page; `reserved` are no names of one."""
    folder = not text or text.endswith(("/", "..")) or page.is_dir()
    require(
        not folder,
        f"--output {text!r} is a folder: name the page in it, such as "
        f"{os.path.join(text, 'report.html')}",
    )
    taken = page.name in {name.split("/")[0] for name in (*reserved, MANIFEST)}
    require(not taken, f"--output {text!r}: {page.name} lies beside the page; name it otherwise")


def require_own(folder: Path, names: Iterable[str], source: Path | None = None) -> None:
    """Raise UserError where writing these files would replace what the report did not write.

    `source` is the file that the report is made from: it is never replaced, whoever wrote it and by
    whatever link it is reached.
    """
    names = list(names)
    if not is_remote(folder):
        _require_room(folder, {(folder / name).parent for name in names})
    known, foreign = _read(folder), []
    for name in names:
        path = folder / name
        if not _there(path):
            continue
        require(
            source is None or not _same(path, source),
            f"{path} is what this report is made from and would be replaced: {_ELSEWHERE}",
        )
        if not path.is_file() or not _own(path.read_bytes(), known.get(name, ())):
            foreign.append(path)
    more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
    require(
        not foreign,
        f"{foreign[0] if foreign else ''}{more} would be replaced, but nothing says that report wrote it "
        f"as it is: move it away, or {_ELSEWHERE}",
    )


def signed(page: str) -> bytes:
    """The page with a last line by which it is known again."""
    text = page.rstrip().encode() + b"\n"
    return text + _SIGNED + _hash(text).encode() + b" -->\n"


def is_page(data: bytes) -> bool:
    """Whether this is a page of the report, and as it wrote it."""
    text, mark, rest = data.rpartition(_SIGNED)
    return bool(mark) and rest == _hash(text).encode() + b" -->\n"


def _own(data: bytes, known: Iterable[str]) -> bool:
    return is_page(data) or _hash(data) in known


def write_page(path: Path, data: bytes) -> None:
    """Write the page, whole; raises UserError as `require_own`."""
    require_own(path.parent, [path.name])
    make_folder(path.parent)
    write_atomic(path, data)


def _require_room(folder: Path, within: Iterable[Path]) -> None:
    """Raise UserError where these folders cannot be, or nothing can be written in them."""
    for above in (*within, folder, *absolute(folder).parents):
        require(above.is_dir() or not _there(above), f"{above} is no folder: {_ELSEWHERE}")
    last = next(above for above in (folder, *absolute(folder).parents) if above.is_dir())
    require(os.access(last, os.W_OK), f"{last} cannot be written to: {_ELSEWHERE}")


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write these files, each of them whole, in their order; raises UserError as `require_own`.

    Files of an earlier report whose names are never used twice, the pictures for TensorBoard, are
    removed when all new ones are there.
    """
    require_own(folder, files)
    before = _read(folder)
    now = {name: [_hash(data)] for name, data in files.items()}
    for each in {(folder / name).parent for name in files}:
        make_folder(each)
    both = {name: [*before.get(name, ()), *now.get(name, ())] for name in {**before, **now}}
    _write(folder, both)
    for name, data in files.items():
        write_atomic(folder / name, data)
    gone = [name for name in before if name.startswith(TENSORBOARD) and name not in now]
    for name in gone:
        path = folder / name
        if _there(path) and _hash(path.read_bytes()) in before[name]:
            path.unlink()
    _write(folder, {name: found for name, found in {**before, **now}.items() if name not in gone})


def _read(folder: Path) -> dict[str, list[str]]:
    """The hashes of every file that was written here, by name; {} where there is no manifest."""
    path = folder / MANIFEST
    if not _there(path):
        return {}
    try:
        whole = json.loads(path.read_bytes())
        if whole["about"] != _ABOUT:
            raise ValueError
        return {name: [str(each) for each in hashes] for name, hashes in whole["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{path} does not list what report wrote: move it away, or {_ELSEWHERE}"
        ) from None


def _write(folder: Path, files: dict[str, list[str]]) -> None:
    write_json(folder / MANIFEST, {"about": _ABOUT, "files": files})


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _there(path: Path) -> bool:
    """Whether anything has this name, also a link that leads nowhere."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def _same(path: Path, source: Path) -> bool:
    """Whether both lead to one file, by links of either kind too."""
    if is_remote(path) or is_remote(source):
        return os.fspath(path) == os.fspath(source)
    if path.exists() and source.exists():
        return path.samefile(source)
    return absolute(path) == absolute(source)
