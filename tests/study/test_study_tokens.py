"""The token law, and what configurations reach at equal training FLOPs."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from study_kit import layers_by_hand, refits_beside_scipys

from gqa_scaling import cli
from gqa_scaling.config import ModelConfig, Question, UserError
from gqa_scaling.costs import (
    n_exact,
    n_formula,
    parameters,
    training_flops_formula,
    training_flops_per_token,
)
from gqa_scaling.study.equal_training import equal_training
from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.points import cells
from gqa_scaling.study.reading import published
from gqa_scaling.study.report.estimates import law_tables
from gqa_scaling.study.report.tradeoffs import aligned_answer
from gqa_scaling.study.results import table
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.tokens import OverTokens, spans_budgets, token_law

TRUTH = {(1, 1): (1.25e8, 0.29), (4, 1): (8.9e7, 0.31), (8, 8): (7.5e7, 0.32)}
FLOOR, DATA, BETA = 1.75, 1.2e9, 0.30
LADDER = tuple((s, 64 * s) for s in (8, 12, 16, 20, 24))


def truth(heads, n, tokens):
    a, b = TRUTH[heads]
    return FLOOR + (a / n) ** b + (DATA / tokens) ** BETA


def study(noise=0.0, seed=0, ratios=(10, 20, 40, 80), sizes=LADDER, context=8192, **columns):
    """Every size at every ratio of tokens to parameters."""
    rng, rows = np.random.default_rng(seed), []
    for h, kv in TRUTH:
        for layers, width in sizes:
            n = n_formula(layers, width, h, kv)
            for ratio in ratios:
                loss = truth((h, kv), n, ratio * n) + noise * rng.standard_normal()
                row = dict.fromkeys(("evaluation", "tokenizer", "corpus"), "")
                row |= {"name": f"L{layers}-h{h}-kv{kv}", "n_heads": h, "n_kv_heads": kv}
                row |= {"head_dim": 64, "n_layers": layers, "d_model": width, "n_params": n}
                row |= {"context_length": context, "tokens": ratio * n, "loss": loss, "seed": 0}
                row |= {"learning_rate": 1e-3, "epochs": 1.0, "vocab_size": 50304}
                rows.append(row | columns)
    return table(rows, source="synthetic", count="n_formula")


@pytest.fixture(scope="module")
def exact():
    return token_law(study(), refits=100)


@pytest.fixture(scope="module")
def noisy():
    return token_law(study(0.002, seed=1), refits=200)


# ------------------------------------------------------------------------------------- the law


@settings(max_examples=20, deadline=None)
@given(
    floor=st.floats(0.5, 2.5),
    b=st.lists(st.floats(0.15, 0.45), min_size=1, max_size=4),
    beta=st.floats(0.15, 0.5),
    data=st.floats(0.2, 1.0),
    seed=st.integers(0, 2**31),
)
def test_noise_free_truths_are_recovered(floor, b, beta, data, seed):
    rng, rows = np.random.default_rng(seed), []
    for k, slope in enumerate(b):
        for i, n in enumerate(np.geomspace(1e7, 1e9, 5)):
            for j, ratio in enumerate((5, 20, 80)):
                tokens = ratio * n * rng.uniform(0.8, 1.25)
                loss = floor + (1e8 / n) ** slope + data * (4e9 / tokens) ** beta
                row = dict.fromkeys(("evaluation", "tokenizer", "corpus"), "")
                row |= {"name": f"{k}{i}{j}", "n_heads": 2**k, "n_kv_heads": 1, "head_dim": 64}
                row |= {"n_layers": 0, "d_model": 0, "n_params": n, "context_length": 0}
                row |= {"tokens": tokens, "loss": loss, "seed": 0, "learning_rate": np.nan}
                rows.append(row | {"epochs": np.nan, "vocab_size": 0})
    law = token_law(table(rows, source="any", count="n_given"), refits=100)
    assert law.floor[0] == pytest.approx(floor, abs=1e-6)
    assert law.beta[0] == pytest.approx(beta, abs=1e-6)
    assert law.best.curves.b[0] == pytest.approx(b, abs=1e-6)
    assert law.term(4e9)[0] == pytest.approx(data, abs=1e-6)
    assert law.fit.converged


def test_the_jacobian_is_the_derivative_and_bulk_refits_are_scipys():
    p, rng = cells(study(0.003), 3, over=("tokens",)), np.random.default_rng(2)
    model = OverTokens(p)
    w = rng.uniform(0.5, 2, len(p.tokens))
    closely = {"xtol": 1e-15, "ftol": 1e-15, "x_scale": "jac"}
    for row, scipys in refits_beside_scipys(model, p, w, rng, **closely):
        assert row[:3] == pytest.approx(scipys[:3], abs=1e-4)


def test_the_curves_at_a_budget_are_the_law_there():
    r = study()
    law = token_law(r, at_tokens=1e10, refits=100)
    n = np.array([5e7, 3e8])
    for k, heads in enumerate(law.heads):
        assert law.fit.curves.loss(k, n) == pytest.approx(truth(heads, n, 1e10), abs=1e-8)
        mine = law.fit.points.curve == k
        brought = truth(heads, law.fit.points.n[mine], 1e10)
        assert law.fit.points.loss[mine] == pytest.approx(brought, abs=1e-8)
        assert float(law.best.loss(k, 2e8, 3e9)[0]) == pytest.approx(truth(heads, 2e8, 3e9))
    assert any("D = 10.0G tokens whatever N is" in flag for flag in law.fit.flags)
    beyond = token_law(r, at_tokens=1e12, refits=100)
    assert any("lies outside the budgets" in flag for flag in beyond.fit.flags)
    json.dumps({**law.fit.to_dict(), **law.to_dict()}, allow_nan=False)


def test_intervals_hold_the_truth_and_grow_with_the_noise(noisy):
    assert noisy.floor[1][0] < FLOOR < noisy.floor[1][1]
    assert noisy.beta[1][0] < BETA < noisy.beta[1][1]
    assert noisy.fit.refits_failed == 0
    wide = token_law(study(0.006, seed=1), refits=200)
    assert 2 < np.ptp(wide.beta[1]) / np.ptp(noisy.beta[1]) < 4.5
    again = token_law(study(0.002, seed=1), refits=200)
    assert again.beta == noisy.beta


def test_seeds_are_averaged_and_judge_the_noise():
    parts = [study(0.002, seed=s) for s in range(3)]
    rows = [
        {**row, "seed": s, "vocab_size": 50304}
        for s, part in enumerate(parts)
        for row in part.rows()
    ]
    law = token_law(table(rows, source="seeds", count="n_formula"), refits=100)
    assert law.fit.points.noise_dof == 2 * 60
    assert law.fit.points.noise == pytest.approx(0.002, rel=0.2)
    assert law.fit.points.replicates.tolist() == [3] * 60


def test_what_tells_nothing_of_tokens_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="training tokens follow from the size"):
        token_law(study(ratios=(20,)))
    with pytest.raises(UserError, match="training tokens follow from the size"):
        token_law(study(ratios=(20, 21, 22)))
    r = study(0.001, ratios=(10, 20))
    two = dataclasses.replace(r, tokens=np.where(r.tokens / r.n_params > 15, 2e9, 1e9))
    with pytest.raises(UserError, match="2 token budgets cannot tell the shape"):
        token_law(two)
    with pytest.raises(UserError, match="does not say its training tokens"):
        token_law(dataclasses.replace(r, tokens=np.where(r.n_layers > 20, np.nan, r.tokens)))
    lengths = dataclasses.replace(r, context_length=np.where(r.n_layers > 20, 4096, 8192))
    with pytest.raises(UserError, match="4096, 8192 cannot share a token law; name one"):
        token_law(lengths)
    with pytest.raises(UserError, match=r"needs 3 sizes, but \(1,1\) has 2"):
        token_law(study(0.001, sizes=LADDER[:2]))
    with pytest.raises(UserError, match=r"use law 'separate'$"):
        estimate(r, law="product")
    with pytest.raises(UserError, match=r"at_tokens=-1\.0"):
        token_law(study(), at_tokens=-1)
    # tokens vary, but only where size does too: a steep data term and size cannot be parted
    three = np.where(r.n_layers == 8, 1.3 * r.tokens, r.tokens)
    alike = dataclasses.replace(r, tokens=three).select(r.tokens / r.n_params < 15)
    with pytest.raises(UserError, match=r"do not tell what size does|training tokens follow"):
        token_law(alike)


def test_only_runs_of_several_budgets_for_a_size_take_the_token_law():
    assert not spans_budgets(published())
    assert estimate(published(), refits=100).tokens is None
    assert spans_budgets(study())
    found = estimate(study(0.002), refits=100)
    assert found.tokens is not None
    assert found.fit is found.tokens.fit
    lengths = [study(0.002, context=t) for t in (8192, 32768)]
    rows = [{**row, "vocab_size": 50304} for r in lengths for row in r.rows()]
    both = table(rows, source="both", count="n_formula")
    with pytest.raises(UserError, match="name a length with --context to fit a token law"):
        estimate(both, refits=100)
    one = estimate(both, context_length=8192, refits=100)
    assert one.tokens is not None
    assert one.flatness is not None
    assert one.flatness.verdict != "untested"


# ------------------------------------------------------------------------ equal training FLOPs


def test_training_flops_are_the_built_models_without_its_output_matrix():
    for causal in (True, False):
        m = ModelConfig(12, 768, 12, 4, vocab_size=50304)
        whole = training_flops_per_token(m, 8192, causal)
        norms = 6 * parameters(m).norm
        mine = training_flops_formula(n_exact(m), 8192, 12, 64, 12, causal)
        assert mine == whole - 6 * 768 * 50304 + norms


def _flops(heads, n, context):
    """FLOPs of one token, written out."""
    layers = layers_by_hand(n, heads)
    return 6 * n + 6 * context * layers * 64 * heads[0]


QUESTION = Question(contexts=(8192, 131072), baseline=(8, 8))


@pytest.fixture(scope="module")
def answer(exact):
    return equal_training(exact, study(), QUESTION, train_context=65536, baseline_run=(3e8, 9e9))


def test_every_allocation_costs_exactly_what_the_baseline_run_does(answer):
    (goal,) = answer.goals
    assert (goal.n, goal.tokens) == (3e8, 9e9)
    assert goal.flops == pytest.approx(9e9 * _flops((8, 8), 3e8, 65536), rel=1e-9)
    assert goal.loss == pytest.approx(truth((8, 8), 3e8, 9e9), abs=1e-8)
    for t in goal.trained:
        same = t.same_n_tokens * _flops(t.heads, goal.n, 65536)
        assert same == pytest.approx(goal.flops, rel=1e-9)
        assert t.tokens * _flops(t.heads, t.n, 65536) == pytest.approx(goal.flops, rel=1e-9)
        assert t.same_n_loss == pytest.approx(truth(t.heads, goal.n, t.same_n_tokens), abs=1e-8)
    base = next(t for t in goal.trained if t.heads == (8, 8))
    assert base.same_n_tokens == pytest.approx(goal.tokens, rel=1e-12)
    for rows in goal.served.values():
        for s in rows:
            assert s.tokens * _flops(s.heads, s.n, 65536) == pytest.approx(goal.flops, rel=1e-9)
            assert truth(s.heads, s.n, s.tokens) == pytest.approx(goal.loss, abs=1e-8)
    cheaper = next(t for t in goal.trained if t.heads == (1, 1))
    assert cheaper.same_n_tokens > 1.5 * goal.tokens


def test_brute_force_finds_the_same(answer):
    (goal,) = answer.goals
    grid = np.geomspace(2e7, 2e10, 3000)
    found = {}
    for heads in TRUTH:
        sizes = [n_formula(*size, *heads) for size in LADDER]
        tokens = goal.flops / np.array([_flops(heads, n, 65536) for n in grid])
        loss = truth(heads, grid, tokens)
        enough = np.flatnonzero(loss <= goal.loss + 1e-9)
        trained = np.where((grid >= sizes[0]) & (grid <= sizes[-1]), loss, np.inf)
        found[heads] = trained.min(), grid[trained.argmin()], grid[enough[0]]
        further = grid[loss.argmin()] > sizes[-1]
        row = next(t for t in goal.trained if t.heads == heads)
        assert row.beyond == ("larger" if further else "")
    assert [t.heads for t in goal.trained] == sorted(found, key=lambda h: found[h][0])
    for t in goal.trained:
        least, n, _ = found[t.heads]
        assert t.loss == pytest.approx(least, abs=2e-6 if not t.beyond else 1e-3)
        assert t.loss <= least + 1e-12
        assert t.n == pytest.approx(n, rel=0.02)  # the minimum is flat
        assert t.gain == pytest.approx(goal.loss - t.loss, abs=1e-8)
    step = grid[1] / grid[0]
    for context, rows in goal.served.items():
        costs = {}
        for heads, (_, _, n) in found.items():
            layers = layers_by_hand(n, heads)
            memory = n + 2 * context * layers * 64 * heads[1]
            flops = 2 * n + 4 * context * layers * 64 * heads[0]
            costs[heads] = 0.9 * memory**0.5 + 0.1 * flops ** (1 / 3), memory, flops
        for s in rows:
            assert s.n == pytest.approx(found[s.heads][2], rel=2 * (step - 1))
            assert (s.z, s.memory, s.flops) == pytest.approx(costs[s.heads], rel=0.01)
        assert [s.z for s in rows] == sorted(s.z for s in rows)
        by_z = sorted(costs, key=lambda h: costs[h][0])
        assert [s.heads for s in rows] == by_z


def test_savings_are_against_the_baseline_run_itself(answer):
    (goal,) = answer.goals
    layers = layers_by_hand(goal.n, (8, 8))
    for context, rows in goal.served.items():
        memory = goal.n + 2 * context * layers * 64 * 8
        for s in rows:
            assert s.saving["memory"] == pytest.approx(1 - s.memory / memory, rel=1e-9)
    # trained on more than the best tokens for its FLOPs, the baseline is its own cheapest
    own = next(s for s in goal.served[8192] if s.heads == (8, 8))
    assert own.n == pytest.approx(goal.n, rel=1e-6)
    assert own.saving["z"] == pytest.approx(0, abs=1e-6)


def test_a_baseline_too_large_for_its_tokens_saves_even_with_its_own_heads(exact):
    (goal,) = equal_training(exact, study(), QUESTION, baseline_run=(5e8, 2e9)).goals
    own = next(s for s in goal.served[8192] if s.heads == (8, 8))
    assert own.n < 0.5 * goal.n
    assert own.saving["memory"] > 0.4


def test_uncertainty_goes_through_to_the_answers(noisy):
    found = equal_training(noisy, study(0.002, seed=1), QUESTION, train_context=65536)
    (goal,) = found.goals
    largest = noisy.fit.points.curve == noisy.fit.index((8, 8))
    assert goal.n == noisy.fit.points.n[largest].max()
    assert goal.tokens == pytest.approx(20 * goal.n)  # the lower median of four budgets
    assert goal.loss_interval[0] < goal.loss < goal.loss_interval[1]
    assert sum(t.probability for t in goal.trained) == pytest.approx(1)
    for t in goal.trained:
        assert t.gain_interval[0] <= t.gain <= t.gain_interval[1]
    for rows in goal.served.values():
        assert sum(s.probability for s in rows) == pytest.approx(1)
        for s in rows:
            assert s.unreachable == 0
            low, high = s.saving_interval["z"]
            assert low - 1e-9 <= s.saving["z"] <= high + 1e-9
    assert goal.trained[0].beyond == "larger"  # best for so many FLOPs, than any that was trained
    assert goal.trained[0].n <= 1.001 * goal.n
    told = " ".join(found.flags)
    assert "every run brought there" not in told  # that is said of curves at one budget
    assert "~ marks N more than 10% outside" in told
    assert "training FLOPs are those at T = 65,536 tokens, losses were measured at 8,192" in told
    assert "beyond it the answer assumes" in told
    json.dumps(found.to_dict(), allow_nan=False)


def test_target_losses_set_the_baseline_run(exact):
    q = dataclasses.replace(QUESTION, losses=(3.0, 2.9))
    found = equal_training(exact, study(), q)
    assert [g.loss for g in found.goals] == pytest.approx([3.0, 2.9], abs=1e-8)
    for goal in found.goals:
        assert goal.tokens / goal.n == pytest.approx(30)  # the runs' median
    only = equal_training(exact, study(), dataclasses.replace(QUESTION, losses=(3.0, 1.0)))
    assert len(only.goals) == 1
    with pytest.raises(UserError, match=r"never reaches 1\.5 nats at its 30 tokens"):
        equal_training(exact, study(), dataclasses.replace(QUESTION, losses=(1.5,)))


def test_a_loss_that_the_flops_do_not_buy_is_never_reached(exact):
    # few heads lose more than their attention saves at a short context
    (goal,) = equal_training(
        exact, study(), QUESTION, baseline_run=(3.1e8, 5e9), train_context=64
    ).goals
    row = next(s for s in goal.served[8192] if s.heads == (1, 1))
    assert math.isinf(row.n)
    assert not row.reached
    assert row.probability == 0
    assert row.unreachable == 1
    best = next(t for t in goal.trained if t.heads == (1, 1))
    assert best.loss > goal.loss


def test_what_must_hold_when_serving_rules_out(exact):
    limit = equal_training(exact, study(), QUESTION, train_context=65536, baseline_run=(3e8, 9e9),
                    serving=Serving(limit_bytes=1.5e9)).goals[0]  # fmt: skip
    assert all(s.reached for s in limit.served[8192])
    held = {s.heads for s in limit.served[131072] if s.reached}
    assert held == {(1, 1), (4, 1)}
    pairs = equal_training(exact, study(), QUESTION, serving=Serving(kv_multiple=8)).goals[0]
    assert [t.heads for t in pairs.trained] == [(8, 8)]
    with pytest.raises(UserError, match="multiple of 3"):
        equal_training(exact, study(), QUESTION, serving=Serving(kv_multiple=3))
    with pytest.raises(UserError, match="needs hardware"):
        equal_training(exact, study(), QUESTION, objective="dollars")
    with pytest.raises(UserError, match="baseline_run=0,1 must be N and D"):
        equal_training(exact, study(), QUESTION, baseline_run=(0, 1.0))
    with pytest.raises(UserError, match="not in this study"):
        equal_training(exact, study(), Question(baseline=(2, 2)))
    unknown = token_law(study(context=0), refits=100)
    with pytest.raises(UserError, match="training context length"):
        equal_training(unknown, study(context=0), QUESTION)


# ------------------------------------------------------------------------------ on the terminal


def test_fit_prints_the_token_law(csv, capsys):
    assert cli.main(["fit", str(csv), "--refits", "100"]) == 0
    out = capsys.readouterr().out
    for told in (
        "Token law: L = (a/N)^b + E + B D^-beta; E, B and beta shared",
        "B D^-beta, nats with 90% intervals",
        "nats tokens^beta",
        "D=",  # names that tell budgets apart
    ):
        assert told in out
    assert cli.main(["fit", str(csv), "--refits", "100", "--at-tokens", "1e10", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["token_law"]["curves_at_tokens"] == 1e10
    assert told["token_law"]["beta"] == pytest.approx(BETA, abs=0.02)


def test_frontier_at_equal_training_flops(csv, capsys):
    ask = ["frontier", str(csv), "--refits", "100", "--contexts", "131072"]
    align = [*ask, "--align", "training", "--train-context", "131072"]
    assert cli.main([*align, "--baseline-run", "3e8,9e9"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "For the training FLOPs of (8,8) at 300M parameters on 9.00G tokens" in out
    assert "6 N D + 6 T L d_h n_h D (causal, Tbar = T/2, without the output matrix)" in out
    assert "Cheapest to serve at 131,072 tokens by Z" in out
    assert cli.main([*align, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["goals"][0]["served"]["131072"][0]["heads"] in ([4, 1], [1, 1])
    assert cli.main(ask) == 0
    assert "whatever N is, every run brought there" in " ".join(capsys.readouterr().out.split())
    for wrong, why in (
        ([*align, "--baseline-run", "big"], "must be N,D"),
        ([*ask, "--baseline-run", "1e9,2e10"], "belongs to --align training"),
        (["frontier", "chen2025", "--align", "training"], "need a token law"),
    ):
        assert cli.main(wrong) == 2
        assert why in capsys.readouterr().err


def test_the_report_holds_the_law_and_the_tables(csv, capsys, tmp_path):
    path = tmp_path / "report.html"
    ask = ["report", str(csv), "--refits", "100", "--contexts", "131072", "--output", str(path)]
    assert cli.main([*ask, "--data"]) == 0
    assert "Token law" in capsys.readouterr().out
    text = path.read_text()
    assert "Token law: L = (a/N)^b + E + B D^-beta" in text
    assert "Lowest loss for these training FLOPs" in text
    assert json.loads((tmp_path / "aligned.json").read_text())["baseline"] == [8, 8]
    assert json.loads((tmp_path / "token_law.json").read_text())["formula"]


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(noisy, width):
    found = equal_training(noisy, study(0.002, seed=1), QUESTION, train_context=65536)
    out = io.StringIO()
    Console(file=out, width=width).print(
        *law_tables(estimate(study(0.002), refits=100)), aligned_answer(found)
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
