"""Dense and sharded configurations in one study: results, costs, the law's sparsity, the answers."""

import csv
import dataclasses
import io
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.optimize import approx_fprime
from study_kit import failing

from gqa_scaling import cli, context_sharding, costs
from gqa_scaling.config import ModelConfig, Question, RunConfig, UserError
from gqa_scaling.context_sharding import ContextSharding, density, kv_cache_values
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.follow_ups import follow_up
from gqa_scaling.study import fit as fitting
from gqa_scaling.study.baseline import default_baseline
from gqa_scaling.study.compare import compare
from gqa_scaling.study.estimates import Estimates, estimate
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import from_csv, published
from gqa_scaling.study.report import pictures
from gqa_scaling.study.report.answers import frontier_answer, ranking_table
from gqa_scaling.study.report.csv_files import frontier_csv, results_csv
from gqa_scaling.study.report.estimates import fit_table
from gqa_scaling.study.report.looks import looks
from gqa_scaling.study.report.loss_pictures import loss_by_position
from gqa_scaling.study.report.pictures import all_figures
from gqa_scaling.study.report.sentences import model_text
from gqa_scaling.study.report.tradeoffs import sparsity_table
from gqa_scaling.study.report.write import Beside, write_report
from gqa_scaling.study.results import COLUMNS, heads_of, pair, pairs, table
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import effective_context, family_of, training_keys
from gqa_scaling.study.solver import solve_point
from gqa_scaling.study.sparsity import _cheapest, sparsity
from gqa_scaling.study.study import Study
from gqa_scaling.study.suggest import Belief, Runs, suggest
from gqa_scaling.study.tokens import token_law
from gqa_scaling.study.trainer import Trainer

T = 4096
STRIDED = ContextSharding(64, 4, 8)
HYBRID = ContextSharding(64, 4, 8, dense_layers="every 2")
WINDOW = ContextSharding(64, 4)
SPARSER = ContextSharding(64, 8, 16)
HALF = ContextSharding(64, 4, 8, dense_kv_heads=1)
PATTERNS = (None, STRIDED, HYBRID, WINDOW, SPARSER)
EVERYTHING = ContextSharding(64, 2**20)  # a window that no context fills
R, E = 0.03, 1.9


def study(
    patterns=PATTERNS, heads=((8, 8), (8, 2)), noise=0.0, seed=0, rate=R, ratios=(20,), context=T
):
    """Runs whose excess loss over E is as density^-(rate / ln 2), at five sizes."""
    rng, rows = np.random.default_rng(seed), []
    choices = itertools.product(heads, patterns, (4, 6, 8, 12, 16), ratios)
    for (h, kv), pattern, layers, ratio in choices:
        n = n_formula(layers, 64 * layers, h, kv)
        backbone = n_formula(layers, 64 * layers, 0, 0)
        share = density(pattern.layers(layers, kv), context) if pattern else 1.0
        level = -0.1 - 0.04 * math.log2(h) - 0.015 * math.log2(kv) - rate * math.log2(share)
        loss = E + math.exp(level - 0.2 * math.log(backbone / 3e7)) + 30 * (ratio * n) ** -0.25
        loss -= 30 * (20 * n) ** -0.25 if len(ratios) == 1 else 0
        row = dict.fromkeys(("evaluation", "tokenizer", "corpus"), "")
        row |= {"name": f"L{layers} {pair(heads_of(h, kv, pattern))}", "pattern": pattern}
        row |= {"n_heads": h, "n_kv_heads": kv, "head_dim": 64, "n_layers": layers}
        row |= {"d_model": 64 * layers, "n_params": n, "context_length": context, "seed": 0}
        row |= {"tokens": ratio * n, "loss": loss * (1 + noise * rng.standard_normal())}
        rows.append(row | {"learning_rate": 1e-3, "epochs": 1.0, "vocab_size": 50304})
    return table(rows, source="synthetic", count="n_formula")


@pytest.fixture(scope="module")
def exact():
    r = study()
    return r, fit(r, refits=100)


@pytest.fixture(scope="module")
def noisy():
    r = study(noise=0.001)
    return r, fit(r, refits=200)


# ------------------------------------------------------------------------------------- results


def test_a_dense_configuration_is_the_plain_pair():
    assert heads_of(np.int64(8), np.int64(2), None) == (8, 2)
    assert pair((8, 2)) == "(8,2)"
    sharded = heads_of(8, 2, HYBRID)
    assert sharded != (8, 2)
    assert pair(sharded) == "(8,2) b64 w4 s8 +dense every 2"
    assert sorted([sharded, (8, 4), (8, 2, WINDOW), (8, 2)]) == [
        (8, 2),
        (8, 2, WINDOW),
        sharded,
        (8, 4),
    ]
    assert pairs([(8, 1), (4, 1)]) == "(8,1) (4,1)"
    assert pairs([(8, 1), (4, 1, WINDOW)]) == "(8,1), (4,1) b64 w4"
    assert default_baseline([(8, 2), (8, 8, WINDOW), (4, 4)]) == (8, 2)
    assert default_baseline([(8, 2, STRIDED), (8, 2, WINDOW)]) == (8, 2, STRIDED)


def test_the_written_csv_reads_back_with_its_patterns(tmp_path):
    r = study((None, ContextSharding(64, 2, sinks=1, dense_layers="first 1, every 3"), HALF))
    (tmp_path / "r.csv").write_text(results_csv(r))
    again = from_csv(tmp_path / "r.csv")
    assert again.heads == r.heads
    for column in COLUMNS:
        a, b = getattr(again, column), getattr(r, column)
        assert (a == b).all() or np.allclose(
            a.astype(float), b.astype(float), rtol=0, equal_nan=True
        )
    assert again.rows() == r.rows()
    assert json.loads(json.dumps(r.rows()))[5]["pattern_dense_layers"]


def test_no_gain_by_rereading_is_not_an_unknown_one(tmp_path):
    r = published()
    gains = np.array([0.0, -0.01, np.nan, *np.full(len(r) - 3, 0.5)])
    (tmp_path / "r.csv").write_text(results_csv(dataclasses.replace(r, gained_by_rereading=gains)))
    np.testing.assert_array_equal(from_csv(tmp_path / "r.csv").gained_by_rereading, gains)


def test_a_dense_csv_says_nothing_of_patterns():
    header = results_csv(published()).splitlines()[0]
    assert header.endswith("tokenizer,corpus,gained_by_rereading,n_count")
    assert "pattern" not in header


HEADER = "n_heads,n_kv_heads,n_layers,d_model,context_length,loss,pattern_block,pattern_local"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"{HEADER}\n4,2,2,128,512,2.5,16,\n", ("line 2", "needs column pattern_local")),
        (f"{HEADER}\n4,2,2,128,,2.5,16,2\n", ("line 2", "needs column context_length")),
        (f"{HEADER}\n4,2,2,128,512,2.5,16,1.5\n", ("line 2", "pattern_local='1.5'", "whole")),
        (
            f"{HEADER},pattern_dense_layers\n4,2,2,128,512,2.5,16,2,odd\n",
            ("line 2", "'odd' is none of them"),
        ),
        (
            f"{HEADER},pattern_dense_kv_heads\n4,2,2,128,512,2.5,16,2,2\n",
            ("line 2", "dense_kv_heads=2 must be less than n_kv_heads=2"),
        ),
    ],
)
def test_malformed_patterns_get_one_line(tmp_path, text, parts):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(UserError) as error:
        from_csv(tmp_path / "r.csv")
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_one_shape_with_two_patterns_is_no_contradiction(tmp_path):
    (tmp_path / "r.csv").write_text(
        f"{HEADER}\n4,2,2,128,512,2.5,16,2\n4,2,2,128,512,2.6,16,4\n4,2,2,128,512,2.4,,\n"
    )
    r = from_csv(tmp_path / "r.csv")
    assert [pair(h) for h in r.heads] == ["(4,2) b16 w2", "(4,2) b16 w4", "(4,2)"]
    assert r.density[2] == 1
    assert r.density[0] == density(ContextSharding(16, 2).layers(2, 2), 512)


# --------------------------------------------------------------------------------------- costs


@given(
    st.sampled_from([STRIDED, HYBRID, HALF, ContextSharding(16, 1, 5, dense_layers="first 3")]),
    st.floats(3.5, 60),
    st.integers(1, 5000),
)
def test_what_is_read_at_a_real_depth_lies_straight_between_whole_ones(pattern, layers, context):
    heads = (8, 4, pattern)
    low, high = math.floor(layers), math.ceil(layers)
    exact = [
        (L, L * context_sharding.effective_context(pattern.layers(L, 4), context))
        for L in (low, high)
        if L > 3
    ]
    found = layers * effective_context(heads, np.array(layers), context)
    if len(exact) == 2:
        assert found == pytest.approx(np.interp(layers, *zip(*exact, strict=True)), rel=1e-9)
    tbar = training_keys(heads, np.array(float(high)), context)
    model = ModelConfig(high, 64, 8, 4, pattern=pattern)
    assert tbar == pytest.approx(costs.training_keys(model, context), rel=1e-9)


def test_a_dense_configuration_reads_its_context_to_the_digit():
    assert effective_context((8, 2), np.array([2.5, np.inf]), 8192) == 8192
    assert training_keys((8, 2), np.array(2.5), 8191) == 8191 / 2


@pytest.mark.parametrize("convention", ["per_token", "per_sequence"])
def test_costs_of_runs_by_hand(exact, convention):
    r, _ = exact
    context = 131072
    deployment = Deployment(family_of(r), Question(convention=convention), context)
    for i, heads in enumerate(r.heads):
        L, kv, n = int(r.n_layers[i]), int(r.n_kv_heads[i]), r.n_params[i]
        pattern, keys = r.pattern[i], L * kv * context
        if pattern:
            layers = pattern.layers(L, kv)
            keys = sum(h.keys(context) if h else context for layer in layers for h in layer)
        found = deployment.costs(n, heads)
        assert float(found.memory) == pytest.approx(n + 2 * 64 * keys, rel=1e-9)
        read = 64 * 8 * keys / kv
        by_hand = {"per_token": 2 * n + 4 * read, "per_sequence": context * (n + 2 * read)}
        assert float(found.flops) == pytest.approx(by_hand[convention], rel=1e-9)
        cached = kv_cache_values(layers, context, 64) if pattern else 2 * 64 * keys
        assert 0 <= cached - (found.memory - n) <= 2 * 64 * L * kv * 64  # a block for each head


def test_a_pattern_that_sees_everything_costs_and_answers_as_dense():
    r = study((None, EVERYTHING), rate=0.0)
    found = fit(r, refits=100)
    for answer in frontier(found, r).answers:
        for heads in ((8, 8), (8, 2)):
            dense, same = (answer.choice(h) for h in (heads, (*heads, EVERYTHING)))
            assert same.effective == dense.effective == answer.context
            for name in ("n", "memory", "flops", "z", "bytes"):
                assert getattr(same, name) == pytest.approx(getattr(dense, name), rel=1e-6)


# -------------------------------------------------------------------------------- the frontier


def test_dense_and_sharded_are_ranked_together_by_brute_force(exact):
    r, found = exact
    q = Question(contexts=(T, 65536), losses=(2.7, 2.9))
    answers = frontier(found, r, q)
    assert answers.baseline == (8, 8)
    for answer in answers.answers:
        z, deployment = {}, Deployment(family_of(r), q, answer.context)
        for k, heads in enumerate(found.heads):
            n = found.scale[k] / (answer.loss - found.floor) ** (1 / found.curves.b[k])
            z[heads] = float(deployment.costs(n, heads).z)
        assert [c.heads for c in answer.choices] == sorted(z, key=z.get)
        assert answer.best.z == pytest.approx(min(z.values()), rel=1e-9)
    long = answers.at(2.9, 65536)
    assert len(long.best.heads) == 3
    base = long.choice((8, 8))
    assert long.best.saving["z"] == pytest.approx(1 - long.best.z / base.z)


def test_sharded_runs_leave_the_answers_for_dense_ones_alone():
    """Without noise the curves are what they are, whoever else is in the study."""
    whole, alone = study((None, STRIDED), rate=0.0), study((None,), rate=0.0)
    q = Question(contexts=(32768,), losses=(2.8,))
    both, dense = (frontier(fit(r, refits=100), r, q).answers[0] for r in (whole, alone))
    for heads in ((8, 8), (8, 2)):
        a, b = both.choice(heads), dense.choice(heads)
        assert (a.n, a.z, a.saving["z"]) == pytest.approx((b.n, b.z, b.saving["z"]), rel=1e-6)


def test_the_model_to_build_has_the_pattern_and_what_its_cache_really_holds(noisy):
    r, found = noisy
    answer = frontier(found, r, Question(contexts=(100_000,), losses=(2.8,))).answers[0]
    model, pattern = answer.model, answer.best.heads[2]
    assert model.config.pattern == pattern
    assert model.heads == answer.best.heads
    layers = model.config.layer_patterns
    assert model.cache_bytes == 2 * kv_cache_values(layers, 100_000, 64)
    keys = context_sharding.effective_context(layers, 100_000)
    cache = 2 * keys * model.n_layers * 64 * model.n_kv_heads
    assert model.memory == pytest.approx(model.n + cache, rel=1e-12)
    assert f"pattern=ContextSharding(block=64, local={pattern.local}" in model_text(model)


def test_a_pattern_too_deep_for_the_size_is_ranked_and_not_built():
    deep = ContextSharding(64, 1, dense_layers="3")
    r = study((None, deep), heads=((8, 2),), rate=0.0)
    found = fit(r, refits=100)
    n = n_formula(2, 128, 8, 2)
    loss = float(found.curves.loss(found.index((8, 2, deep)), n))
    answer = frontier(found, r, Question(contexts=(65536,), losses=(loss,))).answers[0]
    assert answer.best.heads == (8, 2, deep)
    assert answer.model is None


def test_what_is_printed_names_patterns_units_and_what_is_untested(noisy):
    r, found = noisy
    q = Question(contexts=(T, 65536), losses=(2.8,))
    answers = frontier(found, r, q)
    console = Console(width=160, file=io.StringIO())
    console.print(frontier_answer(answers), ranking_table(answers.answers[0], answers))
    console.print(fit_table(found))
    text = " ".join(console.file.getvalue().split())
    best = answers.at(2.8, 65536).best
    assert f"with pattern {best.heads[2].label} (T_eff {best.effective:,.0f} tokens)" in text
    assert "(8,2) b64 w4 s8 +dense every 2" in text
    assert "T_eff in tokens: the keys that a head reads and keeps" in text
    assert "costs no more loss there than at the 4,096 tokens it was trained at is untested" in text
    assert any("losses of sharded configurations, too" in flag for flag in answers.flags)
    inside = frontier(found, r, dataclasses.replace(q, contexts=(T,)))
    assert not any("sharded" in flag for flag in inside.flags)
    rows = list(csv.DictReader(io.StringIO(frontier_csv(answers))))
    assert {row["pattern"] for row in rows} == {p.label if p else "" for p in PATTERNS}
    told = json.loads(json.dumps(answers.to_dict(), allow_nan=False))
    best = told["answers"][1]["best"]
    assert best[:2] == list(answers.answers[1].best.heads[:2])
    assert ContextSharding.from_dict(best[2]) == answers.answers[1].best.heads[2]


def test_dense_studies_print_nothing_of_patterns():
    found = fit(published(), refits=100)
    answers = frontier(found, published())
    assert not answers.sharded
    assert sparsity(found, published(), answers) is None
    console = Console(width=160, file=io.StringIO())
    console.print(frontier_answer(answers), fit_table(found))
    text = console.file.getvalue()
    assert "T_eff" not in text
    assert "pattern" not in text
    assert "pattern" not in frontier_csv(answers)


# ------------------------------------------------------------------------ the law and its rate


def truth_of(law, r):
    """Losses of a law: those of `study` for the product, the sum's with the same sparsity."""
    if law != "sum":
        return r
    h, kv = r.n_heads.astype(float), r.n_kv_heads.astype(float)
    x = np.log(n_formula(r.n_layers, r.d_model, 0, 0) / 3e7)
    points = fitting.points(r)
    share = dict(zip(points.heads, points.density, strict=True))
    spare = R * np.log2([share[heads] for heads in r.heads])
    excess = np.exp(-0.4 - 0.2 * x - spare) * (1 + 0.5 * h**-0.6 + 0.2 * kv**-0.6)
    return dataclasses.replace(r, loss=E + excess)


HEADS = ((1, 1), (2, 2), (4, 1), (8, 2))


@pytest.mark.parametrize("law", ["product", "fading"])
def test_the_rate_is_recovered(law):
    r = truth_of(law, study((None, STRIDED, WINDOW, SPARSER), heads=HEADS))
    found = fit(r, law=law, refits=100)
    assert found.floor == pytest.approx(E, abs=1e-3)
    assert found.constants["r"][0] == pytest.approx(R, abs=2e-4)
    assert "r log2(1/density)" in found.formula
    for k in (0, 3):
        n = float(found.curves.n_star(2.7)[k])
        assert float(found.curves.loss(k, n)) == pytest.approx(2.7, abs=1e-9)
    assert fit(published(), law=law, refits=100).formula.count("density") == 0


@pytest.mark.parametrize("law", ["product", "fading"])
def test_the_jacobian_with_density_is_the_derivative(law):
    p = fitting.points(study(heads=HEADS, noise=0.001))
    model = fitting.make_model(law, p, 64)
    assert "r" in model.names
    found = solve_point(model, p.loss, np.ones(len(p.n)))
    numeric = approx_fprime(found.parameters, lambda q: model.predict(q[None])[0])
    assert np.allclose(found.jacobian, numeric, atol=2e-6)


def test_the_rates_interval_holds_it_and_shrinks_with_the_noise():
    held, width = [], []
    for seed in range(20):
        low, high = fit(study(noise=0.002, seed=seed), law="product", refits=200).constants["r"][1]
        held.append(low <= R <= high)
        width.append(high - low)
    assert np.mean(held) >= 0.75  # 90%, less what 20 draws may miss
    quiet = fit(study(noise=0.0005), law="product", refits=200).constants["r"][1]
    assert np.ptp(quiet) < 0.4 * np.median(width)


def test_a_rate_needs_densities_that_differ():
    one = fit(study((STRIDED,)), law="product", refits=100)
    assert "r" not in one.names
    assert any("one density: what sparsity costs" in flag for flag in one.flags)
    two = fit(study((None, STRIDED)), law="product", refits=100)
    assert two.constants["r"][0] == pytest.approx(R, abs=1e-4)
    assert any("two densities" in flag for flag in two.flags)
    three = fit(study((None, STRIDED, WINDOW)), law="product", refits=100)
    assert not any("densit" in flag for flag in three.flags)
    heads = ((1, 1), (8, 2))
    r = study((None, WINDOW), heads)
    mixed = np.array([len(h) == (3 if h[0] == 8 else 2) for h in r.heads])
    tangled = fit(r.select(mixed), law="product", refits=100)  # sparse only where heads are many
    assert tangled.rank < tangled.n_parameters


def test_one_pair_of_heads_is_enough_for_the_rate():
    found = fit(study(heads=((8, 2),)), law="product", refits=100)
    assert found.names == ("E", "u", "b", "r")
    assert found.rank == 4
    assert found.constants["r"][0] == pytest.approx(R, abs=2e-4)


def test_patterns_left_out_are_predicted():
    r = study(noise=0.0005)
    scores = {s.law: s for s in compare(r)}
    assert scores["separate"].unseen_patterns is None
    for law in ("product", "fading"):
        assert scores[law].unseen_patterns < 0.003
        assert scores[law].unseen_heads < 0.003
    # what the rate is worth: patterns said to be as good as dense ones are missed by far
    p = dataclasses.replace(fitting.points(r), density=np.ones(10))
    model = fitting.make_model("product", p, 64)
    seen = np.array([len(p.heads[k]) < 3 for k in p.curve])
    y = np.where(seen, p.loss, p.loss[seen].max())
    found = solve_point(model, y, seen.astype(float))
    error = (model.predict(found.parameters[None])[0] - p.loss)[~seen]
    assert np.sqrt(np.mean(error**2)) > 0.03
    told = scores["product"].to_dict()
    assert "leave_one_pattern_out_nats" in told


# --------------------------------------------------------------------------------- the trade-off


def test_the_trade_off_is_the_truths(exact):
    r, found = exact
    answers = frontier(found, r, Question(contexts=(T, 65536), losses=(2.8,)))
    traded = sparsity(found, r, answers)
    assert len(traded.rows) == 8
    shares = [row.density for row in traded.rows]
    assert shares == sorted(shares, reverse=True)
    strided = next(row for row in traded.rows if row.heads == (8, 8, STRIDED))
    excess = float(found.curves.loss(found.index((8, 8)), traded.n)) - E
    wanted = excess * math.expm1(-R * math.log2(strided.density))
    assert strided.loss == pytest.approx(wanted, rel=0.02)
    answer = answers.at(2.8, 65536)
    twin = answer.choice((8, 8))
    assert strided.saving == pytest.approx(1 - answer.choice(strided.heads).z / twin.z)
    assert traded.rate == pytest.approx(R, abs=2e-4)
    assert traded.halving == pytest.approx(traded.excess * math.expm1(traded.rate))
    assert [c.context for c in traded.cheapest] == [T, 65536]
    assert traded.cheapest[1].heads == answer.best.heads
    assert traded.cheapest[1].density < traded.cheapest[0].density
    json.dumps(traded.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("share", "told"), [(0.2, "20"), (1.0, "100")])
def test_failed_refits_of_the_rate_are_said(monkeypatch, share, told):
    r = study((None, HYBRID, WINDOW), noise=0.001)
    found = fit(r, refits=100)
    answers = frontier(found, r, Question(contexts=(T,), losses=(2.8,)))
    failing(monkeypatch, share)
    traded = sparsity(found, r, answers)
    assert (traded.rate is None) == (share == 1.0)  # no rate, and no interval, from nothing
    note = sparsity_table(traded, "z").notes[1]
    assert f"{told} of 100 refits did not converge" in note


def test_a_pattern_without_a_dense_twin_has_no_cost_and_no_saving():
    r = study((STRIDED, WINDOW))
    found = fit(r, refits=100)
    traded = sparsity(found, r, frontier(found, r, Question(losses=(2.8,))))
    assert all(math.isnan(row.loss) and math.isnan(row.saving) for row in traded.rows)
    assert traded.rate == pytest.approx(R, abs=2e-4)
    assert traded.halving is None
    alone = study((STRIDED,), heads=((8, 2), (8, 8)))
    found = fit(alone, refits=100)
    traded = sparsity(found, alone, frontier(found, alone, Question(losses=(2.8,))))
    assert traded.rate is None
    assert "do not tell what density does" in traded.no_rate
    console = Console(width=160, file=io.StringIO())
    console.print(sparsity_table(traded, "z"))
    assert "No rate of loss by density" in console.file.getvalue()


def test_the_page_of_a_sharded_study(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "rendered", lambda *_: b"<svg/>")  # takes seconds
    r = study((None, HYBRID, WINDOW), heads=((8, 2),), noise=0.001)
    found = fit(r, refits=100)
    answers = frontier(found, r, Question(contexts=(T, 65536), losses=(2.8,)))
    whole, beside = Study(r, Estimates(found), answers), Beside(figures="svg", data=True)
    text = write_report(tmp_path / "report.html", whole, beside=beside).read_text()
    assert "<h2>Dense and sharded</h2>" in text
    assert "(8,2) b64 w4 s8 +dense every 2" in text
    assert "each halving of density multiplies the excess loss over E by exp(r) = 1.0" in text
    assert (tmp_path / "figures" / "loss_against_density.svg").exists()
    assert json.loads((tmp_path / "sparsity.json").read_text())["train_context"] == T
    assert from_csv(tmp_path / "results.csv").heads == r.heads
    only = study((STRIDED, WINDOW), noise=0.001)
    curves = fit(only, refits=100)
    alone = frontier(curves, only, Question(contexts=(T,), losses=(2.8,)))
    shown = all_figures(Study(only, Estimates(curves), alone))
    assert not {"loss_against_heads", "loss_against_density"} & set(shown)


def test_heads_that_nobody_trained_count_as_dense():
    shares = {(1, 1): 0.5, (8, 2): 0.3, (8, 2, WINDOW): 0.2}
    choices = [SimpleNamespace(heads=h, probability=share) for h, share in shares.items()]
    answer = SimpleNamespace(context=T, choices=choices, best=choices[0])
    points = SimpleNamespace(density=np.array([1.0, 0.2]))
    trained = SimpleNamespace(heads=((8, 2), (8, 2, WINDOW)), points=points)
    assert _cheapest(answer, trained).probability == pytest.approx(0.8)


def test_every_sharded_configuration_looks_different():
    many = [heads_of(h, kv, p) for h, kv in ((8, 8), (8, 2), (4, 1)) for p in (*PATTERNS, HALF)]
    for heads in (many, [h for h in many if h[:2] == (8, 2)], [(8, 2, p) for p in PATTERNS[1:]]):
        assert len({(v["color"], v["marker"]) for v in looks(heads).values()}) == len(heads)


def test_the_command_line_takes_sharded_runs(tmp_path, capsys):
    file = tmp_path / "r.csv"
    file.write_text(results_csv(study((None, STRIDED, WINDOW), noise=0.001)))
    asked = [str(file), "--losses", "2.8", "--contexts", "65536", "--refits", "100"]
    assert cli.main(["frontier", *asked]) == 0
    text = capsys.readouterr().out
    assert "What sparsity costs and saves" in text
    assert "Cheapest density for 2.8 nats" in text
    assert cli.main(["frontier", *asked, "--law", "product", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"]["rate"] == pytest.approx(R, abs=2e-3)
    assert cli.main(["fit", str(file), "--compare", "--refits", "100"]) == 0
    assert "unseen pattern" in capsys.readouterr().out


# --------------------------------------------------------------------------------- other laws


def test_the_wide_laws_take_patterns():
    both = [study((None, STRIDED, WINDOW), noise=0.001, context=t) for t in (2048, T)]
    rows = [{name: getattr(r, name)[i] for name in COLUMNS} for r in both for i in range(len(r))]
    r = table(rows, source="two lengths", count="n_formula")
    found = estimate(r, refits=100, flat_from=2048)
    assert found.context is not None
    assert (8, 2, WINDOW) in found.fit.heads
    # a window is a smaller share of a longer context, so that its differences move
    assert found.flatness.movement.heads[2:] == (WINDOW,)
    traded = sparsity(found.fit, r, frontier(found.fit, r, Question(losses=(2.8,))))
    assert traded.rate is not None


def test_equal_training_flops_count_the_keys_that_are_read():
    r = study((None, HYBRID), ratios=(10, 20, 40), heads=((8, 2),))
    law = token_law(r, refits=100)
    surface, family = law.best.first(law.draws), family_of(r)
    for k, heads in enumerate(law.heads):
        trainer = Trainer(law, surface, k, family, T)
        for L in (4, 8, 16):
            n = n_formula(L, 64 * L, 8, 2)
            model = ModelConfig(L, 64 * L, 8, 2, pattern=heads[2] if len(heads) > 2 else None)
            tbar = costs.training_keys(model, T)
            assert float(trainer.flops_per_token(n)) == pytest.approx(6 * n + 12 * L * tbar * 512)


def test_suggest_believes_in_density(monkeypatch):
    r = study((None, STRIDED, WINDOW), noise=0.001)
    heads = sorted(set(r.heads))
    curve = np.array([heads.index(h) for h in r.heads])
    share = np.array([r.density[curve == k].mean() for k in range(len(heads))])
    runs = Runs.of(list(zip(r.heads, r.n_layers, r.d_model, strict=True)), heads)
    belief = Belief(heads, runs, r.loss, share)
    assert belief.mode[5] == pytest.approx(R, abs=0.01)
    numeric = approx_fprime(belief.mode, lambda t: belief.loss(t, runs)[0])
    assert np.allclose(belief.gradient(belief.mode, runs), numeric, atol=1e-6)
    grid = [
        RunConfig(
            name=f"L{L}-{i}",
            model=ModelConfig(L, 64 * L, 8, 2, pattern=p),
            context_length=T,
            batch_tokens=2**19,
            tokens_per_param=20.0,
        )
        for L in (4, 8, 16)
        for i, p in enumerate(PATTERNS)
    ]
    told = []

    class Spied(Belief):
        def __init__(self, heads, done, loss, density=None, lengths=0):
            told.append(dict(zip(heads, density, strict=True)))
            super().__init__(heads, done, loss, density, lengths)

    monkeypatch.setattr("gqa_scaling.study.suggest.Belief", Spied)
    found = suggest(r, grid, Question(losses=(2.8,), contexts=(65536,)), most=3)
    assert told[0][(8, 8)] == 1
    for pattern in (WINDOW, SPARSER):  # run already, and to do; nearly alike at every depth
        assert told[0][(8, 2, pattern)] == pytest.approx(density(pattern.layers(4, 2), T), rel=0.05)
    assert {s.runs[0].heads for s in found} <= {
        (8, 2, HYBRID),
        (8, 2, SPARSER),
    }  # the rest are done


def test_a_recommended_model_is_trained_as_its_own_pattern_was():
    model = ModelConfig(4, 256, 8, 2)
    runs = [
        RunConfig(
            name=f"r{i}",
            model=dataclasses.replace(model, pattern=p),
            context_length=64,
            batch_tokens=256,
            tokens=25600,
        )
        for i, p in enumerate((STRIDED, None, WINDOW))
    ]
    made = follow_up(runs, dataclasses.replace(model, n_layers=5, pattern=WINDOW))
    assert made.name == "built-L5-d256-h8-kv2-b64-w4"
    assert made.model.pattern == WINDOW
    assert made.note.endswith("of r2")
    assert follow_up(runs, dataclasses.replace(model, n_layers=5)).note.endswith("of r1")


def test_loss_by_position_is_told_against_dense_attention_at_the_largest_size(exact):
    r, _ = exact
    assert loss_by_position(r) is None
    losses = zip(r.name, r.loss, strict=True)
    positions = {str(name): tuple(loss + 0.1 * np.arange(8)) for name, loss in losses}
    figure = loss_by_position(dataclasses.replace(r, positions=positions))
    (axis,) = figure.axes
    assert "L = 16, d = 1024" in axis.get_title("left")
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    dense = r.loss[(r.n_layers == 16) & (r.n_kv_heads == 8) & (r.pattern == None)]  # noqa: E711
    for heads in ((8, 8, STRIDED), (8, 8, WINDOW)):
        sharded = r.loss[[h == heads and n == 16 for h, n in zip(r.heads, r.n_layers, strict=True)]]
        np.testing.assert_allclose(
            lines[pair(heads)].get_ydata(), 1e3 * (sharded - dense).repeat(8), atol=1e-9
        )
        np.testing.assert_allclose(lines[pair(heads)].get_xdata(), (np.arange(8) + 0.5) * T / 8)
