"""What can be asked and answered has limits: any study ends with an answer or a line, in little memory."""

import math
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from study_kit import answered, read, small_study

from gqa_scaling.cli import main
from gqa_scaling.config import MOST_LAYERS, Question, UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.ladder import MOST_PARAMETERS, REACH
from gqa_scaling.study.equal_cost import largest
from gqa_scaling.study.equal_training import equal_training
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import from_csv, published
from gqa_scaling.study.report.sentences import sentence
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.suggest import Belief, Decider, Runs
from gqa_scaling.study.tokens import token_law

NEAR_FLOOR = Path(__file__).parent / "twelve_runs_near_floor.csv"
LINE = "n_heads,n_kv_heads,n_layers,d_model,context_length,loss\n"


def ends_well(seed: int, refits: int, page: Path | None = None) -> None:
    """A study ends with an answer that holds, or with one line."""
    study, told = small_study(seed), ""
    try:
        answer = answered(*study, refits, page)
    except UserError as error:
        told = str(error)
    if told:
        assert "\n" not in told
        return
    family = family_of(read(study[0]))
    for each in answer.answers:
        for choice in each.choices:
            low, high = family.reach(choice.heads)
            least, most = choice.n_interval
            assert low <= choice.n <= high or choice.n == math.inf
            assert low <= least <= most
            assert most <= high or most == math.inf
            assert choice.unreachable > 0 or most < math.inf
            assert choice.equal_cost.n <= high or math.isnan(choice.equal_cost.n)
            assert choice.reached or choice.cost == math.inf


@pytest.mark.parametrize("first", range(0, 40, 5))
def test_small_studies_end_with_an_answer_or_a_line(first):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + 5):
        ends_well(seed, refits=100)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1300, 10))
def test_hundreds_of_small_studies_end_so_with_a_page_too(first, tmp_path):
    tracemalloc.start()
    ends_well(first, 1000, tmp_path / "report.html")
    for seed in range(first + 1, first + 10):
        ends_well(seed, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**29


# ---------------------------------------------------------------------------- what can be built


def test_refits_that_ask_for_endless_models_take_no_memory():
    """Twelve runs with one window; a loss near E asks some refits for 2^42 layers and more."""
    r = from_csv(NEAR_FLOOR)
    found = fit(r)
    tracemalloc.start()
    answer = frontier(found, r, Question(losses=(4.6,), contexts=(4096,), baseline=(4, 2)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    draws = found.draws.n_star(4.6)
    beyond = draws > REACH[1] * r.n_params.max()
    assert (beyond & np.isfinite(draws)).any()  # some ask for more than can be built
    for choice in answer.answers[0].choices:
        k = found.index(choice.heads)
        assert choice.unreachable == beyond[:, k].mean() > 0.05
        assert choice.n_interval[1] == math.inf  # neither cut off nor left out


def test_reach_is_that_of_the_study_and_has_ends():
    r = published()
    family = family_of(r)
    assert family.reach((8, 8)) == (REACH[0] * r.n_params.min(), MOST_PARAMETERS)
    n = np.array([0.0, 1e3, 1e6, 1e15, 1.01e15, np.inf])
    least = REACH[0] * r.n_params.min()
    assert family.within(n, (8, 8)).tolist() == [least, least, 1e6, 1e15, np.inf, np.inf]
    rows = [
        f"{h},1,{layers},8,64,{5 - 0.1 * i}"
        for h in (1, 2)
        for i, layers in enumerate((600, 800, 900))
    ]
    thin = family_of(read(LINE + "\n".join(rows)))
    high = thin.reach((2, 1))[1]
    layers, _ = thin.shape(np.array([high]), (2, 1))
    assert layers[0] == pytest.approx(MOST_LAYERS)
    assert high < 1e6 * thin.trained[1]


def test_a_target_just_above_the_floor_is_out_of_reach():
    r = published()
    found = fit(r, refits=100)
    loss = found.floor + 1e-6
    assert np.isfinite(found.curves.n_star(loss)).all()
    answer = frontier(found, r, Question(losses=(loss,), contexts=(8192,)))
    best = answer.answers[0].best
    assert (best.n, best.reached, answer.answers[0].model) == (math.inf, False, None)
    assert "it is out of reach" in sentence(answer)
    assert any("any size that can be built, up to 1.00P parameters" in f for f in answer.flags)


def test_a_target_that_every_model_reaches_is_said_so():
    r = published()
    found = fit(r, refits=100)
    answer = frontier(found, r, Question(losses=(90.0,), contexts=(8192,)))
    assert answer.answers[0].best.n == family_of(r).reach((1, 1))[0]
    assert any("the smallest size that can be built reaches 90 nats" in f for f in answer.flags)


def test_a_joint_law_reaches_as_far_as_separate_curves():
    found = fit(published(), law="product", refits=100)
    n = np.geomspace(1e4, MOST_PARAMETERS, 50)
    for k in range(len(found.heads)):
        loss = found.curves.loss(k, n)
        assert (np.diff(loss) < 0).all()
        assert found.curves.n_star(float(loss[-2]))[k] == pytest.approx(n[-2], rel=1e-3)


def test_suggestions_cost_finite_whatever_the_target():
    r = published()
    heads = sorted(set(r.heads))
    done = Runs.of(list(zip(r.heads, r.n_layers, r.d_model, strict=True)), heads)
    belief = Belief(heads, done, r.loss)
    decider = Decider(r, heads, Question(losses=(0.01, 2.0, 100.0)))
    least, none, most = decider.costs(belief, belief.mode)[::3]
    assert np.isfinite([least, none, most]).all()
    assert (least == none).all()  # the largest size that can be built
    assert (least > most).all()


# ------------------------------------------------------------------------------ equal costs


def test_the_largest_size_is_exact_whichever_way_costs_bend():
    grid = np.geomspace(1.0, 1e6, 40)
    for power in (0.2, 0.5, 3.0, 9.0):

        def load(n, power=power):
            return np.log(n) ** power + 1, np.zeros_like(n)

        n = np.array([3.0, 777.0, 4.2e5])
        assert largest(load, grid, load(n)[0]) == pytest.approx(n, rel=1e-9)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from([0.0, 0.9, 1.5]))
def test_no_size_comes_out_smaller_at_its_own_cost(seed, place, held):
    """Costs that fall in places, each with an error of rounding that differs from call to call."""
    rng = np.random.default_rng(seed)
    nodes = np.sort(rng.uniform(0, np.log(1e6), 6))
    height = np.cumsum(rng.uniform(-0.3, 1.0, 6))

    def load(n):
        x = np.log(n)
        cost = np.exp(np.interp(x, nodes, height) + 0.01 * x + 0.3 * np.sqrt(1 + x))
        rounded = 1 + rng.integers(-4, 5, np.shape(n)) * 2.0**-53
        return cost * rounded, np.full(np.shape(n), held)

    grid = np.union1d(np.geomspace(1.0, 1e6, 300), np.exp(nodes))
    known = np.r_[np.exp(place * np.log(1e6)), np.exp(nodes[2]), np.inf]
    budgets = np.where(np.isinf(known), np.inf, load(np.where(np.isinf(known), 1.0, known))[0])
    found = largest(load, grid, budgets, known)
    assert np.isnan(found[2])
    if held > 1:
        assert np.isnan(found).all()
    else:
        assert (found[:2] >= known[:2]).all()
        assert (load(found[:2])[0] <= budgets[:2] * (1 + 1e-11)).all()


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--losses 101", "target loss=101.0 must be a number from 0.01 to 100 nats per token"),
        ("--losses 1e300", "losses[0]=1e+300 must be finite"),
        ("--losses 0", "target loss=0.0"),
        ("--losses nan", "--losses: nan must be a finite number"),
        ("--losses 2.8 inf", "--losses: inf must be a finite number"),
        ("--contexts 0", "context=0 must be a number from 1 to 1e+12 tokens"),
        ("--contexts 8192 -1", "context=-1"),
        ("--contexts 1000000000001", "context=1000000000001 must be a number from 1"),
        (f"--contexts {10**30}", f"contexts[0]={10**30}"),
        (f"--contexts {10**400}", "contexts[0]=1000"),
        ("--contexts 1e30", "invalid int value: '1e30'"),
        ("--alpha 1e6", "alpha=1000000.0 must be a number from 0.01 to 4"),
        ("--alpha 0", "alpha=0.0"),
        ("--beta 1e-300", "beta=1e-300"),
        ("--beta nan", "--beta: nan must be a finite number"),
        ("--lambda 1.5", "lambda=1.5 must be a number from 0 to 1"),
        ("--lambda nan", "--lambda: nan must be a finite number"),
        ("--batch 0", "batch=0 must be a number from 1 to 1e+09 sequences"),
        (f"--batch {10**400}", "batch=1000"),
        ("--weight-bytes 1e300", "weight_bytes=1e+300 must be a number from 0.01 to 100"),
        ("--cache-bytes -2", "cache_bytes=-2"),
        ("--cache-bytes nan", "--cache-bytes: nan must be a finite number"),
        ("--fit-gib nan", "--fit-gib: nan must be a finite number"),
        ("--fit-gib 1e13", "--fit-gib=10000000000000.0 must be a number from 1e-06 to 1e+12 GiB"),
        ("--fit-gib 0", "--fit-gib=0"),
        ("--kv-multiple 0", "kv_multiple=0"),
        ("--hardware v5e --price inf", "--price: inf must be a finite number"),
        ("--hardware v5e --price 1e7", "price=10000000.0 must be a number from 0 to 1e+06 dollars"),
        (
            "--hardware v5e --price 0 --objective dollars",
            "objective='dollars' needs a price above 0",
        ),
        ("--objective seconds", "objective='seconds' needs hardware"),
        ("--price 5", "--price 5.0 is that of a machine: name it with --hardware or --cost"),
        ("--refits 1000000000", "refits=1000000000 must be a number from 100 to 10000"),
        ("--refits 99", "refits=99"),
        ("--refits -5", "refits=-5"),
        ("--refits 1e9", "invalid int value: '1e9'"),
        (f"--flat-from {10**30}", "flat_from=1000"),
        ("--flat-from -1", "flat_from=-1"),
        ("--at-tokens 1e300", "at_tokens=1e+300 must be a number from 1 to 1e+18 tokens"),
        ("--at-tokens nan", "--at-tokens: nan must be a finite number"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_fitted(
    arguments, said, monkeypatch, capsys
):
    def fitted(*_, **__):
        raise AssertionError("it was fitted first")

    monkeypatch.setattr("gqa_scaling.study.estimates.points", fitted, raising=False)
    monkeypatch.setattr("gqa_scaling.study.fit.points", fitted)
    for verb in ("frontier", "report"):
        assert main([verb, "chen2025", *arguments.split()]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("gqa-scaling: ")
        assert said in err
        assert err.count("\n") == 1
        assert len(err) < 300


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("loss", "0.0027", "loss='0.0027' must lie between 0.01 and 100 nats per token"),
        ("loss", "1e30", "loss='1e30'"),
        ("loss", "1e300", "loss='1e300'"),
        ("loss", "1e400", "loss='1e400' must be a number above 0"),
        ("n_params", "1e300", "n_params='1e300' must lie between 1 and 1e+15 parameters"),
        ("n_params", "1e-300", "n_params='1e-300'"),
        ("n_layers", "1e12", "n_layers='1e12' must lie between 1 and 10000 layers"),
        ("d_model", "1e15", "d_model='1e15'"),
        ("d_model", "2e9", "its shape has 3.84e+20 parameters and may have at most 1e+15"),
        ("n_heads", "1e9", "n_heads='1e9' must lie between 1 and 10000 heads"),
        ("head_dim", "1e12", "head_dim='1e12'"),
        ("context_length", "1e15", "context_length='1e15' must lie between 1 and 1e+12 tokens"),
        ("tokens", "1e300", "tokens='1e300' must lie between 1 and 1e+18 tokens"),
        ("tokens_per_param", "1e300", "tokens_per_param='1e300'"),
        ("vocab_size", "1e15", "vocab_size='1e15'"),
    ],
)
def test_a_value_in_a_file_that_cannot_be_is_refused_with_its_line(column, value, said):
    columns = {"n_heads": "8", "n_kv_heads": "1", "n_layers": "12", "d_model": "768", "loss": "3"}
    with pytest.raises(UserError) as caught:
        read(
            "\n".join(
                (",".join(columns | {column: 0}), ",".join((columns | {column: value}).values()))
            )
        )
    told = str(caught.value)
    assert told.startswith("study.csv line 2: ")
    assert said in told
    assert told.endswith("mend the line, or leave it out") or "above 0" in told


def test_a_baseline_run_or_a_length_out_of_reach_is_refused():
    rows = []
    for h, kv in ((8, 8), (8, 1)):
        for layers in (4, 6, 8):
            n = n_formula(layers, 64 * layers, h, kv)
            for ratio in (10, 20, 40):
                loss = 1.5 + (1e7 / n) ** 0.2 + 30 * (ratio * n) ** -0.2
                rows.append(f"{h},{kv},{layers},{64 * layers},8192,{ratio},{loss:.6f}")
    header = "n_heads,n_kv_heads,n_layers,d_model,context_length,tokens_per_param,loss\n"
    r = read(header + "\n".join(rows))
    law = token_law(r, refits=100)
    equal_training(law, r, Question(contexts=(8192,)), baseline_run=(1e7, 1e9))
    for run in ((1e300, 1e9), (1e7, 1e300), (math.nan, 1e9), (-1e7, 1e9), (1e7, 0.0)):
        with pytest.raises(UserError, match=r"must be N and D: N from .* and D from 1 to 1e\+18"):
            equal_training(law, r, baseline_run=run)
    with pytest.raises(UserError, match="train_context=10000"):
        equal_training(law, r, train_context=10**30)


def test_a_dearest_question_and_a_flattest_one_are_answered():
    """The largest powers and contexts that may be asked for leave no cost without a number."""
    r = published()
    found = fit(r, refits=100)
    q = Question(losses=(2.8,), contexts=(1, 10**12), memory_power=4, compute_power=4)
    for question in (q, Question(losses=(2.8,), memory_power=0.01, compute_power=0.01)):
        for answer in frontier(found, r, question, serving=Serving(batch=10**9)).answers:
            assert all(math.isfinite(c.cost) for c in answer.choices)
            assert answer.best.saving["z"] >= 0


def test_two_sizes_are_too_few_in_one_line(capsys):
    args = ["chen2025", "--without", "L12*", "L16*", "L20*", "L24*"]
    for verb in ("frontier", "compare", "fit"):
        assert main([verb, args[0], *(["8,1", "1,1"] if verb == "compare" else []), *args[1:]]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "too few runs to fit" in err or "needs" in err
