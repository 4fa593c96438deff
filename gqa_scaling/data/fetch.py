"""Corpora that anybody can fetch by name, without an account: `gqa-scaling fetch linux-6.1`.

What is fetched is one archive with a known hash. What is kept of it is one file of records, so that
the documents and their order are the same on every machine.
"""

import hashlib
import io
import json
import lzma
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import zstandard

from gqa_scaling.config import UserError, require
from gqa_scaling.data.corpus import FETCHED

CHUNK = 2**20  # bytes read at once
TEXT = {".c", ".h", ".S", ".rst", ".txt", ".py", ".pl", ".sh", ".yaml"}
LARGEST = 128 * 2**10  # bytes of a file; what is longer there are mostly tables of registers


@dataclass(frozen=True)
class Archive:
    """A Debian package of source text: its sha256, size in bytes and licence.

    `sources` are addresses, tried in turn; `inside` is the archive in it that holds the text.
    """

    sources: tuple[str, ...]
    sha256: str
    size: int
    licence: str
    inside: str


ARCHIVES = {
    "linux-6.1": Archive(
        sources=(
            "https://deb.debian.org/debian/pool/main/l/linux/linux-source-6.1_6.1.176-1_all.deb",
            "https://snapshot.debian.org/file/88a9623d7b92776fbdae70dba1510eeca618a7fa",  # once Debian has a newer one
        ),
        sha256="9305d1a151b8e83dcb88aa11361e7b9513f0c252bdf7f5647e4542762d99c094",
        size=139_131_140,
        licence="GPL-2.0 with syscall note",
        inside="linux-source-6.1.tar.xz",
    ),
}


def fetch(name: str, file: Path | None = None) -> Path:
    """Fetch a corpus by name, check it, and keep its documents; the path of what is kept.

    `file` is the archive where it lies on this machine already. The records are written aside and
    renamed; a file of them that is there is left as it is. Raises UserError for another name, an
    archive that cannot be had or is not the one that is meant, and a place that cannot be written.
    """
    require(name in ARCHIVES, f"no corpus is called {name!r}: there are {', '.join(ARCHIVES)}")
    archive, kept = ARCHIVES[name], Path(FETCHED[name])
    if kept.exists():
        return kept
    plain = file is None or file.is_file()
    require(plain, f"{file} is no file here: name the package that was downloaded")
    partial = _aside(kept)
    package = file or kept.with_name(archive.sources[0].rpartition("/")[2])
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not package.exists():
            _download(archive, package)
        _check(archive, package)
        _keep(archive, package, partial)
        partial.rename(kept)
        if file is None:
            package.unlink(missing_ok=True)
    except OSError as error:
        if kept.exists():  # another process fetched it meanwhile, and its package is gone again
            return kept
        raise UserError(
            f"cannot keep {name} as {kept} ({error.strerror or error}): make room there, or work "
            "in a folder that can be written"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return kept


def _aside(file: Path) -> Path:
    """Where a file is written before it is renamed, by this process alone."""
    return file.with_name(f".{file.name}.{os.urandom(4).hex()}.partial")


def _download(archive: Archive, package: Path) -> None:
    """The package, from the first source that has it, aside and renamed."""
    partial, failed = _aside(package), []
    for source in archive.sources:
        try:
            # A mirror that stalls is left after a minute without a byte.
            with urllib.request.urlopen(source, timeout=60) as answer, partial.open("wb") as out:
                _copy(answer, out, f"fetching {package.name}", archive.size)
            partial.rename(package)
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            failed.append(f"{source}: {getattr(error, 'reason', error)}")
        finally:
            partial.unlink(missing_ok=True)
    raise UserError(
        f"{package.name} cannot be fetched ({'; '.join(failed)}): download it elsewhere, its sha256 is "
        f"{archive.sha256}, and name it with --from"
    )


def _copy(source: BinaryIO, out: BinaryIO, what: str, size: int) -> None:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(what, total=size)
        while block := source.read(CHUNK):
            out.write(block)
            progress.advance(bar, len(block))


def _check(archive: Archive, package: Path) -> None:
    with package.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    require(
        digest == archive.sha256,
        f"{package} is not the package that is meant: its sha256 is {digest}, not {archive.sha256}; "
        "remove it and fetch again",
    )


def _keep(archive: Archive, package: Path, out: Path) -> None:
    """Write the documents of the package as records, in the order of their names."""
    print(f"unpacking {package.name}", flush=True)
    texts = sorted(_texts(archive, package))
    require(bool(texts), f"{package} holds no text in {archive.inside}: remove it and fetch again")
    with out.open("wb") as raw, zstandard.ZstdCompressor(level=6).stream_writer(raw) as file:
        for name, text in texts:
            file.write(json.dumps({"name": name, "text": text}).encode() + b"\n")


def _texts(archive: Archive, package: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every file that is text, as long as people write them, and UTF-8."""
    try:
        with (
            _content(package) as data,
            tarfile.open(fileobj=data, mode="r|xz") as outer,
        ):
            for each in outer:
                if PurePosixPath(each.name).name != archive.inside:
                    continue
                inner = outer.extractfile(each)
                with tarfile.open(fileobj=inner, mode="r|xz") as files:
                    for file in files:
                        path = PurePosixPath(file.name)
                        if file.isfile() and path.suffix in TEXT and 0 < file.size <= LARGEST:
                            content = files.extractfile(file)
                            assert content is not None  # it is a file
                            try:
                                text = content.read().decode()
                            except UnicodeDecodeError:
                                continue
                            yield path.relative_to(path.parts[0]).as_posix(), text
                return
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{package} is damaged ({error}): remove it and fetch again") from error
    raise UserError(f"{package} holds no {archive.inside}: remove it and fetch again")


@contextmanager
def _content(package: Path) -> Iterator[BinaryIO]:
    """The files of a Debian package: a member of an `ar` archive, whose headers have 60 bytes."""
    with package.open("rb") as file:
        require(file.read(8) == b"!<arch>\n", f"{package} is no Debian package")
        while len(header := file.read(60)) == 60:
            size = int(header[48:58])
            if header[:16].decode().strip().rstrip("/") == "data.tar.xz":
                yield io.BufferedReader(_Part(file, size))
                return
            file.seek(size + size % 2, os.SEEK_CUR)
    raise UserError(f"{package} holds no data.tar.xz")


class _Part(io.RawIOBase):
    """The next `size` bytes of a file, as a file of their own."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.file.read(min(len(buffer), self.left))
        buffer[: len(block)] = block
        self.left -= len(block)
        return len(block)
