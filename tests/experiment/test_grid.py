import dataclasses

import pytest

from gqa_scaling.config import ModelConfig, OptimizerConfig, RunConfig, UserError
from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.experiment.grid import (
    LearningRateChoice,
    beside,
    head_candidates,
    learning_rate_choices,
    run_of,
    unique,
    with_learning_rate,
)
from gqa_scaling.files.runs import run_directory


def run(name: str = "a", rate: float = 1e-3, **model) -> RunConfig:
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 4} | model
    return RunConfig(
        name, ModelConfig(**shape), 64, 256, tokens=2560, optimizer=OptimizerConfig(rate)
    )


# ------------------------------------------------------------------------------- one more model


def ladder(**changes) -> list[RunConfig]:
    """Three sizes, each with its own rate, x two head configurations, and a second seed."""
    runs = [
        run(f"L{layers}-d{width}-kv{kv}", rate, n_layers=layers, d_model=width, n_kv_heads=kv)
        for layers, width, rate in ((2, 32, 3e-3), (2, 64, 2e-3), (4, 128, 1e-3))
        for kv in (4, 1)
    ]
    again = dataclasses.replace(runs[2], name="again", seed=1)
    return [dataclasses.replace(r, **changes) for r in (again, *runs)]


def test_a_model_is_trained_as_the_nearest_size_was():
    model = ModelConfig(3, 64, 4, 1)
    made = run_of(ladder(), model)
    expected = dataclasses.replace(
        ladder()[4],
        name="built-L3-d64-h4-kv1",
        model=model,
        note="learning rate 0.002 of L2-d64-kv1",
    )
    assert made == expected
    assert (made.seed, made.tokens, made.optimizer.learning_rate) == (0, 2560, 2e-3)
    unseen = run_of(ladder(), ModelConfig(4, 96, 8, 2))
    assert unseen.note == "learning rate 0.001 of L4-d128-kv4"


def test_a_model_of_the_grid_is_the_grids_own_run():
    runs = ladder()
    assert [run_of(runs, r.model).digest for r in runs[1:]] == [r.digest for r in runs[1:]]


def test_the_token_rule_is_the_grids():
    model = ModelConfig(3, 64, 4, 1)
    assert run_of(ladder(tokens=None, tokens_per_param=20.0), model).tokens_per_param == 20.0
    grown = [dataclasses.replace(r, tokens=20 * n_exact(r.model)) for r in ladder()]
    made = run_of(grown, model)
    assert (made.tokens, made.tokens_per_param) == (None, 20.0)
    assert training_tokens(made) == pytest.approx(20 * n_exact(model), abs=256)


def test_runs_beside_the_grid_are_those_trained_alike(tmp_path):
    runs = ladder()
    good = run_of(runs, ModelConfig(3, 64, 4, 1))
    others = [
        dataclasses.replace(good, name="short", tokens=1280),
        dataclasses.replace(good, name="rate", optimizer=OptimizerConfig(1e-4)),
        dataclasses.replace(good, name="context", context_length=128),
        dataclasses.replace(good, name="seed", seed=3),
    ]
    renamed = dataclasses.replace(good, name="mine", note="by hand")
    for each in (*runs[:3], *others, renamed):
        run_directory(tmp_path, "e", each).begin(each, {})
    for name in ("study", "figures", "broken"):
        (tmp_path / "e" / name).mkdir()
    (tmp_path / "e/broken/config.json").write_text('{"schema": 99}')
    assert [(r.name, r.digest) for r in beside(tmp_path, "e", runs)] == [("mine", good.digest)]
    assert beside(tmp_path, "none", runs) == []


# ---------------------------------------------------------------------------------- candidates


def test_the_published_grid_has_21_head_configurations():
    candidates = head_candidates(32)
    assert len(candidates) == len(set(candidates)) == 21
    powers = {1, 2, 4, 8, 16, 32}
    assert set(candidates) == {(h, kv) for h in powers for kv in powers if kv <= h}


def test_one_head_is_one_candidate():
    assert head_candidates(1) == [(1, 1)]


@pytest.mark.parametrize("count", [0, -2, 3, 24])
def test_only_powers_of_two(count):
    with pytest.raises(UserError, match=f"max_heads={count} must be a power of two"):
        head_candidates(count)


def test_runs_that_share_a_name_or_a_definition_are_refused():
    assert unique(iter([run("a"), run("b", n_heads=8)])) == [run("a"), run("b", n_heads=8)]
    with pytest.raises(UserError, match="runs a and a share one name"):
        unique([run("a"), run("a", n_heads=8)])
    with pytest.raises(UserError, match="runs a and b share one definition"):
        unique([run("a"), run("b")])


# ------------------------------------------------------------------------------- learning rates


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


def test_a_choice_at_the_edge_says_which():
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
