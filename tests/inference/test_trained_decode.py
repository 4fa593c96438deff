"""A model that was trained, decoded with a cache and without: on one device and on eight."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import trained_decode_kit
from eight_devices import on_eight_devices

from gqa_scaling import cli

RUN = ["experiments.smoke", "--only", "L2-d48-h8-kv1", "--quiet"]


@pytest.mark.slow
def test_a_trained_model_writes_the_same_with_a_cache_and_without(tmp_path, monkeypatch):
    checkout = Path(__file__).parents[2]
    (tmp_path / "experiments").symlink_to(checkout / "experiments")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", RUN[0]]) == 0
    train = [sys.executable, "-m", "gqa_scaling", "run", *RUN]
    subprocess.run(train, check=True, capture_output=True)
    (run,) = Path("runs/smoke").glob("L2-d48-h8-kv1-*")
    script = Path(trained_decode_kit.__file__)
    alone = subprocess.run(
        [sys.executable, str(script), str(run)], check=True, capture_output=True, text=True
    )
    one = json.loads(alone.stdout.splitlines()[-1])
    eight, _ = on_eight_devices(script, run)
    for found in (one, eight):
        assert found.keys() == trained_decode_kit.PATTERNS.keys()
        for pattern in found.values():
            assert [len(text) for text in pattern["texts"]] == [256] * 4
            assert pattern["behind"] < 1e-3  # a tie within rounding at the most
    assert {each["mesh"]["tensor"] for each in eight.values()} == {8}
