import dataclasses

import pytest
from test_follow_ups import run

from gqa_scaling.config import OptimizerConfig, RunConfig, UserError
from gqa_scaling.experiment.learning_rates import (
    LearningRateChoice,
    learning_rate_choices,
    with_learning_rate,
)
from gqa_scaling.files.runs import run_directory


def finish(root, config: RunConfig, loss: float) -> None:
    directory = run_directory(root, "rates", config)
    directory.begin(config, {})
    directory.finish({"evaluations": {config.evaluation_digest: {"loss": loss}}}, {})


def test_the_rate_of_least_loss_is_chosen_for_each_size(tmp_path):
    declared = []
    for rate, loss in ((1e-2, 3.0), (1e-3, 2.5), (1e-4, 4.0)):
        declared += [run(f"small-{rate}", rate), run(f"large-{rate}", rate, n_layers=4)]
        finish(tmp_path, declared[-2], loss)
        finish(tmp_path, declared[-1], 5 - loss)
    finish(tmp_path, run("a-trial-beside-the-sweep", 1e-5), 0.1)
    assert learning_rate_choices("rates", declared, tmp_path) == {
        (2, 32): LearningRateChoice(1e-3, ((1e-4, 4.0), (1e-3, 2.5), (1e-2, 3.0))),
        (4, 32): LearningRateChoice(1e-4, ((1e-4, 1.0), (1e-3, 2.5), (1e-2, 2.0))),
    }
    assert learning_rate_choices("others", declared, tmp_path) == {}


def test_a_size_has_no_choice_until_all_its_rates_are_finished(tmp_path):
    small, large = run("small", 1e-2), run("large", 1e-2, n_layers=4)
    finish(tmp_path, small, 3.0)
    finish(tmp_path, large, 3.0)
    declared = [small, large, run("small-open", 1e-3)]
    assert list(learning_rate_choices("rates", declared, tmp_path)) == [(4, 32)]


def test_seeds_are_averaged_and_other_models_of_a_size_are_refused(tmp_path):
    declared = [run("a", 1e-3), dataclasses.replace(run("b", 1e-3), seed=1), run("c", 1e-2)]
    for config, loss in zip(declared, (3.0, 2.0, 2.75), strict=True):
        finish(tmp_path, config, loss)
    found = learning_rate_choices("rates", declared, tmp_path)
    assert found == {(2, 32): LearningRateChoice(1e-3, ((1e-3, 2.5), (1e-2, 2.75)))}
    with pytest.raises(UserError, match=r"a and d have one size, .* \(model.n_kv_heads: "):
        learning_rate_choices("rates", [*declared, run("d", 1e-3, n_kv_heads=2)], tmp_path)


def test_runs_of_a_size_that_learned_from_more_do_not_choose_its_rate(tmp_path):
    short, other = run("short", 1e-3), run("other", 1e-2)
    long = dataclasses.replace(short, name="long", tokens=2 * short.tokens)
    at_another = dataclasses.replace(other, name="at-another", tokens=long.tokens)
    judged = dataclasses.replace(other.evaluation, tokens=2 * other.evaluation.tokens)
    for each in (long, at_another, dataclasses.replace(other, name="judged", evaluation=judged)):
        with pytest.raises(
            UserError, match=f"short and {each.name} have one size, .*(tokens|evaluation)"
        ):
            learning_rate_choices("rates", [short, each], tmp_path)
    # a weight decay that goes with the rate is part of what is tried
    decay = dataclasses.replace(other.optimizer, weight_decay=0.01)
    for each in (short, coupled := dataclasses.replace(other, optimizer=decay)):
        finish(tmp_path, each, 3.0)
    assert learning_rate_choices("rates", [short, coupled], tmp_path)


def test_a_choice_at_the_edge_says_which():
    assert LearningRateChoice(1e-3, ((1e-3, 2.5),)).edge == "only"
    tried = ((1e-4, 4.0), (1e-3, 2.5), (1e-2, 3.0))
    edges = {rate: LearningRateChoice(rate, tried).edge for rate, _ in tried}
    assert edges == {1e-4: "lowest", 1e-3: "", 1e-2: "highest"}


def test_a_run_takes_its_size_s_rate_and_notes_where_from():
    choices = {(2, 32): LearningRateChoice(3e-3, ((1e-3, 3.0), (3e-3, 2.0), (1e-2, 4.0)))}
    tuned = with_learning_rate(run(), choices, "experiments.rates")
    assert tuned == dataclasses.replace(
        run(),
        optimizer=OptimizerConfig(3e-3),
        note="learning rate 0.003 from experiments.rates (3 tried)",
    )
    edge = {(2, 32): LearningRateChoice(1e-2, ((1e-3, 3.0), (1e-2, 2.0)))}
    assert "AT THE HIGHEST RATE TRIED" in with_learning_rate(run(), edge, "rates").note


def test_a_size_without_a_result_keeps_its_rate_and_says_so():
    kept = with_learning_rate(run(rate=7e-4), {}, "rates")
    assert kept.optimizer.learning_rate == 7e-4
    assert kept.digest == run(rate=7e-4).digest
    assert kept.note == "learning rate 0.0007 as declared; rates has not finished L2 d32"
