"""Fetching a corpus by name: the package, what is kept of it, and what is said when it cannot be."""

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from gqa_scaling.cli import main
from gqa_scaling.config import DataConfig, UserError
from gqa_scaling.data import fetch as fetching
from gqa_scaling.data.corpus import FETCHED, open_corpus
from gqa_scaling.data.fetch import ARCHIVES, LARGEST, fetch

NAME = "linux-6.1"
FILES = {
    "linux-source-6.1/mm/slab.c": b"int a;\n",
    "linux-source-6.1/Documentation/b.rst": "B\u00e4ume\n".encode(),
    "linux-source-6.1/mm/slab.o": b"\x00\x01",
    "linux-source-6.1/include/registers.h": b"x" * (LARGEST + 1),
    "linux-source-6.1/include/latin.h": b"\xe4\n",
    "linux-source-6.1/include/empty.h": b"",
}


def _tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        for name, content in files.items():
            each = tarfile.TarInfo(name)
            each.size = len(content)
            tar.addfile(each, io.BytesIO(content))
    return out.getvalue()


def _package(files: dict[str, bytes]) -> bytes:
    """A Debian package: an `ar` archive of a version, and of a tar that holds the tar of the source."""
    inner = {f"./usr/src/{ARCHIVES[NAME].inside}": _tar(files)}
    members = {"debian-binary": b"2.0", "data.tar.xz": _tar({"./usr/share/doc/x": b"", **inner})}
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in the place of the real one, in a folder of its own to work in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mirror" / "small.deb"
    path.parent.mkdir()
    path.write_bytes(_package(FILES))
    small = dataclasses.replace(
        ARCHIVES[NAME],
        sources=(f"file://{tmp_path}/gone/small.deb", path.as_uri()),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size=path.stat().st_size,
    )
    monkeypatch.setitem(fetching.ARCHIVES, NAME, small)
    return path


def test_fetched_documents_are_the_text_files_in_order(package: Path, capsys) -> None:
    with pytest.raises(UserError, match="gqa-scaling fetch linux"):
        open_corpus(DataConfig(corpus=NAME))
    assert main(["fetch", NAME]) == 0  # the first source has it not, the second has
    assert "GPL-2.0" in capsys.readouterr().out
    corpus = open_corpus(DataConfig(corpus=NAME))
    assert [document.text for document in corpus.documents()] == ["B\u00e4ume\n", "int a;\n"]
    raw = zstandard.ZstdDecompressor().stream_reader(Path(FETCHED[NAME]).read_bytes()).read()
    names = [json.loads(line)["name"] for line in raw.splitlines()]
    assert names == ["Documentation/b.rst", "mm/slab.c"]
    # nothing is left beside it, and what is there is not fetched again
    assert [path.name for path in Path("data").iterdir()] == [Path(FETCHED[NAME]).name]
    package.unlink()
    assert fetch(NAME) == Path(FETCHED[NAME])


def test_package_that_lies_here_is_used_and_kept(package: Path) -> None:
    assert main(["fetch", NAME, "--from", str(package)]) == 0
    assert package.exists()
    assert Path(FETCHED[NAME]).exists()


def test_a_fetch_that_another_one_overtakes_ends_with_what_that_one_kept(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = fetching._check

    def overtaken(archive: fetching.Archive, file: Path) -> None:
        monkeypatch.setattr(fetching, "_check", check)
        fetch(NAME)  # the other one; it removes the package
        check(archive, file)

    monkeypatch.setattr(fetching, "_check", overtaken)
    assert fetch(NAME) == Path(FETCHED[NAME])
    assert [path.name for path in Path("data").iterdir()] == [Path(FETCHED[NAME]).name]


def _other(package: Path) -> None:
    package.write_bytes(_package({"linux-source-6.1/a.c": b"other"}))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_other, "sha256"),
        (lambda package: package.unlink(), "cannot be fetched"),
    ],
)
def test_another_or_missing_package_leaves_nothing(package: Path, harm, said: str, capsys) -> None:
    harm(package)
    assert main(["fetch", NAME]) == 2
    assert said in capsys.readouterr().err
    assert not Path(FETCHED[NAME]).exists()


@pytest.mark.parametrize(
    "content", [b"no archive", b"!<arch>\n", _package(FILES)[:-400], _package({})]
)
def test_damaged_package_with_the_right_hash_is_said_to_be_damaged(
    package: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    package.write_bytes(content)
    right = dataclasses.replace(fetching.ARCHIVES[NAME], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(fetching.ARCHIVES, NAME, right)
    assert main(["fetch", NAME]) == 2
    assert "small.deb" in capsys.readouterr().err
    assert not Path(FETCHED[NAME]).exists()


@pytest.mark.parametrize("given", [".", "", "gone.deb"])
def test_what_is_no_file_is_no_package(package: Path, given: str, capsys) -> None:
    assert main(["fetch", NAME, "--from", given]) == 2
    assert "is no file here: name the package that was downloaded" in capsys.readouterr().err
    assert not Path("data").exists()


def test_unknown_name_is_refused(capsys) -> None:
    assert main(["fetch", "windows"]) == 2
    assert "linux-6.1" in capsys.readouterr().err
