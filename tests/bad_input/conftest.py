"""Bad input: one line that names it, exit code 2, nothing changed.

Every case runs a verb in an empty working directory with a small experiment, and compares every file
there before and after.
"""

from collections.abc import Callable

import pytest
from bad_input_kit import files

from gqa_scaling import cli


@pytest.fixture
def refused(workplace, capsys, monkeypatch):
    """refused(said, *arguments): the command ends so, in one line that says that, and changes nothing."""
    monkeypatch.setattr("gqa_scaling.devices.processes.join", lambda alone: None)
    monkeypatch.setenv("GQA_SCALING_CACHE", str(workplace / "cache"))

    def check(said: str, *arguments: str, code: int = 2, main: Callable = cli.main) -> str:
        before = files(workplace)
        found = main(arguments)
        out, err = capsys.readouterr()
        assert (found, out if code == 2 else "") == (code, ""), err
        assert said in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert files(workplace) == before
        return err

    return check
