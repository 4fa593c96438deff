"""Configurations that were never trained: what is said of them, and how sure that is."""

import dataclasses
import math

import numpy as np
import pytest

from gqa_scaling import cli
from gqa_scaling.config import Question, UserError
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.grid import head_candidates
from gqa_scaling.study.baseline import in_words, label
from gqa_scaling.study.candidates import Candidates, candidates, heads_to_rank, known_as, sizes_of
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import from_csv, from_text, published
from gqa_scaling.study.report.csv_files import frontier_csv
from gqa_scaling.study.report.sentences import sentence, training
from gqa_scaling.study.serving import Deployment
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.uncertainty import interval

TABLE_4 = Question(contexts=(131072,), losses=(3.0, 2.9, 2.8, 2.7, 2.6), convention="per_sequence")
SIZES = ((12, 768), (16, 1024), (20, 1280), (24, 1536), (28, 1792), (32, 2048))
SEVEN = ((1, 1), (2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (8, 8))


@pytest.fixture(scope="module")
def all_21() -> Candidates:
    return candidates(published(), "all", refits=400)


@pytest.fixture(scope="module")
def table_4(all_21):
    return frontier(all_21.fit, published(), TABLE_4, among=all_21, gains=False)


def truth(n_layers, d_model, heads, stray=0.0):
    """A loss whose gains of more heads fade, (n_layers, d_model) and heads given."""
    x = math.log(n_formula(n_layers, d_model, 0, 0) / 4e8)
    gain = 0.067 * (1 - heads[0] ** -0.2) / 0.2 + 0.023 * (1 - heads[1] ** -0.2) / 0.2
    return 2.05 + math.exp(-0.11 - 0.19 * x + stray) * (1 - gain)


def study(path, strays=None, heads=SEVEN, sizes=SIZES, noise=0.003, seed=0):
    rng, rows = np.random.default_rng(seed), ["n_heads,n_kv_heads,n_layers,d_model,loss"]
    for h in heads:
        for layers, width in sizes[h] if isinstance(sizes, dict) else sizes:
            loss = truth(layers, width, h, (strays or {}).get(h, 0.0)) + noise * rng.normal()
            rows.append(f"{h[0]},{h[1]},{layers},{width},{loss:.6f}")
    path.write_text("\n".join(rows) + "\n")
    return from_csv(path)


# ------------------------------------------------------------------------------ which are ranked


def test_by_default_powers_of_two_up_to_the_most_trained_and_whatever_was_trained():
    found = heads_to_rank([(28, 8), (4, 1)])
    assert set(found) == {(28, 8), *(h for h in head_candidates(16) if h[1] <= 8)}
    assert len(heads_to_rank(SEVEN, "all")) == 21
    assert heads_to_rank(SEVEN, "measured") == SEVEN
    assert heads_to_rank(SEVEN, [(4, 2), (12, 3)]) == ((4, 2), (12, 3))


def test_what_is_known_of_heads():
    said = {h: known_as(h, SEVEN) for h in ((8, 2), (4, 4), (16, 1), (6, 3), (16, 16))}
    assert list(said.values()) == ["measured", "predicted", "beyond", "predicted", "beyond"]


def test_table_4_from_the_shipped_points(table_4):
    """The five published answers at 128K are the cheapest of the trained; the law sees more beyond."""
    assert [a.safest.heads for a in table_4.answers] == [(4, 1), (4, 1), (8, 1), (8, 1), (8, 1)]
    assert table_4.answers[0].best.heads == (4, 1)
    for answer in table_4.answers:
        assert len(answer.choices) == 21
        assert {c.known for c in answer.choices} == {"measured", "predicted", "beyond"}
        assert answer.safest.excess < 0.05
        assert math.isnan(answer.under["separate"]) == (answer.best.known != "measured")
        assert 0 <= answer.under["fading"] < 0.05
        assert sum(c.probability for c in answer.choices) == pytest.approx(1)


def test_among_the_default_candidates_the_published_answers_win():
    among = candidates(published(), refits=200)
    assert len(among.heads) == 10
    found = frontier(among.fit, published(), TABLE_4, among=among, gains=False)
    assert [a.best.heads for a in found.answers] == [(4, 1), (4, 1), (8, 1), (8, 1), (8, 1)]
    assert found.law == "product"


def test_a_predicted_winner_says_so_everywhere_and_comes_with_its_run(all_21):
    low = dataclasses.replace(TABLE_4, losses=(2.6,))
    found = frontier(all_21.fit, published(), low, among=all_21, gains=False)
    answer = found.headline
    assert answer.best.known == "beyond"
    assert "never trained" in sentence(found)
    assert "predicted beyond the trained heads" in sentence(found)
    assert "The cheapest that was trained is (8,1)" in sentence(found)
    assert f"n_heads={answer.best.heads[0]}" in training(found)
    assert "It checks heads that were never trained" in training(found)
    rows = [c["known"] for c in found.to_dict()["answers"][0]["choices"]]
    assert set(rows) == {"measured", "predicted", "predicted beyond the trained heads"}
    assert "predicted beyond the trained heads" in frontier_csv(found)


def test_excess_under_another_law_is_that_laws_own_ranking(all_21, table_4):
    answer = table_4.at(2.9, 131072)
    other = next(o for o in all_21.others if o.law == "fading")
    deployment = Deployment(family_of(published()), TABLE_4, 131072)
    n = other.curves.n_star(2.9)
    z = {h: float(deployment.costs(n[k], h).z) for k, h in enumerate(other.heads)}
    assert answer.under["fading"] == pytest.approx(z[answer.best.heads] / min(z.values()) - 1)


# ---------------------------------------------------------------------------------- how sure it is


def test_intervals_hold_configurations_that_were_left_out():
    """Each published configuration predicted from the others: 90% of the intervals of a run."""
    r, rng, inside = published(), np.random.default_rng(0), []
    for out in ((2, 1), (8, 2), (8, 8)):
        mine = np.array([h == out for h in r.heads])
        fit = candidates(r.select(~mine), [out], refits=200).fit
        for i in np.flatnonzero(mine):
            draws = fit.draws.loss(fit.index(out), r.n_params[i])
            low, high = interval(draws + fit.sigma * rng.standard_normal(len(draws)))
            inside.append(low <= r.loss[i] <= high)
    assert np.mean(inside) >= 0.8


def test_intervals_grow_beyond_the_trained_heads(all_21):
    draws = all_21.fit.draws
    width = {h: np.ptp(interval(draws.loss(k, 1e9))) for k, h in enumerate(all_21.fit.heads)}
    assert width[8, 2] < width[4, 2] < width[16, 2] < width[32, 2]


def test_a_trained_configuration_keeps_what_its_runs_say(tmp_path):
    """A stray of 4%, ten times the noise: the law alone would miss it, its own curve does not."""
    strays = {(8, 2): 0.04, (2, 1): -0.04}
    r = study(tmp_path / "a.csv", strays, noise=0.001)
    among = candidates(r, refits=200)
    for heads, stray in strays.items():
        k = among.fit.index(heads)
        for layers, width in SIZES[1:-1]:
            n = n_formula(layers, width, *heads)
            here, law = truth(layers, width, heads, stray), truth(layers, width, heads)
            found = float(among.fit.curves.loss(k, n))
            assert abs(found - here) < 0.3 * abs(law - here)
            assert (
                np.std(among.fit.draws.loss(k, n)) < 0.003
            )  # as sure as its noise of 0.001 makes it
    unseen, seen = (np.std(among.fit.draws.u[:, among.fit.index(h)]) for h in ((4, 2), (4, 1)))
    assert unseen > 1.5 * seen
    spread = among.strayed.spreads.mean(0)[0]
    away = (
        among.fit.draws.u[:, among.fit.index((4, 2))]
        - among.strayed.model([(4, 2)]).curves(among.strayed.rows[1:]).u[:, -1]
    )
    assert 0.6 * spread < np.std(away) < 2 * spread  # as far from the law as trained ones are
    assert 0.01 < spread < 0.08
    calm = candidates(study(tmp_path / "b.csv", noise=0.001), refits=200).strayed.spreads.mean(0)[0]
    assert calm < 0.5 * spread


def test_with_sizes_enough_trained_configurations_have_curves_of_their_own(tmp_path):
    """Slopes that grow with the heads: no strays around a law of one slope, and nothing is shrunk."""
    slope = {h: 0.19 + 0.01 * k for k, h in enumerate(SEVEN)}
    r = study(tmp_path / "a.csv")
    log_n = np.log(8 * r.n_layers * r.d_model**2.0 / 4e8)
    b = np.array([slope[h] for h in r.heads])
    noise = np.random.default_rng(0).normal(0, 1e-5, len(r))
    r = dataclasses.replace(r, loss=2.05 + 0.9 * np.exp(-b * log_n) + noise)
    found = candidates(r, refits=100).fit
    assert found.floor == pytest.approx(2.05, abs=2e-3)
    for h, value in slope.items():
        assert found.curves.b[found.index(h)] == pytest.approx(value, abs=1e-3)
    assert found.misfit.verdict != "bends"  # the law does, these curves do not


def test_an_unseen_configuration_is_the_same_whoever_asks(all_21):
    one = all_21.strayed.fit_of([(16, 4)])
    k, m = one.index((16, 4)), all_21.fit.index((16, 4))
    assert np.array_equal(one.draws.loss(k, 1e9), all_21.fit.draws.loss(m, 1e9))


def test_a_configuration_with_one_size_is_taken_by_a_joint_law(tmp_path):
    sizes = dict.fromkeys(SEVEN, SIZES) | {(8, 4): SIZES[2:3]}
    r = study(tmp_path / "a.csv", sizes=sizes)
    among = candidates(r, refits=200)
    assert among.fit.law != "separate"
    k = among.fit.index((8, 4))
    assert sizes_of(among.fit, k)[1] > 1e9
    assert "separate" not in [o.law for o in among.others]
    n = n_formula(*SIZES[-1], 8, 4)
    low, high = interval(among.fit.draws.loss(k, n))
    assert low < truth(*SIZES[-1], (8, 4)) < high
    with pytest.raises(UserError, match=r"each configuration needs 3 sizes, but \(8,4\) has 1"):
        candidates(r, law="separate")


def test_few_configurations_are_ranked_alone_and_it_is_said_in_one_line(tmp_path):
    r = study(tmp_path / "a.csv", heads=SEVEN[3:])
    among = candidates(r, refits=200)
    assert (among.heads, among.fit.law, among.strayed) == (SEVEN[3:], "separate", None)
    found = frontier(among.fit, r, Question(contexts=(8192,)), among=among, gains=False)
    line = "only the 4 trained configurations are ranked: a joint law needs 5 dense configurations"
    assert any(line in flag for flag in found.flags)
    with pytest.raises(UserError, match=r"\(2,2\).* cannot be predicted.*needs 5 dense"):
        candidates(r, "all", refits=200)
    with pytest.raises(UserError, match=r"\(4,2\) cannot be predicted.*'separate' knows nothing"):
        candidates(published(), [(4, 2)], law="separate", refits=200)
    assert candidates(published(), law="separate", refits=200).heads == SEVEN
    assert not candidates(published(), "measured", refits=200).note


# ------------------------------------------------------------------------------------- baselines


def test_the_published_family_stands_where_its_sizes_do(all_21):
    """At a size of the ladder the family is its model there: d / 64 query heads and 8 KV heads."""
    q = Question(contexts=(131072,), losses=(2.7,), baseline="llama3")
    found = frontier(all_21.fit, published(), q, among=all_21, gains=False)
    base = found.answers[0].baseline
    assert base.loss == 2.7
    assert base.d_model == pytest.approx(64 * base.n_layers)
    n_heads = base.d_model / 64
    assert base.n == pytest.approx(n_formula(base.n_layers, base.d_model, n_heads, 8), rel=1e-6)
    cache = 2 * 131072 * base.n_layers * 64 * 8
    assert base.memory == pytest.approx(base.n + cache, rel=1e-6)
    whole = scale_loss(all_21, base.n_layers, base.d_model, n_heads)
    assert whole == pytest.approx(2.7, abs=1e-4)
    assert "Llama-3" in label(found.baseline)
    assert "every size" in in_words(found.baseline)


def scale_loss(among, layers, width, n_heads):
    heads, backbone = np.array([[n_heads, 8.0]]), np.array([n_formula(layers, width, 0, 0)])
    return float(among.strayed.losses(heads, backbone, "llama3")[0, 0])


def test_a_family_far_below_the_sizes_has_an_endless_loss_and_no_warning(all_21):
    steep = dataclasses.replace(all_21.strayed, rows=all_21.strayed.rows + 9.0 * np.eye(5)[2])
    assert (steep.losses(np.array([[8.0, 8.0]]), np.array([1e-80]), "llama3") == np.inf).all()


def test_what_8_1_saves_against_llama_3_at_1_2b_and_128k(all_21):
    """Chen et al. 2025: 50.8% less memory and 57.8% fewer FLOPs at equal loss, 2.615 nats."""
    q = Question(contexts=(131072,), losses=(2.615,), baseline="llama3")
    found = frontier(all_21.fit, published(), q, among=all_21, gains=False)
    choice = found.answers[0].choice((8, 1))
    for kind, paper in (("memory", 0.508), ("flops", 0.578)):
        low, high = choice.saving_interval[kind]
        assert low < choice.saving[kind] < high
        assert choice.saving[kind] == pytest.approx(paper, abs=0.05)


def test_a_whole_model_is_a_baseline_and_its_loss_the_target(all_21):
    q = Question(contexts=(131072,), baseline="8,2@L24d1536")
    found = frontier(all_21.fit, published(), q, among=all_21, gains=False)
    answer, n = found.answers[0], n_formula(24, 1536, 8, 2)
    k = all_21.fit.index((8, 2))
    assert answer.baseline.n == n
    assert found.losses == (pytest.approx(float(all_21.fit.curves.loss(k, n))),)
    own = answer.choice((8, 2))
    assert own.n == pytest.approx(n)
    assert own.saving["memory"] == pytest.approx(0, abs=1e-9)
    assert own.saving_interval["memory"] == pytest.approx((0, 0), abs=1e-9)  # in every refit
    assert answer.baseline.memory == n + 2 * 131072 * 24 * 64 * 2
    asked = dataclasses.replace(q, losses=(2.9,))
    apart = frontier(all_21.fit, published(), asked, among=all_21, gains=False).answers[0]
    assert apart.baseline == answer.baseline
    assert apart.choice((8, 2)).saving["memory"] > 0.1


def test_baselines_are_checked_when_they_are_written():
    for text in ("llama4", "8,8@L0d64", "8;8", "8,8@36"):
        with pytest.raises(UserError, match="the text 24,8@L36d1536 for one model"):
            Question(baseline=text)
    q = Question(baseline="llama3")
    assert Question.from_dict(q.to_dict()) == q
    assert Question.from_dict({"baseline": [8, 8]}) == Question(baseline=(8, 8))
    few = candidates(published(), "measured", refits=100)
    with pytest.raises(UserError, match="needs a joint law"):
        frontier(few.fit, published(), q, among=few, gains=False)


def test_from_the_command_line(capsys):
    words = ["frontier", "chen2025", "--refits", "100", "--losses", "2.8", "--contexts", "8192"]
    assert cli.main([*words, "--candidates", "4,1", "16,2", "--baseline", "12,4"]) == 0
    said = capsys.readouterr().out
    assert "(16,2)" in said
    assert "Saved against (12,4) at equal loss" in said
    assert cli.main([*words, "--candidates", "all", "--law", "separate"]) == 2
    assert "knows nothing of heads" in capsys.readouterr().err
    assert cli.main([*words, "--baseline", "8"]) == 2
    assert "llama3" in capsys.readouterr().err


def test_query_heads_that_are_no_multiple_of_the_kv_heads_are_read_and_priced(tmp_path):
    heads = ((28, 8), (20, 8), (12, 8), (4, 1), (2, 2), (8, 2))
    among = candidates(study(tmp_path / "a.csv", heads=heads), [(28, 8)], refits=100)
    q = Question(contexts=(8192,), losses=(2.7,), baseline=(28, 8))
    found = frontier(among.fit, from_csv(tmp_path / "a.csv"), q, among=among, gains=False)
    answer = found.answers[0]
    assert answer.best.heads == (28, 8)
    assert answer.model is None
    assert any("no model of them can be built here" in flag for flag in found.flags)
    costs = Deployment(family_of(from_csv(tmp_path / "a.csv")), q, 8192).costs(
        answer.best.n, (28, 8)
    )
    assert answer.best.flops == pytest.approx(
        2 * answer.best.n + 4 * 8192 * float(costs.n_layers) * 64 * 28
    )
    with pytest.raises(UserError, match="at most n_heads=4"):
        from_text("n_heads,n_kv_heads,n_layers,d_model,loss\n4,8,12,768,3\n", "x")
