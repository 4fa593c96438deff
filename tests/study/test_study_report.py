"""The report: one page that stands alone, its data beside it."""

import colorsys
import csv
import io
import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gqa_scaling.config import Question
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import from_csv, published
from gqa_scaling.study.report.decision_pictures import colour_scale, gains, spread
from gqa_scaling.study.report.files import TENSORBOARD, write_files
from gqa_scaling.study.report.looks import light, looks
from gqa_scaling.study.report.page import sections, study_page
from gqa_scaling.study.report.table import Column, Table, card_styles, shown
from gqa_scaling.study.report.tensorboard import events_file
from gqa_scaling.study.report.write import Beside, write_report
from gqa_scaling.study.study import Study


@pytest.fixture(scope="module")
def study():
    r = published()
    f = fit(r, refits=200)
    q = Question(
        contexts=(131072,), losses=(3.0, 2.8), convention="per_sequence", demonstration=True
    )
    return Study(r, Estimates(f), frontier(f, r, q))


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    command, beside = "gqa-scaling report <x>", Beside("svg", data=True, tensorboard=True)
    return write_report(folder / "report.html", study, command, beside=beside)


def test_laws_of_many_configurations_are_compared_only_when_asked(study, monkeypatch):
    monkeypatch.setattr("gqa_scaling.study.report.page.MOST_COMPARED", 6)
    said = "Laws are not compared: with 7 configurations that takes minutes; fit --compare does it"
    (told,) = [parts for heading, parts in sections(study) if heading == "The fit"]
    assert told[1].notes == [said]


class _Balance(HTMLParser):
    void = ("meta", "img", "input")

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(page):
    text = page.read_text()
    parser = _Balance()
    parser.feed(text)
    assert parser.open == []
    assert [source.partition(",")[0] for source in parser.sources] == ["data:text/csv;base64"]
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in text  # so that a browser would refuse whatever is asked for
    assert "$" not in text[: text.index("<script")]


def test_the_page_answers_with_units_interval_and_label(page, study):
    text = page.read_text()
    assert '<span class="demo">demonstration</span>' in text
    assert "For 3 nats at 131,072 tokens, take 4 query heads and 1 KV head at 166M" in text
    assert "200 refits, seed 0" in text
    assert "per_sequence: T (N + 2 T L d_h n_h)" in text
    assert f"E = {study.fit.floor:.4f} nats" in text
    assert "gqa-scaling report &lt;x&gt;" in text
    assert text.count('data-label="run">L12-d768-h8-kv8<') == 1


def test_no_label_without_a_demonstration(study):
    asked = Question(contexts=(8192,), losses=(2.8,))
    plain = replace(study, frontier=frontier(study.fit, study.results, asked))
    assert 'class="demo"' not in study_page(plain)


def test_data_lies_beside_the_page(page, study):
    folder = page.parent
    found, answers = study.fit, study.frontier
    with open(folder / "frontier.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 7
    assert {r["n_heads"] + r["n_kv_heads"] for r in rows if r["rank"] == "1"} == {"41", "81"}
    assert float(rows[0]["z"]) == answers.answers[0].best.z
    assert json.loads((folder / "fit.json").read_text())["E_nats"] == found.floor
    assert json.loads((folder / "frontier.json").read_text())["baseline"] == [8, 8]
    assert len(from_csv(folder / "results.csv")) == 40
    names = {p.name for p in (folder / "figures").iterdir()}
    assert {f"{n}.svg" for n in ("loss_curves", "heat_map", "savings")} <= names
    assert not list(folder.rglob(".*"))  # nothing half written


def test_the_same_study_gives_the_same_page(page, study, tmp_path):
    again = write_report(tmp_path / "report.html", study, command="gqa-scaling report <x>")
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


def test_tensorboard_shows_every_figure_as_wide_as_a_card_where_text_can_be_read(page):
    (file,) = (page.parent / "study").iterdir()
    assert "tfevents" in file.name
    found = images(page.parent / "study")
    figures = {p.stem for p in (page.parent / "figures").glob("*.svg")}
    figures -= {"loss_curves", "loss_against_costs"}  # one set of axes for each of these
    assert set(found) == {f"study/{n}" for n in figures | {"losses", "memory", "flops", "z"}}
    for step, size, picture in found.values():
        assert (step, size) == (0, picture.size)
        assert picture.width == 736  # 4.6 inches: of 350 pixels, a letter of 9.5 points has 10


def test_tensorboard_shows_the_tables(page, study):
    events = EventAccumulator(str(page.parent / "study"))
    events.Reload()
    tag = "study/The answers as they were asked for/text_summary"
    assert tag in events.Tags()["tensors"]
    (event,) = events.Tensors(tag)
    text = event.tensor_proto.string_val[0].decode()
    assert "**Saved against (8,8) at equal loss, 90% intervals**" in text
    assert "context (tokens) | loss (nats) | heads, KV" in text
    assert (
        f"131,072 | 3 | (4,1) | {100 * study.frontier.answers[0].best.saving['memory']:.1f}%"
        in text
    )


def test_a_new_report_replaces_the_pictures_of_the_old(tmp_path):
    for size in ((3, 2), (4, 3)):
        out = io.BytesIO()
        Figure(figsize=size).savefig(out, format="png", dpi=10)
        now, events = events_file({"a": out.getvalue()}, {})
        write_files(tmp_path, {TENSORBOARD + now: events})
        assert list((tmp_path / "study").iterdir()) == [tmp_path / (TENSORBOARD + now)]
    assert [size for _, size, _ in images(tmp_path / "study").values()] == [(40, 30)]


def test_the_page_says_how_to_build_and_what_is_gained(page, study):
    text = page.read_text()
    assert "these runs come without their corpus" in text
    best = study.frontier.answers[1].model
    assert f"ModelConfig(n_layers={best.n_layers}, d_model={best.d_model}, n_heads=8" in text
    e = study.frontier.answers[1].choice((8, 4)).equal_cost
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
    assert colour_scale(np.array([12.0, 47.0])) == (10, 50)
    assert colour_scale(np.array([41.0, 42.0])) == (40, 50)
    assert colour_scale(np.array([-13.0, 5.0])) == (-20, 10)
    assert colour_scale(np.array([40.0])) == (40, 50)
    assert colour_scale(np.array([])) == (0, 100)


def test_every_configuration_looks_different():
    for heads in (published().heads, head_candidates(32)):
        look = looks(heads)
        assert len({(v["color"], v["marker"]) for v in look.values()}) == len(set(heads))
        colours = {v["color"] for v in look.values()}
        assert len(colours) == len(set(heads))


def test_kv_heads_shade_the_hue_of_query_heads_the_same_in_every_picture():
    every = looks(head_candidates(32))
    assert looks([(8, 2), (8, 8), (1, 1)]) == {h: every[h] for h in ((1, 1), (8, 2), (8, 8))}
    for queries in (8, 32):
        own = [every[h] for h in sorted(every) if h[0] == queries]
        hues = [colorsys.rgb_to_hsv(*to_rgb(v["color"]))[0] for v in own]
        assert max(hues) - min(hues) < 0.02
        lightness = [light(v["color"]) for v in own]
        assert all(b < 0.75 * a for a, b in itertools.pairwise(lightness))
        assert len({str(v["linestyle"]) for v in own}) == len(own)
        assert len({v["marker"] for v in own}) == 1
    assert len({every[n, 1]["marker"] for n in (1, 2, 4, 8, 16, 32)}) == 6
    assert len({v["color"] for v in looks([(12, 1), (16, 1), (17, 1)]).values()}) == 3


# ------------------------------------------------------------------- a table, wherever it is shown


ITEMS = [("a|b", 12345.0), ("<c>", 0.5)]
SAMPLE = Table(
    "Sizes",
    [
        Column("name", lambda item: item[0], fold=True),
        Column("of the\nrun", lambda item: f"{item[1]:.1f}", "nats"),
        Column("first to go", lambda item: "1" * 20, spare=1),
        Column("next to go", lambda item: "2" * 20, "unit", spare=2),
        Column("on the page", lambda item: "3" * 90, page_only=True),
    ],
    ITEMS,
    ["a note [of brackets]"],
    about="what it says",
)


def on_terminal(width: int, *parts) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(*parts)
    return console.file.getvalue()


def test_a_terminal_shows_what_fits_and_says_what_it_left_out():
    wide = on_terminal(100, SAMPLE).splitlines()
    assert [line.split() for line in wide[:5]] == [
        ["Sizes"],
        ["of", "the"],
        ["run", "next", "to", "go"],
        ["name", "(nats)", "first", "to", "go", "(unit)"],
        ["a|b", "12345.0", "1" * 20, "2" * 20],
    ]
    assert wide[-2:] == ["", "a note [of brackets]"]
    assert "333" not in "".join(wide)
    assert "what it says" not in "".join(wide)
    narrow = on_terminal(40, SAMPLE)
    assert "left out for want of width: first to go;" in narrow
    assert "2" * 20 in narrow
    assert "; --json has all" in narrow.replace("\n", " ")
    narrower = on_terminal(30, SAMPLE)
    assert "left out for want of width:" in narrower
    assert "12345.0" in narrower
    assert "222" not in narrower
    every = replace(SAMPLE, columns=[replace(c, spare=0) for c in SAMPLE.columns])
    least = on_terminal(40, every)  # too narrow for what may not be left out: a row as a block
    assert "left out" not in least
    for said in ("of the run (nats) 12345.0", "next to go (unit)", "1" * 20, "2" * 20):
        assert said in " ".join(least.split()), said
    assert max(map(len, least.splitlines())) <= 40


def test_the_page_shows_every_column_with_its_heading_beside_it():
    text = SAMPLE.html()
    assert "<th>of the run (nats)</th>" in text
    assert ">&lt;c&gt;</td>" in text
    assert f">{'3' * 90}</td>" in text
    assert text.index("what it says") < text.index("<table") < text.index("a note [of brackets]")
    assert text.count("<td") == text.count("data-label=") == 2 * 5
    (width,) = re.findall(r'<table class="w(\d+)">', text)
    assert f"@container (max-width:{int(width) - 1}px){{table.w{width}," in card_styles()


def test_a_table_without_rows_is_its_title_and_its_notes():
    empty = replace(SAMPLE, items=[])
    assert on_terminal(80, empty).split("\n") == ["Sizes", "a note [of brackets]", ""]
    assert "<table" not in empty.html()


def test_sentence_tables_and_flags_are_parted():
    lines = on_terminal(80, shown([SAMPLE, SAMPLE], ["be careful"], "So it is.")).split("\n")
    assert lines[:3] == ["So it is.", "", "Sizes"]
    assert lines.count("Sizes") == 2
    assert lines[-2] == "! be careful"
