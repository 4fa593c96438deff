"""Carrying a grid out; what it does with runs is in tests/training/test_training_loop.py."""

from pathlib import Path

import jax
import pytest

from gqa_scaling.devices import processes
from gqa_scaling.files.storage import as_path
from gqa_scaling.sweep import run


@pytest.mark.parametrize(
    ("root", "several", "backend", "folder"),
    [
        ("s3://mine/runs", True, "gpu", None),
        ("s3://mine/runs", True, "tpu", "cache/compiled"),
        ("s3://mine/runs", False, "gpu", "cache/compiled"),
        ("runs", True, "gpu", "runs/.compiled"),
    ],
)
def test_hosts_with_gpus_that_share_no_disk_keep_no_compiled_programs(
    root, several, backend, folder, monkeypatch
):
    """The first would read one that the others compile, and they would wait for it for ever."""
    monkeypatch.setenv("GQA_SCALING_CACHE", "cache")
    monkeypatch.setattr(processes, "several", lambda: several)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert run._compiled_folder(as_path(root)) == (folder and Path(folder))
