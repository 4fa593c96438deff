import random

import pytest

from gqa_scaling.config import DataConfig
from gqa_scaling.data import prepare

WORDS = ["the", "a", "query", "head", "loss", "naïve", "Größe", "注意", "🙂", "layer", "mesh"]


@pytest.fixture(scope="session")
def texts() -> dict[str, str]:
    """120 small documents by file name, sorted."""
    rng = random.Random(0)
    return {
        f"{i % 7}/{i:03d}.txt": " ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + f"\n{i}\n"
        for i in sorted(range(120), key=lambda i: f"{i % 7}/{i:03d}")
    }


@pytest.fixture(scope="session")
def folder(texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus") / "texts"
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8", newline="")
    return root


@pytest.fixture
def config(folder, tmp_path):
    """A declaration over `folder` whose store lies in this test's own directory."""

    def make(**fields) -> DataConfig:
        defaults = {"corpus": str(folder), "heldout_fraction": 0.2, "store": str(tmp_path / "s")}
        return DataConfig(**defaults | fields)

    return make


@pytest.fixture(scope="session")
def store(folder, tmp_path_factory):
    """A store of bytes that no test may change."""
    path = tmp_path_factory.mktemp("stores") / "bytes"
    return prepare(DataConfig(corpus=str(folder), heldout_fraction=0.2, store=str(path)))
