"""Files on a disk of this machine, or objects at gs:// and s3://: what differs between the two.

A remote path is one of etils.epath, as in Orbax, and reaches its bucket through fsspec (gcsfs, s3fs).
One request writes an object whole, so none is ever seen in part; there are no folders, no appending
and no renaming. A write can be made to depend on what is there: of two that create an object, or
that replace the same version of it, only one succeeds. That is all the locking there is.
"""

import contextlib
import errno
import importlib.util
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_scaling.config import UserError, require

if TYPE_CHECKING:
    import fsspec

# For each scheme the package that reaches it, and the extra that installs that.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
# TensorStore's errors are ValueErrors: a status, then words, some of these among them.
STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
OF_REQUESTS = ("CURL error", "HTTP response", "retry attempts failed", "gs://", "s3://")
NO_VERSION = "1"  # that of no file
OTHER_VERSION = ("PreconditionFailed", "ConditionalRequestConflict")  # how S3 refuses to replace


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
    import fsspec.config
    from etils import epath

    # What it has to say of a server that is away, whoever asked is told as well.
    for talker in ("asyncio", "gcsfs"):
        logging.getLogger(talker).setLevel(logging.CRITICAL)

    # Others write there too: a listing that is kept tells of what was. Orbax's own included.
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


# ------------------------------------------------------------------------------------- writing


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace a file at one stroke: a reader sees the old one or the new one, both whole."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        files_of(path).pipe_file(os.fspath(path), data)
        return
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # not there, or on a disk that turned read-only
            aside.unlink()
        if isinstance(error, OSError):
            error.filename = os.fspath(path)  # a failed write does not say of which file
        raise


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
        said = getattr(error.__cause__, "response", None) or {}  # what s3fs was told
        code = said.get("Error", {}).get("Code")
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

    Left unclosed, what came since is lost. No file of `io`: those have a file descriptor.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._data = path, bytearray(path.read_bytes() if path.exists() else b"")
        self._there = len(self._data)

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self) -> None:
        if len(self._data) > self._there:
            write_atomic(self._path, bytes(self._data))
            self._there = len(self._data)

    def close(self) -> None:
        self.flush()


NO_PLACE = (errno.EACCES, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT)
NO_PLACE += (errno.ENOTDIR, errno.EPERM)


def require_folder(path: Path) -> None:
    """Raises UserError where a file is at the place of this folder of this machine, or above it."""
    for place in (path, *path.parents):
        try:
            in_the_way = not stat.S_ISDIR(os.stat(place).st_mode)
        except FileNotFoundError:
            in_the_way = place.is_symlink()
        except NotADirectoryError:  # which of those above it, is found next
            in_the_way = False
        except OSError as error:
            raise UserError(f"{path} cannot be a folder: {error.strerror}; name another") from None
        require(not in_the_way, f"{path} cannot be a folder: {place} is none; name another")


def make_folder(path: Path) -> None:
    """The folder and those above it; buckets need none and are never made.

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
    """Have all below a folder on the disk itself, where it outlives a fall of the machine."""
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
    probe = path / f".probe-{uuid.uuid4().hex[:8]}"
    try:
        write_atomic(probe, b"")
        probe.unlink()
    except OSError as error:  # its words are the server's: no such bucket, access denied
        raise UserError(
            f"cannot write to {path} ({error}): create the bucket, or give these credentials access"
        ) from error


# ------------------------------------------------------------------------------------- reading


def size(path: Path) -> int:
    """Bytes of a file. Raises FileNotFoundError, also for a folder."""
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


def cache_folder() -> Path:
    """Where this machine keeps copies of what is remote: $GQA_SCALING_CACHE, else as XDG says.

    Raises UserError where this user has no home folder and neither is set.
    """
    own = os.environ.get("GQA_SCALING_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache"), "gqa_scaling")


# -------------------------------------------------------------------------------------- errors


class StorageError(OSError):
    """A bucket or a disk cannot be read or written just now; the message is one line.

    `exit_code` is that of a command that ends so.
    """

    exit_code = 1


class DiskError(StorageError):
    """A disk of this machine is full, read-only, failing or closed to this user."""

    exit_code = 2


# What the system says of a disk that cannot be used, and what helps.
REMEDIES = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EROFS: "mount it for writing",
    errno.EIO: "the device fails, see the system's log",
    errno.ESTALE: "mount it again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EACCES: "give this user access",
    errno.EPERM: "give this user access",
    errno.ENOTCONN: "mount it again",  # a bucket mounted as a folder, whose program has ended
    errno.ENODEV: "mount it again",
    errno.ETIMEDOUT: "mount it again",
}
# Said of other things too: these count only where the error names a file.
OF_MORE = (errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT)
# The words of the others count also where a library kept only the words of an error.
SAID_OF_DISKS = tuple(n for n in REMEDIES if n not in OF_MORE)


def failure(error: BaseException, place: Path | None = None) -> StorageError | None:
    """The failing bucket or disk behind an error, however it was wrapped; None if there is none.

    A disk is named by the file in the error, or by `place` where the error has none.
    """
    for seen in _behind(error):
        if isinstance(seen, StorageError):
            return seen
        library = type(seen).__module__.partition(".")[0] in LIBRARIES
        if library or _is_tensorstores(str(seen)):
            words = " ".join(str(seen).split())[:300]
            return StorageError(
                f"remote storage failed ({type(seen).__name__}: {words}); what was saved is whole "
                "and the same command continues when it answers again"
            )
        number = _number(seen)
        if number is not None:
            named = getattr(seen, "filename", None) or place
            where = f" ({os.fsdecode(named)})" if isinstance(named, str | bytes | Path) else ""
            return DiskError(
                f"cannot use the disk{where}: {os.strerror(number)}: {REMEDIES[number]}, then give "
                "the same command again"
            )
    return None


def _behind(error: BaseException) -> Iterator[BaseException]:
    """The error, then what led to it, each once: libraries build chains that end in themselves."""
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        this = left.pop()
        if this is None or any(this is one for one in seen):
            continue
        seen.append(this)
        yield this
        left.append(this.__cause__ or (None if this.__suppress_context__ else this.__context__))
        if isinstance(this, BaseExceptionGroup):
            left.extend(this.exceptions)


def _number(error: BaseException) -> int | None:
    """What the system said of a disk in this error, as a key of REMEDIES; None if nothing."""
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename is not None or error.errno in SAID_OF_DISKS
        return error.errno if error.errno in REMEDIES and named else None
    return next((n for n in SAID_OF_DISKS if os.strerror(n) in str(error)), None)


def _is_tensorstores(words: str) -> bool:
    return any(s in words for s in STATUSES) and any(part in words for part in OF_REQUESTS)


@contextlib.contextmanager
def failures_are_fine() -> Iterator[None]:
    """For what may as well be done later, or not at all: a disk or bucket that is away is no error."""
    try:
        yield
    except OSError:
        pass
    except Exception as error:
        if failure(error) is None:
            raise
