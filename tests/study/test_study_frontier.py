"""The decision: the paper's Table 4, its Figure 2 axes, and what must hold for any study."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import brentq
from study_kit import layers_by_hand

from gqa_scaling.config import ModelConfig, Question, UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.ladder import MOST_PARAMETERS, PUBLISHED_LADDER
from gqa_scaling.hardware import hardware
from gqa_scaling.study.baseline import default_baseline
from gqa_scaling.study.build import check_runs, run_interval
from gqa_scaling.study.choices import OBJECTIVES
from gqa_scaling.study.equal_cost import largest
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier, target_losses
from gqa_scaling.study.ranking import decide, rank, saved
from gqa_scaling.study.reading import from_csv, published
from gqa_scaling.study.report.answers import frontier_answer, frontier_table, ranking_table
from gqa_scaling.study.report.csv_files import frontier_csv
from gqa_scaling.study.report.estimates import fit_table, residual_table
from gqa_scaling.study.report.sentences import _gained, sentence
from gqa_scaling.study.results import table
from gqa_scaling.study.serving import Deployment, Serving
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.uncertainty import interval
from gqa_scaling.units import byte_size, quantity

TABLE_4 = Question(contexts=(131072,), losses=(3.0, 2.9, 2.8, 2.7, 2.6), convention="per_sequence")


@pytest.fixture(scope="module")
def table_4(chen):
    return frontier(chen, published(), TABLE_4)


def noisy(seed=0, noise=0.01, floor=0.9, sizes=((1, 32), (2, 48), (3, 64), (4, 96))):
    """4 sizes x 4 configurations of tiny models, as the smoke study has them."""
    rng, rows = np.random.default_rng(seed), []
    for layers, width in sizes:
        for h, kv in ((1, 1), (2, 1), (4, 1), (4, 4)):
            n = 1.08 * 8 * layers * width**2 + 2 * layers * width * 16 * (h + kv)
            loss = floor + (3e4 * (1 - 0.05 * math.log2(h)) / n) ** 0.12
            row = {"name": f"L{layers}-h{h}-kv{kv}", "n_heads": h, "n_kv_heads": kv, "head_dim": 16}
            row |= {"n_layers": layers, "d_model": width, "n_params": n, "context_length": 256}
            row |= {"tokens": 1e6, "loss": loss * (1 + noise * rng.standard_normal()), "seed": 0}
            row |= {"learning_rate": 2e-3, "epochs": 1.0, "vocab_size": 256}
            rows.append(row | {"evaluation": "e", "tokenizer": "t", "corpus": "c"})
    return table(rows, source="smoke", count="n_exact")


def test_table_4_at_128k_is_reproduced(table_4):
    winners = [a.best.heads for a in table_4.answers]
    assert winners == [(4, 1), (4, 1), (8, 1), (8, 1), (8, 1)]
    assert table_4.baseline == (8, 8)


def test_what_per_token_gives_instead(chen):
    answers = frontier(chen, published(), dataclasses.replace(TABLE_4, convention="per_token"))
    assert [a.best.heads for a in answers.answers] == [(8, 1)] * 5


@pytest.mark.parametrize(
    ("heads", "layers", "memory", "flops", "z"),
    [((8, 8), 12, 1.68611e9, 2.21002e14, 43002), ((1, 1), 32, 1.62739e9, 2.13305e14, 42281.8)],
)
def test_published_axes_of_figure_2(heads, layers, memory, flops, z):
    r = published()
    i = next(i for i, h in enumerate(r.heads) if h == heads and r.n_layers[i] == layers)
    costs = Deployment(family_of(r), TABLE_4, 131072).costs(r.n_params[i], heads)
    assert float(costs.n_layers) == pytest.approx(layers, rel=1e-12)
    assert float(costs.d_model) == pytest.approx(64 * layers, rel=1e-12)
    assert float(costs.memory) == pytest.approx(memory, rel=1e-5)
    assert float(costs.flops) == pytest.approx(flops, rel=1e-5)
    assert float(costs.z) == pytest.approx(z, rel=1e-5)


def test_costs_of_all_forty_published_points_by_hand():
    """Each point's own L and d, and M, C and Z of Chen et al. 2025, eqs. 3 and 4, as Figure 2 plots."""
    r, context = published(), 131072
    deployment = Deployment(family_of(r), TABLE_4, context)
    assert len(r) == 40
    for i, (h, kv) in enumerate(r.heads):
        layers = int(r.n_layers[i])
        n = 8 * layers * (64 * layers) ** 2 + 2 * layers * 64 * layers * 64 * (h + kv)
        assert r.n_params[i] == n
        memory = n + 2 * context * layers * 64 * kv
        flops = context * (n + 2 * context * layers * 64 * h)
        costs = deployment.costs(r.n_params[i], (h, kv))
        assert float(costs.n_layers) == pytest.approx(layers, rel=1e-12)
        assert float(costs.d_model) == pytest.approx(64 * layers, rel=1e-12)
        assert float(costs.memory) == pytest.approx(memory, rel=1e-12)
        assert float(costs.flops) == pytest.approx(flops, rel=1e-12)
        z = 0.9 * memory ** (1 / 2) + 0.1 * flops ** (1 / 3)
        assert float(costs.z) == pytest.approx(z, rel=1e-12)


def test_a_runs_own_size_gives_its_own_shape_however_n_is_counted():
    r = noisy()
    family = family_of(r)
    for i, heads in enumerate(r.heads):
        layers, width = family.shape(r.n_params[i], heads)
        assert float(layers) == pytest.approx(r.n_layers[i], rel=1e-9)
        assert float(width) == pytest.approx(r.d_model[i], rel=1e-9)


def test_ranking_margin_and_saving_hang_together(table_4):
    for answer in table_4.answers:
        z = [c.z for c in answer.choices]
        assert z == sorted(z)
        assert answer.margin == pytest.approx(z[1] / z[0] - 1)
        assert answer.best.excess == 0
        assert sum(c.probability for c in answer.choices) == pytest.approx(1)
        base = answer.choice((8, 8))
        assert base.saving == {"z": 0, "memory": 0, "flops": 0}
        for kind in ("z", "memory", "flops"):
            best = answer.best
            assert best.saving[kind] == pytest.approx(1 - getattr(best, kind) / getattr(base, kind))
            low, high = best.saving_interval[kind]
            assert low < best.saving[kind] < high
        assert sum(answer.choice(h).probability for h in answer.tied) >= 0.9
        assert answer.tied[0] == answer.best.heads
        assert all(c.probability <= c.within <= 1 for c in answer.choices)


def test_a_near_tie_is_printed_as_one(table_4):
    assert set(table_4.at(2.8, 131072).tied) == {(4, 1), (8, 1)}
    assert table_4.at(2.8, 131072).equivalent == ((4, 1),)  # 0.1% dearer
    assert table_4.at(2.6, 131072).tied == ((8, 1),)  # the next is dearer by 2.9%
    assert table_4.at(2.9, 131072).tied == ((4, 1), (8, 1))  # 0.9% dearer, never the cheapest
    assert any("others may be within 1% of it" in flag for flag in table_4.flags)


def test_extrapolation_is_flagged_only_where_it_happens(chen, table_4):
    assert table_4.at(2.6, 131072).best.extrapolated
    assert not table_4.at(2.8, 131072).best.extrapolated
    assert any("2.6 at 131,072" in flag for flag in table_4.flags)
    inside = frontier(chen, published())
    assert not any("outside its fitted sizes" in flag for flag in inside.flags)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_refits_out_of_reach_count_also_where_memory_or_flops_are_all_of_z(weight):
    runs = published()
    asked = Question(contexts=(131072,), losses=(2.15,), weight=weight)
    (answer,) = frontier(fit(runs, refits=200), runs, asked).answers
    least = "memory" if weight else "flops"
    alone = frontier(fit(runs, refits=200), runs, asked, least).answers[0]
    assert answer.best.unreachable == alone.best.unreachable > 0
    assert answer.best.probability == alone.best.probability
    assert [c.unreachable for c in answer.choices] == [c.unreachable for c in alone.choices]


def test_unreachable_losses_are_said_so_not_crashed_on(chen):
    answers = frontier(chen, published(), Question(losses=(2.0,), contexts=(8192,)))
    answer = answers.answers[0]
    assert math.isinf(answer.best.n)
    assert answer.model is None
    assert any("reaches 2 nats at 8,192 tokens" in flag for flag in answers.flags)
    row = next(line for line in _text(answers).splitlines() if "none" in line)
    assert row.split() == ["8,192", "2", "none", *["-"] * 8]
    assert "No configuration reaches" in sentence(answers)
    json.dumps(answers.to_dict(), allow_nan=False)
    Console(width=100, quiet=True).print(frontier_answer(answers))


def test_objectives_rank_by_what_they_name(chen):
    q = Question(losses=(2.8,), contexts=(131072,))
    for objective in ("memory", "flops"):
        answer = frontier(chen, published(), q, objective).answers[0]
        costs = [getattr(c, objective) for c in answer.choices]
        assert costs == sorted(costs)
    assert answer.best.heads == (1, 1)  # fewest heads, fewest FLOPs
    pure = dataclasses.replace(q, weight=1.0)
    by_memory = frontier(chen, published(), q, "memory").answers[0]
    assert [c.heads for c in frontier(chen, published(), pure).answers[0].choices] == [
        c.heads for c in by_memory.choices
    ]


# ------------------------------------------------------------------------- loss at equal cost


def by_hand(objective, n, heads, context, s):
    """The cost of N on the published ladder d = 64 L, written out from the equations."""
    h, kv = heads
    layers = layers_by_hand(n, heads)
    cache = 2 * context * layers * 64 * kv
    per_token = 2 * n + 4 * context * layers * 64 * h
    held = s.weight_bytes * n + s.cache_bytes * s.batch * cache
    seconds = (
        max(
            held / s.hardware.bandwidth,
            s.batch * per_token / (s.hardware.peak_flops * s.hardware.mfu),
        )
        / s.batch
    )
    return {
        "memory": n + cache,
        "flops": per_token,
        "z": 0.9 * math.sqrt(n + cache) + 0.1 * per_token ** (1 / 3),
        "bytes": held + s.weight_bytes * 50304 * 64 * layers,
        "seconds": seconds,
        "dollars": seconds * s.hardware.price / 3600 * 1e6,
    }[objective]


def equal_by_hand(objective, target, heads, base, context, s, curves, floor):
    """N and loss of `heads` for the cost of `base` at the target loss; curves are (a, b) by heads."""

    def cost(n, heads):
        return by_hand(objective, n, heads, context, s)

    a, b = curves[base]
    budget = cost(a / (target - floor) ** (1 / b), base)
    log_n = brentq(lambda x: cost(math.exp(x), heads) - budget, math.log(1e4), math.log(1e14))
    a, b = curves[heads]
    return math.exp(log_n), (a / math.exp(log_n)) ** b + floor


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_at_equal_cost_by_brute_force(chen, objective):
    s = Serving(batch=4, weight_bytes=1, hardware=hardware("h100"))
    q = Question(losses=(2.8, 2.95), contexts=(8192, 131072))
    found = frontier(chen, published(), q, objective, s)
    curves = {h: (chen.scale[k], chen.curves.b[k]) for k, h in enumerate(chen.heads)}
    for answer in found.answers:
        for choice in answer.choices:
            e, where = choice.equal_cost, (objective, answer.loss, choice.heads, (8, 8))
            n, loss = equal_by_hand(*where, answer.context, s, curves, chen.floor)
            assert e.n == pytest.approx(n, rel=1e-7)
            assert e.loss == pytest.approx(loss, abs=1e-8)
            assert e.gain == pytest.approx(answer.loss - loss, abs=1e-8)
            low, high = chen.points.range_n(chen.index(choice.heads))
            assert e.extrapolated == (not low <= n <= high)
        own = answer.choice((8, 8)).equal_cost
        assert own.gain == pytest.approx(0, abs=1e-9)
        assert own.n >= answer.choice((8, 8)).n
        assert own.n == pytest.approx(answer.choice((8, 8)).n, rel=1e-8)
        assert answer.lowest.equal_cost.gain == max(c.equal_cost.gain for c in answer.choices)


def test_the_interval_of_a_gain_is_that_of_the_refits_one_by_one():
    r = published()
    f = fit(r, refits=100)
    q = Question(losses=(2.8,), contexts=(32768,))
    e = frontier(f, r, q).answers[0].choice((8, 1)).equal_cost
    s, gains, sizes = Serving(hardware=hardware("h100")), [], []
    for i in range(len(f.draws.floor)):
        a = np.exp(f.draws.centre + f.draws.u[i] / f.draws.b[i])
        curves = {h: (a[k], f.draws.b[i, k]) for k, h in enumerate(f.heads)}
        floor = float(f.draws.floor[i])
        n, loss = equal_by_hand("z", 2.8, (8, 1), (8, 8), 32768, s, curves, floor)
        gains.append(2.8 - loss)
        sizes.append(n)
    assert e.gain_interval == pytest.approx(interval(np.array(gains)), abs=1e-8)
    assert e.n_interval == pytest.approx(interval(np.array(sizes)), rel=1e-7)
    assert e.gain_interval[0] < e.gain < e.gain_interval[1]


def test_the_largest_size_is_found_where_costs_fall_again():
    """The published ladder turns wider at once in places, so that its caches shrink with N."""
    family = family_of(published())
    family = dataclasses.replace(family, ladder=PUBLISHED_LADDER, trained=(1e7, 1e9))
    deployment = Deployment(family, Question(), 2**20)

    def load(n):
        costs = deployment.costs(n, (32, 32))
        return costs.memory, costs.bytes / np.inf

    grid = family.sizes((32, 32))
    assert (grid[0], grid[-1]) == (1e3, 1e15)
    n = np.geomspace(5e7, 5e8, 400001)
    cost = load(n)[0]
    assert (np.diff(cost) < 0).any()
    budgets = np.quantile(cost, np.linspace(0.1, 0.9, 9))
    scanned = [n[np.flatnonzero(cost <= b)[-1]] for b in budgets]
    assert largest(load, grid, budgets) == pytest.approx(scanned, rel=2e-5)
    beyond = largest(load, grid, np.array([load(grid)[0].min() / 2, 1e30, np.inf, np.nan]))
    assert np.isnan(beyond).tolist() == [True, False, True, True]
    assert beyond[1] == 1e15


def test_a_baseline_that_could_be_larger_at_no_cost_is_taken_so():
    """Else part of what others gain would be owed to the ladder's aspect ratio, not to heads."""
    r = noisy(noise=0.0, sizes=((2, 24), (2, 48), (3, 64), (4, 96)))
    found = fit(r, refits=100)
    k = found.index((4, 4))
    gaps = []
    for loss in np.linspace(1.85, 2.0, 16):
        q = Question(losses=(float(loss),), contexts=(65536,))
        answer = frontier(found, r, q).answers[0]
        own = answer.choice((4, 4))
        assert own.equal_cost.gain == 0
        assert own.equal_cost.gain_interval == (0, 0)
        reference = float(found.curves.loss(k, own.equal_cost.n))
        gaps.append(loss - reference)
        for choice in answer.choices:
            e = choice.equal_cost
            assert e.gain == pytest.approx(reference - e.loss, abs=1e-12)
    assert min(gaps) > -1e-9
    assert max(gaps) > 1e-3


def test_what_must_hold_holds_at_equal_cost_too(chen):
    q = Question(losses=(2.8,), contexts=(131072,))
    free = frontier(chen, published(), q).answers[0]
    limit = 6e9
    s = Serving(kv_multiple=2, limit_bytes=limit)
    tight = frontier(chen, published(), q, serving=s).answers[0]
    assert math.isnan(tight.choice((8, 1)).equal_cost.gain)
    assert tight.lowest.heads in ((8, 2), (8, 4))
    for heads in ((8, 2), (8, 4)):
        e = tight.choice(heads).equal_cost
        held = Deployment(family_of(published()), q, 131072, serving=s).costs(e.n, heads)
        base = free.choice((8, 8))
        both = max(float(held.bytes) / limit, float(held.z) / base.z)
        assert both == pytest.approx(1, abs=1e-9)
        assert e.gain == pytest.approx(2.8 - e.loss, abs=1e-9)  # the baseline itself is free of it
        assert e.n <= free.choice(heads).equal_cost.n * (1 + 1e-9)
    assert not tight.choice((8, 8)).reached


def test_a_loss_the_baseline_never_reaches_gives_no_gain(chen):
    found = frontier(chen, published(), Question(losses=(2.0,), contexts=(8192,)))
    assert found.answers[0].lowest is None
    assert math.isnan(found.answers[0].best.equal_cost.gain)
    assert "none" in _text(found).split("Gained over")[1]
    json.dumps(found.to_dict(), allow_nan=False)


def test_gains_are_told_at_a_glance(chen):
    q = Question(losses=(2.8,), contexts=(32768,), convention="per_sequence")
    found = frontier(chen, published(), q)
    e = found.answers[0].best.equal_cost
    low, high = e.gain_interval
    said = f"; or {e.gain:.3f} nats less at the same Z ({low:.3f} to {high:.3f})."
    assert said in sentence(found)
    row = _text(found).split("Gained over (8,8) at equal Z")[1].splitlines()[3].split()
    assert row[:3] == ["32,768", "2.8", "(8,1)"]
    assert row[5] == "2.8000"
    assert row[6:] == [f"{1e3 * v:.1f}" for v in (e.gain, low)] + ["to", f"{1e3 * high:.1f}"]
    worse = frontier(chen, published(), dataclasses.replace(q, baseline=(8, 1)))
    choice = worse.answers[0].choice((1, 1))
    assert "nats more at the same Z (0.0" in _gained(choice, "Z")
    line = next(x for x in frontier_csv(found).splitlines()[1:] if ",8,1," in x)
    assert f"{e.gain},{low},{high},0" in line


# ------------------------------------------------------------------- predictions and their checks


def test_a_run_is_expected_where_its_curve_and_its_noise_put_it(chen):
    """The noise that the refits have drawn: that of a point with one seed is its own and its size's."""
    draws = chen.draws.loss(chen.index((8, 1)), 3e8)
    rng = np.random.default_rng(1)
    runs = rng.choice(draws, 200_000) + chen.shared.draw(200_000, rng)[:, 0]
    assert run_interval(chen, draws) == pytest.approx(interval(runs), abs=3e-4)


def test_left_out_runs_fall_where_they_were_predicted():
    r = noisy(seed=3, noise=0.002)
    out = (r.n_layers == 3) & (r.n_heads == 4)
    checks = check_runs(fit(r.select(~out), refits=300), r.select(out))
    assert [c.heads for c in checks] == [(4, 1), (4, 4)]
    for c in checks:
        assert (c.n_layers, c.d_model) == (3, 64)
        assert c.run_interval[0] < c.measured < c.run_interval[1]
        assert c.difference == c.measured - c.predicted
    other = dataclasses.replace(r.select(out), n_kv_heads=np.array([2, 2]))
    assert check_runs(fit(r, refits=100), other) == ()


def test_bytes_seconds_and_dollars_by_hand(chen):
    h100 = hardware("h100")
    s = Serving(batch=4, weight_bytes=1, cache_bytes=2, hardware=h100)
    n, heads, context = 5e8, (8, 2), 131072
    costs = Deployment(family_of(published()), Question(), context, serving=s).costs(n, heads)
    held = n + 2 * 4 * 2 * context * costs.n_layers * 64 * 2
    flops = 4 * (2 * n + 4 * context * costs.n_layers * 64 * 8)
    step = max(held / h100.bandwidth, flops / (h100.peak_flops * h100.mfu))
    assert float(costs.bytes) == pytest.approx(
        float(held + 50304 * costs.d_model)
    )  # embeddings too
    assert float(costs.seconds) == pytest.approx(float(step / 4))
    assert float(costs.dollars) == pytest.approx(float(step / 4 * h100.price / 3600 * 1e6))
    q = Question(losses=(2.8,), contexts=(131072,))
    for objective in ("bytes", "seconds", "dollars"):
        found = frontier(chen, published(), q, objective, s)
        costs = [c.cost for c in found.answers[0].choices]
        assert costs == sorted(costs)
        assert found.answers[0].best.saving[objective] > 0
        assert "on h100" in _text(found)
        assert OBJECTIVES[objective] in sentence(found)
        json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(UserError, match="needs hardware"):
        frontier(chen, published(), q, "seconds")
    with pytest.raises(UserError, match="batch=0"):
        Serving(batch=0)


def test_constraints_rule_configurations_out(chen):
    q = Question(losses=(2.8,), contexts=(131072,))
    free = frontier(chen, published(), q).answers[0]
    assert free.best.heads == (8, 1)
    grouped = frontier(chen, published(), q, serving=Serving(kv_multiple=4)).answers[0]
    assert [c.heads for c in grouped.choices if c.reached] == [(8, 4), (8, 8)]
    assert grouped.choice((8, 1)).probability == 0
    middle = sorted(c.bytes for c in free.choices)[2] * 1.001
    tight = frontier(chen, published(), q, "flops", Serving(limit_bytes=middle)).answers[0]
    assert sum(c.reached for c in tight.choices) == 3
    assert all(c.bytes <= middle for c in tight.choices if c.reached)
    none = frontier(chen, published(), q, serving=Serving(limit_bytes=1e6))
    assert not none.answers[0].best.reached
    assert none.answers[0].model is None
    assert "No configuration that reaches 2.8 nats" in sentence(none)
    assert "fits --fit-gib 0.000931323 (GiB)" in sentence(none)
    assert any("fits --fit-gib" in flag for flag in none.flags)
    with pytest.raises(UserError, match="no candidate has n_kv that is a multiple of 7"):
        frontier(chen, published(), q, serving=Serving(kv_multiple=7))
    assert "none" in _text(none)


def _text(found):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(frontier_answer(found))
    return console.export_text()


def test_bad_questions_are_refused(chen):
    with pytest.raises(
        UserError, match=r"\(16,2\) is not in this study; there are \(1,1\), \(2,1\)"
    ):
        frontier(chen, published(), Question(baseline=(16, 2)))
    with pytest.raises(UserError, match="objective='speed'"):
        frontier(chen, published(), objective="speed")
    r = published()
    mixed = dataclasses.replace(r, head_dim=np.where(r.n_layers > 20, 64, 128))
    with pytest.raises(UserError, match="head sizes 64, 128"):
        family_of(mixed)


def test_default_targets_lie_on_every_curve(chen):
    losses = target_losses(chen)
    assert len(losses) == 3
    assert list(losses) == sorted(losses, reverse=True)
    for loss in losses:
        for k, n in enumerate(chen.curves.n_star(loss)):
            low, high = chen.points.range_n(k)
            assert low <= n <= high
    assert all(len(f"{loss:g}") <= 4 for loss in losses)


def test_curves_that_share_no_loss_ask_for_targets():
    r = noisy(noise=0.0)
    mine = np.array([h == (4, 4) for h in r.heads])
    apart = fit(dataclasses.replace(r, loss=r.loss + 3.0 * mine), refits=100)
    with pytest.raises(UserError, match="name target losses"):
        target_losses(apart)


def test_refits_that_miss_the_loss_are_said_so(chen):
    floors = np.sort(chen.draws.floor.ravel())
    loss = float(np.quantile(floors, 0.9))
    q = Question(losses=(loss,), contexts=(8192,))
    assert math.isfinite(chen.curves.n_star(loss).min())
    found = frontier(chen, published(), q)
    best = found.answers[0].best
    sizes = chen.draws.n_star(loss)[:, chen.index(best.heads)]
    assert np.isinf(sizes).mean() == pytest.approx(0.1, abs=0.02)
    assert best.unreachable == (sizes > MOST_PARAMETERS).mean() > 0.2  # E alone would say 10%
    assert best.n_interval[1] == math.inf
    assert any("at any size that can be built, up to 1.00P parameters" in f for f in found.flags)
    missed = f"{best.unreachable:.0%} of the refits never reach {loss:g} nats at 8,192 tokens"
    assert any(missed in flag for flag in found.flags)
    assert any("savings leave them out" in flag for flag in found.flags)
    assert "of the refits never reach that loss" in sentence(found)
    assert ",unreachable," in frontier_csv(found)


def test_a_baseline_that_never_reaches_the_loss_saves_nothing():
    share = saved(np.array([1.0, 1.0, math.inf]), np.array([math.inf, 2.0, math.inf]))
    assert np.isnan(share).tolist() == [True, False, True]
    assert share[1] == 0.5
    rounded = saved(np.array([1 + 1e-15]), np.array(1.0))
    assert np.copysign(1, rounded) == 1  # printed as 0.0%, not as -0.0%


def test_refits_that_miss_the_loss_cost_endlessly_or_are_left_out():
    n = np.full((11, 2), 1e9)
    n[1:6, 1] = np.inf
    deployment = Deployment(family_of(published()), Question(), 8192)
    ranking = rank(deployment, [(8, 8), (8, 1)], n)
    reference = deployment.costs(1e9, (8, 8))
    endless, left_out = (ranking.of(1, reference, finite=f) for f in (False, True))
    assert endless.saving_interval["z"] == (-math.inf, pytest.approx(endless.saving["z"]))
    assert left_out.saving_interval["z"] == pytest.approx((left_out.saving["z"],) * 2)
    for found in (endless, left_out):
        assert found.saving["memory"] > 0.1
        assert found.unreachable == 0.5
        assert found.probability == 0.5
    assert ranking.of(0, reference).saving["z"] == 0
    assert np.isinf(ranking.regret[1])


def test_built_models_hold_what_serving_says_and_fit_it(chen):
    q = Question(losses=(2.8,), contexts=(131072,))
    s = Serving(batch=4, weight_bytes=1)
    m = frontier(chen, published(), q, serving=s).answers[0].model
    assert m.weight_bytes == m.parameters
    assert m.cache_bytes == 4 * 2 * (m.memory - m.n)
    assert "batch 4, 1 bytes a weight" in _text(frontier(chen, published(), q, serving=s))
    total = m.weight_bytes + m.cache_bytes
    tight = dataclasses.replace(s, limit_bytes=total - 1)
    found = frontier(chen, published(), q, serving=tight)  # N* fits, the model near it does not
    assert found.answers[0].best.bytes < total - 1
    assert found.answers[0].model is None
    assert any("can be built within the bytes: 2.8 nats" in flag for flag in found.flags)


def test_each_configuration_has_its_own_way_from_n_to_the_formula():
    r = noisy(noise=0.0)
    wide = r.n_heads == 4
    r = dataclasses.replace(r, n_params=np.where(wide, 1.5, 1.0) * r.n_params)
    family = family_of(r)
    for i, heads in enumerate(r.heads):
        formula = n_formula(r.n_layers[i], r.d_model[i], *heads, 16)
        assert float(family.to_formula(r.n_params[i], heads)) == pytest.approx(formula)
        assert float(family.from_formula(formula, heads)) == pytest.approx(r.n_params[i])


def test_models_are_built_as_the_runs_were_and_far_contexts_are_flagged():
    r = noisy(noise=0.001)
    template = ModelConfig(1, 32, 1, 1, head_dim=16, vocab_size=512, tie_embeddings=False)
    r = dataclasses.replace(r, template=template)
    found = frontier(fit(r, refits=100), r, Question(contexts=(256, 4096)))
    m = found.answers[0].model
    assert m.parameters == m.n_exact + 2 * 512 * m.d_model
    assert any("measured at T = 256 tokens" in flag for flag in found.flags)
    near = frontier(fit(r, refits=100), r, Question(contexts=(256,)))
    assert not any("measured at T" in flag for flag in near.flags)


def test_default_baseline_has_the_most_query_heads_then_kv_heads():
    assert default_baseline([(1, 1), (8, 1), (8, 8), (16, 4)]) == (16, 4)
    assert default_baseline([(1, 1), (8, 1), (8, 8)]) == (8, 8)
    assert default_baseline([(8, 1), (8, 2), (4, 2)]) == (8, 2)


def test_probability_and_regret_by_hand():
    inf = math.inf
    draws = np.array([[1.0, 2.0, inf], [1.0, 0.5, inf], [1.0, 4.0, 2.0], [inf, inf, inf]])
    probability, regret = decide(draws)
    assert probability.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert regret.tolist() == pytest.approx([1 / 3, 4 / 3, inf])
    assert decide(np.full((2, 2), inf))[0].tolist() == [0, 0]


def test_a_model_one_can_build_is_near_and_exactly_counted(table_4):
    for answer in table_4.answers:
        m = answer.model
        assert m.n == n_formula(m.n_layers, m.d_model, *answer.best.heads)
        assert m.n == pytest.approx(answer.best.n, rel=0.04)
        assert m.loss == pytest.approx(answer.loss, abs=0.01)
        assert m.loss_interval[0] < m.loss < m.loss_interval[1]
        assert m.memory == m.n + 2 * 131072 * m.n_layers * 64 * m.n_kv_heads
        assert m.cache_bytes == 2 * (m.memory - m.n)
        assert m.parameters == m.n_exact + m.vocab_size * m.d_model
        assert m.weight_bytes == 2 * m.parameters


@pytest.mark.parametrize("seed", range(6))
def test_noisy_little_studies_answer_with_doubt(seed):
    r = noisy(seed)
    found = fit(r, refits=300, seed=seed)
    answers = frontier(found, r, Question(contexts=(1024, 16384), demonstration=True))
    assert np.ptp(found.floor_interval) > 0.2
    json.dumps(answers.to_dict(), allow_nan=False)
    assert sentence(answers).startswith("Demonstration")


def test_more_noise_means_more_ties():
    def doubt(noise):
        counted = 0
        for seed in range(8):
            r = noisy(seed, noise)
            a = frontier(fit(r, refits=200), r, Question(contexts=(16384,), losses=(1.9, 1.8)))
            counted += sum(len(answer.tied) for answer in a.answers)
        return counted

    assert doubt(0.0002) < doubt(0.01)


def test_tables_fit_100_columns_and_name_units(chen, table_4):
    console = Console(width=100, record=True, file=io.StringIO())
    for part in (
        fit_table(chen),
        residual_table(chen),
        frontier_answer(table_4),
        ranking_table(table_4.answers[0], table_4),
    ):
        console.print(part)
    text = console.export_text()
    assert "per_sequence" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for word in ("per_sequence", "(values)", "(nats)", "(tokens)", "(parameters)", "90%", "regret"):
        assert word in text, word
    for a in table_4.answers:
        assert quantity(a.best.n) in text


@pytest.mark.parametrize("width", [80, 100])
def test_narrow_tables_leave_columns_out_and_cut_no_number(table_4, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(frontier_answer(table_4))
    console.print(ranking_table(table_4.answers[0], table_4))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text.count("131,072") >= 4 * len(table_4.answers)
    assert ("--json has all" in text) == ("left out for want of width" in text)
    assert ("left out for want of width: L x d" in text) == (width == 80)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.68611e9, "1.69G"),
        (999.6e6, "1.00G"),
        (12345, "12.3k"),
        (0.5, "0.5"),
        (2.21e14, "221T"),
        (math.inf, "out of reach"),
    ],
)
def test_quantities_have_three_digits_and_a_prefix(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize(
    ("objective", "heading"),
    [("dollars", "per million tokens"), ("seconds", "per token"), ("bytes", "bytes held")],
)
def test_the_objective_is_told_in_its_own_unit(chen, objective, heading, width):
    s = Serving(batch=16, hardware=hardware("h100"))
    a = frontier(chen, published(), TABLE_4, objective, s, gains=False)
    cost = getattr(a.answers[0].best, objective)
    told = byte_size(cost) if objective == "bytes" else quantity(cost)
    for told_in in (frontier_table(a), ranking_table(a.answers[0], a)):
        console = Console(width=width, file=io.StringIO())
        console.print(told_in)
        text = console.file.getvalue()
        assert heading in text
        assert told in text


def test_the_sentence_says_configuration_saving_interval_and_doubt(chen, table_4):
    text = sentence(table_4)  # middle loss 2.8, where two are tied
    assert "8 query heads and 1 KV head " in text
    assert "42.0% less Z than (8,8)" in text
    assert "90% interval" in text
    assert "As good, within 1% of the cheapest in 90% of the refits: (4,1)." in text
    own = frontier(chen, published(), dataclasses.replace(TABLE_4, baseline=(8, 1), losses=(2.7,)))
    assert "it is the baseline itself" in sentence(own)


def test_a_csv_from_elsewhere_goes_all_the_way(tmp_path, chen):
    # other column order, further columns, another ladder, another head size
    lines = ["who,loss,d_model,head_dim,n_kv_heads,n_layers,n_heads"]
    for layers, width in ((4, 256), (6, 512), (12, 768), (12, 1024)):
        for h, kv in ((2, 1), (4, 2), (8, 8)):
            n = n_formula(layers, width, h, kv, 32)
            loss = 1.8 + (4e7 * (1 - 0.04 * math.log2(h)) / n) ** 0.21
            lines.append(f"them,{loss:.4f},{width},32,{kv},{layers},{h}")
    file = tmp_path / "theirs.csv"
    file.write_text("\n".join(lines) + "\n")
    r = from_csv(file)
    found = fit(r, refits=200)
    assert found.floor == pytest.approx(1.8, abs=0.02)
    answer = frontier(found, r, Question(contexts=(32768,))).answers[0]
    assert answer.best.heads == (2, 1)
    assert answer.model.head_dim == 32
    assert any("no replicate seeds" in flag for flag in found.flags)


def test_a_fit_that_identifies_nothing_gives_no_confident_answer(tmp_path) -> None:
    rows = ["2,1,7760,6.4155", "2,1,21700,6.4181", "2,1,41700,6.0715"]
    rows += ["2,2,8270,6.5239", "2,2,22700,6.4858", "2,2,43200,6.2765"]
    file = tmp_path / "noise.csv"
    file.write_text("n_heads,n_kv_heads,n_params,loss\n" + "\n".join(rows))
    results = from_csv(file)
    answer = frontier(fit(results, refits=100), results)
    assert "E is at its bound" in answer.doubt
    assert sentence(answer).startswith("NOT TO BE RELIED ON: E is at its bound")
    sound = frontier(fit(published(), refits=100), published())
    assert sound.doubt == ""
