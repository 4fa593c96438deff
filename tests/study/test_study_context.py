"""The context law and the test that differences between configurations do not move with T."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from study_kit import refits_beside_scipys

from gqa_scaling import cli
from gqa_scaling.config import UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.study.context import context_law
from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.fit import fit
from gqa_scaling.study.flatness import flatness
from gqa_scaling.study.models import SeparateCurves
from gqa_scaling.study.points import cells
from gqa_scaling.study.reading import published
from gqa_scaling.study.results import table

TRUTH = {(1, 1): (1.3e8, 0.20), (4, 1): (9.0e7, 0.215), (8, 8): (7.5e7, 0.227)}
DELTA = {2048: 0.08, 8192: 0.02, 32768: 0.0, 131072: -0.015}
FLOOR = 2.1


def power(n, a, b, floor):
    return (a / n) ** b + floor


def study(
    noise=0.0, seed=0, move=0.0, shared=0.0, layers=(12, 16, 20, 24), delta=None, replicates=1
):
    """Runs at every length of `delta`; (4,1) is `move` worse from 32K on, models of one size and
    length err together by `shared`."""
    rng, rows = np.random.default_rng(seed), []
    common = {(s, t): shared * rng.standard_normal() for s in layers for t in DELTA}
    for (h, kv), (a, b) in TRUTH.items():
        for s in layers:
            n = n_formula(s, 64 * s, h, kv)
            for t, offset in (delta or DELTA).items():
                for i in range(replicates):
                    loss = power(n, a, b, FLOOR) + offset + common[s, t]
                    loss += noise * rng.standard_normal()
                    loss *= 1 + (move if (h, kv) == (4, 1) and t > 8192 else 0.0)
                    row = dict.fromkeys(("evaluation", "tokenizer", "corpus"), "")
                    row |= {"name": f"L{s}-h{h}-kv{kv}", "n_heads": h, "n_kv_heads": kv}
                    row |= {"head_dim": 64, "n_layers": s, "d_model": 64 * s, "n_params": n}
                    row |= {"context_length": t, "tokens": 20 * n, "loss": loss, "seed": i}
                    rows.append(row | {"learning_rate": 1e-3, "epochs": 1.0, "vocab_size": 50304})
    return table(rows, source="synthetic", count="n_formula")


# ------------------------------------------------------------------------------------- the law


@settings(max_examples=12, deadline=None)
@given(
    floor=st.floats(0.5, 2.5),
    b=st.lists(st.floats(0.1, 0.4), min_size=2, max_size=4),
    delta=st.lists(st.floats(-0.3, 0.5), min_size=1, max_size=4),
    kept=st.integers(0, 2**31),
)
def test_noise_free_truths_are_recovered_from_unequal_designs(floor, b, delta, kept):
    lengths, rng = (8192, *(16384 * 2**i for i in range(len(delta)))), np.random.default_rng(kept)
    rows, offsets = [], np.r_[0.0, delta]
    for k, slope in enumerate(b):
        for i, n in enumerate(np.geomspace(2e7, 1e9, 6)):
            for j, t in enumerate(lengths):
                if j and i > 1 and rng.random() < 0.4:  # long runs are dear, so some are missing
                    continue
                loss = floor + (1e8 / n) ** slope + offsets[j]
                row = dict.fromkeys(("evaluation", "tokenizer", "corpus"), "")
                row |= {"name": f"{k}{i}{j}", "n_heads": 2**k, "n_kv_heads": 1, "head_dim": 64}
                row |= {"n_layers": 0, "d_model": 0, "n_params": n, "context_length": t}
                row |= {"tokens": 20 * n, "loss": loss, "seed": 0, "learning_rate": np.nan}
                rows.append(row | {"epochs": np.nan, "vocab_size": 0})
    law = context_law(table(rows, source="any", count="n_given"), refits=100)
    at = lengths.index(law.reference)
    assert law.delta == pytest.approx(offsets - offsets[at], abs=1e-6)
    assert law.fit.floor == pytest.approx(floor + offsets[at], abs=1e-6)
    assert law.fit.curves.b == pytest.approx(b, abs=1e-6)
    assert law.fit.converged


def test_the_jacobian_is_the_derivative_and_bulk_refits_are_scipys():
    p, rng = cells(study(0.003), 4, over=("context_length",)), np.random.default_rng(2)
    model = SeparateCurves(p, {str(t): p.context == t for t in DELTA if t != 32768})
    w = p.replicates * rng.uniform(0.5, 2, len(p.context))
    for row, scipys in refits_beside_scipys(model, p, w, rng, xtol=1e-14):
        assert row[:4] == pytest.approx(scipys[:4], abs=1e-5)


def test_the_reference_has_the_most_runs_then_the_longest_context():
    r = study(0.001)
    assert context_law(r, refits=100).reference == 131072
    fewer = r.select((r.context_length <= 8192) | (r.n_layers < 24))
    law = context_law(fewer, refits=100)
    assert law.reference == 8192
    assert list(law.runs.values()) == [12, 12, 9, 9]
    assert law.delta[1] == 0
    assert not law.delta_draws[:, 1].any()


def test_losses_at_other_lengths_do_not_bound_e():
    r = study(delta={2048: -1.2, 8192: 0.0})
    assert r.loss.min() < FLOOR
    law = context_law(r, refits=100)
    assert law.fit.floor == pytest.approx(FLOOR, abs=1e-6)
    assert law.delta == pytest.approx([-1.2, 0.0], abs=1e-6)


def test_every_run_is_brought_to_the_reference_and_uses_follow():
    law = context_law(study(), refits=100)
    found = law.fit
    assert found.context_length == 131072
    at = zip(found.points.curve, found.points.n, strict=True)
    expected = [power(n, *TRUTH[found.heads[k]], FLOOR + DELTA[131072]) for k, n in at]
    assert found.points.loss == pytest.approx(expected, abs=1e-8)
    assert len(set(found.points.name)) == len(found.points.n)  # names say their T
    assert any("131,072 tokens, every run brought there" in flag for flag in found.flags)
    json.dumps({**found.to_dict(), **law.to_dict()}, allow_nan=False)


def test_more_lengths_make_the_curves_surer_and_one_length_agrees_with_fit():
    r = study(0.003, seed=4)
    law = context_law(r, refits=300)
    alone = fit(r, context_length=131072, refits=300)
    assert law.fit.floor == pytest.approx(alone.floor, abs=0.1)
    assert np.ptp(law.fit.floor_interval) < 0.7 * np.ptp(alone.floor_interval)


def test_intervals_of_delta_are_as_wide_as_linear_theory_says():
    def widths(r):
        draws = context_law(r, refits=300).delta_draws[:, :-1]
        return np.ptp(np.percentile(draws, (5, 95), axis=0), axis=0)

    own = np.mean([widths(study(0.003, seed=s)) for s in range(6)])
    # a difference of two means of twelve runs
    assert own == pytest.approx(2 * 1.645 * 0.003 * np.sqrt(2 / 12), rel=0.25)
    together = np.mean([widths(study(0.003, seed=s, shared=0.01)) for s in range(4)])
    assert together > 2 * own  # errors of a size at a length do not average out


def test_what_cannot_be_fitted_is_refused_with_the_remedy():
    r = study(0.001)
    with pytest.raises(UserError, match="all runs have context length 8192"):
        context_law(published())
    with pytest.raises(UserError, match="do not say their context_length"):
        context_law(dataclasses.replace(r, context_length=r.context_length % 131072))
    budgets = dataclasses.replace(
        study(0.001, replicates=2), tokens=np.where(study(replicates=2).seed, 1e9, 2e9)
    )
    with pytest.raises(UserError, match="one token budget for each size: name a length"):
        context_law(budgets)
    with pytest.raises(UserError, match=r"needs 3 sizes, but \(1,1\) has 2"):
        context_law(study(0.001, layers=(12, 16)))
    with pytest.raises(UserError, match=r"law='fading' takes runs of one .* name one length"):
        estimate(r, law="fading")
    with pytest.raises(UserError, match="leave --at-tokens out"):
        estimate(r, at_tokens=1e9)


def test_budgets_that_differ_between_lengths_are_flagged():
    r = study(0.001)
    other = dataclasses.replace(r, tokens=np.where(r.context_length > 8192, 0.1, 1) * r.tokens)
    told = " ".join(context_law(other, refits=100).fit.flags)
    assert "delta(T) mixes what length does with what data does" in told
    assert "mixes" not in " ".join(context_law(r, refits=100).fit.flags)


# ------------------------------------------------------------------------------------- flatness


def _by_hand(r, since):
    """The balanced analysis of variance from means alone: F of configuration x length."""
    heads, sizes = sorted(set(r.heads)), sorted(set(r.n_layers.tolist()))
    lengths = [t for t in sorted(set(r.context_length.tolist())) if t >= since]
    y = np.zeros((len(heads), len(sizes), len(lengths)))
    for i, pair in enumerate(r.heads):
        if r.context_length[i] >= since:
            at = heads.index(pair), sizes.index(r.n_layers[i]), lengths.index(r.context_length[i])
            y[at] = r.loss[i]

    def centred(values, axes):
        for axis in axes:
            values = values - values.mean(axis, keepdims=True)
        return values

    between = len(sizes) * (centred(y.mean(1), (0, 1)) ** 2).sum()
    within = (centred(y, (0, 1, 2)) ** 2).sum()
    h, s, t = (k - 1 for k in y.shape)
    return (between / (h * t)) / (within / (h * s * t)), (h * t, h * s * t)


def test_the_test_is_the_textbooks_analysis_of_variance():
    for move in (0.0, 0.004):
        r = study(0.003, seed=1, move=move, shared=0.01)
        found, (ratio, dof) = flatness(r), _by_hand(r, 8192)
        assert found.dof == dof == (4, 12)
        assert found.statistic == pytest.approx(ratio, rel=1e-9)
        assert found.p_value == pytest.approx(stats.f.sf(ratio, *dof), rel=1e-9)


def test_size_and_power_also_when_models_of_a_size_err_together():
    nothing = [flatness(study(0.003, seed=s, shared=0.02)) for s in range(200)]
    p = np.array([f.p_value for f in nothing])
    assert 0.015 <= np.mean(p < 0.05) <= 0.095  # 5% of 200, three standard deviations
    assert 0.42 <= p.mean() <= 0.58
    assert {f.verdict for f in nothing} == {"unjudged"}  # by no answer
    moved = [flatness(study(0.003, seed=s, move=0.004, shared=0.02)) for s in range(60)]
    assert np.mean([f.p_value < 0.05 for f in moved]) > 0.9
    assert np.mean(["Differences move" in f.sentence() for f in moved]) > 0.9


def test_the_largest_movement_and_its_interval():
    exact = flatness(study(move=0.02))
    m = exact.movement
    assert (m.heads, m.shorter, m.longer) == ((4, 1), 8192, 131072)
    n = {h: np.array([n_formula(s, 64 * s, *h) for s in (12, 16, 20, 24)]) for h in TRUTH}

    def relative(t):
        loss = {h: power(n[h], *TRUTH[h], FLOOR) + DELTA[t] for h in ((4, 1), (8, 8))}
        loss[4, 1] = loss[4, 1] * (1.02 if t > 8192 else 1)
        return loss[4, 1] / loss[8, 8] - 1

    assert m.value == pytest.approx(np.mean(relative(131072) - relative(8192)), rel=1e-9)
    found = [flatness(study(0.003, seed=s)).movement for s in range(100)]
    still = [abs(f.value) <= (f.interval[1] - f.interval[0]) / 2 + 1e-3 for f in found]
    assert np.mean(still) >= 0.85  # 90%, simultaneous: nothing moved but by delta / L


def test_noise_free_flat_runs_are_flat():
    found = flatness(study(delta={8192: 0.0, 32768: 0.0}))
    assert (found.statistic, found.p_value, found.movement.most) == (
        0,
        1,
        pytest.approx(0, abs=1e-9),
    )
    assert flatness(study(move=0.004, delta={8192: 0.0, 32768: 0.0})).p_value < 1e-6


def test_too_few_runs_to_test_say_so_in_one_line():
    r = study(0.003)
    short = r.select(r.context_length <= 8192)
    reasons = {
        "there is only T = 8,192": flatness(short),
        "from 500,000 tokens on, there is none": flatness(r, since=500_000),
        "leave 0 degrees of freedom": flatness(r.select(r.n_layers == 12)),
        "a size that two configurations": flatness(
            r.select((r.context_length == 8192) | (r.n_heads == 8))
        ),
    }
    for reason, found in reasons.items():
        assert found.verdict == "untested"
        assert reason in found.sentence()
        assert "\n" not in found.sentence()
        json.dumps(found.to_dict(), allow_nan=False)
    assert flatness(short, since=2048).verdict != "untested"
    seeds = study(0.003, layers=(12,), replicates=3)  # which judge the noise of a single size
    assert flatness(seeds).dof == (4, 18)


def test_the_baseline_is_one_that_was_run_at_two_lengths():
    r = study(0.003)
    found = flatness(r.select((r.context_length == 8192) | (r.n_heads < 8)))
    assert found.baseline == (4, 1)
    assert found.verdict == "unjudged"
    lost = flatness(r.select((r.context_length == 8192) | (r.n_heads < 8)), baseline=(8, 8))
    assert "(8,8) shares no size" in lost.sentence()


# ------------------------------------------------------------------------------ on the terminal


def test_fit_prints_the_law_and_the_test(csv, capsys):
    assert cli.main(["fit", str(csv), "--refits", "100"]) == 0
    out = capsys.readouterr().out
    assert "Context law: L = (a/N)^b + E + delta(T), E and delta shared" in out
    assert "loss at T minus loss at 131,072 tokens" in out
    assert "F-test of configuration x T at T = 8,192, 32,768, 131,072: F(4, 12)" in out
    assert "simultaneous interval" in out
    assert "No movement found from 8,192 tokens on; none above" in out
    assert cli.main(["fit", str(csv), "--refits", "100", "--flat-from", "32768", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["flatness"]["dof"] == [2, 6]
    assert told["context_law"]["reference_tokens"] == 131072
    assert len(told["points"]) == 48


def test_one_named_length_is_fitted_alone_and_still_tested(csv, capsys):
    assert cli.main(["fit", str(csv), "--refits", "100", "--context", "8192"]) == 0
    out = capsys.readouterr().out
    assert "Context law" not in out
    assert "F-test of configuration x T" in out
    assert "12 points" in out


def test_frontier_and_report_take_runs_of_several_lengths(csv, capsys, tmp_path):
    ask = ["--refits", "100", "--contexts", "131072"]
    assert cli.main(["frontier", str(csv), *ask]) == 0
    assert "every run brought there by its delta(T)" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["frontier", str(csv), *ask, "--align", "training"]) == 2
    assert "need a token law" in capsys.readouterr().err
    path = tmp_path / "report.html"
    assert cli.main(["report", str(csv), *ask, "--data", "--output", str(path)]) == 0
    text = path.read_text()
    assert "Context and training tokens" in text
    assert "F-test of configuration x T" in text
    told = json.loads((tmp_path / "flatness.json").read_text())
    assert told["verdict"] == "unsure"  # 0.1% noise still hides a movement that costs more than 1%
    assert told["effect"]["change"] > 0.01
