import os
import platform
import subprocess
import sys

import pytest

from gqa_scaling.devices import host_memory

# What a step's large temporaries do where `gqa-scaling run` trains: page faults of eight calls.
COUNT = """
import resource, sys
from pathlib import Path
from gqa_scaling.__main__ import program
from gqa_scaling.devices import host_memory
from gqa_scaling.sweep import run

if {absent}:
    host_memory.HUGE_PAGES = Path("absent")

def faults_of_large_temporaries(*_):
    import jax, jax.numpy as jnp

    @jax.jit
    def step(x, turns):
        return jax.lax.fori_loop(0, turns, lambda _, y: y + 1, x)[::4096].sum()

    x = jnp.ones(24 * 2**20)  # 96 MiB, and as much for what the loop carries
    def faults(calls):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            step(x, 1).block_until_ready()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(16)
    print(faults(8))
    raise SystemExit

run.run_sweep = faults_of_large_temporaries
sys.argv = ["gqa-scaling", "run", "experiments.tiny", "--quiet", "--only", "L1-h1"]
program()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize("absent", [False, True], ids=["as it is", "no huge pages"])
def test_large_temporaries_are_not_faulted_in_again(workplace, absent):
    """Where the memory goes back to the system, each of the eight calls makes 24,576 faults.

    Huge pages make 48 of them. Where it is kept there are none, once the free blocks are large
    enough: here and there a small array breaks one of them.
    """
    code = COUNT.format(absent=absent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 8 * 24_576 / 3


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What a program does on a CPU under a glibc that knows huge pages: starts again, or keeps memory."""
    done = []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv(host_memory.TUNABLES, raising=False)
    monkeypatch.setattr(host_memory, "HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(host_memory, "keep_host_memory", lambda: done.append("kept"))
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.35")
    monkeypatch.setattr(os, "execv", lambda program, words: done.append([program, *words]))
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    return done


def test_a_program_starts_again_once_where_huge_pages_are_to_be_asked_for(started, monkeypatch):
    monkeypatch.setenv(host_memory.TUNABLES, "glibc.malloc.check=1")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", "-m", "gqa_scaling", "plan"])
    host_memory.ready_host_memory()
    words = ["-W", "error", "-m", "gqa_scaling", "plan"]
    assert started[0] == [sys.executable, sys.executable, *words]
    assert os.environ[host_memory.TUNABLES] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"
    del started[:]
    host_memory.ready_host_memory()
    assert started == ["kept"]  # which leaves alone what asks for huge pages


@pytest.mark.parametrize("pages", ["0", "2"])
def test_what_the_user_set_of_huge_pages_stands(started, monkeypatch, pages):
    monkeypatch.setenv(host_memory.TUNABLES, f"glibc.malloc.hugetlb={pages}")
    host_memory.ready_host_memory()
    assert started == ["kept"]


@pytest.mark.parametrize(
    ("library", "pages"),
    [
        ("glibc 2.31", "always [madvise] never"),
        ("glibc 2.36", "always madvise [never]"),
        ("glibc 2.36", "[always] madvise never"),
        (None, "always [madvise] never"),  # another C library
    ],
)
def test_memory_is_kept_where_huge_pages_cannot_be_asked_for(started, monkeypatch, library, pages):
    monkeypatch.setattr(os, "confstr", lambda name: library)
    host_memory.HUGE_PAGES.write_text(pages)
    host_memory.ready_host_memory()
    assert started == ["kept"]


def test_nothing_is_done_where_an_accelerator_computes(started, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    host_memory.ready_host_memory()
    assert started == []


@pytest.mark.parametrize(
    ("platforms", "device", "expected"),
    [
        ("", None, True),
        ("", "nvidia0", False),
        ("", "accel0", False),
        ("", "nvidiactl", True),  # a driver without a device
        ("cpu", "nvidia0", True),
        ("cuda,cpu", None, False),
    ],
)
def test_whether_the_cpu_computes_is_told_before_jax_starts(
    tmp_path, monkeypatch, platforms, device, expected
):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(host_memory, "DEVICES", tmp_path)
    if device:
        (tmp_path / device).touch()
    assert host_memory.computes_on_cpu() is expected
