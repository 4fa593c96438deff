"""What fails is told in one line, a disk or a bucket apart from everything else."""

import errno
import io
import itertools
import os
from pathlib import Path

import pytest

from gqa_scaling.files import failures, storage


def failing(bucket, s3_server):
    """What s3fs raises while the server is away."""
    s3_server.stop()
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            (bucket / "file").read_text()
    finally:
        s3_server.start()
    return caught.value


def test_a_server_that_is_away_is_told_in_one_line(bucket, s3_server):
    error = failing(bucket, s3_server)
    found = failures.failure(error)
    assert s3_server.endpoint in str(found)
    assert "\n" not in str(found)
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert str(failures.failure(wrapped)) == str(found)
    with failures.failures_are_fine():
        raise error


def test_tensorstores_words_are_known():
    words = (
        'ABORTED: Error reading "a/b": All 5 retry attempts failed: CURL error Could not connect'
    )
    assert words in str(failures.failure(ValueError(words)))
    assert failures.failure(ValueError("ABORTED: a collective of the job's processes")) is None


@pytest.mark.parametrize(
    "error", [ValueError("bad"), OSError("disk"), FileNotFoundError("x"), io.UnsupportedOperation()]
)
def test_other_errors_are_not_taken_for_a_servers(error):
    assert failures.failure(error) is None
    if not isinstance(error, OSError):
        with pytest.raises(type(error)), failures.failures_are_fine():
            raise error


def test_an_error_raised_beside_an_answered_one_is_its_own():
    def answered():
        try:
            raise failures.StorageError("away")
        except OSError:
            raise KeyError("bug") from None

    with pytest.raises(KeyError) as caught:
        answered()
    assert failures.failure(caught.value) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    file = tmp_path / "file"
    storage.write_atomic(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(OSError, match="No space left") as caught:
            storage.write_atomic(file, "new")
    assert str(failures.failure(caught.value)).startswith(f"cannot use the disk ({file}): No space")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


def chained(*errors):
    """The errors, each the cause of the one after it; the last is returned."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


@pytest.mark.parametrize("number", failures.SAID_OF_DISKS, ids=errno.errorcode.get)
def test_a_disk_is_known_however_it_is_wrapped(number):
    words = os.strerror(number)
    for error in (
        OSError(number, words),
        chained(OSError(number, words, "file"), ValueError("a save failed"), RuntimeError("ended")),
        ValueError(f"INTERNAL: Error writing local file: {words} [source locations='x.cc:1']"),
        ExceptionGroup("two", [ValueError("other"), OSError(number, words)]),
    ):
        found = failures.failure(error)
        assert isinstance(found, failures.DiskError)
        assert found.exit_code == 2
        assert str(found).count("\n") == 0
        assert f"{words}: {failures.REMEDIES[number]}" in str(found)


def test_a_chain_of_errors_that_ends_in_itself_is_walked_once():
    full, wrapped = OSError(errno.ENOSPC, "full"), RuntimeError("a save failed")
    wrapped.__cause__, full.__cause__ = full, wrapped
    assert isinstance(failures.failure(wrapped), failures.DiskError)
    bug = ValueError("bug")
    bug.__context__ = bug
    assert failures.failure(bug) is None


def test_what_is_refused_without_a_file_is_no_disk():
    """Such as a signal to somebody else's process, or a device that is not ours."""
    assert failures.failure(PermissionError(errno.EPERM, "Operation not permitted")) is None
    assert failures.failure(ValueError("Permission denied by the accelerator's driver")) is None


def test_a_folder_whose_mount_is_gone_is_a_disk_and_a_peer_that_is_gone_is_none():
    words = "Transport endpoint is not connected"
    found = failures.failure(OSError(errno.ENOTCONN, words, "/mnt/runs/x"))
    assert "(/mnt/runs/x)" in str(found)
    assert "mount it again" in str(found)
    assert failures.failure(OSError(errno.ENOTCONN, words)) is None
    assert failures.failure(TimeoutError(errno.ETIMEDOUT, "Connection timed out")) is None


def test_the_cache_lies_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("GQA_SCALING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "gqa_scaling"
    monkeypatch.setenv("GQA_SCALING_CACHE", str(tmp_path / "own"))
    assert storage.cache_folder() == tmp_path / "own"
