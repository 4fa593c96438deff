import pytest

from gqa_scaling.files.runs import RunDirectory


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    """A run's directory, which is not there yet."""
    return RunDirectory(tmp_path / "a-0123456789ab")
