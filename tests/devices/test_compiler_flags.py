"""Flags that avoid faults of the compilers, and flags that are refused."""

import os

import pytest

from gqa_scaling.devices import compiler_flags
from gqa_scaling.devices.compiler_flags import overlap_fault

FUSION = "--xla_tpu_enable_async_collective_fusion=true"
OVERLAP = "--xla_tpu_overlap_compute_collective_tc=true"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A machine with an NVIDIA device and jaxlib 0.10.2; the flags after the call."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(compiler_flags, "DEVICES", tmp_path)
    monkeypatch.setattr(compiler_flags, "version_of", lambda name: (0, 10, 2))

    def flags(given=None):
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        if given is not None:
            monkeypatch.setenv("XLA_FLAGS", given)
        compiler_flags.keep_native_atomics()
        return os.environ.get("XLA_FLAGS")

    return flags


def test_the_gpus_own_addition_is_asked_for_where_jaxlib_would_not_take_it(
    gpu, tmp_path, monkeypatch
):
    asked = "--xla_backend_extra_options=-nvptx-allow-ftz-atomics"
    assert gpu() == asked
    assert gpu(asked) == asked
    assert gpu("--xla_gpu_autotune_level=0") == f"--xla_gpu_autotune_level=0 {asked}"
    other = "--xla_backend_extra_options=xla_gpu_x"
    assert gpu(other) == f"{other},-nvptx-allow-ftz-atomics"
    monkeypatch.setattr(compiler_flags, "version_of", lambda name: (0, 11, 1))
    assert gpu() is None
    monkeypatch.setattr(compiler_flags, "version_of", lambda name: (0, 10, 2))
    (tmp_path / "nvidia0").unlink()
    assert gpu() is None


@pytest.mark.parametrize(
    ("flags", "kind", "attention", "context", "refused"),
    [
        (f"{FUSION} {OVERLAP}", "TPU v6 lite", "splash", 4, True),
        (f"{FUSION} --xla_enable_async_all_reduce", "TPU v6 lite", "splash", 4, True),
        (f"{FUSION} {OVERLAP.replace('true', 'false')}", "TPU v6 lite", "splash", 4, False),
        (FUSION, "TPU v6 lite", "splash", 4, False),
        (OVERLAP, "TPU v6 lite", "splash", 4, False),
        (f"{FUSION} {OVERLAP}", "TPU v5 lite", "splash", 4, False),
        (f"{FUSION} {OVERLAP}", "TPU v6 lite", "blockwise", 4, False),
        (f"{FUSION} {OVERLAP}", "TPU v6 lite", "splash", 1, False),
    ],
)
def test_two_groups_of_flags_are_refused_together(
    monkeypatch, flags, kind, attention, context, refused
):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    said = overlap_fault(kind, attention, context)
    assert bool(said) == refused
    assert not refused or "xla_tpu_enable_async_collective_fusion" in said
