"""What is asked of the TPU compiler and told of its answers, with a compiler that is told what to say."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gqa_scaling import costs
from gqa_scaling.config import EvaluationConfig, ModelConfig, ParallelConfig, Question, RunConfig
from gqa_scaling.config import UserError as Refused
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.experiment.load import Experiment, load_experiment
from gqa_scaling.hardware import GIB, HARDWARE, slice_of
from gqa_scaling.sweep import memory, pods
from gqa_scaling.sweep.views import compiled_summary, compiled_table

CHECKOUT = Path(__file__).parents[2]
V5E = slice_of("v5e:4x4")
RUN = RunConfig(
    name="a",
    model=ModelConfig(4, 256, 8, 2, vocab_size=1024),
    context_length=2048,
    batch_tokens=16 * 2048,
    tokens=10 * 16 * 2048,
    evaluation=EvaluationConfig(tokens=2**12),
    parallel=ParallelConfig(fsdp=8),
)
COLLECTIVES = [
    {
        "kind": "all-gather",
        "array": "bf16[256, 704]",
        "devices": 8,
        "times": 8.0,
        "bytes": 3e6,
        "overlaps": True,
        "meanwhile": 6e9,
    },
    {
        "kind": "all-reduce",
        "array": "f32[]",
        "devices": 16,
        "times": 1.0,
        "bytes": 8.0,
        "overlaps": False,
        "meanwhile": 0.0,
    },
]
FITS = {
    "mesh": {"data": 2, "fsdp": 8, "context": 1, "tensor": 1},
    "compiler": "libtpu 0",
    "needed": 3 * GIB + 2**20,
    "arguments": 2**30,
    "temporaries": 2**31,
    "code": 2**20,
    "donated": 1.0,
    "flops": 2e12,
    "mean_turns": 2.5,
    "kernels": 0,
    "collectives": COLLECTIVES,
    "gathered": [],
    "seconds": 1.0,
}
TOO_LARGE = {
    "mesh": FITS["mesh"],
    "compiler": "libtpu 0",
    "needed": 20 * GIB,
    "allowed": int(15.75 * GIB),
}


@pytest.fixture
def compiler(monkeypatch):
    """Answers in turn with what is put into it: dicts to print, or (exit code, stderr)."""
    answers, asked = [], []

    def run(command, *, input, env, **_):
        asked.append((json.loads(input), env))
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, tuple):
            return subprocess.CompletedProcess(command, answer[0], "", answer[1])
        said = answer.pop("stderr", "")
        return subprocess.CompletedProcess(command, 0, "noise\n" + json.dumps(answer) + "\n", said)

    monkeypatch.setattr(pods.subprocess, "run", run)
    monkeypatch.setattr(pods.importlib.util, "find_spec", lambda name: name)
    return answers, asked


def experiment(*runs: RunConfig) -> Experiment:
    return Experiment("exp", runs, Question())


def shown(found: list[pods.Compiled], *runs: RunConfig) -> str:
    console = Console(width=240)
    with console.capture() as captured:
        console.print(compiled_table(found, V5E))
        for line in compiled_summary(found, {run.name: run for run in runs}):
            console.print(line, markup=False)
    return captured.get()


def test_an_answer_is_told_in_full(compiler):
    answers, asked = compiler
    answers.append(FITS)
    (found,) = pods.compile_experiment(experiment(RUN), V5E, lambda _: None)
    assert found.fits
    assert found.needed == 3 * GIB + 2**20
    assert found.allowed == HARDWARE["v5e"].memory
    assert found.predicted == memory.training_bytes(RUN, 16, "tpu").total
    assert found.received == 3e6 + 8
    text = shown([found], RUN)
    for part in (
        "data 2 x fsdp 8",
        "1.00 GiB",
        "2.00 GiB",
        "3.00 GiB",
        "2.00T",
        "yes",
        "2.5 turns",
    ):
        assert part in text
    assert "2.86 MiB  all-gather bf16[256, 704] among 8, 8 times" in text
    assert "100% of it while computing" in text
    assert "8 times, meanwhile 2,000 FLOPs for each byte" in text
    assert found.overlapped == 3e6
    assert "WARNING" not in text
    assert json.loads(json.dumps(found.to_dict()))["fits"]
    request, environment = asked[0]
    assert RunConfig.from_dict(request["run"]) == RUN
    assert request["topology"] == "v5e:4x4"
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["TPU_ACCELERATOR_TYPE"] == "v5litepod-16"
    assert environment["TPU_STDERR_LOG_LEVEL"] == "1"


def test_each_shape_is_compiled_once(compiler):
    answers, asked = compiler
    answers.append(FITS)
    runs = [replace(RUN, name=f"s{i}", seed=i, tokens=(10 + i) * 2**16) for i in range(3)]
    other = replace(RUN, name="other", model=replace(RUN.model, n_kv_heads=1))
    said = []
    first, second = pods.compile_experiment(experiment(*runs, other), V5E, said.append)
    assert (first.run, first.others, second.run) == ("s0", ("s1", "s2"), "other")
    assert len(asked) == 2
    assert said == ["compiling 1 of 2 for v5e:4x4: s0", "compiling 2 of 2 for v5e:4x4: other"]
    assert "s0 +2" in shown([first])


def test_an_answer_that_is_kept_is_not_asked_for_again(compiler, tmp_path, monkeypatch):
    answers, asked = compiler
    monkeypatch.setattr(pods.metadata, "version", lambda package: "1")
    answers.append({**FITS, "stderr": "E1 Involuntary full rematerialization: of x"})
    first = pods.compile_run(RUN, V5E, tmp_path)
    again = pods.compile_run(replace(RUN, seed=7), V5E, tmp_path)
    assert (len(asked), again) == (1, first)
    assert again.involuntary
    pods.compile_run(RUN, slice_of("v5e:4x8"), tmp_path)
    pods.compile_run(replace(RUN, batch_tokens=32 * 2048), V5E, tmp_path)
    monkeypatch.setattr(pods.metadata, "version", lambda package: "2")
    pods.compile_run(RUN, V5E, tmp_path)
    assert len(asked) == 4


def test_what_does_not_fit_gets_the_least_costly_change_that_does(compiler):
    answers, asked = compiler
    answers += [dict(TOO_LARGE), FITS]
    run = replace(RUN, batch_tokens=64 * 2048)
    (found,) = pods.compile_experiment(experiment(run), V5E, lambda _: None)
    assert not found.fits
    changed = RunConfig.from_dict(asked[1][0]["run"])
    assert changed.parallel == found.change.parallel
    assert found.change.fits
    text = shown([found], run)
    assert "a needs 20.00 GiB of 15.75 GiB; it fits, with 3.00 GiB, by --parallel." in text
    assert text.count("\n") > 3
    assert "no " in text


def test_a_pattern_is_named_beside_its_run(compiler):
    answers, _ = compiler
    answers.append(FITS)
    sparse = replace(RUN, model=replace(RUN.model, pattern=ContextSharding(64, 2, 4)))
    (found,) = pods.compile_experiment(experiment(sparse), V5E, lambda _: None)
    assert found.pattern == "b64 w2 s4"
    assert f"{sparse.name} b64 w2 s4" in shown([found], sparse)
    dense = pods.compile_run(RUN, V5E)
    assert (dense.pattern, dense.model_flops > found.model_flops) == ("", True)


def test_changes_cost_less_before_more():
    run = replace(RUN, batch_tokens=64 * 2048)
    found = list(pods.candidates(run, V5E))
    flops = [
        costs.hardware_flops_per_token(run.model, 2048, c.parallel.remat, False) for c in found
    ]
    assert flops == sorted(flops)
    assert len({c.parallel for c in found}) == len(found)
    assert all(c.parallel != run.parallel for c in found)
    assert {c.parallel.remat for c in found} == {"none", "dots", "full"}
    assert {2, 4} < {c.parallel.accumulation for c in found}
    first = next(c for c in found if c.parallel.remat == "none" and c.parallel.accumulation == 2)
    assert first.parallel.tensor == 1
    two = slice_of("2xv5e:4x4")  # data goes across slices, so it stays
    for c in pods.candidates(replace(run, parallel=ParallelConfig(fsdp=8)), two):
        assert 32 // (c.parallel.fsdp * c.parallel.context * c.parallel.tensor) % 2 == 0


def test_no_change_may_be_enough(compiler):
    answers, asked = compiler
    answers.append(TOO_LARGE)
    (found,) = pods.compile_experiment(experiment(RUN), V5E, lambda _: None)
    assert found.change is None
    assert len(asked) <= 1 + pods.TRIES
    assert "no change of remat, accumulation" in shown([found], RUN)


def test_warnings(compiler):
    answers, _ = compiler
    warning = "[SPMD] Involuntary full rematerialization. The compiler cannot go from sharding x"
    more = {"gathered": ["all-gather bf16[4, 256, 704]"], "donated": 0.5, "kernels": 3}
    answers.append(FITS | more | {"stderr": f"W1 a.cc:6] {warning}\nW1 a.cc:6] {warning}\n"})
    (found,) = pods.compile_experiment(experiment(RUN), V5E, lambda _: None)
    text = shown([found], RUN)
    assert text.count("WARNING: a: Involuntary full rematerialization") == 1
    assert "WARNING: a: all layers joined at once: all-gather bf16[4, 256, 704]" in text
    assert "WARNING: a: only 50.0% of the state is donated" in text
    assert "leave out 3 kernel calls" in text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((-6, "I note\nF1121 x.cc:1] Check failed: no\n  @ 0x55\n"), "SIGABRT.*Check failed: no"),
        ((1, "Traceback\n  File x\nValueError: bad shape\n"), "exit code 1.*ValueError: bad shape"),
        ((1, ""), "it said nothing"),
        ({"refused": "data=3 must be 2", "compiler": ""}, "a on v5e:4x4: data=3 must be 2"),
    ],
)
def test_a_compiler_that_fails_is_one_line(compiler, answer, said):
    compiler[0].append(answer)
    with pytest.raises(Refused, match=said) as error:
        pods.compile_experiment(experiment(RUN), V5E, lambda _: None)
    assert "\n" not in str(error.value)


def test_a_layout_that_cannot_be_is_refused_before_anything_is_compiled(compiler):
    answers, asked = compiler
    answers.append(FITS)
    wide = replace(RUN, name="wide", batch_tokens=4 * 2048, parallel=ParallelConfig())
    with pytest.raises(Refused, match=r"wide on v5e:4x4: .* = 16 must divide the 4 .*be 1, 2, 4"):
        pods.compile_experiment(experiment(RUN, wide), V5E, lambda _: None)
    assert asked == []


def test_only_tpus_have_a_compiler_that_can_be_asked(compiler):
    with pytest.raises(Refused, match="8xH100 is no slice of them"):
        pods.compile_experiment(experiment(RUN), slice_of("8xH100"), lambda _: None)
    assert compiler[1] == []


def test_a_compiler_that_is_not_there_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(pods.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"pip install -e '\.\[tpu\]'"):
        pods.compile_experiment(experiment(RUN), V5E, lambda _: None)


def test_the_documented_table_is_predicted_on_the_safe_side():
    """And the prediction that docs/pods.md prints is today's."""
    known = {run.name: run for run in load_experiment(str(CHECKOUT / "experiments/pods.py")).runs}
    lines = (CHECKOUT / "docs/pods.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = [row for row in rows if row and row[0] in known]
    assert len(rows) == 12
    for name, chips, _, total, allowed, predicted, *_ in rows:
        place = slice_of(chips)
        found = memory.training_bytes(known[name], place.chips, "tpu").total / GIB
        assert float(predicted.split()[0]) == pytest.approx(found, abs=0.01), name
        assert 1 < found / float(total) < 1.2, name
        assert float(total) < float(allowed) == pytest.approx(HARDWARE[place.kind].memory / GIB)


# ------------------------------------------------------------------- the compiler itself, minutes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("v5e:2x2", "blockwise"),
        ("v5e:4x4", "blockwise"),
        ("2xv5e:2x2", "blockwise"),
        ("v5e:4x4", "auto"),
    ],
)
def test_the_real_compiler(name, attention):
    """Needs libtpu, which make test-slow brings; without it this fails and says so."""
    place = slice_of(name)
    context = 2 if place.slices == 1 else 1
    parallel = ParallelConfig(fsdp=2, context=context, remat="full", attention=attention)
    run = replace(RUN, model=ModelConfig(3, 256, 4, 2, vocab_size=512), parallel=parallel)
    (found,) = pods.compile_experiment(experiment(run), place, lambda _: None)
    assert found.fits
    assert found.donated >= 0.99
    assert (found.involuntary, found.gathered) == ((), ())
    tokens = run.batch_tokens / place.chips
    executed = costs.hardware_flops_per_token(run.model, 2048, "full", False) * tokens
    if attention == "blockwise":
        assert found.flops == pytest.approx(executed, rel=0.25)  # tiles on the diagonal are whole
    else:  # splash: forward twice, dQ, and dK with dV
        assert (found.kernels, found.flops < executed) == (4, True)
    assert {row["kind"] for row in found.collectives} >= {"all-gather", "all-reduce"}


@pytest.mark.slow
def test_the_real_compiler_runs_out_of_memory():
    run = replace(RUN, model=ModelConfig(2, 8192, 8, 2, vocab_size=512), batch_tokens=2**19)
    found = pods.compile_run(
        replace(run, tokens=2**20, parallel=ParallelConfig()), slice_of("v5e:1x1")
    )
    assert not found.fits
    assert found.allowed == HARDWARE["v5e"].memory
