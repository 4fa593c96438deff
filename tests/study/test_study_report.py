"""The report: one page that stands alone, its data beside it."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gqa_scaling.config import Question
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study.board import events_file
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.outputs import PICTURES, write_files
from gqa_scaling.study.plots import _rounded, gains, looks, spread
from gqa_scaling.study.report import _laws, write_report
from gqa_scaling.study.sources import from_csv, published


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


def test_laws_of_many_configurations_are_compared_only_when_asked(study, monkeypatch):
    results, fitted, _ = study
    monkeypatch.setattr("gqa_scaling.study.report.MOST_COMPARED", 6)
    said = "Laws are not compared: with 7 configurations that takes minutes; fit --compare does it"
    assert said in _laws(results, fitted)


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
    assert len(parser.sources) == 8
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


def images(folder):
    """Every picture of TensorBoard's images tab by tag: (step, declared size, decoded image)."""
    events = EventAccumulator(str(folder))
    events.Reload()
    out = {}
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        picture.load()  # decodes the whole PNG
        out[tag] = (event.step, (event.width, event.height), picture)
    return out


def test_tensorboard_shows_every_figure(page):
    (file,) = (page.parent / "study").iterdir()
    assert "tfevents" in file.name
    found, pngs = images(page.parent / "study"), sorted((page.parent / "figures").glob("*.png"))
    assert sorted(found) == [f"study/{p.stem}" for p in pngs]
    for png in pngs:
        step, size, picture = found[f"study/{png.stem}"]
        assert (step, size) == (0, picture.size)
        with Image.open(png) as drawn:
            assert drawn.tobytes() == picture.tobytes()


def test_a_new_report_replaces_the_pictures_of_the_old(tmp_path):
    for size in ((3, 2), (4, 3)):
        out = io.BytesIO()
        Figure(figsize=size).savefig(out, format="png", dpi=10)
        now, events = events_file({"a": out.getvalue()})
        write_files(tmp_path, {PICTURES + now: events})
        assert list((tmp_path / "study").iterdir()) == [tmp_path / (PICTURES + now)]
    assert [size for _, size, _ in images(tmp_path / "study").values()] == [(40, 30)]


def test_the_page_says_how_to_build_and_what_is_gained(page, study):
    text = page.read_text()
    assert "these runs come without their corpus" in text
    best = study[2].answers[1].model
    assert f"ModelConfig(n_layers={best.n_layers}, d_model={best.d_model}, n_heads=8" in text
    e = study[2].answers[1].choice((8, 4)).equal_cost
    low, high = (f"{1e3 * v:.1f}" for v in e.gain_interval)
    assert f"{1e3 * e.gain:.1f} ({low} to {high})" in text


@pytest.mark.parametrize(
    ("ends", "contexts"),
    [
        ((512, 8192), [512, 1024, 2048, 4096, 8192]),
        ((512, 131072), [512 << k for k in range(9)]),
        ((2048, 2048), [128, 256, 512, 1024, 2048]),
        ((500, 8200), [500, 1025, 2050, 4100, 8200]),
        ((3, 3), [1, 3]),
    ],
)
def test_the_map_spans_what_was_asked(ends, contexts):
    assert spread(*ends) == contexts


def test_the_map_of_a_wide_question_has_both_ends_and_few_columns():
    for first in (1, 128, 1000, 8191):
        contexts = spread(first, 2**20)
        assert (contexts[0], contexts[-1]) == (first, 2**20)
        assert 5 <= len(contexts) <= 9


def test_where_nothing_reaches_the_loss_there_is_a_picture_without_a_legend():
    found = fit(published(), refits=100)
    answers = frontier(found, published(), Question(losses=(0.5,), contexts=(8192,)))
    assert not answers.answers[0].best.reached
    assert not gains(answers).legends  # and matplotlib has nothing to warn of


def test_colours_span_the_data_in_tens():
    assert _rounded(np.array([12.0, 47.0])) == (10, 50)
    assert _rounded(np.array([41.0, 42.0])) == (40, 50)
    assert _rounded(np.array([-13.0, 5.0])) == (-20, 10)
    assert _rounded(np.array([40.0])) == (40, 50)
    assert _rounded(np.array([])) == (0, 100)


def test_every_configuration_looks_different():
    for heads in (published().heads, head_candidates(32)):
        look = looks(heads)
        assert len({(v["color"], v["marker"]) for v in look.values()}) == len(set(heads))
