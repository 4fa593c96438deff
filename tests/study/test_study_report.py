"""The report: one page that stands alone, its data beside it."""

import base64
import csv
import json
import re
from html.parser import HTMLParser

import pytest

from gqa_scaling.config import Question
from gqa_scaling.grid import head_candidates
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.plots import looks
from gqa_scaling.study.report import write_report
from gqa_scaling.study.results import from_csv, published


@pytest.fixture(scope="module")
def study():
    r = published()
    f = fit(r, refits=200)
    q = Question(
        contexts=(131072,), losses=(3.0, 2.8), convention="per_sequence", demonstration=True
    )
    return r, f, frontier(f, r, q)


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder / "report.html", *study, command="gqa-scaling report <x>")


class _Balance(HTMLParser):
    void = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page):
    text = page.read_text()
    parser = _Balance()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.sources) == 7
    for source in parser.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(data)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)


def test_the_page_answers_with_units_interval_and_label(page, study):
    text = page.read_text()
    assert '<span class="demo">demonstration</span>' in text
    assert "For 3 nats at 131,072 tokens, take 4 query heads and 1 KV head at 166M" in text
    assert "200 refits, seed 0" in text
    assert "per_sequence: T (N + 2 T L d_h n_h)" in text
    assert f"E = {study[1].floor:.4f} nats" in text
    assert "gqa-scaling report &lt;x&gt;" in text
    assert text.count("L12-d768-h8-kv8") == 1


def test_no_label_without_a_demonstration(study, tmp_path):
    r, f, _ = study
    plain = frontier(f, r, Question(contexts=(8192,), losses=(2.8,)))
    text = write_report(tmp_path / "new" / "r.html", r, f, plain).read_text()
    assert "demonstration" not in text


def test_data_lies_beside_the_page(page, study):
    folder = page.parent
    _, found, answers = study
    with open(folder / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7
    assert {r["n_heads"] + r["n_kv_heads"] for r in rows if r["rank"] == "1"} == {"41", "81"}
    assert float(rows[0]["z"]) == answers.answers[0].best.z
    assert json.loads((folder / "fit.json").read_text())["E_nats"] == found.floor
    assert json.loads((folder / "frontier.json").read_text())["baseline"] == [8, 8]
    assert len(from_csv(folder / "results.csv")) == 40
    names = {p.name for p in (folder / "figures").iterdir()}
    assert {
        f"{n}.{k}" for n in ("loss_curves", "heat_map", "savings") for k in ("png", "svg")
    } <= names
    assert not list(folder.rglob(".*"))  # nothing half written


def test_the_same_study_gives_the_same_page(page, study, tmp_path):
    again = write_report(tmp_path / "report.html", *study, command="gqa-scaling report <x>")
    assert again.read_bytes() == page.read_bytes()


def test_every_configuration_looks_different():
    for heads in (published().heads, head_candidates(32)):
        look = looks(heads)
        assert len({(v["color"], v["marker"]) for v in look.values()}) == len(set(heads))
