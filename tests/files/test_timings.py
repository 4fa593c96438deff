"""Timings as a file: both ways, and refused in one line where it is damaged or missing."""

import json
from dataclasses import replace

import pytest

from gqa_scaling.config import ModelConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.files.timings import Machine, Timing, Timings, read_timings, write_timings

MACHINE = Machine("cpu", 1, 2e10, {"float32": 1e11, "bfloat16": 2e10}, 2**34)
MODEL = ModelConfig(2, 32, 4, 2, dtype="float32", pattern=ContextSharding(64, 2, 2))
TIMED = Timing(MODEL, "decode", 1024, 4, "int8", 0.002, 0.1, 5, 20_000_000, 4e7, 30_000_000)
SKIPPED = replace(TIMED, phase="prefill", seconds=0, spread=0, rounds=0, skipped="does not fit")
TIMINGS = Timings(MACHINE, (TIMED, SKIPPED), {"jax": "0.10"}, "experiments.smoke")


def test_timings_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "timings.json"
    write_timings(path, TIMINGS)
    assert read_timings(path) == TIMINGS
    assert read_timings(path).timed == (TIMED,)
    assert [p.name for p in path.parent.iterdir()] == ["timings.json"]


def test_shares_are_of_what_was_measured():
    assert TIMED.tokens_per_second == 2000
    assert TIMED.bandwidth_share(MACHINE) == 0.5
    assert TIMED.flops_share(MACHINE) == 0.2
    assert replace(TIMED, phase="prefill").tokens_per_second == 2_048_000
    assert (SKIPPED.tokens_per_second, SKIPPED.bandwidth_share(MACHINE)) == (0, 0)


DAMAGE = {
    "no JSON": lambda said: "{",
    "schema": lambda said: said | {"schema": 99},
    "bandwidth=0": lambda said: said | {"machine": said["machine"] | {"bandwidth": 0}},
    "phase='both'": lambda said: said | {"rows": [said["rows"][0] | {"phase": "both"}]},
    "seconds=0": lambda said: said | {"rows": [said["rows"][0] | {"seconds": 0}]},
    "seconds=1": lambda said: said | {"rows": [said["rows"][1] | {"seconds": 1}]},
    "n_kv_heads=3": lambda said: (
        said | {"rows": [said["rows"][0] | {"model": said["rows"][0]["model"] | {"n_kv_heads": 3}}]}
    ),
    "flops.float32": lambda said: said | {"machine": said["machine"] | {"flops": {}}},
    "rows.batch is missing": lambda said: (
        said | {"rows": [{k: v for k, v in said["rows"][0].items() if k != "batch"}]}
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, what):
    path = tmp_path / "timings.json"
    write_timings(path, TIMINGS)
    damaged = DAMAGE[what](json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(UserError) as refused:
        read_timings(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    words = {"no JSON": "damaged", "rows.batch is missing": "batch is missing"}
    assert words.get(what, what) in str(refused.value)


def test_a_file_that_is_not_there_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="bench-inference --out"):
        read_timings(tmp_path / "none.json")


def test_a_file_of_a_newer_version_may_say_more(tmp_path):
    path = tmp_path / "timings.json"
    write_timings(path, TIMINGS)
    said = json.loads(path.read_text())
    said["machine"]["host"] = "a"
    said["rows"] = [row | {"energy": 1.0} for row in said["rows"]]
    path.write_text(json.dumps(said | {"note": "b"}))
    assert read_timings(path) == TIMINGS
