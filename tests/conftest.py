import gc
import importlib.metadata
import logging
import os
import sys
import textwrap
import uuid

import pytest
from hypothesis import HealthCheck, settings

# The tests compile much and run little, so XLA is to be quick here and in the processes that are
# started: without most optimisations and without its newer code generator. Programs mean the same;
# last digits may differ. Whoever sets XLA_FLAGS, be it to nothing, has the compiler that users have,
# as make test-slow, test-avx2 and test-compiler do. jax reads both when it is loaded.
if "XLA_FLAGS" not in os.environ:
    # jaxlib 0.11 has no other code generator any more, and ends at a flag that it does not know
    old = importlib.metadata.version("jaxlib").startswith("0.10.")
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false" if old else ""
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

# What is imported and collected stays to the end: millions of objects, which Python would look through
# for cycles again and again. That was a tenth of the time.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


# A test may be slow on a busy machine; that alone is no failure.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TINY = '''
"""What the tests ask.

More words.
"""
from gqa_scaling.config import ModelConfig, Question, RunConfig

QUESTION = Question(contexts=(64,))


def runs():
    return [
        RunConfig(
            name=f"L{layers}-h{heads}",
            model=ModelConfig(layers, 32, heads, 1, head_dim=8, vocab_size=264),
            context_length=32,
            batch_tokens=128,
            tokens=1280,
        )
        for layers in (1, 2)
        for heads in (1, 2, 4)
    ]
'''


def _forget_experiments() -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "experiments"]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory but for experiments/tiny.py, six runs that are never trained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GQA_SCALING_RUNS", "runs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/tiny.py").write_text(textwrap.dedent(TINY))
    _forget_experiments()
    yield tmp_path
    _forget_experiments()


@pytest.fixture(scope="session")
def s3_server():
    """An S3-compatible server on this machine; tests that stop it start it again."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from s3_server import Server

    server = Server()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    """An empty folder in a bucket there, for this process and those it starts."""
    from gqa_scaling.files.storage import as_path, files_of

    settings = {
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",  # a test that stops the server need not wait for more
        "GQA_SCALING_CACHE": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    folder = as_path(f"s3://tests/{uuid.uuid4().hex[:8]}")
    files_of(folder).makedirs("tests", exist_ok=True)
    return folder
