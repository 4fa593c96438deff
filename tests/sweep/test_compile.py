"""The step that `run` takes, compiled for 8 devices of this machine."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from eight_devices import on_eight_devices

from gqa_scaling.sweep.hlo import Array, Collective
from gqa_scaling.sweep.pods import INVOLUNTARY


@pytest.fixture(scope="module")
def compiled():
    """What is found of the step on each mesh, and all that the compiler said."""
    return on_eight_devices(Path(__file__).with_name("compiled_steps.py"))


def test_the_partitioner_replicates_nothing_against_its_will(compiled):
    assert INVOLUNTARY.findall(compiled[1]) == []


def test_the_whole_state_is_donated(compiled):
    assert min(found["donated"] for found in compiled[0].values()) >= 0.99


def test_parameters_are_joined_one_layer_at_a_time(compiled):
    assert {
        name: found["gathered"] for name, found in compiled[0].items() if found["gathered"]
    } == {}


def test_no_weight_is_kept_whole_in_all_layers_for_the_backward_pass(compiled):
    """Each mesh splits them; only where there is nothing but `data` are they whole anyway."""
    whole = {name: found["whole stacks"] for name, found in compiled[0].items()}
    assert whole.pop("data 8") != []
    assert set(map(len, whole.values())) == {0}, whole


def test_each_device_does_its_share_of_the_flops(compiled):
    """Zig-zag order balances attention: a mesh does not change what all devices do together."""
    flops = {name: found["flops"] for name, found in compiled[0].items()}
    assert flops["data 8"] > 0
    assert flops["all four"] > flops["data 8"]  # remat


def test_a_parameter_joined_in_all_layers_is_told():
    import jax

    from gqa_scaling.sweep.compile import whole_parameters

    class Program:
        def __init__(self, kind: str, *dims: int) -> None:
            arrays = (Array("f32", (3,)), Array("bf16", dims))
            self.collectives = (Collective(kind, arrays, 8, 0.0, 1.0, True, "step", False, 0.0),)

    mesh = jax.make_mesh((1,), ("fsdp",))

    class Split(jax.sharding.NamedSharding):
        is_fully_replicated = False

    spec = jax.sharding.PartitionSpec(None, "fsdp")
    state = [jax.ShapeDtypeStruct((3, 64, 192), "float32", sharding=Split(mesh, spec))]
    assert whole_parameters(Program("all-gather", 3, 64, 192), state, 1)
    assert whole_parameters(Program("all-gather", 3, 96, 64), state, 2)
    assert not whole_parameters(Program("all-gather", 1, 64, 192), state, 1)
    assert not whole_parameters(Program("reduce-scatter", 3, 64, 192), state, 1)


LONG = """
import sys, time
from gqa_scaling.sweep import compile
def compile_step(*_):
    print("compiling", flush=True)
    time.sleep(60)
    print("went on", flush=True)
compile.compile_step, compile.chips = compile_step, lambda place: []
sys.exit(compile.main())
"""
# Like `plan --compile`, whose compiler takes a minute.
PARENT = """
import json, os, subprocess, sys
from gqa_scaling.config import ModelConfig, RunConfig
run = RunConfig("a", ModelConfig(2, 32, 4, 2), context_length=64, batch_tokens=256, tokens=2560)
request = {"run": run.to_dict(), "topology": "v5e:4x4", "parent": os.getpid()}
subprocess.run([sys.executable, "-c", sys.argv[1]], input=json.dumps(request), text=True)
"""


def test_the_compiler_ends_with_the_process_that_asked_for_it():
    command = [sys.executable, "-c", PARENT, LONG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "compiling\n"
        parent.terminate()
        assert parent.stdout.read() == ""  # until the compiler, which writes there too, has ended
    assert parent.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("memory space hbm. Used 42.00G of 15.75G hbm. Exceeded", (42 * 2**30, 15.75 * 2**30)),
        (
            "the total memory required for HLO temporaries (29.5G) exceeds available HBM (15.75G).",
            (29.5 * 2**30, 15.75 * 2**30),
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_how_much_is_short(said, found):
    from gqa_scaling.sweep.compile import shortage

    assert shortage(said) == found


def test_what_the_compiler_assigned_is_read_from_its_report(tmp_path):
    from gqa_scaling.sweep.compile import assigned

    with pytest.raises(RuntimeError, match="wrote no report"):
        assigned(tmp_path)
    spaces = "Memory Space: default (color=0)\nTotal bytes: 300 (300B)\n"
    spaces += "Memory Space: vmem (color=1)\nTotal bytes: 700 (700B)\n"
    (tmp_path / "module_1.memory-usage-report.txt").write_text(spaces)
    (tmp_path / "module_2.memory-usage-report.txt").write_text("Total bytes: 20 (20B)\n")
    assert assigned(tmp_path) == 300
