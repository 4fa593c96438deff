"""What matters: ties with a margin of indifference, what an answer hangs on, what movement costs."""

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_study_context import study

from gqa_scaling import cli
from gqa_scaling.config import Question, UserError
from gqa_scaling.hardware import hardware
from gqa_scaling.study.estimates import estimate
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.ranking import near_least, tied
from gqa_scaling.study.reading import published
from gqa_scaling.study.report.answers import frontier_table
from gqa_scaling.study.report.assumptions import sensitivity_table
from gqa_scaling.study.report.sentences import sentence
from gqa_scaling.study.sensitivity import sensitivity
from gqa_scaling.study.serving import Serving
from gqa_scaling.study.verdict import judged, with_verdict

R = published()
ASKED = Question(contexts=(131072,), losses=(2.8,), convention="per_sequence", baseline=(8, 8))


@pytest.fixture(scope="module")
def chen():
    return fit(R, refits=200)


# ------------------------------------------------------------------------------------------ ties

draws = st.integers(1, 2**32).map(
    lambda seed: np.exp(
        np.random.default_rng(seed).normal(0, [0.001, 0.01, 0.1][seed % 3], (100, 5))
        + np.linspace(0, 0.03, 5)
    )
)


@given(draws, st.sampled_from([0.0, 0.01, 0.05]), st.integers(0, 4))
def test_what_is_left_out_of_a_tie_is_dearer_by_more_than_the_margin(cost, margin, first):
    chosen = tied(near_least(cost, margin), first)
    assert chosen[0] == first
    left_out = sorted(set(range(5)) - set(chosen))
    excess = cost / cost.min(1, keepdims=True) - 1
    assert np.mean((excess[:, left_out] > margin).all(1)) >= 0.9
    assert np.mean((excess[:, [*left_out, *chosen[-1:]]] > margin).all(1)) < 0.9 or chosen == [
        first
    ]


@given(draws)
def test_without_a_margin_a_tie_holds_90_percent_of_the_probability(cost):
    probability = np.bincount(cost.argmin(1), minlength=5) / len(cost)
    first = int(probability.argmax())
    chosen = tied(near_least(cost, 0.0), first)
    fewest = int((np.cumsum(np.sort(probability)[::-1]) < 0.9 - 1e-12).sum()) + 1
    assert len(chosen) == fewest
    assert probability[chosen].sum() >= 0.9 - 1e-12


def test_costs_within_the_margin_are_tied_without_any_noise():
    cost = np.tile([1.0, 1.005, 1.02], (50, 1))
    assert tied(near_least(cost, 0.01), 0) == [0, 1]
    assert tied(near_least(cost, 0.001), 0) == [0]
    assert tied(near_least(cost, 0.03), 0) == [0, 1, 2]
    nowhere = np.full((50, 3), np.inf)
    assert tied(near_least(nowhere, 0.01), 1) == [1]


def test_the_answer_tells_indifference_from_doubt(chen):
    def answer(margin):
        q = dataclasses.replace(ASKED, losses=(2.7,), indifference=margin)
        return frontier(chen, R, q)

    strict, usual, loose = (answer(m) for m in (0.0, 0.01, 0.03))  # (4,1) is dearer by 1.4%
    assert strict.headline.tied == ((8, 1),)
    assert set(usual.headline.tied) == {(8, 1), (4, 1)}
    assert usual.headline.equivalent == ()
    assert "The noise leaves open whether (4,1) is as good." in sentence(usual)
    # (8,1) is the cheapest in 96% of the refits: that the two are tied is not for the noise
    assert not any("cannot separate" in flag for flag in usual.flags)
    assert any("in 1 of 1 answers the best is the cheapest in 90%" in flag for flag in usual.flags)
    assert loose.headline.equivalent == ((4, 1),)
    assert "As good, within 3% of the cheapest in 90% of the refits: (4,1)." in sentence(loose)
    assert not any("printed as tied" in flag for flag in loose.flags)
    even = frontier(chen, R, dataclasses.replace(ASKED, indifference=0.0))  # (4,1): 37% of them
    assert any("cannot separate the best configuration in 1 of 1" in flag for flag in even.flags)
    assert loose.to_dict()["answers"][0]["equivalent"] == [[4, 1]]
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(frontier_table(loose))
    assert "= (4,1)" in console.export_text()


def test_indifference_from_the_command_line(capsys):
    ask = ["frontier", "chen2025", "--refits", "100", "--contexts", "131072", "--losses", "2.7"]
    assert cli.main([*ask, "--indifference", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["question"]["indifference"] == 0.03
    assert told["answers"][0]["equivalent"] == [[4, 1]]
    assert cli.main([*ask, "--indifference", "-1"]) == 2
    assert "--indifference=-1.0 must be a number from 0 to 100 percent" in capsys.readouterr().err


# ----------------------------------------------------------------------- what an answer hangs on


def test_every_change_is_ranked_as_the_frontier_ranks_it(chen):
    found = sensitivity(chen, R, frontier(chen, R, ASKED))
    assert found.heads == (8, 1)
    fields = {"lambda": "weight", "alpha": "memory_power", "beta": "compute_power"}
    seen = set()
    for row in found.rows:
        q, s = ASKED, Serving()
        name = fields.get(row.assumption, row.assumption)
        if row.assumption in (*fields, "convention"):
            q = dataclasses.replace(q, **{name: row.after})
        elif row.assumption not in ("", "objective"):
            s = dataclasses.replace(s, **{name: row.after})
        answer = frontier(chen, R, q, row.objective, s).headline
        kept = answer.choice((8, 1))
        assert answer.best.heads == row.heads
        assert row.n == pytest.approx(answer.best.n)
        assert row.dearer == pytest.approx(kept.excess)
        assert row.within == pytest.approx(kept.within)
        low, high = row.dearer_interval
        assert 0 <= low <= high
        seen.add(row.assumption)
    assert {"", "lambda", "alpha", "beta", "batch", "weight_bytes", "cache_bytes"} <= seen
    odds = [row.after / (1 - row.after) / 9 for row in found.rows if row.assumption == "lambda"]
    assert odds == pytest.approx([0.5, 2])


def test_changes_are_judged_by_what_they_enter(chen):
    s = Serving(hardware=hardware("v5e"))
    found = sensitivity(chen, R, frontier(chen, R, ASKED, "seconds", s))
    by = {row.assumption: row.objective for row in found.rows}
    assert by["batch"] == by["cache_bytes"] == by[""] == "seconds"
    assert by["lambda"] == "z"
    assert (
        sensitivity(chen, R, frontier(chen, R, dataclasses.replace(ASKED, losses=(0.5,)))) is None
    )


def test_the_table_marks_what_matters(chen, capsys):
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(sensitivity_table(sensitivity(chen, R, frontier(chen, R, ASKED))))
    lines = {line.split("  ")[0]: line for line in console.export_text().splitlines()}
    assert "!" in lines["λ: 0.9 → 0.818"]
    assert "!" not in lines["λ: 0.9 → 0.947"]
    assert "(1,1)" in lines["α: 0.5 → 0.25"]
    ask = ["frontier", "chen2025", "--refits", "100", "--contexts", "131072", "--losses", "2.8"]
    assert cli.main([*ask, "--sensitivity", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sensitivity"]["rows"]) == len(lines) - 5
    assert cli.main(ask) == 0
    assert "hangs on" not in capsys.readouterr().out


# -------------------------------------------------------------------------- what movement costs


@pytest.mark.parametrize(
    ("move", "matters", "verdict"),
    [(0.0, 0.5, "flat"), (0.0, 1e-4, "unsure"), (0.004, 0.5, "small"), (0.004, 0.001, "moving")],
)
def test_flat_is_what_does_not_change_the_cost_of_the_answer(move, matters, verdict):
    r = study(0.001, seed=3, move=move)
    found = estimate(r, refits=100)
    assert found.flatness.verdict == "unjudged"
    q = Question(contexts=(131072,), losses=(2.95,), indifference=matters)
    answer = frontier(found.fit, r, q)
    tested, e = judged(found.flatness, found.fit, r, answer), answer.headline.best
    assert tested.verdict == verdict
    moved = tested.movement.most * 2.95
    then = frontier(found.fit, r, dataclasses.replace(q, losses=(2.95 - moved,))).headline
    assert tested.effect.change == pytest.approx(then.choice(e.heads).cost / e.cost - 1)
    told, flagged = with_verdict(found, r, answer)
    assert told.flatness == tested
    assert (tested.sentence() in flagged.flags) == (verdict != "flat")
    assert f"{100 * tested.effect.change:.1f}% dearer" in tested.sentence()


def test_a_movement_that_changes_the_answer_says_to_what():
    r = study(0.001, seed=3, move=0.02)
    found = estimate(r, refits=100)
    answer = frontier(found.fit, r, Question(contexts=(131072,), losses=(2.95,)))
    tested = judged(found.flatness, found.fit, r, answer)
    assert answer.headline.best.heads == (4, 1)
    assert tested.effect.then == (1, 1)
    assert "and (1,1) would be the cheapest" in tested.sentence()
    near = frontier(found.fit, r, Question(contexts=(131072,), losses=(found.fit.floor + 0.03,)))
    if near.headline.best.reached:
        assert "out of reach" in judged(found.flatness, found.fit, r, near).sentence()


# ----------------------------------------------------------------------------------- left out


def test_runs_and_configurations_can_be_left_out(capsys):
    ask = ["chen2025", "--refits", "100", "--contexts", "131072", "--losses", "2.8"]
    assert cli.main(["frontier", *ask, "--json", "--without", "8,1", "(1, 1)", "L12-*"]) == 0
    told = json.loads(capsys.readouterr().out)
    found = {tuple(c["heads"]) for c in told["answers"][0]["choices"]}
    assert found.isdisjoint({(8, 1), (1, 1)})  # nor are they predicted from the others
    assert found >= set(R.heads) - {(8, 1), (1, 1)}
    assert told["answers"][0]["best"] == [4, 1]
    assert told["flags"][0].startswith("left out by --without 8,1 (1, 1) L12-*: 15 runs (L12-d768-")
    assert cli.main(["fit", "chen2025", "--refits", "100", "--without", "8,1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["points"]) == sum(h != (8, 1) for h in R.heads)
    assert cli.main(["frontier", *ask, "--without", "8,8"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the baseline (8,8) with them: savings are against another" in out
    assert "Saved against (8,4) at equal loss" in out
    for words, said in (("9,9", "--without 9,9 names no run or configuration"), ("*", "every run")):
        assert cli.main(["fit", "chen2025", "--without", words]) == 2
        assert said in capsys.readouterr().err


def test_refusals_name_the_value():
    with pytest.raises(UserError, match="indifference=2"):
        Question(indifference=2)
