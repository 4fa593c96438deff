import dataclasses

import pytest

from gqa_scaling.config import ModelConfig, OptimizerConfig, RunConfig
from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.experiment.follow_ups import find_follow_ups, follow_up
from gqa_scaling.files.runs import RunDirectory, run_directory


def run(name: str = "a", rate: float = 1e-3, **model) -> RunConfig:
    shape = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 4} | model
    return RunConfig(
        name, ModelConfig(**shape), 64, 256, tokens=2560, optimizer=OptimizerConfig(rate)
    )


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
    made = follow_up(ladder(), model)
    expected = dataclasses.replace(
        ladder()[4],
        name="built-L3-d64-h4-kv1",
        model=model,
        note="learning rate 0.002 of L2-d64-kv1",
    )
    assert made == expected
    assert (made.seed, made.tokens, made.optimizer.learning_rate) == (0, 2560, 2e-3)
    unseen = follow_up(ladder(), ModelConfig(4, 96, 8, 2))
    assert unseen.note == "learning rate 0.001 of L4-d128-kv4"


def test_a_model_of_the_grid_is_the_grids_own_run():
    runs = ladder()
    assert [follow_up(runs, r.model).digest for r in runs[1:]] == [r.digest for r in runs[1:]]


def test_the_token_rule_is_the_grids():
    model = ModelConfig(3, 64, 4, 1)
    assert follow_up(ladder(tokens=None, tokens_per_param=20.0), model).tokens_per_param == 20.0
    grown = [dataclasses.replace(r, tokens=20 * n_exact(r.model)) for r in ladder()]
    made = follow_up(grown, model)
    assert (made.tokens, made.tokens_per_param) == (None, 20.0)
    assert training_tokens(made) == pytest.approx(20 * n_exact(model), abs=256)


def test_follow_ups_are_the_runs_that_were_trained_alike(tmp_path, monkeypatch):
    runs = ladder()
    good = follow_up(runs, ModelConfig(3, 64, 4, 1))
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
    read: list[str] = []
    config = RunDirectory.config
    monkeypatch.setattr(RunDirectory, "config", lambda d: read.append(d.path.name) or config(d))
    assert [(r.name, r.digest) for r in find_follow_ups(tmp_path, "e", runs)] == [
        ("mine", good.digest)
    ]
    assert not [name for name in read if name.endswith(tuple(r.digest for r in runs))]
    assert find_follow_ups(tmp_path, "none", runs) == []
