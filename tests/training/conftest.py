import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # training_kit.py, also run as a process of its own


@contextlib.contextmanager
def setting(**flags: object) -> Iterator[None]:
    """Flags of jax, for this process and for those that it starts."""
    before = {name: jax.config.values[name] for name in flags}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in flags.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def keeping_programs(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Compiled programs are kept in a folder: the tests train the same few models again and again."""
    return setting(
        jax_compilation_cache_dir=str(folder), jax_persistent_cache_min_compile_time_secs=0.0
    )


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept for all tests of this session, on every worker."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module", autouse=True)
def kept_programs(compiled: Path) -> Iterator[None]:
    with keeping_programs(compiled):
        yield


@pytest.fixture
def full_optimization() -> Iterator[None]:
    """Programs are optimized as in real runs, which takes more than twice as long. What is trained
    without is compared with what is trained without; only the golden steps need it."""
    with setting(jax_disable_most_optimizations=False):
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Path:
    """A folder with a prepared corpus, tiny.py and its one run, finished. To be left as it is."""
    from training_kit import make_workplace, tiny_run

    from gqa_scaling.config import Question
    from gqa_scaling.experiment.load import Experiment
    from gqa_scaling.sweep.run import run_sweep

    folder = tmp_path_factory.mktemp("trained")
    make_workplace(folder)
    with pytest.MonkeyPatch.context() as patch, keeping_programs(compiled):
        patch.chdir(folder)
        tiny = Experiment("tiny", (tiny_run(),), Question())
        assert run_sweep(tiny, Path("runs")).exit_code == 0
    return folder


@pytest.fixture
def workplace(
    trained: Path, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The working directory: that corpus and tiny.py, and no run yet."""
    for name in ("corpus", "data", "tiny.py"):
        (tmp_path / name).symlink_to(trained / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/.compiled").symlink_to(compiled)
    monkeypatch.chdir(tmp_path)
    return tmp_path
