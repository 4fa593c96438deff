"""Suggest: a belief over curves, the value of a run, and what it picks."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from gqa_scaling import cli
from gqa_scaling.config import ModelConfig, Question, RunConfig, UserError
from gqa_scaling.costs import n_formula, training_flops
from gqa_scaling.study.proposals import Proposals, _declared, for_a_fit, too_small
from gqa_scaling.study.reading import published
from gqa_scaling.study.report.csv_files import results_csv
from gqa_scaling.study.results import table
from gqa_scaling.study.serving import Deployment, Serving
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.source import read_source
from gqa_scaling.study.suggest import STRAY_T, Belief, Decider, Runs, suggest

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
    assert not {(s.runs[0].heads, s.runs[0].n_layers) for s in found} & known
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


def test_only_what_may_be_served_can_be_chosen():
    runs, asked = published(), Question(contexts=(131072,), losses=(2.8,))
    twice = suggest(runs, (), asked, most=2, serving=Serving(kv_multiple=2))
    assert all(each.runs[0].heads[1] % 2 == 0 for each in twice)
    assert (
        twice[0].regret_after < 0.9 * twice[0].regret_before
    )  # not against (8,1), which may not be
    with pytest.raises(
        UserError, match=r"only \(8,8\) has .* multiple of 8: there is nothing to choose"
    ):
        suggest(runs, (), asked, serving=Serving(kv_multiple=8))
    with pytest.raises(UserError, match=r"none of .* has n_kv that is a multiple of 3"):
        suggest(runs, (), asked, serving=Serving(kv_multiple=3))


def test_what_holds_too_many_bytes_is_not_chosen():
    runs, asked = published(), Question(contexts=(131072,), losses=(2.8,))
    gib = 2**30
    (wide,) = suggest(runs, (), asked, most=1, serving=Serving(limit_bytes=100 * gib))
    (free,) = suggest(runs, (), asked, most=1)
    assert wide == free
    assert free.regret_before > 0
    (alone,) = suggest(runs, (), asked, most=1, serving=Serving(limit_bytes=1.9 * gib))
    assert alone.regret_before == pytest.approx(0, abs=1e-9)  # (8,1) holds 1.8 GiB, (4,1) 1.96
    with pytest.raises(
        UserError, match=r"fits 1\.00 MiB, by what these runs tell: raise --fit-gib"
    ):
        suggest(runs, (), asked, serving=Serving(limit_bytes=2**20))


def test_contenders_are_looked_at_before_the_hopeless(some):
    # at 128K the (8,8) model costs twice the best: another size of it can wait
    picked = [s.runs[0].heads for s in suggest(some, GRID, QUESTION, most=4, per_flop=False)]
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
    with pytest.raises(UserError, match="needs 4 finished runs to begin with, not 3"):
        suggest(some.select(np.arange(len(some)) < 3), GRID, QUESTION)
    with pytest.raises(UserError, match="needs target losses"):
        suggest(some, GRID, Question())
    with pytest.raises(UserError, match=r"costs less than 1e\+03 training FLOPs; raise --budget"):
        suggest(some, GRID, QUESTION, budget_flops=1e3)
    unknown = dataclasses.replace(some, n_layers=0 * some.n_layers)
    with pytest.raises(UserError, match="layers and widths"):
        suggest(unknown, GRID, QUESTION)


# ------------------------------------------------------------------------------ beyond the grid


def test_a_finished_grid_goes_on_with_sizes_seeds_heads_and_lengths():
    done = set(zip(R.heads, R.n_layers.tolist(), strict=True))
    own = [run for run in GRID if (_declared(run).heads, run.model.n_layers) in done]
    finished = suggest(R, own, QUESTION, most=2)
    unfinished = suggest(R, GRID, QUESTION)
    assert {s.kind for s in unfinished} == {"grid"}
    assert {s.name for s in unfinished} == {run.name for run in GRID if run not in own}
    steps = Proposals(R, tuple(GRID)).beyond(QUESTION.contexts, [(4, 1), (8, 1)])
    by = {
        kind: [s for s in steps if s.kind == kind] for kind in ("size", "seed", "heads", "context")
    }
    assert {s.runs[0].heads for s in by["heads"]} == {(2, 2), (4, 2), (4, 4)}
    assert len(by["seed"]) == len(R)
    assert all(s.runs[0].seed == 1 for s in by["seed"])
    trained = {(h, n) for h, n in zip(R.heads, R.n_layers.tolist(), strict=True)}
    assert not {(s.runs[0].heads, s.runs[0].n_layers) for s in by["size"]} & trained
    largest = [s.runs[0] for s in by["size"] if s.runs[0].n_layers > 32]
    assert {run.heads for run in largest} == {h for h, n in trained if n == 32}
    n = [n_formula(run.n_layers, run.d_model, *run.heads) for run in largest]
    assert np.allclose(n, [2 * n_formula(32, 2048, *run.heads) for run in largest], rtol=0.1)
    for step in by["context"]:
        assert [run.heads for run in step.runs] == [(4, 1), (8, 1)]
        assert {run.context for run in step.runs} == {131072}
        assert len({run.n_layers for run in step.runs}) == 1
    for step in steps:
        assert step.flops == sum(training_flops(run.run) for run in step.runs)
        assert all(run.run.model.n_kv_heads == run.heads[1] for run in step.runs)
    assert {s.kind for s in finished} <= set(by)
    assert all(s.regret_after <= s.regret_before for s in finished)


def test_others_runs_need_no_grid():
    steps = Proposals(R).beyond((131072,), [(4, 1), (8, 1)])
    ours = Proposals(R, tuple(GRID)).beyond((131072,), [(4, 1), (8, 1)])
    assert [(s.kind, [(r.heads, r.n_layers, r.context) for r in s.runs]) for s in steps] == [
        (s.kind, [(r.heads, r.n_layers, r.context) for r in s.runs]) for s in ours
    ]
    # the formula leaves out the output matrix of a built model and rounds no FFN up
    prices = np.array([[a.flops, b.flops] for a, b in zip(steps, ours, strict=True)])
    assert (np.abs(prices[:, 1] / prices[:, 0] - 1) < 0.8).all()
    assert all(run.run is None for s in steps for run in s.runs)
    found = suggest(R, (), QUESTION, most=2)
    assert len(found) == 2


def test_losses_at_longer_contexts_move_as_the_belief_says(some):
    lengths, reference = [32768], 8192
    done = _columns(some).at([8192] * len(some), reference, lengths)
    belief = Belief(HEADS, done, some.loss, None, 1)
    runs = _columns(R).at([32768] * 20 + [8192] * 20, reference, lengths)
    at = belief.mode + 1e-3
    numeric = approx_fprime(at, lambda t: belief.loss(t, runs)[0])
    assert np.allclose(belief.gradient(at, runs), numeric, atol=1e-5)
    alone = Belief(HEADS, _columns(some), some.loss)
    assert belief.noise == pytest.approx(alone.noise, rel=1e-6)  # no such run has been done
    k = len(HEADS)
    moves = belief.covariance.diagonal()[belief.first + 2 * k : belief.first + 3 * k]
    assert np.sqrt(moves) == pytest.approx(np.full(k, STRAY_T * some.loss.min()), rel=1e-6)


def test_a_longer_context_tells_by_two_runs_what_one_cannot(some):
    lengths, heads = [131072], [(4, 1), (8, 1)]
    done = _columns(some).at([8192] * len(some), 8192, lengths)
    belief = Belief(HEADS, done, some.loss, None, 1)
    two = Runs.of([(h, 12, 768) for h in heads], HEADS).at([131072] * 2, 8192, lengths)
    decider, rng = Decider(R, HEADS, QUESTION, reference=8192), np.random.default_rng(0)
    assert decider.octaves == {131072: 4}
    theta = belief.draw(rng)
    costs, z = decider.costs(belief, theta), rng.standard_normal((len(theta), 2))
    apart = decider.gains(belief, theta, two, costs)
    together = decider.gain_together(belief, theta, two, costs, z)
    assert together > 5 * apart.sum()
    assert together <= decider.regret(costs) + 1e-6
    one = two.some([0])
    assert decider.gain_together(belief, theta, one, costs, z[:, :1]) == pytest.approx(
        apart[0], abs=0.1 * together
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(R) - 1), min_size=1, max_size=12, unique=True), st.booleans())
@example([1, 2, 36], False)  # the size that (1,1) lacks is below the one it has
def test_the_runs_that_a_fit_lacks_make_it_possible(rows, gridded):
    few = R.select(np.isin(np.arange(len(R)), rows))
    steps = for_a_fit(Proposals(few, tuple(GRID) if gridded else ()))
    assert bool(steps) == bool(too_small(few))
    more = [
        {"n_heads": r.heads[0], "n_kv_heads": r.heads[1], "n_layers": r.n_layers}
        | {"d_model": r.d_model, "n_params": float(n_formula(r.n_layers, r.d_model, *r.heads))}
        | {"loss": 3.0, "name": f"new {i}"}
        for i, r in enumerate(step.runs[0] for step in steps)
    ]
    whole = table(few.rows() + [few.rows()[0] | row for row in more], "any", "n_formula")
    assert too_small(whole) == ""
    for i in range(len(more)):  # and none of them could be spared
        fewer = few.rows() + [few.rows()[0] | row for j, row in enumerate(more) if j != i]
        assert too_small(table(fewer, "any", "n_formula"))


def test_runs_that_were_left_out_are_not_asked_for_again(tmp_path):
    """Neither one of them nor, as new heads, a configuration: another seed may be, or another size."""
    file = tmp_path / "some.csv"
    file.write_text(results_csv(R))
    left = read_source(str(file), (), None, ("L12-d768-h8-kv8", "4,1")).results
    assert len(left) < len(R) - 1
    steps = Proposals(left).beyond((), [])
    asked = {(run.heads, run.n_layers, run.d_model, run.seed) for s in steps for run in s.runs}
    assert ((8, 8), 12, 768, 0) not in asked
    assert ((8, 8), 12, 768, 1) in asked
    assert not any(heads == (4, 1) for heads, *_ in asked)


def test_suggest_from_the_command_line(capsys, tmp_path):
    assert (
        cli.main(["suggest", "chen2025", "--refits", "100", "--contexts", "131072", "--most", "1"])
        == 0
    )
    out = capsys.readouterr().out
    assert "new length" in out
    assert "these runs come without their corpus" in out
    file = tmp_path / "some.csv"
    file.write_text(results_csv(R.select(np.isin(R.n_heads, (1, 4)))))
    assert cli.main(["suggest", str(file), "--most", "1", "--refits", "100", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    (told,) = whole["suggestions"]
    assert whole["flags"] == []
    assert set(told) >= {"name", "kind", "runs", "flops", "regret_before", "regret_after"}
    file.write_text(results_csv(R.select(np.isin(R.n_layers, (12, 16)))))
    assert cli.main(["suggest", str(file), "--without", "4,1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "! left out by --without 4,1: 2 runs" in out
    assert "(4,1) has" not in out
    assert "Too few runs to fit" in out
    assert "(8,8) has 2" in out
    assert "for a fit" in out
    bare = tmp_path / "bare.csv"
    bare.write_text("n_heads,n_kv_heads,n_layers,d_model,loss\n8,1,4,256,3.0\n8,1,8,512,2.9\n")
    assert cli.main(["suggest", str(bare)]) == 0
    assert "! training FLOPs assume 20 training tokens a parameter and" in capsys.readouterr().out
    sizeless = tmp_path / "sizeless.csv"
    lines = [f"8,{kv},{n}e7,{3 - n / 99}" for kv in (1, 8) for n in (1, 2, 4, 8)]
    sizeless.write_text("\n".join(["n_heads,n_kv_heads,n_params,loss", *lines]))
    assert cli.main(["suggest", str(sizeless)]) == 2
    assert "columns n_layers, d_model" in capsys.readouterr().err
