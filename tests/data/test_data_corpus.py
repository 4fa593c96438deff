"""Which documents a corpus holds, in which order, and how a bad one is refused."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gqa_scaling.config import DataConfig, UserError
from gqa_scaling.data.corpus import open_corpus

TEXTS = ["one", "zwei\nlines", "três 注意", "x" * 5000]


def read(path, **fields):
    return [d.text for d in open_corpus(DataConfig(corpus=str(path), **fields)).documents()]


def write(path, texts=TEXTS):
    """Write the texts in the format of the file's name."""
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:50]) + compress(lines[50:]))  # two frames, as pzstd writes
    elif path.name.endswith(".parquet"):
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=3)
    else:
        path.write_bytes(lines)


FORMATS = ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst", "c.parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_documents(tmp_path, name):
    write(tmp_path / name)
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path) == TEXTS  # and so does the folder around it


@pytest.mark.parametrize("name", FORMATS)
def test_reading_is_measured_in_bytes_of_the_files(tmp_path, name):
    write(tmp_path / name, [str(i) * 100 for i in range(1000)])
    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    reads = [d.read for d in corpus.documents()]
    assert reads == sorted(reads)
    assert reads[-1] == corpus.total_bytes == (tmp_path / name).stat().st_size


def test_folder_is_read_in_sorted_order_without_hidden_or_binary_files(tmp_path):
    for name in ("b.txt", "a/z.md", "a/y.py", ".hidden", ".git/config", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    (tmp_path / "c.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "crlf.txt").write_bytes(b"a\r\nb")
    skipped = []
    documents = list(open_corpus(DataConfig(corpus=str(tmp_path))).documents(skipped.append))
    assert [d.text for d in documents] == ["a/y.py", "a/z.md", "b.txt", "a\r\nb"]
    assert skipped == ["c.png"]


def test_records_win_over_files_beside_them_and_those_are_counted(tmp_path):
    write(tmp_path / "2.jsonl", ["second"])
    write(tmp_path / "1.parquet", ["first"])
    (tmp_path / "README.md").write_text("about")
    corpus = open_corpus(DataConfig(corpus=str(tmp_path)))
    assert [d.text for d in corpus.documents()] == ["first", "second"]
    assert corpus.left_out == 1


def test_stdlib_has_the_library_and_neither_packages_nor_tests():
    corpus = open_corpus(DataConfig())
    assert {"argparse.py", "json/decoder.py"} <= set(corpus.files)
    parts = {part for name in corpus.files for part in name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert list(corpus.files) == sorted(corpus.files)
    assert corpus.total_bytes > 5_000_000


def test_fingerprint_notices_names_and_sizes_not_places(tmp_path):
    prints = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        write(tmp_path / place / "a.jsonl")
        prints.add(open_corpus(DataConfig(corpus=str(tmp_path / place))).fingerprint)
    assert len(prints) == 1
    write(tmp_path / "there" / "a.jsonl", [*TEXTS, "more"])
    assert open_corpus(DataConfig(corpus=str(tmp_path / "there"))).fingerprint not in prints


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a"', "line 2 of .*c.jsonl is not valid JSON"),
        ('{"body": "a"}', "line 2 of .*c.jsonl has no field 'text', only body.*text_field"),
        ('{"text": 3}', "text=3 in line 2 of .*c.jsonl must be a string"),
        ('["a"]', "line 2 of .*c.jsonl must be a JSON object"),
        ('{"text": "\\ud800"}', "line 2 of .*c.jsonl holds half of a surrogate"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / "c.jsonl")
    assert "\n" not in str(caught.value)


def test_blank_lines_are_no_documents_and_text_field_chooses(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"body": "a"}\n\n{"body": "b", "text": 1}')
    assert read(tmp_path, text_field="body") == ["a", "b"]


@pytest.mark.parametrize("name", ["c.jsonl.gz", "c.jsonl.zst", "c.parquet"])
def test_cut_files_are_refused(tmp_path, name):
    write(tmp_path / name, [str(i) for i in range(20_000)])
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=name):
        read(tmp_path)


def test_a_zst_file_of_a_long_window_is_read(tmp_path):
    long = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    content = packer.compress(b'{"text": "a"}\n') + packer.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert read(tmp_path / "a.jsonl.zst") == ["a"]


def test_a_zst_file_cut_between_lines_is_refused(tmp_path):
    """The decompressor itself is silent there; only an unfinished frame gives it away."""
    line = json.dumps({"text": "a" * (2**17 - 13)}).encode() + b"\n"
    assert len(line) == 2**17  # one zstd block
    out = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(out, closefd=False) as writer:
        for _ in range(4):
            writer.write(line)
            writer.flush(zstandard.FLUSH_BLOCK)
        cut = out.tell()
        writer.write(line)
    (tmp_path / "c.jsonl.zst").write_bytes(out.getvalue()[:cut])
    with pytest.raises(UserError, match=r"c\.jsonl\.zst is damaged"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"body": ["a"]}, "has no column 'text', only body"),
        ({"text": ["a", None]}, "text=None in row 2 of"),
        ({"text": [1]}, "text=1 in row 1 of"),
    ],
)
def test_bad_parquet_is_named(tmp_path, texts, words):
    pq.write_table(pa.table(texts), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=words):
        read(tmp_path)


def test_a_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    texts = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet is damaged \('utf-8' codec"):
        read(tmp_path)


def test_missing_empty_and_unknown_corpora_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_corpus(DataConfig(corpus=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="holds no files"):
        open_corpus(DataConfig(corpus=str(tmp_path)))
    (tmp_path / "book.txt").write_text("text")
    with pytest.raises(UserError, match=r"must end in one of \.jsonl"):
        open_corpus(DataConfig(corpus=str(tmp_path / "book.txt")))


def test_dangling_links_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    assert read(tmp_path) == ["a"]
