"""What `doctor` says of this machine, and of others that are not at hand."""

import dataclasses
import functools
import json
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_scaling import cli
from gqa_scaling.devices import compiler_flags
from gqa_scaling.doctor import faults, machine, programs, speeds
from gqa_scaling.doctor.faults import Answer, Diagnosis
from gqa_scaling.sweep.hlo import Program

YES, NO, UNTOLD = Answer(True, "it is"), Answer(False, "it is not"), Answer(None, "no device")
BY_NAME = {fault.name: fault for fault in faults.FAULTS}


@pytest.fixture(scope="module")
def diagnosed():
    """Of this machine, which takes seconds."""
    return faults.diagnose()


def test_the_verb_tells_what_is_here_and_fails_where_runs_would(
    tmp_path, capsys, monkeypatch, diagnosed
):
    """And its table has the versions and faults that its JSON has."""
    monkeypatch.setattr(faults, "diagnose", lambda: diagnosed)
    monkeypatch.setattr(speeds, "speeds", functools.cache(speeds.speeds))
    asked = ["doctor", "--root", str(tmp_path / "runs")]
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    values = {fact["name"]: fact["value"] for fact in found["machine"]}
    assert values["jaxlib"] == metadata.version("jaxlib")
    assert values["devices"] == f"{len(jax.devices())} x cpu (cpu)"
    assert [speed["slow"] for speed in found["speeds"]] == [False, False]
    assert {fault["name"]: fault["hit"]["yes"] for fault in found["faults"]} == {
        name: False if fault.platform == "cpu" else None for name, fault in BY_NAME.items()
    }
    monkeypatch.setattr(machine, "LEAST_FILES", 2**60)
    assert cli.main(asked) == 1
    said = capsys.readouterr().out
    assert "! open files: " in said
    assert f"ulimit -n {2**60}" in said
    assert "wrong fusion" in said


def test_an_argument_that_is_none_is_refused(capsys):
    assert cli.main(["doctor", "--model.n-layers", "3"]) == 2
    assert "--model.n-layers" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("shown", "hit", "wrong"),
    [(YES, YES, True), (YES, NO, False), (NO, YES, False), (UNTOLD, YES, True), (UNTOLD, UNTOLD, False)],
)  # fmt: skip
def test_a_fault_is_an_error_where_it_may_show_and_hits_our_programs(shown, hit, wrong):
    assert Diagnosis(faults.FAULTS[0], True, shown, hit).wrong == wrong


@pytest.mark.parametrize(
    ("fault", "platform", "kind", "version", "touched"),
    [
        ("slow scatter", "gpu", "NVIDIA H200", "0.10.1", False),
        ("slow scatter", "gpu", "NVIDIA H200", "0.10.2", True),
        ("slow scatter", "gpu", "NVIDIA H200", "0.11.0", True),
        ("slow scatter", "gpu", "NVIDIA H200", "0.11.1", False),
        ("slow scatter", "cpu", "cpu", "0.10.2", False),
        ("overlap flags", "tpu", "TPU v6 lite", "0.10.2", True),
        ("overlap flags", "tpu", "TPU v5 lite", "0.10.2", False),
        ("eager gather", "tpu", "TPU v5", "0.0.42.1", True),
        ("eager gather", "tpu", "TPU v5", "0.0.41", False),
        ("wrong fusion", "cpu", "cpu", "0.10.2", True),
        ("wrong fusion", "cpu", "cpu", "0.11.0", False),
    ],
)
def test_a_fault_has_versions_and_devices(fault, platform, kind, version, touched):
    assert BY_NAME[fault].touches(platform, kind, compiler_flags.numbers(version)) == touched


@pytest.mark.skipif(
    metadata.version("jaxlib") != "0.10.2", reason="what other versions show nobody has looked at"
)
def test_the_faults_of_this_jaxlib_show(diagnosed):
    shown = {each.fault.name: each.shown for each in diagnosed}
    assert "should be 1073741824" in shown["wrong fusion"].seen
    assert shown["seven axes"].yes


@pytest.mark.parametrize(
    "ask", [faults.scatter_shows, faults.scatter_hits, faults.gather_shows, faults.gather_hits,
            faults.tied_shows, faults.tied_hits, faults.overlap_hits, faults.motion_hits]
)  # fmt: skip
def test_faults_of_accelerators_do_not_show_on_a_cpu(ask):
    """The programs that look for them do run, and can answer no."""
    assert ask().yes is False


def test_a_fusion_that_sums_a_product_over_rows_is_seen():
    matrix = np.eye(3, dtype=np.float32)

    def f(x_ND):
        return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(x_ND)

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((32769, 3), "float32")).compile().as_text()
    found = programs.ynn_fusions(Program(text))
    assert [fusion.sums_products_over_rows for fusion in found] == [True]


LOOP = """
HloModule m, num_partitions=4

add (a: f32[], b: f32[]) -> f32[] {
  a = f32[] parameter(0)
  b = f32[] parameter(1)
  ROOT s = f32[] add(a, b)
}

body (p: (s32[], f32[264,64])) -> (s32[], f32[264,64]) {
  p = (s32[], f32[264,64]) parameter(0)
  i = s32[] get-tuple-element(%p), index=0
  x = f32[264,64] get-tuple-element(%p), index=1
  y = f32[264,64] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT t = (s32[], f32[264,64]) tuple(%i, %y)
}

condition (p: (s32[], f32[264,64])) -> pred[] {
  p = (s32[], f32[264,64]) parameter(0)
  ROOT c = pred[] constant(false)
}

ENTRY main (x: f32[264,64]) -> f32[64,264] {
  x = f32[264,64] parameter(0)
  zero = s32[] constant(0)
  start = (s32[], f32[264,64]) tuple(%zero, %x)
  loop = (s32[], f32[264,64]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  last = f32[264,64] get-tuple-element(%loop), index=1
  turned = f32[64,264] transpose(%last), dimensions={1,0}
  ROOT out = f32[64,264] all-reduce(%turned), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_sum_that_left_its_loop_is_seen():
    program = Program(LOOP)
    assert programs.moved_out(program, (264, 64), 2) == 1
    assert programs.moved_out(program, (264, 64), 1) == 0
    assert programs.moved_out(program, (264, 65), 2) == 0


# ------------------------------------------------------------------------------------ machine


def problems(facts):
    return {fact.name: fact.problem for fact in facts if fact.problem}


def test_a_plugin_of_another_version_than_jaxlib_is_named(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.10.1" if name == "jax-cuda13-plugin" else real(name)
    )
    said = problems(machine.versions())
    assert "jax goes on without the GPU" in said["jax-cuda13-plugin"]


def test_a_library_outside_its_range_is_named(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.99.0" if name == "flax" else real(name)
    )
    assert "flax 0.99.0 is none of" in problems(machine.versions())["flax"]


def test_an_accelerator_that_jax_does_not_use_is_named(monkeypatch):
    monkeypatch.setattr(machine, "computes_on_cpu", lambda: False)
    assert "pip install -e .[" in problems(machine.devices())["devices"]


def device(**also):
    stats = {"bytes_limit": 30 * 2**30, "bytes_in_use": 0}
    return SimpleNamespace(**{"platform": "tpu", "memory_stats": lambda: stats, **also})


def test_a_device_whose_memory_another_holds_is_named(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [device(device_kind="TPU v6 lite")])
    assert problems(machine.devices()) == {}
    monkeypatch.setattr(jax, "devices", lambda: [device(device_kind="TPU v5")])
    assert "another process" in problems(machine.devices())["device memory"]


def test_what_others_hold_of_a_gpu_is_what_its_driver_says(monkeypatch):
    """XLA's limit is a share of the whole, whoever holds some of it."""
    a100 = device(device_kind="NVIDIA A100-PCIE-40GB", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [a100])
    monkeypatch.setattr(machine, "_driver", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    said = ["3, 40960\n", "20000, 40960\n", "3, 81920\n", "[N/A], [N/A]\n"]
    asked = []

    def nvidia_smi(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout=said.pop(0))

    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    seen = [problems(machine.devices(machine.gpu_memory())) for _ in range(3)]
    assert seen[:2] == [{}, {"memory held of GPU 0": machine.IN_USE}]
    assert "MEM_FRACTION" in seen[2]["device memory"]
    assert machine.gpu_memory() == []
    assert asked[0][-1] == "--id=1"


def test_a_kind_whose_peak_is_unknown_is_no_problem(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [device(device_kind="TPU v9")])
    assert problems(machine.devices()) == {}
    assert "MFU is not told" in machine.devices()[0].note


def test_an_old_driver_is_named(monkeypatch):
    said = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Jul 1\n"
    monkeypatch.setattr(machine, "version_of", lambda name: (0,) if "13" in name else None)
    for version, named in (("575.57.08", True), ("580.159.03", False)):
        monkeypatch.setattr(Path, "read_text", lambda _, v=version: said.format(v))
        (fact,) = machine._driver()
        assert fact.value == version
        assert bool(fact.problem) == named
        assert ("-e .[cuda12]" in fact.problem) == named
        assert machine._cuda_extra() == ("cuda12" if named else "cuda")


def test_the_driver_is_told_where_jax_does_not_see_its_gpu(monkeypatch):
    monkeypatch.setattr(machine, "computes_on_cpu", lambda: False)
    monkeypatch.setattr(machine, "has_nvidia", lambda: True)
    monkeypatch.setattr(machine, "_driver_version", lambda: "535.104.05")
    monkeypatch.setattr(machine, "version_of", lambda name: (0,) if "13" in name else None)
    said = problems(machine.devices())
    assert "pip install -e .[cuda12]" in said["devices"]
    assert "needs 580" in said["driver"]


@pytest.mark.parametrize(("driver", "extra"), [("535", "cuda12"), ("580", "cuda"), ("", "cuda")])
def test_make_installs_the_cuda_that_the_driver_can(driver, extra):
    asked = ["make", "-n", "accelerator", "NVIDIA=/dev/nvidia0", f"DRIVER={driver}", "MAKE=true"]
    root = Path(__file__).parents[2]
    done = subprocess.run(asked, cwd=root, capture_output=True, text=True, check=True)
    assert f'-e ".[{extra}]"' in done.stdout


def test_limits_that_break_runs_are_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (512, 512))
    monkeypatch.setattr(machine, "_quota", lambda: 0.5)
    found = machine.limits()
    assert set(problems(found)) == {"open files", "size of files", "address space"}
    assert [fact.name for fact in found if fact.note] == ["processor time"]


def test_what_a_container_allows_is_the_memory(monkeypatch):
    monkeypatch.setattr(machine, "_meminfo", lambda name: 64 * 2**30)
    monkeypatch.setattr(
        machine, "_number", lambda path: {"max": 2**31, "current": 2**30}[path.suffix[1:]]
    )
    (fact,) = machine.memory()
    assert fact.value == "1.00 GiB"
    assert fact.problem


@pytest.mark.parametrize(("measured", "slow"), [(6.0e14, False), (3.0e14, True)])
def test_a_device_far_below_its_data_sheet_is_slow(measured, slow):
    speed = speeds.Speed("product", "FLOP/s", measured, 9.89e14)
    assert speed.slow == slow
    assert not dataclasses.replace(speed, peak=None).slow
