"""What an error says of a disk or a bucket that cannot be used just now, as one line.

Libraries wrap what the system or a server said in errors of their own; `failure` looks through them.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

# Libraries that reach a server: whatever one of them raises is a failure of remote storage.
LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs")
# TensorStore raises a ValueError instead, whose words hold one of each of these.
STATUSES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED")
OF_REQUESTS = ("CURL error", "HTTP response", "retry attempts failed", "gs://", "s3://")
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
# These are said of other things too: they count only where the error names a file.
OF_MORE = (errno.EACCES, errno.EPERM, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT)
# The words of the others count also where a library kept only the words of an error.
SAID_OF_DISKS = tuple(n for n in REMEDIES if n not in OF_MORE)


class StorageError(OSError):
    """A bucket or a disk cannot be read or written just now; the message is one line.

    `exit_code` is that of a command that ends so.
    """

    exit_code = 74  # EX_IOERR of <sysexits.h>


class DiskError(StorageError):
    """A disk of this machine is full, read-only, failing or closed to this user."""

    exit_code = 2


def failure(error: BaseException, place: Path | None = None) -> StorageError | None:
    """The failing bucket or disk behind an error, however it was wrapped; None if there is none.

    A disk is named by the file in the error, or by `place` where the error has none.
    """
    for cause in _with_causes(error):
        if isinstance(cause, StorageError):
            return cause
        library = type(cause).__module__.partition(".")[0] in LIBRARIES
        if library or _is_tensorstores(str(cause)):
            words = " ".join(str(cause).split())[:300]
            return StorageError(
                f"remote storage failed ({type(cause).__name__}: {words}); what was saved is whole "
                "and the same command continues when it answers again"
            )
        number = _disk_error_number(cause)
        if number is not None:
            named = getattr(cause, "filename", None) or place
            where = f" ({os.fsdecode(named)})" if isinstance(named, str | bytes | Path) else ""
            return DiskError(
                f"cannot use the disk{where}: {os.strerror(number)}: {REMEDIES[number]}, then give "
                "the same command again"
            )
    return None


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


def _with_causes(error: BaseException) -> Iterator[BaseException]:
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


def _disk_error_number(error: BaseException) -> int | None:
    """What the system said of a disk in this error, as a key of REMEDIES; None if nothing."""
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename is not None or error.errno in SAID_OF_DISKS
        return error.errno if error.errno in REMEDIES and named else None
    return next((n for n in SAID_OF_DISKS if os.strerror(n) in str(error)), None)


def _is_tensorstores(words: str) -> bool:
    return any(s in words for s in STATUSES) and any(part in words for part in OF_REQUESTS)
