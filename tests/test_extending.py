"""The changes of docs/extending.md, made in a copy of the code, and what they say follows."""

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
GUIDE = (CHECKOUT / "docs/extending.md").read_text(encoding="utf-8")
CHANGES = ("Another cost", "Another attention", "Another engine")


def blocks(title: str) -> list[str]:
    """The indented blocks of a section, in order; what is told of two files in a row is two."""
    section = re.split(r"^## ", GUIDE.partition(f"\n## {title}\n")[2], flags=re.MULTILINE)[0]
    found = re.findall(r"(?:^    .*\n)+", section, flags=re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def change(copy: Path, block: str) -> None:
    """Apply `# path` and lines with +, - and a space before them, as a diff has them, @@ between places."""
    name, _, lines = block.removeprefix("# ").partition("\n")
    path = copy / name
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for hunk in re.split(r"^@@\n", lines, flags=re.MULTILINE):
        told = [(line[:1] or " ", line[1:]) for line in hunk.splitlines()]
        old, new = ("".join(f"{line}\n" for sign, line in told if sign != other) for other in "+-")
        assert text.count(old) == 1 if old else not text, f"{name} has no one place for\n{hunk}"
        text = text.replace(old, new, 1) if old else new
    path.write_text(text, encoding="utf-8")


def run(copy: Path, words: list[str]) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "GQA_SCALING_RUNS": "runs"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


PROGRAMS = {"gqa-scaling": [sys.executable, "-m", "gqa_scaling"], "python": [sys.executable]}


@pytest.mark.parametrize("title", CHANGES)
def test_a_change_of_the_guide_does_what_it_says(title, tmp_path):
    for room in ("gqa_scaling", "launch", "experiments"):
        shutil.copytree(
            CHECKOUT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__")
        )
    said, followed = None, 0
    for block in blocks(title):
        if block.startswith("# "):
            change(tmp_path, block)
        elif block.startswith(">>> "):
            (tmp_path / "example.txt").write_text(block)
            tried = "import doctest, sys; sys.exit(doctest.testfile('example.txt', False).failed)"
            run(tmp_path, [sys.executable, "-c", tried])
            followed += len(doctest.DocTestParser().get_examples(block))
        elif block[2:].split()[0] in PROGRAMS:
            program, *words = shlex.split(block.removeprefix("$ "))
            said = run(tmp_path, [*PROGRAMS[program], *words])
            followed += 1
        else:
            assert said is not None
            assert block.strip() in said
    assert followed


def test_the_guide_has_no_other_changes():
    assert tuple(re.findall(r"^## (Another .*)$", GUIDE, flags=re.MULTILINE)) == CHANGES
