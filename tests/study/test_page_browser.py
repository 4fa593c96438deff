"""The page in a browser without a window: from disk, the network off, every control moved."""

import json
from dataclasses import replace

import numpy as np
import pytest
from page_kit import agree, printed

from gqa_scaling import cli
from gqa_scaling.config import Question
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.histories import Histories, Unfinished
from gqa_scaling.study.reading import published
from gqa_scaling.study.report.write import write_report
from gqa_scaling.study.study import Study

pytestmark = pytest.mark.browser
SIZES = [(380, False), (380, True), (1400, False), (1400, True), (2500, False)]
ODD = '</script><script>window.taken=1</script><b onclick="x">\'&amp;'


@pytest.fixture(scope="module")
def page():
    from browser_kit import a_page, browser

    assert browser(), "no browser on PATH: apt install chromium, or Google Chrome"
    with a_page() as page:
        yield page


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page of the published points, on disk."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    asked = ["--refits", "120", "--losses", "2.8", "--contexts", "131072"]
    assert cli.main(["report", "chen2025", *asked, "--output", str(path)]) == 0
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    return path.as_uri()


def opened(page, address, **size):
    page.errors.clear()
    page.asked.clear()
    page.open(address, **size)
    page.wait("document.body.dataset.drawn")


def quiet(page):
    """Nothing failed, and nothing was asked of anybody."""
    assert page.errors == []
    assert {each.split(":")[0] for each in page.asked} <= {"file", "data", "about", "blob"}


ANSWER = "JSON.stringify(gqaScalingAnswer, (_, v) => v === Infinity || v !== v ? String(v) : v)"


def shown(page):
    """The answer behind the page, and the command that it gives for it."""
    text = page.run("document.getElementById('command').textContent")
    return json.loads(page.run(ANSWER)), text


def move(page, field, value):
    """Give a control a value as a hand would."""
    page.run(
        f"(() => {{ const c = document.getElementById('{field}'); c.value = {json.dumps(value)};"
        "for (const kind of ['input', 'change']) c.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


MOVES = {
    "context": "20000",
    "loss": "2.73",
    "context-slide": "13",
    "loss-slide": "2.9",
    "baseline": "llama3",
    "objective": "memory",
    "lambda": "0.4",
    "alpha-slide": "0.7",
    "beta": "0.45",
    "convention": "per_token",
    "limit_gib": "40",
    "kv_multiple": "2",
    "indifference": "5",
}
SERVED = {"hardware": "h200", "objective": "dollars", "price": "3.5", "batch": "16"}
SERVED |= {"weight_bytes": "1", "cache_bytes": "0.5"}


@pytest.mark.parametrize(
    "moves", [*({k: v} for k, v in MOVES.items()), SERVED], ids=lambda m: next(iter(m))
)
def test_each_control_moves_the_answer_that_its_command_prints(page, address, capsys, moves):
    opened(page, address)
    first = page.run("document.getElementById('sentence').textContent")
    for field, value in moves.items():
        move(page, field, value)
    told, command = shown(page)
    agree(told, printed(command, capsys))
    sentence = page.run("document.getElementById('sentence').textContent")
    there = page.run("location.href")
    assert "#" in there
    opened(page, there)  # the address alone brings it back
    assert page.run("document.getElementById('sentence').textContent") == sentence
    page.run("document.getElementById('reset').click()")
    assert page.run("document.getElementById('sentence').textContent") == first
    assert "#" not in page.run("location.href")
    quiet(page)


def test_configurations_are_taken_out_and_in(page, address, capsys):
    opened(page, address)
    page.run("document.querySelector('#candidates input[value=\"(8,1)\"]').click()")
    told, command = shown(page)
    assert "(8,1)" not in [c["configuration"]["name"] for c in told["choices"]]
    agree(told, printed(command, capsys))
    page.run("document.getElementById('measured').click()")
    assert "--candidates 1,1 2,1 4,1 8,1 8,2 8,4 8,8" in shown(page)[1]
    quiet(page)


def test_a_slip_is_told_and_the_last_answer_stays(page, address):
    opened(page, address)
    before = shown(page)
    move(page, "lambda", "7")
    assert "must be from 0 to 1" in page.run("document.getElementById('wrong').textContent")
    assert page.run("document.getElementById('lambda').getAttribute('aria-invalid')") == "true"
    assert shown(page) == before
    opened(page, f"{address}#lambda=7&context=4096")
    assert "This address was not taken" in page.run("document.getElementById('wrong').textContent")
    quiet(page)


def test_the_button_copies_the_command(page, address):
    opened(page, address)
    page.run("document.getElementById('copy').click()")
    page.wait("document.getElementById('copy').textContent === 'Copied'")
    quiet(page)


OVER = """(() => { const w = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > w + 1);
  return [document.documentElement.scrollWidth, ...wide.map((e) => e.outerHTML.slice(0, 80))]; })()"""


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_nothing_is_cut_and_nothing_scrolls_aside(page, address, width, dark):
    opened(page, address, width=width, dark=dark)
    page.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.wait("[...document.querySelectorAll('.chart')].every((c) => c.dataset.drawn === 'done')")
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert page.run(OVER) == [width]
    quiet(page)


FRAMES = """Object.values(Bokeh.index.roots ?? Bokeh.index).filter((v) => v.frame)
  .map((v) => Math.min(v.frame.bbox.height, v.frame.bbox.width))"""


@pytest.mark.parametrize("width", [380, 900, 1280, 1400, 2500])
def test_every_picture_has_room(page, address, width):
    """Without a screenshot before, which would lay pictures out anew."""
    opened(page, address, width=width)
    page.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.wait("[...document.querySelectorAll('.chart')].every((c) => c.dataset.drawn === 'done')")
    frames = page.run(FRAMES)
    assert len(frames) == len(page.run("[...document.querySelectorAll('.plot')].map(String)")) == 5
    assert min(frames) > 120
    for context in ("4096", "8192", "16384"):
        page.run("delete document.body.dataset.drawn")
        move(page, "context", context)
        page.wait("document.body.dataset.drawn")
    assert page.run("Bokeh.documents.length") == 5  # what was replaced is let go
    quiet(page)


def test_names_with_markup_are_text(page, tmp_path):
    r = published()
    r = replace(r, source=ODD, name=np.array([f"{ODD}{i}" for i in range(len(r))], object))
    found = fit(r, refits=100)
    answer = frontier(found, r, Question(contexts=(8192,), losses=(2.8,)))
    curve = (tuple(1e3 * i for i in range(1, 9)), tuple(9.0 / i for i in range(1, 9)))
    told = Histories({str(n): curve for n in r.name}, (Unfinished(ODD, "failed", ODD, ODD),), ODD)
    study = Study(r, Estimates(found), answer, histories=told)
    path = write_report(tmp_path / "report.html", study, command=ODD)
    opened(page, path.as_uri())
    page.run("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    page.wait("[...document.querySelectorAll('.chart')].every((c) => c.dataset.drawn === 'done')")
    assert page.run("window.taken") is None
    assert page.run("document.querySelectorAll('b[onclick]').length") == 0
    assert page.run("document.querySelector('.kicker').textContent") == ODD
    cells = page.run("[...document.querySelectorAll('td')].map((cell) => cell.textContent)")
    assert f"{ODD}7" in cells
    quiet(page)


def test_paper_gets_every_fold_in_dark_ink(page, address):
    opened(page, address, dark=True)
    page.run("window.dispatchEvent(new Event('beforeprint'))")
    assert page.run("[...document.querySelectorAll('details')].every((d) => d.open)")
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.run("getComputedStyle(document.querySelector('form')).display") == "none"
    assert page.run("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    quiet(page)


def test_an_index_leads_to_its_pages(page, address, tmp_path):
    r = published()
    found = fit(r, refits=100)
    study = Study(
        r, Estimates(found), frontier(found, r, Question(losses=(2.8,), contexts=(8192,)))
    )
    for name in ("one", "an & other"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name / "report.html", study)
    (tmp_path / "one" / "mine.html").write_text("<p>mine")
    assert cli.main(["report", str(tmp_path)]) == 0
    page.errors.clear()
    page.open((tmp_path / "index.html").as_uri())
    assert (
        page.run("[...document.querySelectorAll('article a')].map((a) => a.textContent)")
        == [r.source] * 2
    )
    page.run("document.querySelector('article a').click()")
    page.wait("document.body?.dataset.drawn")
    quiet(page)
