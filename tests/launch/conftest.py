import json
import sys
from pathlib import Path

import pytest

from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.runs import runs_root
from launch import cli, submission

GRID = str(Path(__file__).parents[2] / "experiments/head_ladder.py")

FAKE = """#!{python} -S
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
print({says!r})
sys.exit({code})
"""


class Tools:
    """Fake commands on the PATH, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "calls.jsonl"
        folder.mkdir()

    def add(self, name: str, says: str = "", code: int = 0, folder: Path | None = None) -> None:
        path = (folder or self.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = FAKE.format(python=sys.executable, log=str(self.log), says=says, code=code)
        path.write_text(text)
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """No command is found but these."""
    tools = Tools(tmp_path / "tools")
    monkeypatch.setenv("PATH", str(tools.folder))
    return tools


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://mine, whose runs lie in a folder here and whose tokens are there."""
    monkeypatch.setenv("GQA_SCALING_RUNS", str(tmp_path / "bucket"))
    monkeypatch.setattr(cli, "runs_root", lambda named=None: runs_root())
    monkeypatch.setattr(cli, "_require_tokens", lambda experiment: None)
    monkeypatch.setattr(submission, "CODE", ("experiments",))  # the folder passes for a checkout
    return tmp_path / "bucket"


@pytest.fixture(scope="session")
def grid(tmp_path_factory):
    """The 168 runs of the published grid, at the published learning rates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GQA_SCALING_RUNS", str(tmp_path_factory.mktemp("none")))
        found = load_experiment(
            GRID, ["--data.store", "gs://mine/data", "--parallel.remat", "full"]
        )
    assert len(found.runs) == 168
    return found
