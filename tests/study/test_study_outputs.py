"""Nothing that the project did not write is ever overwritten: the files of a report."""

import json
import os

import pytest

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.files import storage
from gqa_scaling.study.reading import published
from gqa_scaling.study.report import files, page, pictures
from gqa_scaling.study.report.csv_files import results_csv
from gqa_scaling.study.report.files import MANIFEST, TENSORBOARD, require_own, write_files
from gqa_scaling.study.report.pictures import PICTURES, all_figures
from gqa_scaling.study.report.write import Beside, write_report

BESIDE_ALL = ("--data", "--figures", "svg", "--tensorboard")
BESIDE = Beside(data=True, tensorboard=True)


@pytest.fixture
def light(monkeypatch):
    """Reports without their pictures and the comparison of laws, which take the time."""
    monkeypatch.setattr(pictures, "all_figures", lambda *_: {})
    monkeypatch.setattr(page, "_compared", lambda *_: [])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(capsys, *arguments):
    """The one line with which the command line refuses, before it computes anything."""
    assert cli.main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture(autouse=True)
def nothing_is_computed(request, monkeypatch):
    if "capsys" in request.fixturenames:
        monkeypatch.setattr(cli.study, "answer_of", lambda *_: pytest.fail("it was computed"))


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_the_input_is_never_an_output(tmp_path, capsys, link):
    file = tmp_path / "results.csv"
    file.write_text(results_csv(published()))
    before, source = contents(tmp_path), file
    if link:
        source = tmp_path / "other" / "linked.csv"
        source.parent.mkdir()
        link(file, source)
    said = refused(capsys, source, "--data", "--output", tmp_path / "report.html")
    assert "results.csv is what this report is made from" in said
    assert "--output" in said
    assert contents(tmp_path).items() >= before.items()


def test_a_way_back_through_a_folder_to_be_made_hides_no_file(tmp_path, capsys):
    source = tmp_path / "mine.csv"
    source.write_text(results_csv(published()))
    (tmp_path / "notes.html").write_text("mine")
    before = contents(tmp_path)
    said = refused(capsys, source, "--output", tmp_path / "new/../mine.csv")
    assert f"{source} is what this report is made from" in said
    said = refused(capsys, source, "--output", tmp_path / "new/deep/../../notes.html")
    assert "notes.html would be replaced" in said
    assert "is a folder" in refused(capsys, source, "--output", tmp_path / "new/..")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "name", ["report.html", "results.csv", "fit.json", "token_law.json", "figures/gains.svg"]
)
def test_a_file_of_somebody_elses_is_refused_before_anything_is_computed(tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    said = refused(
        capsys, "chen2025", "--data", "--figures", "svg", "--output", tmp_path / "report.html"
    )
    assert f"{name} would be replaced" in said
    assert contents(tmp_path) == {name: b"mine"}


def test_a_link_that_leads_nowhere_is_somebodys(tmp_path, capsys):
    (tmp_path / "report.html").symlink_to(tmp_path / "later.html")
    refused(capsys, "chen2025", "--output", tmp_path / "report.html")
    assert (tmp_path / "report.html").is_symlink()


def test_several_files_in_the_way_are_counted(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="a and 2 more would be replaced"):
        require_own(tmp_path, ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("", "is a folder"),
        ("{}", "is a folder"),
        ("{}/new/", "is a folder"),
        ("{}/fit.json", "lies beside the page"),
        ("{}/figures", "lies beside the page"),
        (f"{{}}/{MANIFEST}", "lies beside the page"),
        ("{}/file/report.html", "is no folder"),
        ("{}/file/deep/report.html", "is no folder"),
        ("{}/taken/report.html", "is no folder"),
        ("{}/others/report.html", "move it away"),
    ],
)
def test_a_place_that_cannot_take_a_report_is_refused_in_one_line(tmp_path, capsys, place, word):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "study").write_text("mine")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / MANIFEST).write_text('{"files": {}}')
    before = contents(tmp_path)
    assert word in refused(capsys, "chen2025", *BESIDE_ALL, "--output", place.format(tmp_path))
    assert contents(tmp_path) == before


def test_a_report_replaces_its_own_files_and_leaves_all_others(study, tmp_path, light):
    path = write_report(tmp_path / "report.html", study, beside=BESIDE)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "study" / "events.out.tfevents.17.host").write_text("mine")
    first = contents(tmp_path)
    write_report(path, study, command="again", beside=BESIDE)
    second = contents(tmp_path)
    mine = {"notes.txt", "study/events.out.tfevents.17.host"}
    assert {name: second[name] for name in mine} == {name: first[name] for name in mine}
    assert b"again" in second["report.html"]
    assert sum(name.startswith(TENSORBOARD) for name in second) == 2  # mine, and the newest
    listed = json.loads(second[MANIFEST])["files"]
    assert set(listed) == set(second) - mine - {MANIFEST, "report.html"}


def test_a_file_edited_since_is_somebodys(study, tmp_path, light):
    path = write_report(tmp_path / "report.html", study, beside=BESIDE)
    (tmp_path / "results.csv").write_text("# my runs\n" + (tmp_path / "results.csv").read_text())
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"results\.csv would be replaced"):
        write_report(path, study, beside=BESIDE)
    assert contents(tmp_path) == before
    (tmp_path / "results.csv").unlink()
    write_report(path, study, beside=BESIDE)


def test_two_pages_share_a_folder(study, tmp_path, light):
    for name in ("a.html", "b.html", "a.html"):
        write_report(tmp_path / name, study, beside=BESIDE)
    assert {"a.html", "b.html"} < set(contents(tmp_path))


@pytest.mark.parametrize("survived", range(5))
def test_a_report_that_was_killed_half_way_is_given_again(tmp_path, monkeypatch, survived):
    first = dict.fromkeys(("a", "b", TENSORBOARD + "1"), b"1")
    write_files(tmp_path, first)
    write, count = files.write_atomic, iter(range(9))

    def killed(path, data):
        if next(count) == survived:
            raise KeyboardInterrupt
        write(path, data)

    again = dict.fromkeys(("a", "b", TENSORBOARD + "2"), b"2")
    with monkeypatch.context() as patch:
        for module in (files, storage):
            patch.setattr(module, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            write_files(tmp_path, again)
    write_files(tmp_path, again)
    assert contents(tmp_path).items() >= again.items()
    assert TENSORBOARD + "1" not in contents(tmp_path)


def test_a_bucket_is_no_different(study, bucket, light):
    path = write_report(bucket / "report.html", study, beside=BESIDE)
    write_report(path, study, beside=BESIDE)
    (bucket / "frontier.csv").write_text("mine")
    with pytest.raises(UserError, match=r"frontier\.csv would be replaced"):
        write_report(path, study, beside=BESIDE)
    assert (bucket / "frontier.csv").read_text() == "mine"


def test_every_name_that_a_report_may_write_is_known_before(study):
    assert set(all_figures(study)) <= set(PICTURES)
    assert {f"figures/{name}.pdf" for name in PICTURES} == set(Beside("pdf").names(PICTURES))
