"""Laws of seconds: machines that are known are found again, and judged on models never shown."""

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from calibrate_kit import (
    BATCHES,
    CONTEXTS,
    HEADS,
    LAYER,
    MACHINE,
    RATES,
    SIZES,
    STEP,
    added,
    longer,
    parts,
    prefilled,
    rows,
    timed,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_scaling.config import UserError
from gqa_scaling.files.timings import Timings, write_timings
from gqa_scaling.hardware import hardware
from gqa_scaling.study.calibrate import LEAST_MODELS, calibrate, halves
from gqa_scaling.study.calibration import (
    Calibration,
    Judged,
    read_calibration,
    write_calibration,
)
from gqa_scaling.study.report.calibrated import tables
from gqa_scaling.study.timed import Case, judge, label, misled, paper_z
from gqa_scaling.study.zform import ZLaw, fit_z


def law(found: Calibration, name: str, phase: str = "decode") -> Judged:
    return next(j for j in found.judged if (j.law, j.phase) == (name, phase))


# ------------------------------------------------------------------------- what is known is found


@pytest.mark.parametrize(("form", "truth"), [("sum", added), ("max", longer)])
def test_a_known_machine_is_found_again(tmp_path, form, truth):
    own = [*rows(), *rows(cache="int8")]
    found = calibrate(written(tmp_path, timed(own, truth)))
    assert found.decode.form == form
    assert found.decode.rate("weights") == pytest.approx(RATES["weights"], rel=0.01)
    assert found.decode.rate("linear") == pytest.approx(RATES["linear"], rel=0.01)
    for cache in ("float32", "int8"):
        assert found.decode.rate(f"cache {cache}") == pytest.approx(RATES[cache], rel=0.01)
        attention = found.decode.rate(f"attention {cache}")
        assert attention == pytest.approx(RATES["attention"], rel=0.01)
    assert found.decode.seconds_per["layer"] == pytest.approx(LAYER, rel=0.05)
    assert found.decode.seconds_per["step"] == pytest.approx(STEP, rel=0.1)
    assert found.error.most < 0.003
    assert found.error.rank > 0.999  # steps that take as long as each other have no order
    assert found.error.regret < 1e-4
    assert set(found.z) == {"float32", "int8"}


def test_noise_and_a_slow_row_hardly_move_what_is_found(tmp_path):
    rng = np.random.default_rng(3)
    own = [
        replace(row, seconds=row.seconds * float(np.exp(0.05 * rng.standard_normal())))
        for row in timed(rows(), added)
    ]
    half = halves([row.model for row in own])
    slow = next(k for k, row in enumerate(own) if row.model in half)
    own[slow] = replace(own[slow], seconds=20 * own[slow].seconds)
    found = calibrate(written(tmp_path, own))
    assert found.decode.rate("weights") == pytest.approx(RATES["weights"], rel=0.15)
    assert found.decode.rate("cache float32") == pytest.approx(RATES["float32"], rel=0.15)
    assert found.error.median < 0.06
    assert found.error.rank > 0.99
    assert found.error.regret < law(found, "z_one").regret


def test_busy_moments_are_told_by_the_bandwidth_between_the_rounds(tmp_path):
    """Rows of a moment in which the machine did half of the usual take twice as long."""
    rng, usual = np.random.default_rng(5), 2e10
    own = []
    for row in timed(rows(), added):
        pace = rng.choice([0.25, 0.5, 1, 1, 1])
        own.append(replace(row, seconds=row.seconds / pace, bandwidth=pace * usual))
    found = calibrate(written(tmp_path, own))
    assert found.decode.rate("weights") == pytest.approx(RATES["weights"], rel=0.01)
    assert found.error.most < 0.003
    unknown = calibrate(written(tmp_path, [replace(row, bandwidth=0.0) for row in own]))
    assert unknown.error.most > 0.3


def test_the_constants_of_z_are_found_again(tmp_path):
    truth = ZLaw(3e-7, 2e-9, 0.6, 0.8)
    own = timed(rows(), lambda row: truth.seconds(*Case(row).paper(row.batch)))
    found = calibrate(written(tmp_path, own))
    z = found.z["float32"]
    assert z.at_bound == ()
    assert (z.memory_power, z.compute_power) == pytest.approx((0.6, 0.8), rel=1e-3)
    assert z.weight == pytest.approx(truth.weight, rel=1e-2)
    assert law(found, "z").most < 1e-3 < found.error.most


def test_constants_that_timings_do_not_tell_are_named():
    memory, flops = np.geomspace(1e6, 1e9, 40), np.geomspace(3e6, 1e11, 40)[::-1]
    found = fit_z(memory, flops, 1e-10 * memory)
    assert found.at_bound == ("lambda", "beta")
    assert found.memory_power == pytest.approx(1, rel=1e-2)


def test_prefill_has_a_law_of_its_own(tmp_path):
    own = [*timed(rows(), added), *timed(rows("prefill"), prefilled)]
    found = calibrate(written(tmp_path, own))
    assert found.prefill is not None
    assert found.prefill.rate("linear") == pytest.approx(8e10, rel=0.01)
    assert found.prefill.rate("attention float32") == pytest.approx(2e10, rel=0.01)
    assert (
        law(found, found.prefill.form, "prefill").most < 0.01 < law(found, "flops", "prefill").most
    )


# ---------------------------------------------------------------------------------- what is judged


def test_where_bandwidth_is_all_that_counts_z_is_wrong_where_it_is(tmp_path):
    """Z of a sequence knows nothing of the caches of a batch: it takes the model that reads more."""
    found = calibrate(
        written(tmp_path, timed(rows(), lambda row: row.bytes / 2e10)), hardware("cpu")
    )
    assert law(found, "bytes").most < 1e-9
    assert law(found, "machine").regret == found.error.regret == 0
    assert law(found, "z_one").regret > 0.05
    assert {m.batch for m in found.misled} == {8}
    own = [
        Case(row) for row in timed(rows(contexts=(8192,), batches=(8,)), lambda r: r.bytes / 2e10)
    ]
    told = next(m for m in found.misled if m.context == 8192)
    lost = []
    for one, other in combinations(own, 2):
        chosen, faster = (one, other) if paper_z(one) < paper_z(other) else (other, one)
        if chosen.row.seconds > faster.row.seconds:
            lost.append((chosen.row.seconds - faster.row.seconds, label(chosen.row.model)))
    assert told.wrong == len(lost)
    assert (told.chosen_seconds - told.faster_seconds, told.chosen) == pytest.approx(max(lost))


def test_a_difference_that_the_timings_spread_misleads_nobody():
    own = timed(rows(contexts=(8192,), batches=(8,)), lambda row: row.bytes / 2e10)
    assert misled([Case(row) for row in own])
    assert not misled([Case(replace(row, spread=5.0)) for row in own])


def test_judging_by_hand():
    """Two models of three are open to choice: (8,8) of less parameters, (4,1) of less cache."""
    own = [
        Case(replace(row, seconds=s))
        for row, s in zip(
            [
                *rows(sizes=SIZES[:1], heads=HEADS[:1], contexts=(8192,), batches=(1,)),
                *rows(sizes=SIZES[1:2], heads=((4, 1), (8, 1)), contexts=(8192,), batches=(1,)),
            ],
            (3.0, 2.0, 4.0),
            strict=True,
        )
    ]
    said = judge("decode", "bytes", lambda cases: np.array([1.0, 2.0, 4.0]), own)
    assert (said.shapes, said.pairs) == (3, 2)  # the first with each of the others
    assert said.median == pytest.approx(0)
    assert said.rank == said.rank_within == pytest.approx(0.5)
    assert said.wrong == pytest.approx(1 / 2)  # 3 s for 2 s; rightly 3 s for 4 s
    assert said.regret == pytest.approx((3 / 2 - 1) / 2)
    assert said.regret_seconds == pytest.approx(1 / 2)
    same = judge("decode", "bytes", lambda cases: np.ones(3), own)
    assert same.wrong == pytest.approx(1 / 2)
    assert math.isnan(same.rank)


@settings(max_examples=20, deadline=None)
@given(st.permutations(list(range(len(SIZES) * len(HEADS)))))
def test_the_split_is_by_models_and_knows_no_order(order):
    models = list(dict.fromkeys(row.model for row in rows()))
    half = halves([models[k] for k in order])
    assert half == halves(models)
    assert len(half) == math.ceil(len(models) / 2)


def test_no_model_is_fitted_and_held_out(tmp_path):
    found = calibrate(written(tmp_path, timed(rows(), added)))
    assert not set(found.fitted) & set(found.held_out)
    assert len(found.fitted) + len(found.held_out) == len(SIZES) * len(HEADS)
    assert found.error.shapes == len(found.held_out) * len(CONTEXTS) * len(BATCHES)


def test_what_is_held_out_is_not_seen(tmp_path):
    """Models that are held out take three times as long: the others cannot know."""
    half = halves([row.model for row in rows()])
    own = timed(rows(), lambda row: added(row) * (1 if row.model in half else 3))
    found = calibrate(written(tmp_path, own))
    assert (found.error.median, found.error.most) == pytest.approx((2 / 3, 2 / 3), rel=1e-2)
    assert law(found, "z_one").median > 0.5


def test_what_timings_cannot_tell_apart_is_joined_and_said(tmp_path):
    """With one batch, products with weights are in proportion to reading them."""
    found = calibrate(written(tmp_path, timed(rows(batches=(1,)), added)))
    assert found.decode.joined == ("linear",)
    assert found.error.most < 0.003
    assert any("do not tell linear from the rest" in flag for flag in found.flags)


def test_what_takes_no_time_is_said(tmp_path):
    found = calibrate(written(tmp_path, timed(rows(), lambda row: sum(parts(row)))))
    assert set(found.decode.nothing) == {"step", "layer"}
    assert found.decode.seconds_per["layer"] == 0
    assert "decode: step, layer take no time in these timings" in found.flags


def test_copies_of_kv_heads_are_said(tmp_path):
    own = [replace(row, bytes=2 * row.bytes) for row in timed(rows(), added)]
    found = calibrate(written(tmp_path, own))
    assert [flag for flag in found.flags if "copies" in flag]
    assert not calibrate(written(tmp_path, timed(rows(), added))).flags[1:]


def test_a_cache_of_which_there_is_too_little_is_left_out(tmp_path):
    own = timed([*rows(), *rows(cache="int8", contexts=(512,))], added)
    found = calibrate(written(tmp_path, own))
    assert found.caches == ("float32",)
    assert any("cache in int8 is left out: one context" in flag for flag in found.flags)


def test_models_of_one_half_alone_are_left_out_for_that(tmp_path):
    every = rows()
    own = halves([row.model for row in every])
    few = [row for row in rows(cache="int8") if row.model in own]
    found = calibrate(written(tmp_path, timed([*every, *few], added)))
    said = f"of the {len(own)} models timed {len(own)} are among those to fit and 0 among those held out"
    assert len(own) >= LEAST_MODELS
    assert any(f"cache in int8 is left out: {said}" in flag for flag in found.flags)


def test_a_recording_of_a_cpu():
    """90 decode steps of 15 models: what `bench-inference` wrote, judged on models held out."""
    found = calibrate(Path(__file__).with_name("timings.json"), hardware("cpu"))
    assert (len(found.held_out), found.error.shapes, found.error.pairs) == (7, 42, 24)
    assert found.error.rank > 0.99
    assert found.error.median < 0.1 < law(found, "z_one").median
    assert found.error.regret < 0.5 * law(found, "z_one").regret
    assert found.error.rank_within > law(found, "z_one").rank_within
    worst = next(m for m in found.misled if (m.batch, m.context) == (1, 8192))
    assert (worst.chosen, worst.faster) == ("(16,1)@L12d768", "(8,8)@L8d512")


# ------------------------------------------------------------------------------------- the file


def test_a_calibration_is_read_back_as_it_was_written(tmp_path):
    own = [*timed(rows(), added), *timed(rows("prefill"), prefilled)]
    found = calibrate(written(tmp_path, own), hardware("cpu"))
    path = tmp_path / "new" / "calibration.json"
    write_calibration(path, found)
    assert read_calibration(path).to_dict() == found.to_dict()
    assert read_calibration(path).decode == found.decode
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    assert all(table.html() for table in tables(found))


REFUSED = {
    "5 models of sizes and heads were timed and at least 6 are needed": lambda: rows(
        sizes=SIZES[:1]
    ),
    "one context, 512 tokens, was timed": lambda: rows(contexts=(512,)),
    "18 shapes were timed and at least 20": lambda: rows(
        sizes=SIZES[:2], heads=HEADS[:3], contexts=(512, 1024, 2048), batches=(1,)
    ),
    "decode: none were timed": lambda: rows("prefill"),
    "bfloat16 and float32: calibrate those of one dtype": lambda: [
        *rows(),
        *(replace(row, model=replace(row.model, dtype="bfloat16")) for row in rows()),
    ],
}


@pytest.mark.parametrize("why", REFUSED)
def test_timings_that_tell_too_little_are_refused_in_one_line(tmp_path, why):
    path = tmp_path / "timings.json"
    machine = replace(MACHINE, flops={"float32": 1e11, "bfloat16": 1e11})
    write_timings(path, Timings(machine, tuple(REFUSED[why]())))
    with pytest.raises(UserError) as refused:
        calibrate(path)
    assert str(refused.value).startswith(str(path))
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


DAMAGE = {
    "no calibration": lambda said: said | {"kind": "other"},
    "schema 9": lambda said: said | {"schema": 9},
    "form='both'": lambda said: said | {"decode": said["decode"] | {"form": "both"}},
    "must not be negative": lambda said: (
        said | {"decode": said["decode"] | {"seconds_per": {"weights": -1.0}}}
    ),
    "ranges is missing": lambda said: {k: v for k, v in said.items() if k != "ranges"},
    "judged has no error of decode": lambda said: said | {"judged": []},
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_calibration_is_refused_in_one_line(tmp_path, what):
    found = calibrate(written(tmp_path, timed(rows(), added)))
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(DAMAGE[what](json.loads(json.dumps(found.to_dict())))))
    with pytest.raises(UserError, match=what) as refused:
        read_calibration(path)
    assert str(path) in str(refused.value)
