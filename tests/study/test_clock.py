"""Answers in seconds of a machine that was timed, beside those by Z."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from calibrate_kit import calibrated_file
from scipy.stats import norm, t

from gqa_scaling.cli import main
from gqa_scaling.config import Question, UserError
from gqa_scaling.study.calibration import read_calibration
from gqa_scaling.study.clock import clock
from gqa_scaling.study.estimates import Estimates
from gqa_scaling.study.fit import fit
from gqa_scaling.study.frontier import frontier
from gqa_scaling.study.reading import published
from gqa_scaling.study.report import compared
from gqa_scaling.study.report.answers import frontier_tables
from gqa_scaling.study.report.clocked import clock_table
from gqa_scaling.study.report.page import sections
from gqa_scaling.study.report.sentences import sentence
from gqa_scaling.study.sensitivity import sensitivity
from gqa_scaling.study.serving import Deployment, Serving
from gqa_scaling.study.shapes import family_of
from gqa_scaling.study.sides import Side
from gqa_scaling.study.study import Study
from gqa_scaling.study.versus import versus

QUESTION = Question(losses=(2.8,), contexts=(2048, 8192))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A machine that reads caches as slowly as this has Z wrong: timed, calibrated, written."""
    return calibrated_file(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def machine(path):
    return clock(read_calibration(path), price=3.6)


@pytest.fixture(scope="module")
def near(machine):
    """The same as if models as large as those of the question had been timed."""
    return replace(machine, ranges={**machine.ranges, "n": (2e6, 2e9)})


@pytest.fixture(scope="module")
def chen():
    return fit(published(), refits=100)


def serving(machine, batch=8, **more):
    return Serving(batch=batch, weight_bytes=4, cache_bytes=4, hardware=machine, **more)


def test_seconds_are_those_of_the_rates_that_were_found(machine):
    n, heads, context, batch = np.array([5e8, np.inf]), (8, 2), 4096, 8
    place = Deployment(family_of(published()), QUESTION, context, serving=serving(machine))
    costs = place.costs(n, heads)
    layers, width = costs.n_layers[0], costs.d_model[0]
    per = machine.decode.seconds_per
    read = 5e8 + 50304 * width
    step = (
        per["step"]
        + per["layer"] * layers
        + per["weights"] * 4 * read
        + per["linear"] * batch * 2 * read
        + per["cache float32"] * 4 * batch * 2 * context * layers * 64 * 2
        + per["attention float32"] * batch * 4 * context * layers * 64 * 8
    )
    assert costs.seconds[0] == pytest.approx(step / batch)
    assert costs.dollars[0] == pytest.approx(step / batch / 1000 * 1e6)  # 3.6 dollars an hour
    assert np.isinf([costs.seconds[1], costs.dollars[1]]).all()


def test_output_tokens_pay_for_their_prompt(machine):
    n, heads, context, batch, tokens = np.array([5e8]), (8, 2), 4096, 8, 96
    place = Deployment(family_of(published()), QUESTION, context, serving=serving(machine))
    request = replace(place, serving=serving(machine, output_tokens=tokens))
    alone, paid = place.costs(n, heads), request.costs(n, heads)
    prompt, layers, width = context - tokens, alone.n_layers[0], alone.d_model[0]
    per = machine.prefill.seconds_per
    prefill = (
        per["step"]
        + per["layer"] * layers
        + per["linear"] * batch * 2 * (prompt * 5e8 + 50304 * width)
        + per["attention float32"] * batch * 2 * prompt * (prompt + 0) * layers * 64 * 8
    )
    more = paid.seconds[0] - alone.seconds[0]
    assert more == pytest.approx(prefill / batch / tokens, rel=1e-3)


def test_the_frontier_is_by_the_clock_and_beside_it_by_z(near, chen):
    found = frontier(chen, published(), QUESTION, "seconds", serving(near))
    for answer in found.answers:
        costs = [c.seconds for c in answer.choices]
        assert costs == sorted(costs)
        assert answer.least("z").z == min(c.z for c in answer.choices)
        assert answer.least("seconds") == answer.best
        assert answer.least("z").seconds > 1.02 * answer.best.seconds  # Z knows of no batch
    same = frontier(chen, published(), QUESTION, "z", serving(near))
    by_z = {a.context: a.best.heads for a in same.answers}
    assert {a.context: a.least("z").heads for a in found.answers} == by_z
    rows = clock_table(found)._rows()
    z, seconds = found.answers[0].least("z"), found.answers[0].best
    assert f"({seconds.heads[0]},{seconds.heads[1]})" in rows[1]
    assert f"{1e3 * (z.seconds - seconds.seconds):.3g}" in rows[1]
    assert f"{seconds.dollars:.3g}" in rows[1]
    assert rows[1][-1] == "yes"
    json.dumps(found.to_dict(), allow_nan=False)
    told = sections(Study(published(), Estimates(chen), found))
    assert "By Z and by the clock" in [heading for heading, _ in itertools.islice(told, 3)]
    assert clock_table(frontier(chen, published(), QUESTION)) is None


def test_what_lies_beyond_the_timings_is_said(machine, chen):
    q = replace(QUESTION, contexts=(8192, 131072))
    flags = frontier(chen, published(), q, "seconds", serving(machine, batch=64)).flags
    said = [flag for flag in flags if "beyond what was timed" in flag]
    assert any("contexts of 131,072 tokens" in flag and "512 to 8,192" in flag for flag in said)
    assert any("a batch of 64" in flag for flag in said)
    assert any("parameters" in flag for flag in said)
    assert not any("heads of size" in flag for flag in said)


def test_a_difference_within_the_error_is_said(near, chen):
    unsure = replace(near, error=replace(near.error, ratio=10.0))
    found = frontier(chen, published(), QUESTION, "seconds", serving(unsure))
    assert {row[-1] for row in clock_table(found)._rows()[1:]} == {"left open"}
    assert len(found.headline.tied) > 3
    assert found.headline.best.probability < 0.5


def test_without_pairs_the_error_of_the_seconds_counts(near, chen):
    unsure = replace(near, error=replace(near.error, ratio=np.nan, pairs=0, most=0.5))
    found = frontier(chen, published(), QUESTION, "seconds", serving(unsure))
    assert any("no ratio of two was judged" in flag for flag in found.flags)
    assert np.array_equal(
        unsure.errors("(8,1)", 50),
        replace(near, error=replace(near.error, ratio=0.5)).errors("(8,1)", 50),
    )


@pytest.mark.parametrize("held_out", [3, 8, 100])
def test_ratios_of_two_are_drawn_as_far_off_as_those_held_out_were(machine, held_out):
    judged = replace(machine, error=replace(machine.error, ratio=0.2), held_out=held_out)
    one, other = (judged.errors(name, 100_001) for name in ("(8,1)", "(8,8)"))
    assert one[0] == other[0] == 0
    off = np.quantile(np.abs(one - other)[1:], 0.9)
    wider = t.ppf(0.95, held_out - 1) / norm.ppf(0.95)  # so few models say less of it
    assert off == pytest.approx(np.log(1.2) * wider, rel=0.03)
    assert np.array_equal(judged.errors("(8,1)", 20), one[:20])


def test_a_difference_is_as_sure_as_losses_and_clock_together(near, chen):
    """Of two the seconds of which are nearly one number neither is said to be the cheaper."""

    def told(ratio):
        judged = replace(near, error=replace(near.error, ratio=ratio))
        return versus(
            Estimates(chen),
            published(),
            Side((4, 1)),
            Side((8, 1)),
            replace(QUESTION, contexts=(2048,)),
            "seconds",
            serving(judged),
        ).headline

    sure, unsure = told(1e-6), told(0.5)
    assert sure.equal_loss[0].gain == unsure.equal_loss[0].gain
    assert (sure.verdict, unsure.verdict) == ("second", "open")
    wide, narrow = (np.diff(m.equal_loss[0].gain_interval)[0] for m in (unsure, sure))
    assert wide > 3 * narrow
    z, same = unsure.equal_loss[1], sure.equal_loss[1]
    assert (z.kind, z.gain_interval) == (same.kind, same.gain_interval)


def test_far_beyond_what_was_timed_nothing_is_decided(near, chen, capsys):
    q = replace(QUESTION, contexts=(131072,))
    answers = frontier(chen, published(), q, "seconds", serving(near))
    assert answers.headline.stretch["context"] == 16
    assert "NOT DECIDED which is the cheapest: seconds of contexts 16 times the most" in sentence(
        answers
    )
    (row,) = frontier_tables(answers)[0]._rows()[1:]
    assert row[-1] == "not decided"
    assert clock_table(answers)._rows()[1][-1] == "too far"
    by_z = frontier(chen, published(), q, "z", serving(near))
    assert "NOT DECIDED" not in sentence(by_z)
    two = versus(
        Estimates(chen), published(), Side((4, 1)), Side((8, 1)), q, "seconds", serving(near)
    )
    assert two.headline.verdict == "untimed"
    assert "NOT DECIDED whether (4,1) or (8,1) is cheaper" in compared.sentence(two)


def test_what_was_timed_is_no_assumption_to_change(machine, chen):
    found = frontier(chen, published(), QUESTION, "seconds", serving(machine))
    names = {row.assumption for row in sensitivity(chen, published(), found).rows}
    assert {"batch", "lambda"} <= names
    assert not {"weight_bytes", "cache_bytes"} & names


def test_bytes_that_were_not_timed_are_refused(path):
    known = read_calibration(path)
    assert clock(known).cache == "float32"
    assert clock(known, cache_bytes=1).cache == "int8"
    with pytest.raises(UserError, match=r"cache_bytes=2 was not timed: .* has 1 \(int8\), 4 \(fl"):
        clock(known, cache_bytes=2)
    with pytest.raises(
        UserError, match=r"weight_bytes=2 was not timed: .* weights in float32, 4 bytes"
    ):
        clock(known, weight_bytes=2)
    place = Serving(hardware=clock(known, cache_bytes=1), output_tokens=10)
    served = Deployment(family_of(published()), QUESTION, 4096, serving=place)
    with pytest.raises(UserError, match="prefill with its cache in int8 was not timed"):
        served.costs(1e8, (8, 1))


# ------------------------------------------------------------------------------ the command line


def test_calibrate_and_frontier_from_the_command_line(path, capsys):
    timings, again = path.parent / "timings.json", path.parent / "again.json"
    assert main(["calibrate", str(timings), "--output", str(again), "--hardware", "cpu"]) == 0
    out = capsys.readouterr().out
    for said in (
        "What a step of decoding takes on cpu",
        "prefers the slower of two",
        "λ",
        "regret",
    ):
        assert said in out
    assert f"calibration: {again}" in out
    assert main(["calibrate", str(timings), "--output", str(again), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decode"]["form"] == "sum"
    asked = [
        "chen2025",
        "--losses",
        "2.8",
        "--contexts",
        "8192",
        "--batch",
        "8",
        "--cost",
        str(again),
    ]
    assert main(["frontier", *asked, "--price", "3.6", "--refits", "100", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    best = said["answers"][0]["choices"][0]
    assert said["objective"] == "seconds"
    assert best["cost"] == best["seconds"]
    assert best["dollars"] == pytest.approx(1e6 * best["seconds"] / 1000)
    assert said["serving"]["hardware"]["sha256"] == read_calibration(again).sha256
    assert main(["frontier", *asked, "--refits", "100"]) == 0
    assert "By Z and by the clock of cpu: batch 8" in capsys.readouterr().out
    two = ["chen2025", "4,1", "8,1", "--loss", "2.8", "--context", "8192", "--refits", "100"]
    assert main(["compare", *two, "--cost", str(again)]) == 0
    out = capsys.readouterr().out
    assert "seconds per token" in out
    assert "beyond what was timed, 2.82M to 76.7M" in out


BAD = {
    "--cost {folder}/none.json": "there is no {folder}/none.json: make it of timings",
    "--cost {folder}/timings.json": "timings.json is no calibration: make one of timings",
    "--cost {path} --hardware v5e": "--hardware and --cost are two machines: name one",
    "--cost {path} --weight-bytes 2": "weight_bytes=2.0 was not timed",
    "--cost {path} --objective dollars": "needs a price above 0",
    "--cost {path} --price -1": "price=-1.0 must be a number from 0",
    "--cost {path} --output-tokens 0": "output_tokens=0 must be a number from 1",
    "--output-tokens 10": "output_tokens need the time of prefill",
    "--cost {path} --output-tokens 8192": "output_tokens=8192 must be less than the context",
}


@pytest.mark.parametrize("arguments", BAD)
def test_what_cannot_be_priced_is_refused_in_one_line(arguments, path, capsys):
    places = {"path": path, "folder": path.parent}
    words = arguments.format(**places).split()
    asked = ["frontier", "chen2025", "--losses", "2.8", "--contexts", "8192", "--refits", "100"]
    assert main([*asked, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert BAD[arguments].format(**places) in err
    assert err.count("\n") == 1


def test_no_file_but_a_calibration_is_replaced(path, capsys):
    timings = path.parent / "timings.json"
    before = timings.read_bytes()
    assert main(["calibrate", str(timings), "--output", str(timings)]) == 2
    assert "is there and no calibration" in capsys.readouterr().err
    assert timings.read_bytes() == before
    assert main(["calibrate", str(path.parent / "none.json")]) == 2
    assert "none.json: measure this machine" in capsys.readouterr().err
