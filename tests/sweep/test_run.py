"""Carrying a grid out; what it does with runs is in tests/training/test_training_loop.py."""

from pathlib import Path

import jax
import pytest

from gqa_scaling.config import ModelConfig, RunConfig
from gqa_scaling.devices import processes
from gqa_scaling.files.runs import RunDirectory
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


def test_one_of_several_processes_records_why_its_run_failed_before_it_ends(tmp_path, monkeypatch):
    def train(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("gqa_scaling.training.loop.train", train)
    monkeypatch.setattr(processes, "several", lambda: True)
    tiny = RunConfig("L1", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
    directory = RunDirectory(tmp_path)
    with pytest.raises(processes.RunFailed) as raised:
        run._finish(tiny, directory, None, None, (tiny,))
    assert str(raised.value.__cause__) == "a bug"
    assert directory.failure()["kind"] == "ValueError"
    again = run._finish(tiny, directory, None, None, (tiny,))  # started again it is passed over
    assert again == run._End.FAILED
