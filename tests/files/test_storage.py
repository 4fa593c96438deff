"""Files on a disk and objects in a bucket, read and written alike."""

import errno
import io
import itertools
import os
from pathlib import Path

import pytest
from etils import epath

from gqa_scaling.config import UserError
from gqa_scaling.files import storage


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path):
    return tmp_path / "files" if request.param == "disk" else request.getfixturevalue("bucket")


def test_what_is_written_is_read(folder):
    storage.make_folder(folder / "deep")
    storage.write_atomic(folder / "a.json", "ü\n")
    storage.write_atomic(folder / "deep/b.bin", bytes(range(256)))
    storage.write_atomic(folder / "a.json", "other")
    assert (folder / "a.json").read_text() == "other"
    assert storage.size(folder / "deep/b.bin") == 256
    assert storage.tail(folder / "deep/b.bin", 3) == b"\xfd\xfe\xff"
    assert storage.tail(folder / "a.json", 100) == b"other"
    assert storage.sizes(folder) == {"a.json": 5, "deep/b.bin": 256}
    assert storage.modified(folder / "a.json") > 1e9


def test_nothing_else_is_listed_as_a_folders_own(folder):
    for name in ("1/x", "10/y"):
        storage.make_folder((folder / name).parent)
        storage.write_atomic(folder / name, "")
    assert storage.sizes(folder / "1") == {"x": 0}
    assert storage.sizes(folder / "none") == {}
    storage.remove_folder(folder / "1")
    assert storage.sizes(folder) == {"10/y": 0}


def test_what_is_missing_is_said_so(folder):
    with pytest.raises(FileNotFoundError):
        storage.size(folder / "none")
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_text()
    assert not (folder / "none").exists()


def test_no_listing_is_kept(bucket):
    """What another process has written since is seen, by Orbax's paths as well."""
    assert not (bucket / "file").exists()
    assert list(bucket.glob("*")) == []
    storage.write_atomic(bucket / "file", "1")
    assert [p.name for p in bucket.iterdir()] == ["file"]


def test_one_of_two_creates(bucket):
    file = bucket / "claim.json"
    assert storage.version(file) is None
    assert storage.replace(file, "first", None)
    assert not storage.replace(file, "second", None)
    assert file.read_text() == "first"


def test_one_of_two_replaces(bucket):
    file = bucket / "claim.json"
    assert not storage.replace(file, "first", storage.NO_VERSION)
    storage.write_atomic(file, "old")
    seen = storage.version(file)
    assert not storage.replace(file, "first", storage.NO_VERSION)
    assert storage.replace(file, "first", seen)
    assert not storage.replace(file, "second", seen)
    assert file.read_text() == "first"
    assert storage.version(file) != seen
    file.unlink()
    assert not storage.replace(file, "third", seen)
    assert not file.exists()


def test_nothing_is_created_in_a_bucket_that_is_not_there(bucket):
    with pytest.raises(FileNotFoundError):
        storage.replace(storage.as_path("s3://nowhere-at-all/claim.json"), "first", None)


class Google:
    """What gcsfs answers for a bucket of one object, which has a generation if it is there."""

    base = "https://storage.googleapis.com/storage/v1/"

    def __init__(self) -> None:
        self.generation, self.asked = 0, []

    def split_path(self, path):
        return *path.removeprefix("gs://").split("/", 1), None

    def info(self, path):
        if not self.generation:
            raise FileNotFoundError(path)
        return {"generation": str(self.generation)}

    def call(self, method, url, bucket, *, uploadType, name, ifGenerationMatch, data):
        self.asked.append((method, url.format(bucket), uploadType, name, data))
        if int(ifGenerationMatch) != self.generation:
            raise FileExistsError(url)  # as gcsfs says of every condition that does not hold
        self.generation += 7


def test_google_replaces_by_generation(monkeypatch):
    google, file = Google(), epath.Path("gs://tests/runs/claim.json")
    monkeypatch.setattr(storage, "files_of", lambda path: google)
    assert storage.version(file) is None
    assert storage.replace(file, "first", None)
    assert not storage.replace(file, "second", None)
    seen = storage.version(file)
    assert not storage.replace(file, "third", storage.NO_VERSION)
    assert storage.replace(file, "third", seen)
    assert not storage.replace(file, "fourth", seen)
    upload = "https://storage.googleapis.com/upload/storage/v1/b/tests/o"
    assert google.asked[0] == ("POST", upload, "media", "runs/claim.json", b"first")


def test_a_growing_file_is_there_after_each_flush(bucket):
    file = storage.GrowingFile(bucket / "log")
    file.write(b"one\n")
    assert not (bucket / "log").exists()
    file.flush()
    file.write(b"two\n")
    assert (bucket / "log").read_bytes() == b"one\n"
    file.close()
    assert (bucket / "log").read_bytes() == b"one\ntwo\n"
    more = storage.GrowingFile(bucket / "log")
    more.write(b"three\n")
    more.close()
    assert (bucket / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_paths_of_this_machine_stay_what_they_were():
    assert storage.as_path("runs") == Path("runs")
    assert type(storage.as_path(Path("/a/b"))) is type(Path("/a/b"))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("az://bucket/runs", "must be a path of this machine, or begin with gs:// and s3://"),
        ("s3://", "must name a bucket, as in s3://bucket/folder"),
    ],
)
def test_a_path_that_cannot_be_reached_is_refused(place, words):
    with pytest.raises(UserError, match=words):
        storage.as_path(place)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, scheme, extra):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"pip install 'gqa-scaling\[{extra}\]'"):
        storage.as_path(f"{scheme}://bucket/runs")


def test_a_bucket_that_is_not_there_is_refused(bucket):
    with pytest.raises(UserError, match=r"cannot write to s3://nowhere-at-all/runs .*not exist"):
        storage.check_writable(storage.as_path("s3://nowhere-at-all/runs"))
    storage.check_writable(bucket)
    assert storage.sizes(bucket) == {}


# -------------------------------------------------------------------------------------- errors


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
    found = storage.failure(error)
    assert s3_server.endpoint in str(found)
    assert "\n" not in str(found)
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert str(storage.failure(wrapped)) == str(found)
    with storage.failures_are_fine():
        raise error


def test_tensorstores_words_are_known():
    words = (
        'ABORTED: Error reading "a/b": All 5 retry attempts failed: CURL error Could not connect'
    )
    assert words in str(storage.failure(ValueError(words)))
    assert storage.failure(ValueError("ABORTED: a collective of the job's processes")) is None


@pytest.mark.parametrize(
    "error", [ValueError("bad"), OSError("disk"), FileNotFoundError("x"), io.UnsupportedOperation()]
)
def test_other_errors_are_not_taken_for_a_servers(error):
    assert storage.failure(error) is None
    if not isinstance(error, OSError):
        with pytest.raises(type(error)), storage.failures_are_fine():
            raise error


def test_an_error_raised_beside_an_answered_one_is_its_own():
    def answered():
        try:
            raise storage.StorageError("away")
        except OSError:
            raise KeyError("bug") from None

    with pytest.raises(KeyError) as caught:
        answered()
    assert storage.failure(caught.value) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path, monkeypatch):
    file = tmp_path / "file"
    storage.write_atomic(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        with pytest.raises(OSError, match="No space left") as caught:
            storage.write_atomic(file, "new")
    assert str(storage.failure(caught.value)).startswith(f"cannot use the disk ({file}): No space")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


def chained(*errors):
    """The errors, each the cause of the one after it; the last is returned."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


@pytest.mark.parametrize("number", storage.SAID_OF_DISKS, ids=errno.errorcode.get)
def test_a_disk_is_known_however_it_is_wrapped(number):
    words = os.strerror(number)
    for error in (
        OSError(number, words),
        chained(OSError(number, words, "file"), ValueError("a save failed"), RuntimeError("ended")),
        ValueError(f"INTERNAL: Error writing local file: {words} [source locations='x.cc:1']"),
        ExceptionGroup("two", [ValueError("other"), OSError(number, words)]),
    ):
        found = storage.failure(error)
        assert isinstance(found, storage.DiskError)
        assert found.exit_code == 2
        assert str(found).count("\n") == 0
        assert f"{words}: {storage.REMEDIES[number]}" in str(found)


def test_a_chain_of_errors_that_ends_in_itself_is_walked_once():
    full, wrapped = OSError(errno.ENOSPC, "full"), RuntimeError("a save failed")
    wrapped.__cause__, full.__cause__ = full, wrapped
    assert isinstance(storage.failure(wrapped), storage.DiskError)
    bug = ValueError("bug")
    bug.__context__ = bug
    assert storage.failure(bug) is None


def test_what_is_refused_without_a_file_is_no_disk():
    """Such as a signal to somebody else's process, or a device that is not ours."""
    assert storage.failure(PermissionError(errno.EPERM, "Operation not permitted")) is None
    assert storage.failure(ValueError("Permission denied by the accelerator's driver")) is None


def test_a_folder_whose_mount_is_gone_is_a_disk_and_a_peer_that_is_gone_is_none():
    words = "Transport endpoint is not connected"
    found = storage.failure(OSError(errno.ENOTCONN, words, "/mnt/runs/x"))
    assert "(/mnt/runs/x)" in str(found)
    assert "mount it again" in str(found)
    assert storage.failure(OSError(errno.ENOTCONN, words)) is None
    assert storage.failure(TimeoutError(errno.ETIMEDOUT, "Connection timed out")) is None


def test_the_cache_lies_where_it_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("GQA_SCALING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert storage.cache_folder() == tmp_path / "gqa_scaling"
    monkeypatch.setenv("GQA_SCALING_CACHE", str(tmp_path / "own"))
    assert storage.cache_folder() == tmp_path / "own"
