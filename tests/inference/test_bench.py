"""bench-inference: bytes and FLOPs by arithmetic, what fits, resuming, and the whole verb on tiny models."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from eight_devices import on_eight_devices

from gqa_scaling.cli import main
from gqa_scaling.config import ModelConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.costs import (
    cache_bytes,
    decode_flops,
    prefill_bytes,
    prefill_flops,
    weight_bytes,
)
from gqa_scaling.files.timings import read_timings
from gqa_scaling.inference import timing
from gqa_scaling.inference.cases import (
    FITS,
    Case,
    Grid,
    cases_of,
    default_grids,
    held_bytes,
    most_that_fits,
    needed_bytes,
    packs,
    read_bytes,
    unfit,
)
from gqa_scaling.inference.decode import empty_cache, random_parameters, serving_mesh
from gqa_scaling.inference.machine import Meter

DENSE = ModelConfig(2, 32, 8, 4, head_dim=8, vocab_size=40, dtype="float32")
SHAPES = {
    "dense": DENSE,
    "bfloat16": replace(DENSE, dtype="bfloat16", tie_embeddings=False, qk_norm=True),
    "window": replace(DENSE, pattern=ContextSharding(4, 2, stride=4)),
}


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_bytes_of_a_step_are_those_of_the_arrays(name, cache):
    model = SHAPES[name]
    with jax.set_mesh(serving_mesh(model)):
        weights = jax.eval_shape(lambda: random_parameters(model)._replace(embedding_VD=None))
        held = jax.eval_shape(lambda: empty_cache(model, 3, 64, cache).layers)
    size = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in (weights, held)]
    assert [weight_bytes(model), cache_bytes(model, 64, 3, cache)] == size


def test_flops_and_bytes_of_both_phases_by_hand():
    # 2 layers of q and o 32 x 64, k and v 32 x 32, three matrices of 32 x 96 (8/3 of 32, rounded up)
    products = 2 * (2 * 32 * 64 + 2 * 32 * 32 + 3 * 32 * 96)
    output, token = 32 * 40, 2 * 8 * 8  # layers, heads, head size
    assert decode_flops(DENSE, 64, 3) == 3 * 2 * (products + output + 2 * token * 64)
    assert prefill_flops(DENSE, 64, 3) == 3 * 2 * (64 * (products + 2 * token * 32) + output)
    held = sum(cache_bytes(DENSE, before, 3, "float32") for before in (16, 32, 48))
    assert prefill_bytes(DENSE, 64, 3, "float32", 16) == 4 * weight_bytes(DENSE) + held
    assert prefill_bytes(DENSE, 10, 3, "float32", 16) == weight_bytes(DENSE)


def case(model=DENSE, context=1024, batch=2, cache="float32"):
    return Case(model, context, batch, cache, (context, batch))


def test_what_does_not_fit_is_told_and_max_is_what_just_does():
    memory = 100_000_000
    most = most_that_fits(DENSE, 1024, "float32", memory)
    assert needed_bytes(case(batch=most)) <= FITS * memory < needed_bytes(case(batch=most + 1))
    assert unfit(case(batch=most), memory) is None
    assert "needs about" in unfit(case(batch=most + 1), memory)
    grid = Grid((DENSE,), (1024,), (1, "max"), ("float32",))
    assert [c.batch for c in cases_of([grid], memory)] == [1, most]
    # 3 KV heads on 8 devices: none share a head, all share the sequences
    odd = replace(DENSE, n_heads=3, n_kv_heads=3)
    assert "share out 3 sequences" in unfit(case(odd, batch=3), memory, devices=8)
    assert unfit(case(odd, batch=8), memory, devices=8) is None
    assert most_that_fits(odd, 1024, "float32", memory, devices=8) % 8 == 0
    # KV heads that 8 devices share are kept twice
    once, twice = (held_bytes(case(), devices) for devices in (1, 8))
    assert twice - once == cache_bytes(DENSE, 1024, 2, "float32")
    read = [prefill_bytes(DENSE, 64, 3, "float32", 16, 1, n) for n in (1, 2)]
    assert read[1] - read[0] == sum(cache_bytes(DENSE, t, 3, "float32") for t in (16, 32, 48))


def test_a_prompt_of_millions_of_chunks_is_counted_and_no_longer_one_is_taken():
    starts = [512 * n for n in range(2**21)]
    held = sum(starts) * cache_bytes(DENSE, 1, 1, "int8")
    weights = len(starts) * weight_bytes(DENSE)
    assert prefill_bytes(DENSE, 2**30, 1, "int8", 512) == weights + held
    window = replace(DENSE, pattern=ContextSharding(4, 2, stride=4, dense_kv_heads=2))
    held = sum(cache_bytes(window, before, 3, "int8") for before in range(7, 100, 7))
    assert prefill_bytes(window, 100, 3, "int8", 7) == 15 * weight_bytes(window) + held
    with pytest.raises(UserError, match="context=4294967296 must be a number from 2 to"):
        Grid((DENSE,), (2**32,), (1,), ("float32",))


def test_cases_of_a_group_take_turns_while_memory_has_room():
    models = tuple(replace(DENSE, n_kv_heads=n) for n in (1, 2, 4, 8))
    cases = Grid(models, (256, 512), (1,), ("float32",)).cases(10**9)
    assert [len(pack) for pack in packs(cases, 10**9, 1, 3)] == [3, 1, 3, 1]
    assert [c for pack in packs(cases, 10**9, 1, 3) for c in pack] == cases
    little = 2 * needed_bytes(cases[0])
    assert {len(pack) for pack in packs(cases[:4], little, 1, 3)} == {1}


def test_the_defaults_name_the_published_pair_first_and_fit_each_platform():
    pair, *_ = default_grids("gpu")
    assert [(m.n_heads, m.n_kv_heads) for m in pair.models] == [(32, 8), (8, 1)]
    cases = cases_of(default_grids("gpu"), 141 * 10**9)
    assert cases[0].context == 131072
    largest = {c.model: c.batch for c in cases if c.group[1] == "max"}
    assert largest[pair.models[1]] > 5 * largest[pair.models[0]]
    small = cases_of(default_grids("cpu"), 16 * 10**9)
    assert {c.model.dtype for c in small} == {"float32"}
    assert len(set(small)) == len(small)


MODELS = ("2,1@L1d16", "2,2@L1d16")
ASKED = (*MODELS, "--contexts", "64", "96", "--batches", "2", "--caches", "float32")


@pytest.fixture
def quick(monkeypatch):
    """Fewer rounds and smaller samples: what is measured means nothing here."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    monkeypatch.setattr("gqa_scaling.inference.machine.SAMPLES", 1)
    monkeypatch.setattr("gqa_scaling.inference.machine.HOST_ARRAY_BYTES", 2**16)
    monkeypatch.setattr("gqa_scaling.inference.machine.HOST_PRODUCT", 16)
    monkeypatch.setattr("gqa_scaling.inference.machine.SAMPLE_SECONDS", 0)
    monkeypatch.setattr("gqa_scaling.cli.bench.LONGEST", {True: 1e6, False: 1e6})


def test_the_verb_times_shows_and_goes_on_where_it_was_killed(
    workplace, quick, capsys, monkeypatch
):
    path = Path("t.json")
    once = timing.time_cases

    def killed(*args):
        for number, rows in enumerate(once(*args)):
            yield rows
            if number == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr("gqa_scaling.inference.timing.time_cases", killed)
    assert main(["bench-inference", *ASKED, "--output", "t.json"]) != 0
    first = read_timings(path)
    assert {(row.context, row.phase) for row in first.rows} == {(64, "prefill"), (64, "decode")}
    monkeypatch.setattr("gqa_scaling.inference.timing.time_cases", once)
    assert main(["bench-inference", *ASKED, "--output", "t.json"]) == 0
    out, err = capsys.readouterr()
    assert "8 rows are asked for; t.json has 4 of them" in err
    whole = read_timings(path)
    assert whole.rows[:4] == first.rows
    assert whole.machine == first.machine
    assert len(whole.timed) == 8
    assert all(row.rounds == 2 and row.bandwidth > 0 and row.peak > 0 for row in whole.rows)
    for row in whole.rows:
        assert row.memory_bytes > weight_bytes(row.model)
    assert "(2,1)@L1d16" in out
    assert Path("t.png").read_bytes()[:4] == b"\x89PNG"
    before = path.read_bytes()
    assert main(["bench-inference", *ASKED, "--output", "t.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == json.loads(before)["rows"]
    assert path.read_bytes() == before


def test_an_experiment_gives_its_models_and_contexts_and_what_is_too_much_is_skipped(
    workplace, quick, capsys, monkeypatch
):
    asked = ["bench-inference", "experiments.tiny", "--batches", "1", "--output", "t.json"]
    monkeypatch.setattr(Meter, "free_bytes", lambda self: 2**16)
    assert main([*asked, "--model.d-model", "16"]) == 0
    rows = read_timings(Path("t.json")).rows
    assert {row.model.n_heads for row in rows} == {1, 2, 4}
    assert {row.context for row in rows} == {64}
    assert {row.model.d_model for row in rows} == {16}
    assert all("needs about" in row.skipped for row in rows)
    assert "needs about" in capsys.readouterr().out
    monkeypatch.setattr(Meter, "free_bytes", lambda self: 2**32)
    assert main([*asked, "--longest", "1e-12"]) == 0
    assert "at a time" in read_timings(Path("t.json")).rows[-1].skipped


def test_full_memory_skips_a_case_and_goes_on(quick, monkeypatch):
    meter = Meter(jax.devices()[:1])
    cases = Grid((DENSE, replace(DENSE, n_kv_heads=1)), (64,), (1,), ("float32",)).cases(10**9)
    whole = timing.empty_cache

    def full(model, *rest):
        if model.n_kv_heads == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore")
        return whole(model, *rest)

    monkeypatch.setattr(timing, "empty_cache", full)
    (rows,) = timing.time_cases(cases, meter, meter.machine(), 1e6)
    assert [(row.model.n_kv_heads, bool(row.skipped)) for row in rows] == [
        (4, True),
        (4, True),
        (1, False),
        (1, False),
    ]
    assert "\n" not in rows[0].skipped

    def broken(model, *rest):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(timing, "empty_cache", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        list(timing.time_cases(cases, meter, meter.machine(), 1e6))


BAD = {
    "must be a whole model such as": ["8,1"],
    "only an experiment has fields": ["2,1@L1d16", "--model.n-layers", "2"],
    "--devices 99 must be from 1 to": ["2,1@L1d16", "--devices", "99"],
    "--longest 0.0 must be greater than 0": ["2,1@L1d16", "--longest", "0"],
    "context=1 must be a number from 2": ["2,1@L1d16", "--contexts", "1"],
    "batch=0 must be max, or a number": ["2,1@L1d16", "--batches", "0"],
    "must end in .json": ["2,1@L1d16", "--output", "timings"],
    "n_kv_heads=2 must divide n_heads=3": ["3,2@L1d16"],
    "invalid number of sequences value: 'many'": ["2,1@L1d16", "--batches", "many"],
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_told_in_one_line_and_writes_nothing(workplace, capsys, said):
    assert main(["bench-inference", *BAD[said]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(workplace.rglob("*.json"))


def test_another_machine_or_other_code_is_refused(workplace, quick, capsys):
    assert main(["bench-inference", *ASKED[:1], "--contexts", "64", "--batches", "1",
                 "--output", "t.json"]) == 0  # fmt: skip
    said = json.loads(Path("t.json").read_text())
    for what, changed in (
        ("other devices", said | {"machine": said["machine"] | {"device": "TPU v9"}}),
        ("other code", said | {"versions": said["versions"] | {"jax": "9.9"}}),
    ):
        Path("t.json").write_text(json.dumps(changed))
        before = Path("t.json").read_bytes()
        capsys.readouterr()
        assert main(["bench-inference", *ASKED, "--output", "t.json"]) == 2
        assert what in capsys.readouterr().err
        assert Path("t.json").read_bytes() == before


def test_eight_devices_share_the_work():
    found, _ = on_eight_devices(Path(__file__).with_name("bench_on_devices.py"))
    assert found["devices"] == 8
    dense, odd = found["rows"]["dense"], found["rows"]["odd"]
    twice = 2 * cache_bytes(DENSE, 64, 8, "float32")  # 4 KV heads, each for two devices
    assert dense["bytes"] == weight_bytes(DENSE) + twice
    assert dense["skipped"] is None
    assert "share out 3 sequences" in odd["skipped"]
    # no two devices share a model of 3 heads: each has all its weights
    whole = Case(replace(DENSE, n_heads=3, n_kv_heads=3), 64, 8, "float32", (64, 8))
    cache = cache_bytes(whole.model, 64, 8, "float32")
    assert held_bytes(whole, 8) - cache == found["odd_weights"]
    assert read_bytes(whole, 8) - cache == 8 * weight_bytes(whole.model)
