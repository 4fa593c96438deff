"""Runs that differ in their token budget alone: which share a trunk, and where each begins."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling import costs
from gqa_scaling.config import (
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Question,
    RunConfig,
    UserError,
)
from gqa_scaling.experiment.branches import decay_begins, smallest_budget_first, trunks
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.sweep.plan import check_steps

BATCH = 256


def run(steps: int, name: str = "", **changes: object) -> RunConfig:
    made = RunConfig(
        name=name or f"s{steps}",
        model=ModelConfig(2, 64, 4, 2),
        context_length=64,
        batch_tokens=BATCH,
        tokens=steps * BATCH,
        optimizer=OptimizerConfig(warmup_tokens=10 * BATCH),
    )
    return dataclasses.replace(made, **changes)


def test_runs_of_several_budgets_share_a_trunk():
    short, middle, long = run(100), run(200), run(400)
    found = trunks([long, short, middle])
    assert set(found) == {r.digest for r in (short, middle, long)}
    trunk = found[long.digest]
    assert trunk.runs == (short, middle, long)
    assert [decay_begins(r) for r in trunk.runs] == [80, 160, 320]
    assert [trunk.begins(r) for r in trunk.runs] == [0, 80, 160]
    assert trunk.kept_steps(short) == (80,)
    assert trunk.kept_steps(middle) == (80, 160)  # that of the shorter one, where it comes first
    assert trunk.kept_steps(long) == (80, 160)


def test_runs_that_share_steps_are_dealt_out_together():
    budgets = [run(steps, seed=seed) for steps in (100, 200, 400) for seed in (1, 2)]
    alone = run(100, "alone", optimizer=OptimizerConfig())
    grid = Experiment("grid", (*budgets, alone), Question(contexts=(64,)))
    shares = [grid.select(shard=f"{i}/2").runs for i in range(2)]
    assert [[r.seed for r in share] for share in shares] == [[1, 1, 1, 0], [2, 2, 2]]
    assert shares[0][-1] == alone
    assert grid.select(shard="3/4").runs == ()


def test_budgets_in_tokens_a_parameter_count_as_others_do():
    n = costs.n_exact(run(1).model)
    ratio = run(1, "ratio", tokens=None, tokens_per_param=400 * BATCH / n)
    assert trunks([run(100), ratio])[ratio.digest].begins(ratio) == 80


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model": ModelConfig(2, 64, 4, 1)},
        {"context_length": 32},
        {"optimizer": OptimizerConfig(warmup_tokens=11 * BATCH)},
        {"optimizer": OptimizerConfig(warmup_tokens=10 * BATCH, decay=0.3)},
        {"optimizer": OptimizerConfig(warmup_tokens=10 * BATCH, schedule="cosine")},
        {"optimizer": OptimizerConfig()},  # its warmup is a share of its budget
    ],
)
def test_what_differs_in_anything_else_shares_nothing(changes):
    assert trunks([run(100), run(200, **changes)]) == {}


@pytest.mark.parametrize(
    "optimizer",
    [OptimizerConfig(), OptimizerConfig(warmup_tokens=10 * BATCH, schedule="cosine")],
    ids=["a share of the steps warms up", "all steps decay"],
)
def test_where_the_budget_moves_the_rate_there_is_no_trunk(optimizer):
    assert trunks([run(n, optimizer=optimizer) for n in (100, 200)]) == {}


def test_a_run_whose_last_states_are_averaged_trains_all_of_them():
    short, long = run(100), run(200, evaluation=EvaluationConfig(average=3))
    trunk = trunks([short, long])[long.digest]
    assert trunk.begins(long) == 0
    assert trunk.kept_steps(short) == ()
    assert trunk.kept_steps(long) == (80,)


def test_those_of_a_trunk_are_declared_together():
    other = run(50, "other", seed=1)
    names = [r.name for r in smallest_budget_first([run(400), other, run(100), run(200)])]
    assert names == ["s100", "s200", "s400", "other"]


def test_a_warmup_that_leaves_no_room_for_the_decay_is_refused():
    check_steps(run(13))
    with pytest.raises(UserError, match=r"s12: of 12 steps warmup_tokens=2,816 take 11 and .* 2:"):
        check_steps(dataclasses.replace(run(12), optimizer=OptimizerConfig(warmup_tokens=11 * 256)))


@given(st.lists(st.integers(20, 5000), min_size=2, max_size=5, unique=True))
def test_every_state_that_is_wanted_is_kept_by_whom_it_is_wanted_of(budgets):
    """In any order of training nobody looks for a state that no other keeps."""
    runs = [run(n) for n in budgets]
    trunk = trunks(runs)[runs[0].digest]
    for each in trunk.runs:
        for step, other in trunk.sources(each):
            assert step in trunk.kept_steps(other)
            assert step <= min(decay_begins(each), decay_begins(other))
