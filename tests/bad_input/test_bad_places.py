"""Places where no runs, tokens or pages can be written."""

import pytest
from bad_input_kit import TEXTS, TINY, corpus

from gqa_scaling import cli


@pytest.mark.parametrize("verb", ["plan", "status", "checkpoints", "learning-rates", "run"])
@pytest.mark.parametrize("root", ["", "a-file", "a-file/runs", "link", "loop", "n" * 300, "a\0b"])
def test_roots(refused, workplace, verb, root):
    (workplace / "a-file").write_text("x")
    (workplace / "link").symlink_to("nowhere")
    (workplace / "loop").symlink_to("loop")
    refused(repr(root)[1:-1], verb, TINY, "--root", root)


@pytest.mark.parametrize("verb", ["plan", "status", "fit"])
@pytest.mark.parametrize("root", ["http://x", "gs://", "s3:///"])
def test_roots_elsewhere(refused, verb, root):
    refused(root, verb, TINY, "--root", root)


def test_a_store_under_a_file_and_a_page_under_a_file(refused, workplace):
    (workplace / "a-file").write_text("x")
    (workplace / "texts").mkdir()
    for i in range(40):
        (workplace / f"texts/{i}.txt").write_text(f"text {i}")
    own = ("--data.corpus", "texts", "--data.store", "a-file/store")
    refused("a-file/store", "prepare", TINY, *own)
    refused("a-file is no folder", "report", "chen2025", "--output", "a-file/page/report.html")


@pytest.mark.parametrize("root", ["/proc/x", "/dev/null/runs", "/dev/null"])
def test_roots_that_cannot_be_made(refused, workplace, capsys, root):
    """Training is refused before it begins, with its tokens prepared."""
    corpus(workplace)
    assert cli.main(("prepare", TINY, *TEXTS)) == 0
    capsys.readouterr()
    small = ("--evaluation.tokens", "32", "--data.allow-repeats", "True", "--quiet")
    refused(root, "run", TINY, *TEXTS, *small, "--root", root)
