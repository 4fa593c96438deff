"""Files on a disk of this machine, or objects at gs:// and s3://: what differs between the two.

A remote path is one of etils.epath, as in Orbax, and reaches its bucket through fsspec (gcsfs, s3fs).
One request writes a whole object, so none is ever seen in part; there are no folders, no appending
and no renaming. A write can be made to depend on what is there: of two that create an object, or
that replace the same version of it, only one succeeds. No other locking is used in a bucket.
"""

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gqa_scaling.config import UserError, require

if TYPE_CHECKING:
    import fsspec

T = TypeVar("T")
U = TypeVar("U")
AT_ONCE = 16  # requests to a bucket, or to a disk in a network

# For each scheme the package that reaches it, and the extra that installs that.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
NO_VERSION = "1"  # a version that no file has
OTHER_VERSION = ("PreconditionFailed", "ConditionalRequestConflict")  # how S3 refuses to replace
# What the system says where no folder can be made at this path, whoever tries again.
NO_PLACE = (
    errno.EACCES,
    errno.EEXIST,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
)


# --------------------------------------------------------------------------------------- paths


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is that of objects in a bucket."""
    return "://" in os.fspath(path)


def as_path(place: str | os.PathLike[str]) -> Path:
    """The path of a file or folder: pathlib's, or for gs:// and s3:// one that reads like it.

    Raises UserError where this installation cannot reach it.
    """
    text = os.fspath(place)
    require("\0" not in text, f"the path {text!r} must not hold a NUL character")
    scheme, remote, rest = text.partition("://")
    if not remote:
        return Path(text)
    known = " and ".join(f"{name}://" for name in SCHEMES)
    require(scheme in SCHEMES, f"{text} must be a path of this machine, or begin with {known}")
    require(bool(rest.strip("/")), f"{text} must name a bucket, as in {scheme}://bucket/folder")
    package, extra = SCHEMES[scheme]
    require(
        importlib.util.find_spec(package) is not None,
        f"{text} needs the package {package}: pip install 'gqa-scaling[{extra}]'",
    )
    import logging

    import fsspec.config
    from etils import epath

    # These two log what they also raise when a server is away.
    for logger in ("asyncio", "gcsfs"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    # Other machines write to the bucket too, so a listing that is kept would be out of date. The
    # setting holds for Orbax's paths as well.
    fsspec.config.conf.setdefault(package.removesuffix("fs"), {})["use_listings_cache"] = False
    return epath.Path(text)


def expanded(place: str | os.PathLike[str]) -> Path:
    """A path of this machine with ~ and ~name as the home folder. Raises UserError where none is."""
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise UserError(f"{os.fspath(place)!r} names no home folder here: {error}") from None


def absolute(path: Path) -> Path:
    """The path from the root; a remote one is that already (epath would put this folder before)."""
    return path if is_remote(path) else path.absolute()


def files_of(path: Path) -> "fsspec.AbstractFileSystem":
    """The file system of a remote path."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


def cache_folder() -> Path:
    """Where this machine keeps copies of what is remote: $GQA_SCALING_CACHE, else as XDG says.

    Raises UserError where this user has no home folder and neither is set.
    """
    own = os.environ.get("GQA_SCALING_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache"), "gqa_scaling")


# ------------------------------------------------------------------------------------- writing


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace a file at one stroke: a reader sees the old one or the new one, both whole.

    Raises UserError in a folder that takes no files, such as /proc.
    """
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        files_of(path).pipe_file(os.fspath(path), data)
        return
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # not there, or on a disk that turned read-only
            aside.unlink()
        if isinstance(error, FileNotFoundError) and path.parent.is_dir():
            raise UserError(
                f"{path} cannot be written: {path.parent} takes no files; name another place"
            ) from error
        if isinstance(error, OSError):
            error.filename = os.fspath(path)  # a failed write does not say of which file
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace a file by this value as indented JSON, keys sorted, at one stroke."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def version(path: Path) -> str | None:
    """What tells this state of a remote file from every other; None where there is no file.

    It is Google's generation or the ETag of S3. An ETag follows from the content: a file that is
    written again with the same bytes keeps its version there.
    """
    try:
        info = files_of(path).info(os.fspath(path))
    except FileNotFoundError:
        return None
    return info["generation"] if _on_google(path) else info["ETag"].strip('"')


def replace(path: Path, data: str, expected: str | None) -> bool:
    """Write a remote file only if `version` still says the expected one; whether it was written.

    The server decides, in one request. One that knows no such condition writes in any case.
    """
    files, place = files_of(path), os.fspath(path)
    try:
        if _on_google(path):  # gcsfs itself can only ask that there be no file
            bucket, key, _ = files.split_path(place)
            url = files.base.replace("/storage/v1/", "/upload/storage/v1/") + "b/{}/o"
            condition = {"name": key, "ifGenerationMatch": expected or "0"}
            files.call("POST", url, bucket, uploadType="media", data=data.encode(), **condition)
        else:
            condition = {"IfMatch": f'"{expected}"'} if expected else {"IfNoneMatch": "*"}
            files.pipe_file(place, data.encode(), **condition)
    except OSError as error:
        answer = getattr(error.__cause__, "response", None) or {}  # what S3 told s3fs
        code = answer.get("Error", {}).get("Code")
        gone = expected is not None and isinstance(error, FileNotFoundError)
        if gone or isinstance(error, FileExistsError) or code in OTHER_VERSION:
            return False
        if expected is None or code != "NotImplemented":
            raise
        write_atomic(path, data)
    return True


def _on_google(path: Path) -> bool:
    return os.fspath(path).startswith("gs://")


class GrowingFile:
    """A remote file that is written bit by bit: kept in memory, and put there whole by each flush.

    What was written since the last flush is lost unless it is closed. It is no file of `io`, as
    those have a file descriptor.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._data = path, bytearray(path.read_bytes() if path.exists() else b"")
        self._flushed_bytes = len(self._data)

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self) -> None:
        if len(self._data) > self._flushed_bytes:
            write_atomic(self._path, bytes(self._data))
            self._flushed_bytes = len(self._data)

    def close(self) -> None:
        self.flush()


# ------------------------------------------------------------------------------------- folders


def require_folder(path: Path) -> None:
    """Raises UserError where a file is at the place of this folder of this machine, or above it."""
    for place in (path, *path.parents):
        try:
            in_the_way = not stat.S_ISDIR(os.stat(place).st_mode)
        except FileNotFoundError:
            in_the_way = place.is_symlink()
        except NotADirectoryError:  # which of those above it is a file, a later turn finds
            in_the_way = False
        except OSError as error:
            raise UserError(f"{path} cannot be a folder: {error.strerror}; name another") from None
        require(not in_the_way, f"{path} cannot be a folder: {place} is none; name another")


def make_folder(path: Path) -> None:
    """Make the folder and those above it; buckets need none and are never made.

    Raises UserError where none can be made, whoever tries again. A full disk is an OSError.
    """
    if is_remote(path):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        raise UserError(
            f"cannot make the folder {path}: {error.strerror}; name another place"
        ) from error


def sync(folder: Path) -> None:
    """Have all below a folder on the disk itself, so that it outlives a power failure."""
    if is_remote(folder):
        return  # a request that was answered is kept
    for parent, _, names in os.walk(folder):
        for path in (*(Path(parent, name) for name in names), Path(parent)):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a folder that is there, with everything in it."""
    if is_remote(path):
        files_of(path).rm(os.fspath(path), recursive=True)
    else:
        shutil.rmtree(path)


def check_writable(path: Path) -> None:
    """Raises UserError where nothing can be written below a remote folder."""
    probe = path / f".probe-{os.urandom(4).hex()}"
    try:
        write_atomic(probe, b"")
        probe.unlink()
    except OSError as error:  # its words are the server's: no such bucket, access denied
        raise UserError(
            f"cannot write to {path} ({error}): create the bucket, or give these credentials access"
        ) from error


# ------------------------------------------------------------------------------------- reading


def together(read: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """What `read` gives for each item, in their order, reading several at once; raises what the first
    that fails raises.

    Where each answer takes milliseconds, hundreds of runs are read in a fraction of the time.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(read, items))


def size(path: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError where there is none."""
    if not is_remote(path):
        return path.stat().st_size
    info = files_of(path).info(os.fspath(path))
    if info["type"] != "file":
        raise FileNotFoundError(f"{path} is no file")
    return info["size"]


def modified(path: Path) -> float:
    """When a file was last written, in seconds since 1970; by the server's clock if remote."""
    if is_remote(path):
        return files_of(path).modified(os.fspath(path)).timestamp()
    return path.stat().st_mtime


def tail(path: Path, most: int) -> bytes:
    """The last bytes of a file, at most so many."""
    if is_remote(path):
        return files_of(path).tail(os.fspath(path), most)
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - most))
        return file.read()


def sizes(folder: Path) -> dict[str, int]:
    """{path inside the folder: bytes} of every file below it, sorted; {} when it is not there."""
    if is_remote(folder):
        files = files_of(folder)
        prefix = files._strip_protocol(os.fspath(folder)).rstrip("/") + "/"
        found = files.find(os.fspath(folder), detail=True)
        return {
            name.removeprefix(prefix): info["size"]
            for name, info in sorted(found.items())
            if name.startswith(prefix)
        }
    out = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(OSError):  # it was moved or removed since
                out[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(out.items()))
