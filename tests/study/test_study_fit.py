"""The fit: published numbers, known truths, uncertainty, refusals."""

import dataclasses
import functools
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import approx_fprime, least_squares

from gqa_scaling.config import UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study import curves, solver
from gqa_scaling.study import fit as fitting
from gqa_scaling.study.compare import _error, compare, preferred_law
from gqa_scaling.study.fit import fit
from gqa_scaling.study.heads import head_laws, solve_heads
from gqa_scaling.study.models import LAWS, Model
from gqa_scaling.study.noise import estimate, pooled
from gqa_scaling.study.reading import from_csv, published
from gqa_scaling.study.report.estimates import fit_table
from gqa_scaling.study.results import table
from gqa_scaling.study.solver import refit, solve_point
from gqa_scaling.study.uncertainty import interval


def power(n, a, b, floor):
    """L(N) = (a/N)^b + E, as the paper writes it."""
    return (a / n) ** b + floor


def study(truth, noise=0.0, seed=0, sizes=(12, 16, 20, 24, 28, 32), replicates=1, **columns):
    """A synthetic study; `truth` maps heads to (a, b, E)."""
    rng, rows = np.random.default_rng(seed), []
    for (h, kv), (a, b, floor) in truth.items():
        for layers in sizes:
            n = n_formula(layers, 64 * layers, h, kv)
            for s in range(replicates):
                loss = power(n, a, b, floor) * (1 + noise * rng.standard_normal())
                row = dict.fromkeys(("evaluation", "tokenizer", "corpus"), "")
                row |= {"name": f"L{layers}-h{h}-kv{kv}-s{s}", "n_heads": h, "n_kv_heads": kv}
                row |= {"head_dim": 64, "n_layers": layers, "d_model": 64 * layers, "n_params": n}
                row |= {"context_length": 8192, "tokens": 20 * n, "loss": loss, "seed": s}
                row |= {"learning_rate": 1e-3, "epochs": 1.0, "vocab_size": 50304}
                rows.append(row | columns)
    return table(rows, source="synthetic", count="n_formula")


TRUTH = {(1, 1): (1.3e8, 0.20, 2.1), (4, 1): (9.0e7, 0.215, 2.1), (8, 8): (7.5e7, 0.227, 2.1)}


def test_published_study_is_reproduced(chen):
    assert abs(chen.floor - 2.120) <= 0.005
    assert chen.r2 >= 0.9997
    assert chen.r2_by_curve.min() > 0.999
    assert chen.converged
    assert chen.rank == chen.n_parameters == 15
    assert chen.at_bound == ""
    assert chen.refits_failed == 0
    low, high = chen.floor_interval
    assert low < chen.floor < high
    assert 0.05 < high - low < 0.2


def test_a_and_b_are_the_papers_form(chen):
    n = chen.points.n[chen.points.curve == 3]
    direct = power(n, chen.scale[3], chen.curves.b[3], chen.floor)
    assert np.allclose(direct, chen.predicted[chen.points.curve == 3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", range(4, 9))
@settings(max_examples=12, deadline=None)
@given(
    floor=st.floats(0.3, 2.5),
    b=st.lists(st.floats(0.08, 0.4), min_size=2, max_size=6),
    excess=st.floats(0.3, 1.5),
)
def test_noise_free_truths_are_recovered(floor, b, excess, sizes):
    k = len(b)
    curve = np.repeat(np.arange(k), sizes)
    x = np.tile(np.linspace(-2.7, 2.7, sizes), k)
    y = floor + excess * np.exp(-np.array(b)[curve] * x)
    each, added = np.eye(2 * k + 1), np.ones((len(y), 1))
    names = tuple(map(str, range(2 * k + 1)))
    model = Model(
        names, (), added, (0 * added,), each[1 : k + 1], each[k + 1 :], curve, x, np.zeros(k)
    )
    found = solve_point(model, y, np.ones(len(y)))
    assert abs(found.parameters[0] - floor) <= 1e-6
    assert np.abs(found.parameters[-len(b) :] - b).max() <= 1e-6
    assert found.converged


def test_recovery_through_the_whole_path():
    found = fit(study(TRUTH), refits=100)
    assert found.floor == pytest.approx(2.1, abs=1e-8)
    for k, heads in enumerate(found.heads):
        assert found.scale[k] == pytest.approx(TRUTH[heads][0], rel=1e-6)
        assert found.curves.b[k] == pytest.approx(TRUTH[heads][1], abs=1e-8)


def _model(law, results=None):
    results = published() if results is None else results
    p = fitting.points(results)
    return p, fitting.make_model(law, p, 64)


@pytest.mark.parametrize("law", LAWS)
def test_refits_in_bulk_equal_scipys_least_squares(law):
    (p, model), rng = _model(law), np.random.default_rng(5)
    best = solve_point(model, p.loss, np.ones(len(p.n))).parameters
    y = model.predict(best[None]) * (1 + 0.002 * rng.standard_normal((6, len(p.n))))
    w = rng.integers(0, 3, y.shape) + 0.25
    rows, cost, done = refit(model, y, w, np.repeat(best[None], 6, 0))
    assert done.all()
    for i in range(6):

        def residuals(q, i=i):
            return np.sqrt(w[i]) * (model.predict(q[None])[0] - y[i])

        start = best + 0.02 * rng.standard_normal(len(best))
        found = least_squares(residuals, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, x_scale="jac")
        assert 2 * found.cost == pytest.approx(cost[i], rel=1e-7)
        assert model.predict(rows)[i] == pytest.approx(model.predict(found.x[None])[0], abs=1e-5)
        assert rows[i, 0] == pytest.approx(found.x[0], abs=1e-5)


@pytest.mark.parametrize("law", LAWS)
def test_the_jacobian_is_the_derivative(law):
    p, model = _model(law)
    found = solve_point(model, p.loss, np.ones(len(p.n)))
    numeric = approx_fprime(found.parameters, lambda q: model.predict(q[None])[0])
    assert np.allclose(found.jacobian, numeric, atol=2e-6)


def test_influence_is_what_leaving_a_run_out_does(chen):
    r = published()
    by_name = {name: i for i, name in enumerate(chen.points.name)}
    for drop in ("L20-d1280-h4-kv1", "L32-d2048-h8-kv2"):
        without = fit(r.select(r.name != drop), refits=100)
        change = without.floor - chen.floor
        assert chen.influence[by_name[drop]] == pytest.approx(change, rel=0.25)


def test_e_below_its_bound_is_flagged_not_fatal():
    # straight lines in ln N: no floor can be told
    r = study(TRUTH)
    bent = dataclasses.replace(r, loss=4.5 - 0.1 * np.log(r.n_params))
    found = fit(bent, refits=100)
    assert found.at_bound == "lower"
    assert found.floor == pytest.approx(0, abs=1e-4)
    assert any("at its bound" in flag for flag in found.flags)


BENT = {  # loss falls faster and faster: no floor can be told, and least squares holds E at 0
    (2, 1): ((7760, 6.4155), (21700, 6.4181), (41700, 6.0715)),
    (2, 2): ((8270, 6.5239), (22700, 6.4858), (43200, 6.2765)),
}


def test_intervals_stay_wide_where_e_is_held_at_its_bound(tmp_path):
    rows = [f"{h},{kv},{n},{y}" for (h, kv), runs in BENT.items() for n, y in runs]
    (tmp_path / "runs.csv").write_text("\n".join(["n_heads,n_kv_heads,n_params,loss", *rows]))
    found = fit(from_csv(tmp_path / "runs.csv"))
    assert found.at_bound == "lower"
    assert any("E is at its bound (0)" in flag for flag in found.flags)
    low, high = found.floor_interval
    assert low == 0
    assert high > 5.5
    assert found.draws.floor.min() >= 0
    assert found.refits_failed == 0
    # what a free E would have absorbed is noise, not skill
    assert found.sigma == pytest.approx(np.sqrt((found.residual**2).sum() / 2), rel=1e-6)
    assert np.hypot(found.shared.independent, found.shared.shared) > 0.05


def test_every_refit_converges_on_a_long_valley():
    # three sizes of nearly straight curves leave E between 0 and the least loss
    truth = {(1, 1): (1e14, 0.1, 0.1), (8, 8): (0.7e14, 0.1, 0.1)}
    found = fit(study(truth, 0.0005, sizes=(12, 16, 20)), refits=300)
    assert found.refits_failed == 0


def test_rising_losses_are_flagged():
    r = study(TRUTH, noise=0.002)
    loss = r.loss.copy()
    mine = np.array([h == (4, 1) for h in r.heads])
    loss[mine] = loss[mine][::-1]
    found = fit(dataclasses.replace(r, loss=loss), refits=100)
    assert any("does not fall with N for (4,1)" in flag for flag in found.flags)
    assert math.isinf(found.curves.n_star(2.9)[found.index((4, 1))])


def test_intervals_are_reproducible_and_grow_with_the_noise():
    small, again = (fit(study(TRUTH, 0.0005), refits=300) for _ in range(2))
    assert small.floor_interval == again.floor_interval
    assert fit(study(TRUTH, 0.0005), refits=300, seed=1).floor_interval != small.floor_interval
    large = fit(study(TRUTH, 0.002), refits=300)
    width = [np.ptp(f.floor_interval) for f in (small, large)]
    assert 2 < width[1] / width[0] < 9
    assert "300 refits, seed 0" in small.how


def test_replicate_seeds_give_the_noise_and_narrow_the_answer():
    one, four = (fit(study(TRUTH, 0.002, replicates=n), refits=300) for n in (1, 4))
    assert one.points.noise is None
    assert any("no replicate seeds" in flag for flag in one.flags)
    assert four.points.noise_dof == 3 * 18
    assert four.points.noise == pytest.approx(0.002 * 2.8, rel=0.25)
    assert four.sigma == pytest.approx(0.002 * 2.8, rel=0.25)  # of one run, not of a mean of four
    assert np.ptp(four.floor_interval) < 0.75 * np.ptp(one.floor_interval)
    assert four.points.replicates.tolist() == [4] * 18


def test_unequal_replicates_weigh_as_they_count():
    r = study(TRUTH, 0.002, replicates=3)
    found = fit(r, refits=100)
    # the same means given once each, with no weights, must agree only when counts are equal
    single = study(TRUTH, 0.0)
    means = {}
    for heads, layers, loss in zip(r.heads, r.n_layers, r.loss, strict=True):
        means.setdefault((heads, layers), []).append(loss)
    loss = [np.mean(means[h, n]) for h, n in zip(single.heads, single.n_layers, strict=True)]
    assert fit(dataclasses.replace(single, loss=np.array(loss)), refits=100).floor == pytest.approx(
        found.floor, abs=1e-9
    )
    thinned = fit(r.select((r.seed == 0) | (r.n_layers == 12)), refits=100)
    assert thinned.floor != pytest.approx(fit(r.select(r.seed == 0), refits=100).floor, abs=1e-6)


def test_order_of_the_runs_does_not_matter(chen):
    r = published()
    mixed = r.select(np.random.default_rng(0).permutation(len(r)))
    assert fit(mixed, refits=100).floor == pytest.approx(chen.floor, abs=1e-9)


def test_too_few_runs_are_refused_with_what_is_missing():
    r = study(TRUTH)
    few = dataclasses.replace(r.select(r.n_layers < 20), missing=("L20-h1", "L20-h4"))
    with pytest.raises(UserError, match=r"needs 3 sizes, but \(1,1\) has 2.*L20-h1, L20-h4"):
        fit(few)
    lone = r.select(np.array([h == (1, 1) for h in r.heads]) & (r.n_layers < 24))
    with pytest.raises(UserError, match="nothing to judge the noise"):
        fit(lone)


def test_mixed_contexts_and_budgets_are_refused():
    r = study(TRUTH)
    mixed = dataclasses.replace(r, context_length=np.where(r.n_layers > 24, 4096, 8192))
    with pytest.raises(UserError, match="context lengths 4096, 8192"):
        fit(mixed)
    assert len(fit(mixed, context_length=8192, refits=100).points.n) == 12
    with pytest.raises(UserError, match="no runs at context length 5"):
        fit(r, context_length=5)
    r = study(TRUTH, 0.001, replicates=2)
    with pytest.raises(UserError, match="one token budget"):
        fit(dataclasses.replace(r, tokens=r.tokens * (1 + r.seed)))


def test_everything_is_json(chen):
    told = json.loads(json.dumps(chen.to_dict(), allow_nan=False))
    assert told["E_nats"] == chen.floor
    assert len(told["points"]) == 40
    assert told["curves"][3]["n_heads"] == 8
    assert "percentile bootstrap, 1000 refits, seed 0" in told["intervals"]


@pytest.mark.parametrize("terminal", [True, False])
def test_long_refits_show_how_far_they_are_on_a_terminal_alone(terminal, monkeypatch, capsys):
    monkeypatch.setattr(solver, "_CHUNK", 2**12)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    fit(published(), refits=1000)
    told = capsys.readouterr()
    assert told.out == ""
    assert ("Refitting" in told.err) == terminal


def test_no_refit_of_a_thousand_fails():
    many = {h: (8e7 / (1 + 0.1 * math.log2(h[0])), 0.2, 2.0) for h in head_candidates(32)}
    for results in (published(), study(many, 0.002)):
        assert fit(results, refits=1000).refits_failed == 0


@given(st.floats(1e4, 1e12), st.floats(1e3, 1e9), st.floats(0.05, 0.5), st.floats(0, 3))
def test_the_law_and_its_inverse_agree(n, a, b, floor):
    loss, u = power(n, a, b, floor), b * (math.log(a) - 18.0)
    if loss - floor > 1e-4:
        assert curves.centred_inverse(loss, u, b, floor, 18.0) == pytest.approx(n, rel=1e-6)
    assert curves.centred(n, u, b, floor, 18.0) == pytest.approx(loss, rel=1e-12)
    assert curves.scale_of(u, b, 18.0) == pytest.approx(a, rel=1e-9)


def test_losses_at_or_below_the_floor_are_never_reached():
    at_floor_below_it_and_rising = np.array([2.0, 1.9, 2.5]), 0.0, np.array([0.2, 0.2, -0.1])
    assert np.isinf(curves.centred_inverse(*at_floor_below_it_and_rising, 2.0, 18.0)).all()


def test_intervals_cut_five_percent_from_each_end():
    assert interval(np.arange(1, 101)) == (5.0, 95.0)


# ------------------------------------------------------------------------------------- noise


def _spoil(r, i, by=1.02):
    loss = r.loss.copy()
    loss[i] *= by
    return dataclasses.replace(r, loss=loss)


@pytest.mark.parametrize("i", [0, 5, 19, 33])
def test_a_spoiled_run_is_named_and_no_other(i):
    spoiled = _spoil(published(), i)
    found = fit(spoiled, refits=100)
    assert found.strange == spoiled.name[i]
    assert any(f"too far off its curve for chance: {spoiled.name[i]}" in f for f in found.flags)
    assert np.ptp(found.floor_interval) > 1.2 * np.ptp(fit(published(), refits=100).floor_interval)


def test_good_runs_are_rarely_strange():
    named = [fit(study(TRUTH, 0.002, seed=s), refits=100).strange for s in range(20)]
    assert sum(map(bool, named)) <= 2


MANY = {(h, kv): (1.2e8 - 8e6 * h, 0.2, 2.1) for h, kv in head_candidates(8)}


def _with_shared(own, shared, seed):
    rng = np.random.default_rng(seed)
    r = study(MANY)
    sizes, index = np.unique(r.n_layers, return_inverse=True)
    error = own * rng.standard_normal(len(r)) + shared * rng.standard_normal(len(sizes))[index]
    return dataclasses.replace(r, loss=r.loss * (1 + error))


def test_errors_shared_by_a_size_are_found_and_only_then():
    strong = [fit(_with_shared(0.0005, 0.002, s), refits=100) for s in range(10)]
    found = [any("err together" in flag for flag in f.flags) for f in strong]
    assert np.mean(found) >= 0.8
    # the median of what is left after curves fitted to six sizes is near the truth
    assert 0.5 < np.median([f.shared.shared for f in strong]) / (0.002 * 2.8) < 1.6
    none = [fit(_with_shared(0.002, 0.0, s), refits=100).shared.p_value for s in range(40)]
    assert np.mean(np.array(none) < 0.05) <= 0.15
    assert np.mean(none) > 0.3


def test_shared_errors_widen_the_intervals():
    own, shared = (fit(_with_shared(0.0005, by, 1), refits=400) for by in (0.0, 0.002))
    assert np.ptp(shared.floor_interval) > 2 * np.ptp(own.floor_interval)


# what the noise is that the intervals rest on, against an independent computation


def test_restricted_likelihood_is_that_of_the_error_contrasts():
    """The likelihood of any orthonormal basis of what the curves cannot absorb (Harville 1974)."""
    rng = np.random.default_rng(0)
    jacobian, size = rng.standard_normal((14, 4)), np.arange(14) % 5
    residual, weight = rng.standard_normal(14), rng.integers(1, 4, 14).astype(float)
    noise = estimate(residual, jacobian, weight, size)
    whole = np.sqrt(weight)[:, None] * jacobian
    free = np.linalg.qr(whole, mode="complete")[0][:, 4:].T
    member = np.sqrt(weight)[:, None] * (size[:, None] == np.arange(5))
    z, best = free @ (np.sqrt(weight) * residual), []
    for ratio in (0.0, 0.5, 1.0, 3.0):
        v = np.eye(10) + ratio**2 * (free @ member) @ (free @ member).T
        scale = float(z @ np.linalg.solve(v, z)) / 10
        best.append((-0.5 * (np.linalg.slogdet(v)[1] + 10 * np.log(scale)), ratio, scale))
    top, ratio, scale = max(best)
    if ratio:
        assert noise.shared >= 0.3 * ratio * np.sqrt(scale)
    found = noise.shared / noise.independent
    v = np.eye(10) + found**2 * (free @ member) @ (free @ member).T
    at = float(z @ np.linalg.solve(v, z)) / 10
    assert noise.independent**2 == pytest.approx(at, rel=1e-9)
    assert -0.5 * (np.linalg.slogdet(v)[1] + 10 * np.log(at)) >= top - 0.05


def test_degrees_of_freedom_are_counted_alike_where_e_is_at_its_bound(tmp_path):
    rows = [f"{h},{kv},{n},{y}" for (h, kv), runs in BENT.items() for n, y in runs]
    (tmp_path / "runs.csv").write_text("\n".join(["n_heads,n_kv_heads,n_params,loss", *rows]))
    found = fit(from_csv(tmp_path / "runs.csv"), refits=100)
    assert found.at_bound == "lower"
    assert found.shared.dof == 6 - 4  # E absorbed nothing
    assert found.leverage.sum() == pytest.approx(4)
    assert found.rank == 5


# ---------------------------------------------------------------------------------- lack of fit


@functools.cache
def _smooth():
    r, f = published(), fit(published(), refits=100)
    at = {name: i for i, name in enumerate(f.points.name)}
    return dataclasses.replace(r, loss=f.predicted[[at[name] for name in r.name]])


def _bent(by, noise, seed):
    r = _smooth()
    error = noise * np.random.default_rng(seed).standard_normal(len(r))
    return dataclasses.replace(r, loss=r.loss + by * np.log(r.n_params / 3e8) + error)


def test_a_further_log_term_never_passes_unsaid():
    for noise in (0.0003, 0.001, 0.003):
        for seed in range(2):
            found = fit(_bent(-0.1, noise, seed), refits=100)
            assert found.misfit.verdict in ("bends", "unseen") or found.shared.p_value < 0.05
            assert any("ln N" in f or "bend" in f for f in found.flags)
    assert [fit(_bent(-0.1, 0.0003, s), refits=100).misfit.verdict for s in range(4)] == [
        "bends"
    ] * 4


def test_a_bend_of_the_printed_size_is_found_four_times_in_five():
    noise = 0.003
    size = np.median([fit(_bent(0, noise, s), refits=100).misfit.found_rms for s in range(5)])
    f = fit(_bent(0, 0.0, 0), refits=100)
    p, model = _model("separate", _bent(0, 0.0, 0))
    basis = np.linalg.qr(model.jacobian(f.parameters[None])[0])[0]
    bend = np.log(p.n) - basis @ (basis.T @ np.log(p.n))
    bend *= size / np.sqrt(np.mean(bend**2))
    at = {name: i for i, name in enumerate(p.name)}
    order = [at[name] for name in published().name]

    def found(by, s):
        r = _bent(0, noise, 100 + s)
        return fit(
            dataclasses.replace(r, loss=r.loss + by * bend[order]), refits=100
        ).misfit.p_value

    assert np.mean([found(1, s) < 0.05 for s in range(24)]) >= 0.55
    assert np.mean([found(0, s) < 0.05 for s in range(24)]) <= 0.2


def test_curves_that_miss_replicates_are_told():
    r = study(TRUTH, 0.0005, replicates=3)
    assert fit(r, refits=100).misfit.replicate_p_value > 0.01
    odd = np.where(np.array(r.heads)[:, 0] == 4, 1.0, 0.0) * (-1.0) ** (r.n_layers // 4)
    found = fit(dataclasses.replace(r, loss=r.loss + 0.006 * odd), refits=100)
    assert found.misfit.replicate_p_value < 0.001
    assert found.misfit.replicate_found < 0.003
    assert found.misfit.verdict == "misses"
    assert any("by more than seeds differ" in flag for flag in found.flags)
    assert fit(study(TRUTH, 0.0005), refits=100).misfit.replicate_p_value is None


def test_replicate_seeds_with_identical_losses_are_told_and_leave_every_miss_to_the_curves():
    once = study(TRUTH, 0.0005)
    row = [*range(len(once)), *range(len(once))]
    found = fit(once.select(row), refits=100)
    assert found.points.noise == 0
    assert found.misfit.verdict == "misses"
    assert found.misfit.replicate_p_value < 1e-9
    assert any("identical losses" in flag for flag in found.flags)
    assert not any("identical losses" in flag for flag in fit(once, refits=100).flags)
    width, alone = (np.ptp(f.floor_interval) for f in (found, fit(once, refits=100)))
    assert width == pytest.approx(
        alone, rel=0.1
    )  # a run that is given twice says what it says once


def test_what_seeds_repeat_is_not_less_for_being_repeated():
    once, rng = study(TRUTH), np.random.default_rng(5)
    r = study(TRUTH, 0.0002, replicates=4)
    cells = {(h, L): rng.standard_normal() for h, L in zip(once.heads, once.n_layers, strict=True)}
    common = 0.004 * np.array([cells[h, L] for h, L in zip(r.heads, r.n_layers, strict=True)])
    found = fit(dataclasses.replace(r, loss=r.loss + common), refits=300)
    drawn = found.shared.draw(4000, rng)
    assert np.median(drawn.std(1)) == pytest.approx(0.004, rel=0.35)
    alike = fit(r, refits=300)  # pooled where the curves miss no more than seeds differ
    assert alike.shared.dof == found.shared.dof + alike.points.noise_dof


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.1, 10))
def test_seeds_are_pooled_unless_an_f_test_tells_them_apart(free, dof, ratio):
    kept = stats.f.sf(ratio, free, dof) >= 0.25
    assert pooled(ratio * free * 4e-6, free, dof * 4e-6, dof) == (
        (dof * 4e-6, dof) if kept else (0, 0)
    )


def test_what_is_shared_is_not_told_of_one_configuration():
    r = study({(4, 1): TRUTH[4, 1]}, 0.002)
    alone = fit(r, refits=300)
    assert alone.shared.shared is None
    assert alone.shared.p_value is None
    assert alone.to_dict()["shared_sigma_nats"] is None
    assert not any("shared by a size" in flag for flag in alone.flags)
    drawn = alone.shared.draw(4000, np.random.default_rng(0))  # all of it, however it is split
    assert np.median(drawn.std(1)) == pytest.approx(alone.sigma, rel=0.35)
    seeds = fit(study({(4, 1): TRUTH[4, 1]}, 0.002, replicates=3), refits=100)
    assert seeds.shared.p_value > 0.05  # seeds tell one run's error from its size's


def test_sizes_are_labelled_by_shape_else_by_rank_else_not_at_all():
    r = study(TRUTH, 0.001)
    bare = dataclasses.replace(r, n_layers=0 * r.n_layers, d_model=0 * r.d_model)
    shaped, ranked = (fitting.points(each).size for each in (r, bare))
    assert shaped.tolist() == ranked.tolist() == [0, 1, 2, 3, 4, 5] * 3
    assert fit(bare, refits=100).floor_interval == fit(r, refits=100).floor_interval
    uneven = bare.select(np.arange(len(bare)) != 0)  # ranks would join unlike sizes
    found = fit(uneven, refits=100)
    assert len(set(found.points.size)) == len(uneven)
    assert found.shared.p_value is None
    assert any("shared by a size cannot be told" in flag for flag in found.flags)


def test_drawn_noise_has_the_size_it_was_estimated_at():
    f = fit(_with_shared(0.002, 0.0, 3), refits=100)
    drawn = f.shared.draw(4000, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(f.sigma, rel=0.15)
    assert abs(drawn.mean()) < 0.1 * f.sigma


# ----------------------------------------------------------------------------------- joint laws


def _joint_truth(law, results):
    h, kv = results.n_heads.astype(float), results.n_kv_heads.astype(float)
    x = np.log(8 * results.n_layers * results.d_model**2.0 / 3e8)
    if law == "fading":
        gains = [(1 - n**-0.6) / (1 - 8**-0.6) * 3 for n in (h, kv)]
        excess = np.exp(-0.2 - 0.21 * x - 0.04 * gains[0] - 0.015 * gains[1])
    else:
        excess = np.exp(-0.2 - 0.21 * x - 0.04 * np.log2(h) - 0.015 * np.log2(kv))
    return dataclasses.replace(results, loss=1.9 + excess)


def test_what_query_heads_gain_more_is_told_refit_by_refit():
    found = fit(published(), law="product", refits=200)
    constants = found.constants
    value, (low, high) = constants["p - q"]
    assert value == pytest.approx(constants["p"][0] - constants["q"][0])
    p, q = (found.parameter_draws[:, found.names.index(name)] for name in "pq")
    assert np.mean((low <= p - q) & (p - q <= high)) == pytest.approx(0.9, abs=0.01)
    notes = " ".join(fit_table(found).notes)
    assert f"p - q = {value:.4f}, 90% interval {low:.4f} to {high:.4f}: how much more" in notes


@pytest.mark.parametrize("law", ["product", "fading"])
def test_joint_truths_are_recovered_and_inverted(law):
    r = _joint_truth(law, published())
    found = fit(r, law=law, refits=100)
    assert found.floor == pytest.approx(1.9, abs=1e-5)
    assert found.constants["b"][0] == pytest.approx(0.21, abs=1e-5)
    assert found.constants["p"][0] == pytest.approx(0.04, abs=1e-5)
    assert found.constants["q"][0] == pytest.approx(0.015, abs=1e-5)
    assert ("p - q" in found.constants) == (law == "product")
    if law == "fading":
        assert found.constants["g"][0] == pytest.approx(0.6, abs=1e-3)
    for k in range(len(found.heads)):
        n = float(found.curves.n_star(2.6)[k])
        assert float(found.curves.loss(k, n)) == pytest.approx(2.6, abs=1e-9)
    for i in (0, 17, 39):  # a run's own N gives its own loss back
        k = found.index(r.heads[i])
        assert float(found.curves.loss(k, r.n_params[i])) == pytest.approx(r.loss[i], abs=1e-5)


def test_joint_laws_predict_what_they_were_not_shown():
    scores = {s.law: s for s in compare(published())}
    assert scores["product"].parameters == 5
    assert scores["fading"].parameters == 6
    for law in ("product", "fading"):
        assert scores[law].unseen_heads <= 0.006
        assert scores[law].more_heads <= 0.009
        assert scores[law].more_heads_and_size <= 0.009
        assert scores[law].largest_size <= 0.0025
    assert scores["separate"].largest_size <= 0.0020
    assert scores["separate"].unseen_heads is scores["separate"].more_heads is None
    assert scores["separate"].residual < scores["fading"].residual < scores["product"].residual


def test_more_heads_are_predicted_from_fewer_by_hand():
    r = published()
    cuts = {(8, 1): (0, 8), (8, 8): (1, 8), (8, 4): (1, 4)}  # what is asked, what is left out
    errors = []
    for heads, (kind, least) in [((8, 8), (1, 4)), *cuts.items()]:
        few = r.select(np.array([h[kind] < least for h in r.heads]))
        found = fit(few, law="product", refits=100)
        value = {name: v for name, (v, _) in found.constants.items()}
        mine = r.select(np.array([h == heads for h in r.heads]))
        x = np.log(8 * mine.n_layers * mine.d_model**2.0) - found.curves.centre[0]
        u = (
            value["u"]
            - value.get("p", 0) * np.log2(heads[0])
            - value.get("q", 0) * np.log2(heads[1])
        )
        errors += (value["E"] + np.exp(u - value["b"] * x) - mine.loss).tolist()
    score = next(s for s in compare(r) if s.law == "product")
    assert score.more_heads == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-3)


def test_the_law_is_chosen_by_what_the_question_extrapolates_over():
    rng, best = np.random.default_rng(1), {}
    for law in ("product", "fading"):
        r = _joint_truth(law, published())
        r = dataclasses.replace(r, loss=r.loss + 3e-4 * rng.standard_normal(40))
        best[law] = preferred_law(r)
        found = {s.law: s.more_heads_and_size for s in compare(r) if s.law != "separate"}
        assert found[best[law]] == min(found.values())
    assert best["fading"] == "fading"
    bare = dataclasses.replace(r, n_layers=0 * r.n_layers, d_model=0 * r.d_model)
    with pytest.raises(UserError, match="the data needs columns n_layers and d_model"):
        preferred_law(bare)


def test_two_numbers_of_heads_do_not_tell_whether_gains_fade():
    r = published()
    two = r.select(np.array([h in ((4, 1), (8, 1), (8, 2)) for h in r.heads]))
    plain, fading = (fit(two, law=law, refits=100) for law in ("product", "fading"))
    assert "g" not in fading.constants
    assert fading.floor == pytest.approx(plain.floor, abs=1e-9)


def test_left_out_errors_do_not_see_what_is_left_out():
    r = published()
    last = r.n_layers == r.n_layers.max()
    direct = fit(r.select(~last), law="product", refits=100)
    by_hand = [
        float(direct.curves.loss(direct.index(h), n)) / loss - 1
        for h, n, loss in zip(r.select(last).heads, r.n_params[last], r.loss[last], strict=True)
    ]
    score = next(s for s in compare(r) if s.law == "product")
    assert score.largest_size == pytest.approx(np.sqrt(np.mean(np.square(by_hand))), rel=1e-3)


def test_a_left_out_loss_does_not_bound_e():
    # the configuration left out lies far below the others: E may not be told by it
    r = _joint_truth("product", published())
    odd = np.array([h == (8, 8) for h in r.heads])
    low = dataclasses.replace(r, loss=np.where(odd, r.loss - 1.5, r.loss))
    assert low.loss.min() < 1.9
    p = fitting.points(low)
    keep = np.array([p.heads[k] != (8, 8) for k in p.curve])
    error = _error(p, "product", 64, keep, ~keep)
    assert error == pytest.approx(np.full(6, 1.5), abs=1e-4)


def test_joint_laws_need_shapes_and_configurations():
    r = published()
    with pytest.raises(UserError, match="needs columns n_layers and d_model"):
        fit(dataclasses.replace(r, n_layers=0 * r.n_layers, d_model=0 * r.d_model), law="product")
    with pytest.raises(UserError, match="needs 2 head configurations"):
        fit(r.select(np.array([h == (8, 1) for h in r.heads])), law="product")
    with pytest.raises(UserError, match="law='cubic'"):
        fit(r, law="cubic")


# ---------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("a", "b", "c"), [(0.579, -0.124, 2.473), (0.301, -0.227, 2.622), (1.356, -0.044, 1.53)]
)
def test_the_papers_head_laws_are_recovered(a, b, c):
    n_heads = np.array([1.0, 2, 4, 8, 16, 32])
    loss = a * n_heads**b + c
    found = [v[0] for v in solve_heads(n_heads, loss)[:3]]
    assert found[1] == pytest.approx(b, rel=0.01)  # the grid's step
    assert found[0] * n_heads ** found[1] + found[2] == pytest.approx(loss, abs=5e-5)


def test_published_loss_falls_with_query_heads_as_a_power(chen):
    (law,) = head_laws(chen)  # only n_kv = 1 has four configurations
    assert law.n_kv_heads == 1
    assert law.n_heads == (1, 2, 4, 8)
    assert law.b < 0 < law.a
    assert law.r2 > 0.97
    assert law.b_interval[0] < law.b < law.b_interval[1]
    direct = [float(chen.curves.loss(chen.index((h, 1)), law.n)) for h in law.n_heads]
    assert law.loss(np.array(law.n_heads)) == pytest.approx(direct, abs=0.005)
    # raising n_h lowers loss more than raising n_kv by as much (the paper's claim)
    at = {h: float(chen.curves.loss(chen.index(h), law.n)) for h in chen.heads}
    assert at[1, 1] - at[8, 1] > 2 * (at[8, 1] - at[8, 8])


def test_head_sizes_are_not_mixed_and_uneven_budgets_are_flagged() -> None:
    points = published()
    mixed = np.where(np.arange(len(points)) % 2, 64, 128)
    with pytest.raises(UserError, match="head sizes 64, 128 cannot share a study"):
        fit(dataclasses.replace(points, head_dim=mixed), refits=100)
    assert not any("mix what size does" in flag for flag in fit(points, refits=100).flags)
    uneven = dataclasses.replace(points, tokens=np.where(points.n_heads == 8, 1e9, 2e10))
    assert any("mix what size does" in flag for flag in fit(uneven, refits=100).flags)
