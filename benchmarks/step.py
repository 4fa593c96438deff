"""One training step of small models, side by side with plain variants of the same step and with PyTorch.

    python benchmarks/step.py
    make bench-transformers  # what `run` takes, "+ backward", beside the Llama of transformers

"plain" is what autodiff makes of the textbook equations: reference attention, SwiGLU and
cross-entropy with no hand-written backward pass, memory handed back to the system after every
step. transformers computes in float32, with PyTorch's scaled_dot_product_attention and AdamW, as
written and compiled. Each line is a process of its own, on one core: processor seconds of the first
step, the median of later ones, and the most memory that the process held.
"""

import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import time
from unittest import mock

import numpy as np

from gqa_scaling.config import ModelConfig
from gqa_scaling.devices.host_memory import ready_host_memory

CONFIGS = {  # name: (model, batch, context)
    "L2 d32 T128": (ModelConfig(2, 32, 2, 1, 16, vocab_size=264, dtype="float32"), 8, 128),
    "L3 d96 T256": (ModelConfig(3, 96, 4, 2, 16, vocab_size=264, dtype="float32"), 8, 256),
    "L6 d192 T256": (ModelConfig(6, 192, 8, 2, 16, vocab_size=264, dtype="float32"), 16, 256),
    "L4 d256 T512": (ModelConfig(4, 256, 4, 1, 64, vocab_size=4096, dtype="float32"), 8, 512),
}
OURS = "+ backward"
VARIANTS = {  # name: (attention, autodiff only, keep host memory, remat)
    "plain": ("reference", True, False, "none"),
    "+ memory kept": ("reference", True, True, "none"),
    "+ blockwise": ("blockwise", True, True, "none"),
    OURS: ("blockwise", False, True, "none"),
    "remat dots": ("blockwise", False, True, "dots"),
    "remat full": ("blockwise", False, True, "full"),
}
TORCH = ("transformers", "compiled")
WARM, STEPS = 2, 8


def tokens_of(config, batch, length):
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length + 1))


def plain_swiglu(x, gate, up, down):
    import jax

    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def plain_nll(hidden, table, targets, chunk):
    import optax

    logits = hidden @ table.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def stepper(variant, config, batch, length):
    """A function that takes one step, and waits for it."""
    attention, autodiff, keep, remat = VARIANTS[variant]
    if keep:
        ready_host_memory()  # before jax is imported
    import jax
    import optax
    from flax import nnx

    from gqa_scaling.model import loss, transformer

    if autodiff:
        mock.patch.object(transformer, "swiglu", plain_swiglu).start()
        mock.patch.object(loss, "_mean_nll", plain_nll).start()
    graphdef, params = nnx.split(transformer.create(config, 0))
    tx = optax.adamw(1e-3)
    state = params, jax.jit(tx.init)(params)
    tokens = jax.numpy.asarray(tokens_of(config, batch, length), "int32")

    def step(state, tokens):
        params, moments = state
        value, gradient = jax.value_and_grad(
            lambda p: loss.next_token_loss(
                nnx.merge(graphdef, p),
                tokens[:, :-1],
                tokens[:, 1:],
                attention=attention,
                remat=remat,
            )
        )(params)
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    compiled = jax.jit(step, donate_argnums=0)

    def take():
        nonlocal state
        state, value = compiled(state, tokens)
        return float(value)

    return take


def torch_stepper(variant, config, batch, length):
    """The same step of the Llama that transformers has, with as many parameters."""
    import torch
    import transformers

    from gqa_scaling.inference.hugging_face import config_of

    torch.set_num_threads(1)
    torch.manual_seed(0)
    known = config_of(config, length, eos=[0], dtype="float32")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**known, attn_implementation="sdpa")
    )
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    network = torch.compile(llama) if variant == "compiled" else llama
    tokens = torch.from_numpy(tokens_of(config, batch, length))

    def take():
        logits = network(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return take


def main(variant, name):
    if hasattr(os, "sched_setaffinity"):  # not on macOS
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    make = torch_stepper if variant in TORCH else stepper
    config, batch, length = CONFIGS[name]
    take = make(variant, config, batch, length)
    began = time.process_time()
    take()
    first = time.process_time() - began
    cores = []
    for i in range(WARM + STEPS):
        start = time.process_time()
        loss = take()
        cores += [time.process_time() - start] * (i >= WARM)
    middle = statistics.median(cores)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    numbers = (
        f"{first:9.2f} {1e3 * middle:8.1f} {batch * length / middle:9,.0f} {most:9,.0f} {loss:7.3f}"
    )
    print(f"{name:14} {variant:14} {numbers}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(*sys.argv[1:])
    else:  # a process each: how memory is kept cannot be undone
        print(f"{'':29}   first s  core ms     tok/s       MiB    loss", flush=True)
        torch = importlib.util.find_spec("transformers") is not None
        for name in CONFIGS:
            for variant in (OURS, *TORCH) if torch else VARIANTS:
                subprocess.run([sys.executable, __file__, variant, name], check=True)
