"""What a kernel cannot take is known without a device; the kernels' own tests hold them to it."""

import subprocess
import sys

import pytest

from gqa_scaling.config import ModelConfig, RunConfig
from gqa_scaling.context_sharding import ContextSharding, HeadPattern
from gqa_scaling.devices.kernel_limits import cudnn_limit, splash_limit, triton_limit
from gqa_scaling.devices.layout import attention_implementation


@pytest.mark.parametrize(
    ("tokens", "context", "kinds", "fits"),
    [
        (2**19, 1, [None], True),
        (2**19 + 1024, 1, [None], False),
        (2**20, 1, [None], False),
        (2**20, 2, [None], False),
        (2**20, 4, [None], True),
        (2**20, 1, [HeadPattern(64, 16)], True),
        (2**20, 1, [HeadPattern(64, 16), None], False),
        (2**30, 2**10, [HeadPattern(64, 16)], False),
    ],
)
def test_where_the_tables_of_splash_fit(tokens, context, kinds, fits):
    reason = splash_limit(tokens // context, tokens, 1 if context == 1 else 2, kinds)
    assert (reason == "") == fits


def test_a_context_of_any_length_is_answered_at_once():
    """An absurd one too: nothing is made that grows with it."""
    assert "not 1,000,000,000,000" in splash_limit(10**12, 10**12, 1, [HeadPattern(64, 16)])
    assert "tables for a dense head" in splash_limit(2**29, 2**29, 1, [None])


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (triton_limit(64, None, None), ""),
        (triton_limit(128, 64, 4096), ""),
        (triton_limit(256, None, None), "needs a head_dim of 16, 32, 64 or 128, not 256"),
        (triton_limit(64, 24, None), "needs a pattern.block that is a multiple of 16, not 24"),
        (triton_limit(128, None, None, "NVIDIA H100 80GB HBM3"), ""),
        (triton_limit(64, None, None, "NVIDIA L4"), ""),
        (triton_limit(128, None, None, "NVIDIA L4"), "160 KB of shared memory for head_dim=128"),
        (triton_limit(64, None, 40), "and the context axis makes 40"),
        (cudnn_limit(96, "bfloat16", False, 1), ""),
        (cudnn_limit(64, "float32", False, 1), "needs dtype=bfloat16, not float32"),
        (cudnn_limit(64, "bfloat16", True, 1), "is dense only"),
        (cudnn_limit(64, "bfloat16", False, 2), "needs context=1, not 2"),
        (cudnn_limit(256, "bfloat16", False, 1), "a multiple of 8 up to 128, not 256"),
    ],
)
def test_limits_on_gpus(limit, said):
    assert said in limit
    assert bool(said) == bool(limit)


@pytest.mark.parametrize(
    ("device", "taken"),
    [
        ("", "triton"),  # a plan's
        ("NVIDIA A100-SXM4-80GB", "triton"),
        ("NVIDIA GH200 480GB", "triton"),
        ("NVIDIA H200", "triton"),
        ("NVIDIA B200", "triton"),
        ("NVIDIA A10G", "blockwise"),
        ("NVIDIA L40S", "blockwise"),
        ("NVIDIA GeForce RTX 5090", "blockwise"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "blockwise"),
    ],
)
def test_auto_takes_no_kernel_that_a_gpu_has_no_shared_memory_for(device, taken):
    model = ModelConfig(
        2, 256, 2, 1, head_dim=128, vocab_size=264, pattern=ContextSharding(64, 2, stride=4)
    )
    run = RunConfig(name="wide", model=model, context_length=512, batch_tokens=512, tokens=5120)
    assert attention_implementation(run, "gpu", device) == taken


def test_asking_loads_no_arrays():
    code = "import sys, gqa_scaling.devices.layout; print(*{'numpy', 'jax'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
