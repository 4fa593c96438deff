"""What models were judged by beside their loss, in the report: with a law and without."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from gqa_scaling import cli
from gqa_scaling.config import Question
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import run_directory
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.judged import Judged, judged_rows
from gqa_scaling.study.reading import from_runs, published
from gqa_scaling.study.report.judged import judged_tables
from gqa_scaling.study.report.loss_pictures import needle_maps
from gqa_scaling.study.report.write import Beside, write_report
from gqa_scaling.study.study import Study

NEEDLES = {
    "form": "number",
    "trials": 4,
    "depths": [0.0, 1.0],
    "accuracy": {"64": [0.5, 1.0], "32": [1.0, 1.0]},
}
EXPERIMENT = "experiments.tiny"


@pytest.fixture
def runs(workplace):
    """The runs of experiments.tiny, of which two are finished and judged: too few for any law."""
    runs = load_experiment(EXPERIMENT).runs
    for number, run in enumerate(runs[:2]):
        place = run_directory("runs", "tiny", run)
        place.begin(run, {"store_hash": "s"})
        value = {"loss": 2.5 + number, "bits_per_byte": 3.25, "hash": "e"}
        if number == 0:
            value |= {"loss_by_context": {"8": 3.5, "32": 2.5}, "needles": NEEDLES}
            value |= {"loss_of_first_reading": 2.5, "loss_of_second_reading": 2.25}
        result = {"n_exact": 1e4, "tokens": 1280, "data": {"store_hash": "s"}}
        place.finish(result | {"evaluations": {run.evaluation_digest: value}}, {"finished": 1.8e9})
    return runs


def test_runs_are_read_with_what_they_were_judged_by(runs):
    results = from_runs("runs", "tiny", runs)
    (row,) = judged_rows(results)
    assert row.judged == Judged(
        3.25, {8: 3.5, 32: 2.5}, (0.0, 1.0), {64: (0.5, 1.0), 32: (1.0, 1.0)}, "number", 0.25
    )
    np.testing.assert_equal(results.gained_by_rereading, [0.25, np.nan])
    assert (row.judged.found(64), row.judged.found(32)) == (0.75, 1.0)
    losses, needles = judged_tables(results)
    assert [c.cell(row) for c in losses.columns][-4:] == ["2.5000", "3.2500", "3.5000", "2.5000"]
    assert [c.cell(row) for c in needles.columns][-2:] == ["100%", "75%"]


def test_the_map_has_lengths_from_left_to_right_and_the_beginning_of_the_text_on_top(runs):
    figure = needle_maps(from_runs("runs", "tiny", runs))
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(image.get_array(), [[100, 50], [100, 100]])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["32", "64"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["0%", "100%"]


def test_runs_that_no_law_fits_are_reported_by_what_they_were_judged_by(runs, capsys):
    assert cli.main(["report", EXPERIMENT, "--data", "--figures", "svg"]) == 0
    out = capsys.readouterr().out
    assert "Needles found" in out
    assert "! no law is fitted: " in out
    page = "runs/tiny/report.html"
    assert f"report: {page}" in out
    with open(page) as file:
        text = file.read()
    assert os.path.exists("runs/tiny/figures/needles.svg")
    assert "No law is fitted to these runs" in text
    with open("runs/tiny/judged.json") as file:
        (told,) = json.load(file)
    assert told["accuracy"]["64"] == [0.5, 1.0]
    assert cli.main(["report", EXPERIMENT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judged"] == [told]


def test_runs_without_law_and_without_more_are_refused_as_before(runs, capsys):
    run_directory("runs", "tiny", runs[0]).result_file.unlink()
    assert cli.main(["report", EXPERIMENT]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_page_with_a_law_shows_them_too(tmp_path):
    r = published()
    judged = {str(r.name[0]): Judged(1.5, {64: 3.0}, (0.0, 1.0), {64: (0.25, 0.75)}, "uuid")}
    r = replace(r, judged=judged)
    f = fit(r, refits=100)
    q = Question(contexts=(131072,), losses=(3.0,), convention="per_sequence")
    study = Study(r, Estimates(f), frontier(f, r, q))
    beside = Beside(figures="pdf", data=True)
    page = write_report(tmp_path / "report.html", study, beside=beside)
    assert "What else they were judged by" in page.read_text()
    assert (tmp_path / "figures/needles.pdf").exists()
    assert json.loads((tmp_path / "judged.json").read_text())[0]["accuracy"] == {"64": [0.25, 0.75]}
