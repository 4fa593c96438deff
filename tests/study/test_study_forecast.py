"""Forecasts: what is expected of runs not yet trained, how sure that is, and what came of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gqa_scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
    UserError,
)
from gqa_scaling.costs import n_exact, n_formula, training_tokens
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.forecasts import read_forecasts
from gqa_scaling.files.runs import run_directory
from gqa_scaling.study.build import run_interval
from gqa_scaling.study.candidates import candidates
from gqa_scaling.study.commands import command_of
from gqa_scaling.study.estimates import Estimates, estimate
from gqa_scaling.study.forecast import seal_forecast, to_seal
from gqa_scaling.study.predict import Prediction, predict
from gqa_scaling.study.reading import from_runs
from gqa_scaling.study.report.forecasts import forecast_table
from gqa_scaling.study.report.loss_pictures import forecast_errors
from gqa_scaling.study.results import Results
from gqa_scaling.study.scores import Score, score_forecasts
from gqa_scaling.study.source import Source

SIZES = ((2, 32), (2, 48), (2, 64), (3, 96), (4, 128))
HEADS = ((1, 1), (4, 1), (4, 4), (8, 1), (8, 2))
NOISE, SHARED = 0.004, 0.004  # nats, of one run and of all runs of a size


def run_of(layers: int, width: int, heads: int, kv: int, **more) -> RunConfig:
    return RunConfig(
        name=f"L{layers}-d{width}-h{heads}-kv{kv}",
        model=ModelConfig(layers, width, heads, kv, head_dim=8, vocab_size=264),
        **{"context_length": 32, "batch_tokens": 128, "tokens": 1280, **more},
    )


def truth(run: RunConfig) -> float:
    """The loss of a law across configurations, in nats."""
    m = run.model
    backbone = n_formula(m.n_layers, m.d_model, 0, 0) / 1e5
    heads = m.n_heads**-0.06 * m.n_kv_heads**-0.03
    return 1.6 + 0.5 * float(backbone) ** -0.35 * heads


def finish(root: Path, runs: list[RunConfig], seed: int = 0, shared: float = SHARED) -> None:
    """Results of these runs with noise, begun long after anything that a test seals."""
    rng = np.random.default_rng(seed)
    common = {size: shared * rng.standard_normal() for size in SIZES}
    for run in runs:
        size = run.model.n_layers, run.model.d_model
        loss = truth(run) + common.get(size, 0.0) + NOISE * rng.standard_normal()
        result(root, run, loss, 4e9)


def result(root: Path, run: RunConfig, loss: float, began: float, **told) -> None:
    directory = run_directory(root, "grid", run)
    directory.begin(run, {})
    directory.add_attempt({"began": began, "first_step": 0, "layout": {"device": "cpu"}})
    judged = {run.evaluation_digest: {"loss": loss, "hash": told.get("evaluation", "e")}}
    data = {"corpus_hash": told.get("corpus", "c"), "tokenizer_hash": "t"}
    whole = {"n_exact": n_exact(run.model), "tokens": training_tokens(run), "data": data}
    directory.finish(whole | {"evaluations": judged}, {})


GRID = [run_of(*size, *heads) for size in SIZES for heads in HEADS]
LARGE = [run for run in GRID if run.model.d_model == 128]
SMALL = [run for run in GRID if run not in LARGE]


def estimated(root: Path, runs: list[RunConfig], **options) -> tuple[Estimates, Results]:
    results = from_runs(root, "grid", runs)
    return estimate(results, **{"refits": 200, **options}), results


def source(root: Path, runs: list[RunConfig]) -> Source:
    experiment = Experiment("grid", tuple(runs), Question())
    return Source(
        "experiments.grid", (), from_runs(root, "grid", runs), Question(), experiment, root
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with the small runs finished; copied by nobody, read only."""
    root = tmp_path_factory.mktemp("runs")
    finish(root, SMALL)
    return root


# --------------------------------------------------------------------------------- predictions


def width(prediction: Prediction) -> float:
    low, high = prediction.run_interval
    return high - low


def test_nine_of_ten_losses_of_a_larger_size_lie_inside(tmp_path):
    """Where the law is the true one; with few runs a little less than nine."""
    inside, spread = [], []
    for seed in range(20):
        finish(tmp_path / str(seed), GRID, seed, shared=0.0)
        found, results = estimated(tmp_path / str(seed), SMALL, refits=100, law="product")
        largest = from_runs(tmp_path / str(seed), "grid", LARGE)
        there = predict(found, results, SMALL, LARGE)
        for prediction, loss in zip(there, largest.loss, strict=True):
            low, high = prediction.run_interval
            inside.append(low <= loss <= high)
            spread.append(width(prediction))
    assert 0.78 <= np.mean(inside) <= 0.99
    assert 3 * NOISE < np.mean(spread) < 15 * NOISE  # not by being so wide that all are


def test_the_interval_widens_with_the_size_and_beyond_the_heads(trained):
    found, results = estimated(trained, SMALL)
    shapes = ((2, 64), (4, 128), (6, 256))
    same = predict(found, results, SMALL, [run_of(*shape, 4, 1) for shape in shapes])
    assert [p.beyond for p in same] == ["", "sizes", "sizes"]
    assert width(same[0]) < width(same[1]) < width(same[2])
    for p in same:  # a run strays from its curve
        assert p.run_interval[0] <= p.curve_interval[0] < p.curve_interval[1] <= p.run_interval[1]
    heads = ((8, 4), (8, 8), (2, 1), (2, 2), (4, 2))
    unseen = [run_of(*shape, *each) for each in heads for shape in shapes[:2]]
    other = predict(found, results, SMALL, unseen)
    # on the scale that they are predicted on, heads with runs are known better
    known = candidates(results, [(8, 4)], refits=200).fit
    k, inside, wider = known.index((8, 2)), 0, []
    for run, mine in zip(unseen, other, strict=True):
        assert (mine.beyond, mine.law != "separate") == ("heads", True)
        low, high = run_interval(known, known.draws.loss(k, mine.n))
        wider.append(width(mine) / (high - low))
        assert mine.loss == pytest.approx(truth(run), abs=0.04)
        inside += mine.run_interval[0] < truth(run) < mine.run_interval[1]
    assert np.mean(wider) > 1.02
    assert inside >= 7  # of 10, whose errors are one study's: all runs of a size share one


def test_several_lengths_and_budgets_have_their_own_laws(tmp_path):
    lengths = [replace(run, context_length=t) for run in SMALL for t in (32, 64)]
    lengths = [
        replace(
            run, name=f"{run.name}-T{run.context_length}", evaluation=EvaluationConfig(2**20, 64)
        )
        for run in lengths
    ]
    for run in lengths:
        result(tmp_path, run, truth(run) - 0.1 * (run.context_length == 64), 4e9)
    found, results = estimated(tmp_path, lengths)
    like = {"evaluation": EvaluationConfig(2**20, 64)}
    long, short = (run_of(4, 128, 4, 1, context_length=t, **like) for t in (64, 32))
    there = predict(found, results, lengths, [long, short])
    assert there[1].loss - there[0].loss == pytest.approx(0.1, abs=0.01)
    with pytest.raises(UserError, match="no finished run has its context length of 16 tokens"):
        predict(found, results, lengths, [run_of(4, 128, 4, 1, context_length=16, **like)])

    budgets = [
        replace(run, name=f"{run.name}-D{tokens}", tokens=tokens)
        for run in SMALL
        for tokens in (1280, 5120, 20480)
    ]
    for run in budgets:
        result(tmp_path, run, truth(run) + 0.3 * (run.tokens / 1280) ** -0.5, 4e9)
    found, results = estimated(tmp_path, budgets)
    once, more = (run_of(4, 128, 4, 1, tokens=tokens) for tokens in (1280, 20480))
    least, most = predict(found, results, budgets, [once, more])
    assert least.loss == pytest.approx(truth(once) + 0.3, abs=0.02)
    assert most.loss == pytest.approx(truth(more) + 0.075, abs=0.02)


REFUSED = {
    "corpus or tokenizer": {"data": DataConfig(corpus="elsewhere")},
    "evaluation": {"evaluation": EvaluationConfig(tokens=4096)},
    "vocabulary": {"model": ModelConfig(4, 128, 4, 1, head_dim=8, vocab_size=300)},
    "head size": {"model": ModelConfig(4, 128, 4, 1, head_dim=16, vocab_size=264)},
    "context length": {"context_length": 64, "evaluation": EvaluationConfig(2**20, 32)},
    "not the budget": {"tokens": 5120},
}


@pytest.mark.parametrize("what", REFUSED)
def test_runs_of_which_nothing_is_known_are_refused(trained, what):
    found, results = estimated(trained, SMALL, refits=100)
    if what == "context length":
        run = replace(run_of(4, 128, 4, 1), context_length=64)
        run = replace(run, evaluation=EvaluationConfig(2**20, 64))
        found_runs = [replace(r, evaluation=EvaluationConfig(2**20, 64)) for r in SMALL]
    else:
        run, found_runs = replace(run_of(4, 128, 4, 1), **REFUSED[what]), SMALL
    with pytest.raises(UserError, match=f"^L4-d128-h4-kv1: .*{what}"):
        predict(found, results, found_runs, [run])
    at_another_rate = replace(run_of(4, 128, 4, 1), optimizer=OptimizerConfig(1e-4))
    assert predict(found, results, SMALL, [at_another_rate])  # is the user's to choose


# ------------------------------------------------------------------------------------- scoring


def scored(root: Path) -> dict[str, Score]:
    return {score.name: score for score in score_forecasts(root, "grid").scores}


def test_forecasts_are_scored_when_their_runs_are_finished(tmp_path):
    finish(tmp_path, SMALL)
    from_small = source(tmp_path, GRID)
    assert to_seal(tmp_path, "grid", GRID) == LARGE
    found = estimate(from_small.results, refits=100)
    sealed, predictions = seal_forecast(from_small, found, "grid", LARGE)
    assert to_seal(tmp_path, "grid", GRID, again=False) == []
    assert to_seal(tmp_path, "grid", GRID) == LARGE  # one more of the same is another file
    learned = {run["name"]: run["digest"] for run in sealed.said["predicted_from"]["runs"]}
    assert learned == {run.name: run.digest for run in SMALL}
    assert len(sealed.said["made_by"]["source_sha256"]) == 64
    before = scored(tmp_path)
    assert {score.state for score in before.values()} == {"waiting"}
    below, over, late, other, waiting = LARGE
    low, _ = predictions[0].run_interval
    result(tmp_path, below, low - 1e-6, 4e9)
    result(tmp_path, over, predictions[1].run_interval[1], 4e9)  # the end belongs to it
    result(tmp_path, late, 2.0, sealed.said["sealed"] - 1.0)
    result(tmp_path, other, 2.0, 4e9, corpus="another")
    after = score_forecasts(tmp_path, "grid")
    assert [(s.name, s.state, s.inside) for s in after.scores] == [
        (below.name, "scored", False),
        (over.name, "scored", True),
        (late.name, "begun", None),
        (other.name, "other data", None),
        (waiting.name, "waiting", None),
    ]
    assert after.scores[0].error == pytest.approx(low - 1e-6 - predictions[0].loss)
    assert (len(after.judged), after.inside) == (2, 1)
    told = after.to_dict()
    assert (told["finished"], told["inside"], told["expected_inside"]) == (2, 1, 1.8)
    assert told["runs"][0]["error_nats"] == after.scores[0].error
    assert told["runs"][3]["error_nats"] is None


def test_the_first_forecast_counts(tmp_path):
    finish(tmp_path, SMALL)
    from_small = source(tmp_path, GRID)
    found = estimate(from_small.results, refits=100)
    first, _ = seal_forecast(from_small, found, "grid", LARGE[:1])
    again = estimate(from_small.results, refits=100, law="product")
    seal_forecast(from_small, again, "grid", LARGE)
    finish(tmp_path, LARGE, seed=1)
    score = scored(tmp_path)
    assert score[LARGE[0].name].file == first.path.name
    assert {score[run.name].law for run in LARGE[1:]} == {"product"}
    # without it the next one does
    first.path.unlink()
    assert scored(tmp_path)[LARGE[0].name].law == "product"
    with pytest.raises(UserError, match=f"^{LARGE[0].name} of grid began already"):
        seal_forecast(from_small, found, "grid", LARGE[:1])


def test_tables_and_picture_tell_the_scores(tmp_path):
    finish(tmp_path, SMALL)
    from_small = source(tmp_path, GRID)
    seal_forecast(from_small, estimate(from_small.results, refits=100), "grid", LARGE)
    assert forecast_errors(score_forecasts(tmp_path, "grid"), HEADS) is None
    finish(tmp_path, LARGE[:2])
    result(tmp_path, LARGE[2], 9.0, 4e9)
    run_directory(tmp_path, "grid", LARGE[1]).result_file.write_text("{")
    forecasts = score_forecasts(tmp_path, "grid")
    console = Console(width=140, record=True)
    console.print(forecast_table(forecasts))
    text = console.export_text()
    assert "1 of 2 finished runs inside; of 90% intervals 1.8 are expected, but misses" in text
    for words in ("NO", "yes", "not finished", "a file is damaged"):
        assert words in text
    assert f"{1e3 * forecasts.scores[2].error:.1f}" in text
    figure = forecast_errors(forecasts, HEADS)
    assert figure is not None
    assert len(figure.axes[0].patches) == 2
    (sealed,) = read_forecasts(tmp_path, "grid")
    sealed.path.write_text(sealed.path.read_text().replace('"level": 0.9', '"level": 0.8'))
    assert (
        "altered since and does not count"
        in forecast_table(score_forecasts(tmp_path, "grid")).html()
    )


def test_the_command_of_a_run_seals_a_forecast_unless_nothing_can_be_fitted(trained):
    from_small, run = source(trained, GRID), LARGE[0]
    assert "--forecast experiments.grid" in command_of(from_small, run)
    assert "--forecast" not in command_of(from_small, run, forecast=False)
