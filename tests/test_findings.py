"""docs/findings.md: every figure that it shows is printed again by the command above it.

Numbers may differ by two units of their last digit or by 2%, as refits do between processors.
"""

import re
import runpy
import shlex
import textwrap
from pathlib import Path

import pytest

from gqa_scaling import cli

CHECKOUT = Path(__file__).parents[1]
TEXT = (CHECKOUT / "docs" / "findings.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def shown() -> dict[str, list[str]]:
    """The lines that are quoted of each command's output."""
    blocks = re.findall(r"(?:^    .*\n)+", TEXT, flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for block in map(textwrap.dedent, blocks):
        command, *lines = block.splitlines()
        if command.startswith("$ "):
            assert lines, f"{command}: shows nothing"
            found.setdefault(command.removeprefix("$ "), []).extend(lines)
    return found


def printed_in(quoted: str, printed: str) -> bool:
    """Whether the words of a line are among those printed, one after the other; last digits and what
    ends a clause aside."""
    words, all_words = ([word.rstrip(".,;") for word in each.split()] for each in (quoted, printed))
    frame, frames = [[NUMBER.sub("#", word) for word in each] for each in (words, all_words)]
    places = range(len(frames) - len(frame) + 1)
    there = (at for at in places if frames[at : at + len(frame)] == frame)
    numbers = NUMBER.findall(quoted)
    return any(
        all(map(near, numbers, NUMBER.findall(" ".join(all_words[at : at + len(frame)]))))
        for at in there
    )


def near(quoted: str, printed: str) -> bool:
    one, other = (float(text.replace(",", "")) for text in (quoted, printed))
    _, point, decimals = quoted.partition(".")
    return abs(one - other) <= max(2.1 * 10.0 ** -len(decimals) if point else 0, 0.02 * abs(one))


@pytest.mark.parametrize("command", shown())
def test_the_figures_are_those_that_their_command_prints(command, capsys, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    program, *args = shlex.split(command)
    if program == "gqa-scaling":
        assert cli.main(args) == 0
        printed = capsys.readouterr().out
    else:
        assert (program, args) == ("python", ["docs/findings.py"])
        printed = runpy.run_path("docs/findings.py")["told"]()  # pictures are not drawn again
    for line in shown()[command]:
        assert printed_in(line, printed), f"not printed: {line}"


def test_lines_are_told_apart():
    printed = "law   b\nproduct  0.1920, 90% interval\n(8,1)  0.5 nats"
    assert printed_in("product 0.1921, 90%", printed)
    assert printed_in("(8,1) 0.5", printed)
    for other in ("product 0.1990, 90%", "(8,2) 0.5", "fading 0.1920,", "0.5 nats more"):
        assert not printed_in(other, printed)


def test_every_picture_is_there():
    pictures = re.findall(r"\]\((\S+\.png)\)", TEXT)
    assert pictures
    assert all((CHECKOUT / "docs" / picture).exists() for picture in pictures)
