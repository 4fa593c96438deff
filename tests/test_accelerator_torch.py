"""benchmarks/torch_llama.py, where there is PyTorch: `make test-transformers`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
torch_llama = pytest.importorskip("torch_llama", reason="needs PyTorch")

# under autocast norms have float32 weights and bfloat16 inputs, which eager PyTorch warns of
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
SMALL = {
    "size": (1, 32, 4, 2),
    "context": 16,
    "device": "cpu",
    "tokens": 64,
    "head_dim": 8,
    "vocab": 264,
}


def test_flash_attention_is_asked_for_and_the_default_is_named(monkeypatch):
    asked, real = [], torch_llama.sdpa_kernel
    monkeypatch.setattr(torch_llama, "sdpa_kernel", lambda x: asked.append(x.name) or real(x))
    rows = torch_llama.speed(8, device="cpu", contexts=(16,), n_kv=2, group=2)
    assert [row["what"] for row in rows] == [
        "FlashAttention (PyTorch), T 16, d_h 8, heads 2x2",
        "PyTorch's default (FLASH_ATTENTION), T 16, d_h 8, heads 2x2",
    ]
    assert asked == ["FLASH_ATTENTION"]
    assert all(row["both"] > 0 < row["forward"] for row in rows)
    (row,) = torch_llama.training(**SMALL)
    assert "FLASH_ATTENTION, remat none, 4 sequences at a time" in row["note"]


def test_a_sample_is_several_calls_in_a_row(monkeypatch):
    times = iter(range(1000))  # a thousandth of a second for each look at the clock
    monkeypatch.setattr(torch_llama.time, "perf_counter", lambda: next(times) / 1e3)
    called = []

    def f():
        called.append(0)
        next(times)

    assert torch_llama._milliseconds(f, "cpu") == pytest.approx(5 / 4)
    assert len(called) == 2 + 1 + 2 + 4 + 4


def test_training_gives_up_sequences_before_it_recomputes_layers(monkeypatch):
    tried, real = [], torch_llama._timed

    def timed(llama, compiled, optimizer, data, rows, *rest):
        tried.append((llama.remat, rows))
        if len(tried) < 5:
            raise torch_llama.torch.cuda.OutOfMemoryError
        return real(llama, compiled, optimizer, data, rows, *rest)

    monkeypatch.setattr(torch_llama, "_timed", timed)
    (row,) = torch_llama.training(**SMALL)
    assert tried == [(False, 4), (False, 2), (False, 1), (True, 4), (True, 2)]
    assert "remat each layer, 2 sequences at a time" in row["note"]
