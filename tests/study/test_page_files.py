"""The page as a file: small, the same again, known as the report's own; runs' histories; an index."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from gqa_scaling import cli
from gqa_scaling.config import Question, UserError
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import run_directory
from gqa_scaling.study.candidates import candidates
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.histories import Histories, Unfinished, histories
from gqa_scaling.study.reading import from_text, published
from gqa_scaling.study.report import page
from gqa_scaling.study.report.files import is_page, signed
from gqa_scaling.study.report.index import summary, write_index
from gqa_scaling.study.report.page import study_page
from gqa_scaling.study.report.write import write_report
from gqa_scaling.study.source import Source
from gqa_scaling.study.study import Study
from gqa_scaling.study.training_curves import MOST_PLACES, training_curves


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Pages without the comparison of laws, which takes the time."""
    monkeypatch.setattr(page, "_compared", lambda *_: [])


def test_a_page_of_168_runs_and_as_many_training_curves_is_under_3_mb():
    rows, rng = ["n_heads,n_kv_heads,n_layers,d_model,loss"], np.random.default_rng(0)
    for L, d in ((8, 512), (12, 768), (16, 1024), (20, 1280), (24, 1536), (28, 1792)):
        for h, kv in (
            *head_candidates(32),
            (6, 1),
            (6, 2),
            (12, 1),
            (12, 2),
            (12, 4),
            (24, 1),
            (24, 8),
        ):
            n = 8 * L * d**2 + 128 * L * d * (h + kv)
            excess = (n / 2e7) ** -0.3 * (1 - 0.02 * np.log2(h * kv))
            rows.append(f"{h},{kv},{L},{d},{1.7 + excess + 1e-4 * rng.standard_normal():.5f}")
    r = from_text("\n".join(rows), "runs.csv")
    assert len(r) == 168
    among = candidates(r, refits=1000)
    answer = frontier(among.fit, r, Question(contexts=(8192,)), among=among, gains=False)
    curve = tuple(np.geomspace(1e5, 3e9, MOST_PLACES)), tuple(rng.uniform(2, 9, MOST_PLACES))
    told = Histories(dict.fromkeys(map(str, r.name), curve))
    whole = Study(r, among.estimates, answer, candidates=among, histories=told)
    assert len(study_page(whole).encode()) < 3e6


def test_a_page_knows_itself(study):
    data = signed(study_page(study))
    assert is_page(data)
    assert not is_page(data.replace(b"2.8 nats", b"2.7 nats", 1))
    assert not is_page(data + b"<p>mine")
    assert not is_page(b"<p>mine")


def test_a_page_stands_alone_and_replaces_itself_alone(study, tmp_path):
    path = write_report(tmp_path / "mine" / "page.html", study)
    first = path.read_bytes()
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]
    assert write_report(path, study).read_bytes() == first
    path.write_bytes(first + b"\n")
    with pytest.raises(UserError, match="nothing says that report wrote it"):
        write_report(path, study)
    assert path.read_bytes() == first + b"\n"


def test_scripts_and_data_cannot_end_their_elements(study):
    odd = "</script><!--"
    whole = replace(study, results=replace(study.results, source=odd))
    text = study_page(whole, command=odd)
    assert odd not in text
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text))
    (told,) = re.findall('id="summary">(.*?)</script>', text)
    assert json.loads(told)["title"] == odd


def test_an_index_lists_the_pages_that_report_wrote(study, tmp_path):
    for name in ("b", "a #1"):
        write_report(tmp_path / name / "report.html", study)
    (tmp_path / "mine.html").write_text("mine")
    path = tmp_path / "index.html"
    found = write_index(path, tmp_path)
    assert found == [str(tmp_path / name / "report.html") for name in ("a #1", "b")]
    text = path.read_text()
    assert 'href="a%20%231/report.html"' in text
    assert text.count("take 8 query heads") == 2
    assert summary(path) is None  # an index is none of the studies
    assert write_index(path, tmp_path) == found


def test_a_folder_without_pages_is_refused_in_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no report: write some first" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- how runs went


@pytest.fixture
def begun(workplace):
    """An experiment of six runs, the first of which has logged 5,000 steps and has no result yet."""
    experiment = load_experiment("experiments.tiny", (), workplace / "runs")
    directory = run_directory("runs", "tiny", experiment.runs[0])
    directory.path.mkdir(parents=True)
    lines = [{"step": k, "learning/loss": 9.0 / k} for k in range(1, 5001)]
    directory.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return experiment, directory


def test_training_curves_are_thinned_and_end_where_training_ended(begun):
    _, directory = begun
    (tokens, losses), _ = training_curves(directory, 128)
    assert 50 < len(tokens) <= MOST_PLACES
    first = round(2 * tokens[-1] / 128) - 5000  # the last place is a mean of all steps from here on
    assert first < 4900
    assert losses[-1] == pytest.approx(np.mean([9.0 / k for k in range(first, 5001)]))
    assert list(tokens) == sorted(set(tokens))
    assert (tokens[0], losses[0]) == (128, 9.0)
    np.testing.assert_allclose(losses, 9 * 128 / np.array(tokens), rtol=0.02)


def test_a_damaged_line_is_named_and_one_cut_short_is_not(begun):
    _, directory = begun
    whole = directory.metrics_file.read_text()
    directory.metrics_file.write_text(whole[:-9])
    assert training_curves(directory, 128)[0][0][-1] < 5000 * 128
    directory.metrics_file.write_text(whole.replace('{"step": 1,', '{"step" 1,', 1))
    with pytest.raises(UserError, match="line 1 is damaged"):
        training_curves(directory, 128)


def test_what_failed_is_told_with_its_last_line(begun):
    experiment, directory = begun
    directory.fail("Traceback ...\n  somewhere\nRunDiverged: loss nan at step 7\n\n", "RunDiverged")
    names = [run.name for run in experiment.runs]
    r = replace(published(), name=np.array([names[1]] * 40, object))
    source = Source("experiments.tiny", (), r, Question(), experiment, directory.path.parents[1])
    told = histories(source, "gqa-scaling run experiments.tiny --only")
    first = Unfinished(names[0], "failed", "RunDiverged", "RunDiverged: loss nan at step 7")
    assert told.unfinished[0] == first
    assert [each.state for each in told.unfinished[1:]] == ["pending"] * 4
    assert told.config["data"]["corpus"] == "stdlib"
    assert "n_heads" not in told.config["model"]
    assert "name" not in told.config
