"""benchmarks/accelerator.py: parts that are kept, told and drawn; none of them needs a device."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accelerator
import attention
from accelerator import Part
from accelerator_parts import DECODED, fitting, speed_run

GOOD = {"rows": [{"what": "a", "found": 0.1, "limit": 1}]}
BAD = {"rows": [{"what": "a|b", "found": float("nan"), "limit": 1}]}
H200 = {"platform": "gpu", "device": "NVIDIA H200", "jax": "1"}
SLEEPS = "import sys, time; print(sys.argv[1]); time.sleep(60)"


def run(tmp_path, *words):
    return accelerator.main(
        ["--small", "--out", f"{tmp_path}/out", "--docs", f"{tmp_path}/docs", *words]
    )


def test_kernels_are_checked_in_a_process_and_kept(tmp_path, capsys):
    assert run(tmp_path, "--only", "attention") == 0
    assert "attention: 4 checks are right" in capsys.readouterr().out
    path = tmp_path / "out/cpu-small/attention.json"
    kept = json.loads(path.read_text())
    assert {row["what"].split(",")[0] for row in kept["rows"]} == {"blockwise"}
    assert all(0 < row["found"] < row["limit"] for row in kept["rows"])
    kept["rows"] = kept["rows"][:1]
    path.write_text(json.dumps(kept))
    assert run(tmp_path, "--only", "attention") == 0  # nothing is done again
    assert len(json.loads(path.read_text())["rows"]) == 1
    assert "| attention | 1 checks are right |" in (tmp_path / "docs/cpu-small.md").read_text()


def test_decoding_keeps_its_rows_beside_the_parts_and_goes_on_from_them(tmp_path, monkeypatch):
    """Two models at one context and two batches, which six minutes are enough for."""
    asked, row = [], {"model": {"n_heads": 8, "n_kv_heads": 1, "n_layers": 2, "d_model": 64},
        "phase": "decode", "context": 32, "batch": 4, "cache": "int8"}  # fmt: skip

    def done(command, **_):
        asked.append(command)
        rows = [{**row, "seconds": 0.5, "skipped": None}, {**row, "seconds": 0, "skipped": "large"}]
        return subprocess.CompletedProcess(command, 0, json.dumps({"rows": rows}), "")

    monkeypatch.setattr(subprocess, "run", done)
    part = next(part for part in accelerator.PARTS if part.name == "decoding")
    monkeypatch.setattr(accelerator, "keep_native_atomics", lambda: None)
    found, again = (accelerator._call(part, True, tmp_path)["rows"] for _ in range(2))
    assert [(x["note"], x.get("tokens_per_second")) for x in found] == [("", 8.0), ("large", None)]
    assert found == again
    assert asked[0] == asked[1]
    output = Path(asked[0][asked[0].index("--output") + 1])
    assert output.parent == tmp_path
    assert len([word for word in DECODED if "@" in word]) == 2


@pytest.fixture
def started(monkeypatch):
    """Names of parts as they are started; each finds what it is told to."""
    found, names = {}, []

    def start(part, args, folder, minutes):
        names.append(part.name)
        return found.get(part.name, GOOD)

    monkeypatch.setattr(accelerator, "_start", start)
    monkeypatch.setattr(accelerator, "where", lambda: H200)
    return names, found


def test_parts_that_were_wrong_or_whose_code_changed_are_tried_again(
    tmp_path, started, monkeypatch
):
    names, found = started
    found["steps"], found["gradients"] = BAD, {"failed": "it burnt"}
    assert run(tmp_path, "--only", "right") == 1
    assert names == [part.name for part in accelerator.PARTS if part.kind == "right"]
    names.clear()
    found.clear()
    assert run(tmp_path, "--only", "right") == 0
    assert names == ["steps", "gradients"]
    names.clear()
    monkeypatch.setattr(accelerator, "source", lambda part: "other")
    assert run(tmp_path, "--only", "attention") == 0
    assert names == ["attention"]


def test_what_is_kept_holds_for_its_device_its_size_its_jax_and_its_torch(
    tmp_path, started, monkeypatch
):
    names, _ = started
    monkeypatch.setattr(accelerator, "computes_on_cpu", lambda: False)
    asked = ["--out", f"{tmp_path}/out", "--docs", f"{tmp_path}/docs", "--only", "steps"]
    other = "PyTorch 150M 8K"

    def starts(*words, **here):
        names.clear()
        monkeypatch.setattr(accelerator, "where", lambda: {**H200, **here})
        assert accelerator.main([*asked, *words]) == 0
        return names

    assert starts() == ["steps"]
    assert starts() == []
    assert starts("--small") == ["steps"]
    assert starts(device="NVIDIA A100-SXM4-80GB") == ["steps"]
    assert starts(jax="2") == ["steps"]
    assert starts(other) == ["steps"]  # jax 1 again; and no torch is no result
    assert starts(other, "--torch", "a/python") == [other]
    assert starts(other, "--torch", "b/python") == [other]
    assert starts(other) == []
    assert "a100" not in (tmp_path / "docs/nvidia-h200.md").read_text()


def test_nothing_is_timed_on_a_cpu_by_mistake(tmp_path, started, monkeypatch, capsys):
    """As where a plugin does not fit and jax goes on without the GPU."""
    monkeypatch.setattr(accelerator, "computes_on_cpu", lambda: False)
    monkeypatch.setattr(accelerator, "where", lambda: {**H200, "platform": "cpu"})
    assert accelerator.main(["--out", str(tmp_path)]) == 2
    assert "gqa-scaling doctor says why" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    part = next(part for part in accelerator.PARTS if part.name == "steps")
    assert (
        "without this machine's accelerator" in accelerator._call(part, False, tmp_path)["failed"]
    )


def test_a_call_that_has_no_time_goes_on_the_next_time(tmp_path, started, capsys):
    names, _ = started
    assert run(tmp_path, "--minutes", "0.1") == 75
    assert names == []
    assert "goes on with doctor" in capsys.readouterr().out


def test_a_part_is_given_up_by_its_own_time_and_kept_open_by_that_of_the_call(
    tmp_path, monkeypatch
):
    script = tmp_path / "sleeps.sh"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{SLEEPS}' x\n")
    script.chmod(0o755)
    monkeypatch.setattr(accelerator, "where", lambda: H200)
    args = argparse.Namespace(torch=str(script), small=False)
    part = Part("slow", "fast", "speed", 0.02, torch=True)
    assert accelerator._start(part, args, tmp_path, 0.02) == {"failed": "not done after 0 minutes"}
    assert accelerator._start(part, args, tmp_path, 0.01) is None


def test_a_part_that_dies_says_why(tmp_path, monkeypatch):
    script = tmp_path / "dies.sh"
    script.write_text("#!/bin/sh\necho no memory >&2\nexit 9\n")
    script.chmod(0o755)
    monkeypatch.setattr(accelerator, "where", lambda: H200)
    args = argparse.Namespace(torch=str(script), small=False)
    found = accelerator._start(Part("a", "fast", "speed", 1, torch=True), args, tmp_path, 1)
    assert found["failed"] == "ended with 9: no memory"


def test_a_sample_of_attention_is_as_many_calls_as_last(monkeypatch):
    """At short contexts a single call would time its own start."""
    asked = []
    monkeypatch.setattr(attention, "sample", lambda f, x, n: asked.append(n) or 0.0015 * n)
    assert attention.calls_of(None, ()) == 4
    assert asked == [1, 1, 2, 4]
    monkeypatch.undo()
    assert attention.sample(asked.append, (7,), 3) > 0
    assert asked[-3:] == [7, 7, 7]


@pytest.mark.parametrize(
    ("size", "context", "remat", "platform", "GiB", "accumulation"),
    [
        ("1.2B", 8192, "none", "gpu", 129, 1),  # an H200
        ("1.2B", 8192, "dots", "gpu", 73, 2),  # an A100 or H100
        ("150M", 8192, "none", "tpu", 31.25, 1),  # v6e
        ("1.2B", 8192, "dots", "tpu", 31.25, 8),
        ("1.2B", 32768, "dots", "tpu", 31.25, None),  # two sequences are two parts at the most
        ("150M", 8192, "none", "tpu", 15.75, 2),  # v5e
        ("1.2B", 8192, "full", "tpu", 15.75, None),
        ("1.2B", 8192, "none", "cpu", None, 1),
    ],
)
def test_training_accumulates_as_little_as_fits(size, context, remat, platform, GiB, accumulation):
    found = fitting(speed_run(False, size, context, remat), platform, GiB and GiB * 2**30)
    assert (found and found.parallel.accumulation) == accumulation


def test_nothing_that_is_no_number_is_right():
    assert accelerator.right(GOOD)
    assert not accelerator.right(BAD)
    assert not accelerator.right({"failed": "", "rows": []})
    assert "1 of 1 wrong" in accelerator.summary(BAD)


def test_the_page_has_a_table_and_a_picture(tmp_path):
    parts = {part.name: part for part in accelerator.PARTS}
    rate = {"what": "1.2B, triton", "tokens_per_second": 5e4, "mfu": 0.55, "GiB": 60.0}
    times = {"forward": 1.0, "both": 3.0, "faster": 1.0, "ideal": 1.0}
    done = {
        parts["steps"]: GOOD,
        parts["gradients"]: BAD,
        parts["training 1.2B 8K dots"]: {"rows": [rate]},
        parts["PyTorch 1.2B 8K"]: {"rows": [{"what": "PyTorch", "tokens_per_second": 4e4, "GiB": 70}]},
        parts["speed of attention, d_h 64"]: {
            "rows": [{"what": f"triton, T {T}, d_h 64, heads 8x3", **times} for T in ("2,048", "8,192")]
        },
        parts["decoding"]: {"rows": [{"what": "decode", "note": "", "ms": 4, "tokens_per_second": 4e3}]},
        parts["resume"]: {"failed": "no such verb"},
    }  # fmt: skip
    page = accelerator.write_page(done, tmp_path, H200, small=False)
    assert page.name == "nvidia-h200.md"
    text = page.read_text()
    assert "| 1.2B, triton | 50,000 | 55.0% | 60.0 |  |" in text
    assert "| PyTorch 1.2B 8K, compiled | 40,000 | - | 70.0 |  |" in text
    assert "| a\\|b | nan | 1 |" in text
    assert "| decode | 4 | 4,000 |  |" in text
    assert "* resume: no such verb" in text
    assert (tmp_path / "nvidia-h200.png").stat().st_size > 10_000


def test_a_machine_without_an_accelerator_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    assert accelerator.main(["--out", str(tmp_path)]) == 2
    assert "--small" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
