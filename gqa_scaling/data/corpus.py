"""A corpus: documents in one fixed order, wherever it lies.

The order is that of the sorted relative paths, then of the records within a file. Empty
documents are left out.
"""

import functools
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from gqa_scaling.config import DataConfig, UserError, require
from gqa_scaling.files.storage import expanded, is_remote

# Corpora that `gqa-scaling fetch` brings, and where their records then lie.
FETCHED = {"linux-6.1": "data/linux-6.1.jsonl.zst"}
ZST_WINDOW = 2**31  # bytes: what `zstd --long=31` writes, as large corpora are kept
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")

# Packages are not the library; tests are left out because some Linux packages leave them out.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text. `read` counts the bytes of the corpus's files read when it was complete."""

    text: str
    read: int


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, sorted, with their sizes in bytes.

    `left_out` counts the files of a folder that were passed over because the folder holds
    records (JSONL or Parquet), such as a README beside them.
    """

    root: Path
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    text_field: str
    left_out: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def fingerprint(self) -> str:
        """sha256 over names and sizes: a cheap way to notice that a corpus has changed."""
        listing = "".join(f"{n}\0{s}\n" for n, s in zip(self.files, self.sizes, strict=True))
        return hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()

    def documents(self, on_skip: Callable[[str], object] = lambda name: None) -> Iterator[Document]:
        """Every document in order. `on_skip` is told the name of each file that is not UTF-8.

        Raises UserError for a record that cannot be used, naming its file and line.
        """
        before = 0
        for name, size in zip(self.files, self.sizes, strict=True):
            path = self.root / name
            try:
                if name.endswith(".parquet"):
                    records = _parquet(path, self.text_field)
                elif name.endswith(RECORDS):
                    records = _jsonl(path, self.text_field)
                else:
                    records = _text(path, functools.partial(on_skip, name))
                for text, fraction in records:
                    if text:
                        yield Document(text, before + round(fraction * size))
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
            before += size


def _from_here(path: Path) -> str:
    """Where a relative path was looked for, which is the folder that a command is given in."""
    return "" if path.is_absolute() else f" in {Path.cwd()}, where this command was given"


def open_corpus(data: DataConfig) -> Corpus:
    """Find the files of `data.corpus`. Raises UserError when there are none."""
    require(
        not is_remote(data.corpus),
        f"corpus={data.corpus!r} must lie on this machine: copy it here; the tokens that are made of "
        "it may be remote (data.store)",
    )
    root, left_out = expanded(FETCHED.get(data.corpus, data.corpus)), 0
    require(
        data.corpus not in FETCHED or root.exists(),
        f"corpus={data.corpus!r} is not here as {root} yet: gqa-scaling fetch {data.corpus}",
    )
    if data.corpus == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in _walk(root, _NOT_LIBRARY) if path.suffix == ".py"]
    elif root.is_dir():
        every = _walk(root, set())
        files = [path for path in every if path.name.endswith(RECORDS)] or every
        left_out = len(every) - len(files)
    else:
        require(
            root.exists(),
            f"corpus={data.corpus!r} does not exist{_from_here(root)}: give stdlib, {', '.join(FETCHED)}, a folder of text files, or a "
            f"{', '.join(RECORDS)} file",
        )
        require(
            root.name.endswith(RECORDS) and root.is_file(),
            f"corpus={data.corpus!r} must end in one of {', '.join(RECORDS)}, and be a plain file: a "
            "single file holds one record for each document",
        )
        root, files = root.parent, [root]
    require(
        bool(files),
        f"corpus={data.corpus!r} holds no files under {root}: give a folder with text in it",
    )
    names = sorted((path.relative_to(root).as_posix(), path) for path in files)
    return Corpus(
        root,
        tuple(name for name, _ in names),
        tuple(path.stat().st_size for _, path in names),
        data.text_field,
        left_out,
    )


def _walk(root: Path, leave_out: set[str]) -> list[Path]:
    """The regular files under `root`, hidden ones and the folders in `leave_out` left out."""

    def stop(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    found = []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [d for d in folders if d not in leave_out and not d.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return found


# The readers below yield (text, fraction of the file read).


def _text(path: Path, skip: Callable[[], object]) -> Iterator[tuple[str, float]]:
    try:
        yield path.read_bytes().decode(), 1.0
    except UnicodeDecodeError:
        skip()


def _jsonl(path: Path, field: str) -> Iterator[tuple[str, float]]:
    size = max(path.stat().st_size, 1)
    with path.open("rb") as raw:
        for number, line in enumerate(_lines(path, raw), start=1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8, or nested deep
                raise UserError(f"{where} is not valid JSON ({error}): mend or remove it") from None
            require(isinstance(record, dict), f"{where} must be a JSON object with a text field")
            require(
                field in record,
                f"{where} has no field {field!r}, only {', '.join(sorted(record)) or 'none'}: "
                "set text_field to the field that holds the text",
            )
            yield _checked(record[field], field, where), raw.tell() / size


def _lines(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    try:
        if path.name.endswith(".gz"):
            yield from gzip.GzipFile(fileobj=raw)
        elif path.name.endswith(".zst"):
            yield from _zst_lines(raw)
        else:
            yield from raw
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch or compress it again") from error


def _zst_lines(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, because zstandard's own reader takes a cut file for a finished one."""
    rest, frame = b"", None
    while data := raw.read(2**17):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=ZST_WINDOW).decompressobj()
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("its last frame is cut short")
    if rest:
        yield rest


def _parquet(path: Path, field: str) -> Iterator[tuple[str, float]]:
    import pyarrow  # a quarter of a second, and only this format needs it
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns, rows = file.schema_arrow.names, max(file.metadata.num_rows, 1)
            require(
                field in columns,
                f"{path} has no column {field!r}, only {', '.join(columns)}: set text_field to the "
                "column that holds the text",
            )
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield _checked(text, field, f"row {row} of {path}"), row / rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from error


def _checked(text: object, field: str, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"{field}={text!r:.40} in {where} must be a string: mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{field} in {where} holds half of a surrogate pair, which is no text: mend or remove it"
        ) from None
    return text
