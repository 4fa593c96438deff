"""Tables of docs/ that are held to the code."""

import argparse
import dataclasses
import re
from pathlib import Path

from gqa_scaling import cli
from gqa_scaling.cli import completion
from gqa_scaling.config import Question, UserError
from gqa_scaling.hardware import GIB, HARDWARE
from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.serving import Serving, require_costs
from gqa_scaling.study.shapes import DEFAULT_VOCABULARY
from gqa_scaling.sweep.space import KINDS

DOCS = Path(__file__).parents[1] / "docs"


def rows(document: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    text = (DOCS / document).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE).group().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def options(verb: str) -> dict[str, argparse.Action]:
    parser = completion.verb_parsers(cli.parser_of((verb,)))[verb]
    return parser._option_string_actions


def test_the_fields_of_a_question():
    table = rows("asking.md", "The question")
    fields = {f"`{f.name}`": f"`{f.default!r}`" for f in dataclasses.fields(Question)}
    assert {field: default for field, default, *_ in table} == fields
    named = {option.strip("`") for _, _, option, _ in table if option}
    assert named <= options("frontier").keys()
    assert options("frontier")["--lambda"].dest == "weight"


def test_the_objectives_and_what_they_need():
    table = rows("asking.md", "What is to be least")
    assert [name for name, *_ in table] == [f"`{name}`" for name in OBJECTIVES]
    for name, _, needs in table:
        refused = False
        try:
            require_costs(name.strip("`"), Serving())
        except UserError:
            refused = True
        assert refused == (needs == "`--hardware`")
    text = (DOCS / "asking.md").read_text(encoding="utf-8")
    defaults = Serving()
    assert f"`--batch` ({defaults.batch})" in text
    assert f"`--weight-bytes` ({defaults.weight_bytes:g})" in text
    assert f"`--cache-bytes` ({defaults.cache_bytes:g})" in text
    assert f"{DEFAULT_VOCABULARY:,} tokens" in text


def test_the_serving_hardware():
    table = {
        name.strip("`"): list(map(float, cells))
        for name, *cells in rows("asking.md", "Serving hardware")
    }
    assert table == {
        h.name: [h.peak_flops / 1e12, h.bandwidth / 1e9, round(h.memory / GIB, 2), h.price]
        for h in HARDWARE.values()
    }


def test_what_clean_can_remove():
    table = rows("everyday.md", "Room on the disk: `disk` and `clean`")
    assert [name for name, _ in table] == [f"`{kind}`" for kind in KINDS]


def test_every_verb_is_among_those_of_the_guide():
    text = (DOCS / "using.md").read_text(encoding="utf-8").split("\n## ")[0]
    told = {
        word
        for cell in re.findall(r"^\| (.*?) \|", text, flags=re.MULTILINE)
        for word in re.findall(r"`([a-z-]+)", cell)
    }
    assert told == set(cli.VERBS)
