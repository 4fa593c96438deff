"""Which slice a run gets, which runs share a job, and how jobs are called."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gqa_scaling.config import ModelConfig, ParallelConfig, Question, RunConfig, UserError
from gqa_scaling.experiment.branches import at_budgets, trunks
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.hardware import SLICES, hardware, slice_of
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import make_plan, plan_run
from launch.cli import ENGINES
from launch.compiled import chosen
from launch.jobs import choose, fits, group, job_name, label, memory_needed
from launch.targets import Target, sizes_up_to, startable

V5E, H100 = hardware("v5e"), hardware("h100")
DNS = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def run(name="r", d_model=512, layers=8, batch=64, context=1024, tokens=10**9, **changes):
    model = ModelConfig(layers, d_model, 8, 2)
    return RunConfig(name, model, context, batch * context, tokens=tokens, **changes)


# ---------------------------------------------------------------------------------- slices


def test_both_spellings_of_a_slice_can_be_asked_for():
    assert startable("v5e:4x4") == startable("v5e-16") == slice_of("v5e-16")
    assert startable("v5p-512") == startable("v5p:4x8x8")
    for name in ("2xv5e-16", "v5p:4x4x16", "v5p:16x16x16"):
        with pytest.raises(UserError, match=f"no job can have {name}: .* for its size: v5[ep]-"):
            startable(name)


def test_sizes_go_up_to_the_one_that_was_named():
    names = [s.vendor_name for s in sizes_up_to(slice_of("v6e-16"))]
    assert names == ["v6e-1", "v6e-4", "v6e-8", "v6e-16"]


def test_engines_offer_what_they_can_start():
    largest = slice_of("v6e-8")
    offered = {name: engine.offered(largest) for name, engine in ENGINES.items()}
    names = {name: [s.vendor_name for s in slices] for name, slices in offered.items()}
    assert names["skypilot"] == names["tpu-vm"] == ["v6e-1", "v6e-4", "v6e-8"]
    assert names["xpk"] == ["v6e-8"]
    assert ENGINES["xpk"].offered(slice_of("v5e-4")) == []


@pytest.mark.parametrize(
    "bucket", ["mine", "gs:/mine", "gs://", "gs://a/$(x)", "gs://mine/../b", "file://a"]
)
def test_a_bucket_is_one(bucket):
    with pytest.raises(UserError, match="--bucket"):
        Target("skypilot", slice_of("v5e-16"), V5E, bucket=bucket)


# -------------------------------------------------------------------------------- matching


def test_a_small_run_needs_no_pod():
    place, _ = choose(run(), sizes_up_to(slice_of("v5e-256")), V5E, 24)
    assert place.vendor_name == "v5e-1"


def test_a_run_that_takes_too_long_gets_the_smallest_slice_that_is_fast_enough():
    offered = sizes_up_to(slice_of("v5e-256"))
    big = run(batch=256, tokens=2 * 10**11)
    place, seconds = choose(big, offered, V5E, 24)
    smaller = [s for s in offered if s.chips < place.chips and fits(big, s, V5E)]
    assert seconds <= 24 * 3600
    assert smaller
    assert all(plan_run(big, V5E, s.chips).seconds > 24 * 3600 for s in smaller)
    assert choose(big, offered, V5E, 4)[0].chips > place.chips


def test_budgets_that_share_their_steps_are_one_job_at_the_price_of_the_plan():
    alone = run(tokens=10**9)
    budgets = at_budgets(alone, (20.0, 40.0, 80.0))
    assert len(trunks(budgets)) == 3
    offered = sizes_up_to(slice_of("v5e-16"))
    other = run("other", layers=2)
    shuffled = [budgets[2], other, *budgets[:2]]
    jobs = group("study", shuffled, offered, V5E, 24, trunks(shuffled))
    (job,) = [job for job in jobs if budgets[0] in job.runs]
    order = [each for each in job.runs if each in budgets]
    assert order == budgets
    row = replace(V5E, start_seconds=0.0)
    priced = group("study", budgets, offered, row, 24, trunks(budgets))
    (one,) = priced
    counted = make_plan(Experiment("study", tuple(budgets), Question()), row, one.slice.chips)
    assert one.seconds == pytest.approx(3600 * counted.hours)
    separate = sum(plan_run(each, row, one.slice.chips).seconds for each in budgets)
    assert one.seconds < 0.75 * separate
    # what is left of a trunk is priced by the steps that are left of it
    (left,) = group("study", budgets[1:], offered, row, 24, trunks(budgets))
    assert left.seconds < one.seconds
    assert left.runs == tuple(budgets[1:])


def test_a_run_that_needs_memory_gets_more_chips():
    wide = run(d_model=1024, layers=24, batch=256, tokens=10**6)
    place, _ = choose(wide, sizes_up_to(slice_of("v5e-256")), V5E, 24)
    assert memory_needed(wide, place, V5E) <= V5E.memory
    assert place.chips > 8
    assert memory_needed(wide, SLICES["v5e-8"], V5E) > V5E.memory
    predicted = memory.training_bytes(wide, place.chips, "tpu").total
    assert memory_needed(wide, place, V5E) == math.ceil(1.1 * predicted)  # on the safe side


def test_no_chip_is_left_with_next_to_nothing_to_do():
    """32,768 tokens a batch keep 16 chips busy, however long it takes."""
    long = run(batch=32, tokens=10**12)
    place, seconds = choose(long, sizes_up_to(slice_of("v5e-256")), V5E, 1)
    assert place.vendor_name == "v5e-16"
    assert seconds > 3600


def test_what_fits_nowhere_is_refused_before_anything_else():
    huge = [run(f"r{i}", d_model=8192, layers=64, seed=i) for i in range(3)]
    with pytest.raises(UserError, match=r"r0 and 2 other runs; on v5e-16 it needs .* has 15.8?"):
        group("x", [run("ok"), *huge], sizes_up_to(slice_of("v5e-16")), V5E, 24)
    odd = run("odd", parallel=ParallelConfig(fsdp=64))
    with pytest.raises(
        UserError, match=r"odd; on v5e-16 .*must divide the 16 devices.* another slice"
    ):
        group("x", [odd], sizes_up_to(slice_of("v5e-16")), V5E, 24)


@pytest.mark.parametrize(
    ("largest", "attention"), [("8xH100", "splash"), ("v5e-16", "triton"), ("v6e-8", "cudnn")]
)
def test_no_job_is_made_for_an_attention_that_its_chips_do_not_have(largest, attention):
    asked = run("asked", parallel=ParallelConfig(attention=attention))
    place = slice_of(largest)
    with pytest.raises(
        UserError, match=f"asked; on {largest} attention={attention} needs a .* another slice"
    ):
        group("x", [run("ok"), asked], sizes_up_to(place), hardware(place.kind), 24)


@given(
    st.lists(st.integers(10**6, 10**11), min_size=1, max_size=30, unique=True),
    st.floats(0.1, 100),
)
def test_grouping_keeps_every_run_and_shares_only_what_is_short(tokens, hours):
    runs = [run(f"r{i}", tokens=n) for i, n in enumerate(tokens)]
    jobs = group("x", runs, sizes_up_to(slice_of("8xH100")), H100, hours)
    assert sorted(r.name for job in jobs for r in job.runs) == sorted(r.name for r in runs)
    assert [job.seconds for job in jobs] == sorted((j.seconds for j in jobs), reverse=True)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        each = [plan_run(r, H100, job.slice.chips).seconds for r in job.runs]
        assert math.isclose(sum(each), job.seconds)
        assert len(job.runs) == 1 or job.seconds <= 3600 * 1.000001
        assert each == sorted(each, reverse=True)


# ------------------------------------------------------------------ what the compiler is asked


def test_the_runs_nearest_to_the_memory_and_one_of_each_size_are_compiled(grid):
    jobs = group("x", grid.runs, sizes_up_to(slice_of("v5e-64")), V5E, 24)
    found = chosen(jobs)
    assert sorted(place.chips for place in found) == sorted({job.slice.chips for job in jobs})
    compiled = [run for alike in found.values() for run in alike]
    sizes = {(run.model.n_layers, run.model.d_model) for run in grid.runs}
    assert {(run.model.n_layers, run.model.d_model) for run in compiled} == sizes
    for place, alike in found.items():
        there = [run for job in jobs if job.slice == place for run in job.runs]
        needed = {run: memory.training_bytes(run, place.chips, "tpu").total for run in there}
        assert sorted(needed[run] for run in alike[:2]) == sorted(needed.values())[-2:]
        others = [(run.model.n_layers, run.model.d_model) for run in alike[2:]]
        nearest = {(run.model.n_layers, run.model.d_model) for a in found.values() for run in a[:2]}
        assert not nearest & set(others)
    assert len(compiled) <= len(sizes) + 2 * len(found)


# ---------------------------------------------------------------------------------- names


@given(st.text(max_size=80), st.integers(1, 40))
def test_any_text_makes_a_dns_label(text, length):
    made = label(text, max(length, 5))
    assert DNS.fullmatch(made)
    assert len(made) <= max(length, 5)


@given(st.text("abcé漢-_.+XY01", min_size=1, max_size=60).filter(lambda t: t[0].isalnum()))
def test_job_names_are_dns_labels_that_say_what_they_do(name):
    made = job_name("my_grid", [run(name)])
    assert DNS.fullmatch(made)
    assert len(made) < 40
    assert made.startswith("my-grid")


def test_job_names_tell_apart_what_is_not_the_same_work():
    a, b = run("a"), run("a", seed=1)
    assert job_name("x", [a]) != job_name("x", [b]) != job_name("y", [b])
    assert job_name("x", [a, b]) == job_name("x", [b, a])
    assert job_name("x", [a]) == job_name("x", [replace(a, note="how it is trained is no matter")])
