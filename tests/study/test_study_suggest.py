"""Suggest: a belief over curves, the value of a run, and what it picks."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from gqa_scaling.config import ModelConfig, Question, RunConfig, UserError
from gqa_scaling.costs import n_formula, training_flops
from gqa_scaling.study.reading import published
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.suggest import Belief, Decider, Runs, suggest

QUESTION = Question(contexts=(131072,), losses=(2.8,), convention="per_sequence")
R = published()
HEADS = sorted(set(R.heads))


def _run(heads, layers, tokens=20.0):
    return RunConfig(
        name=f"L{layers}-h{heads[0]}-kv{heads[1]}",
        model=ModelConfig(layers, 64 * layers, *heads),
        context_length=8192,
        batch_tokens=2**19,
        tokens_per_param=tokens,
    )


GRID = [_run(h, layers) for h in HEADS for layers in (12, 16, 20, 24, 28, 32)]


def _columns(r):
    return Runs.of(list(zip(r.heads, r.n_layers, r.d_model, strict=True)), HEADS)


@pytest.fixture(scope="module")
def some():
    """Three sizes of three configurations."""
    few = np.array([h in ((1, 1), (4, 1), (8, 8)) for h in R.heads])
    return R.select(few & np.isin(R.n_layers, (16, 24, 32)))


@pytest.fixture(scope="module")
def belief(some):
    return Belief(HEADS, _columns(some), some.loss)


def test_the_beliefs_gradient_is_the_derivative(belief):
    runs = _columns(R)
    numeric = approx_fprime(belief.mode, lambda t: belief.loss(t, runs)[0])
    assert np.allclose(belief.gradient(belief.mode, runs), numeric, atol=1e-6)


def test_the_belief_predicts_what_it_has_not_seen_and_knows_how_well(belief, some):
    unseen = R.select(~np.isin(R.name, some.name))
    predicted = belief.loss(belief.draw(np.random.default_rng(0)), _columns(unseen))
    error = (predicted.mean(0) - unseen.loss) / np.hypot(predicted.std(0), belief.noise)
    assert np.abs(predicted.mean(0) / unseen.loss - 1).max() < 0.02
    assert np.sqrt(np.mean(error**2)) < 2


def test_the_inverse_is_the_laws(belief):
    at = belief.log_backbone_at(belief.mode, 2.8)[0]
    runs = Runs(np.arange(len(HEADS)), at)
    assert belief.loss(belief.mode, runs)[0] == pytest.approx(np.full(len(HEADS), 2.8), abs=1e-9)


def test_an_imagined_run_is_worth_less_a_second_time(some):
    belief, runs = Belief(HEADS, _columns(some), some.loss), _columns(R)
    decider, rng = Decider(R, HEADS, QUESTION), np.random.default_rng(0)
    theta = belief.draw(rng)
    costs = decider.costs(belief, theta)
    gains = decider.gains(belief, theta, runs, costs)
    assert gains.min() > -1e-9
    i = int(gains.argmax())
    assert gains[i] <= decider.regret(costs) + 1e-6  # one run cannot be worth more than certainty
    before = belief.covariance.copy()
    belief.imagine(runs, i)
    assert np.trace(belief.covariance) < np.trace(before)
    theta = belief.draw(rng)
    again = decider.gains(belief, theta, runs, decider.costs(belief, theta))
    assert again[i] < 0.8 * gains[i]


def test_suggestions_are_new_ordered_and_within_the_budget(some):
    flops = {run.name: training_flops(run) for run in GRID}
    budget = 3.0 * np.median(list(flops.values()))
    found = suggest(some, GRID, QUESTION, budget_flops=budget, most=5)
    names = [s.name for s in found]
    assert 1 <= len(names) == len(set(names)) <= 5
    known = set(zip(some.heads, some.n_layers.tolist(), strict=True))
    assert not {(s.heads, s.n_layers) for s in found} & known
    assert sum(s.flops for s in found) <= budget
    assert all(s.flops == flops[s.name] for s in found)
    assert all(s.regret_after <= s.regret_before for s in found)
    assert found == suggest(some, GRID, QUESTION, budget_flops=budget, most=5)
    assert suggest(some, GRID, QUESTION, most=1)[0].to_dict()["name"] == names[0]


def test_what_costs_more_than_it_tells_is_left_for_later(some):
    by_flop, by_run = (suggest(some, GRID, QUESTION, most=1, per_flop=p)[0] for p in (True, False))
    assert by_flop.flops < by_run.flops
    assert (
        by_run.regret_before - by_run.regret_after >= by_flop.regret_before - by_flop.regret_after
    )


def test_contenders_are_looked_at_before_the_hopeless(some):
    # at 128K the (8,8) model costs twice the best: another size of it can wait
    picked = [s.heads for s in suggest(some, GRID, QUESTION, most=4, per_flop=False)]
    assert (8, 8) not in picked
    assert set(picked) & {(4, 1), (8, 1), (8, 2), (2, 1)}


def test_costs_are_those_of_the_frontier_however_n_is_counted(belief):
    exact = dataclasses.replace(R, n_params=1.04 * R.n_params, count="n_exact")
    for results in (R, exact):
        decider = Decider(results, HEADS, QUESTION)
        deployment = Deployment(family_of(results), QUESTION, 131072)
        for i in (0, 9, 39):
            k = HEADS.index(R.heads[i])
            at = np.log(n_formula(R.n_layers[i], R.d_model[i], 0, 0))
            log_z = np.interp(at, decider.grid, decider.log_z[131072][k])
            z = deployment.costs(results.n_params[i], R.heads[i]).z
            assert np.exp(log_z) == pytest.approx(float(z), rel=2e-3)


def test_refusals_say_what_is_missing(some):
    with pytest.raises(UserError, match="six finished runs"):
        suggest(some.select(np.arange(len(some)) < 5), GRID, QUESTION)
    with pytest.raises(UserError, match="needs target losses"):
        suggest(some, GRID, Question())
    with pytest.raises(UserError, match="no new size"):
        suggest(some, GRID, QUESTION, budget_flops=1e3)
    with pytest.raises(UserError, match="no new size"):
        suggest(R, [_run((8, 8), 12)], QUESTION)
    unknown = dataclasses.replace(some, n_layers=0 * some.n_layers)
    with pytest.raises(UserError, match="layers and widths"):
        suggest(unknown, GRID, QUESTION)
