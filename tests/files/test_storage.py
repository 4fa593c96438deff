"""Files on a disk and objects in a bucket, read and written alike."""

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


def test_what_is_read_together_keeps_its_order_and_the_first_failure():
    assert storage.together(lambda n: n * n, range(40)) == [n * n for n in range(40)]
    assert storage.together(str, []) == []
    with pytest.raises(KeyError, match="2"):
        storage.together(lambda n: {0: 0, 1: 1}[n], range(9))


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
