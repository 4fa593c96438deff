"""One training step of small models, side by side with plain variants of the same step.

    python benchmarks/step.py

"plain" is what autodiff makes of the textbook equations: reference attention, SwiGLU and
cross-entropy with no hand-written backward pass, memory handed back to the system after every
step. Times are the least of several steps; on a busy machine trust the processor time.
"""

import subprocess
import sys
import time
from unittest import mock

import jax
import optax
from flax import nnx

from gqa_scaling.config import ModelConfig
from gqa_scaling.devices.host_memory import computes_on_cpu, keep_host_memory
from gqa_scaling.model import loss, transformer

CONFIGS = {  # name: (model, batch, context)
    "L2 d32 T128": (ModelConfig(2, 32, 2, 1, 16, vocab_size=264, dtype="float32"), 8, 128),
    "L3 d96 T256": (ModelConfig(3, 96, 4, 2, 16, vocab_size=264, dtype="float32"), 8, 256),
    "L6 d192 T256": (ModelConfig(6, 192, 8, 2, 16, vocab_size=264, dtype="float32"), 16, 256),
    "L4 d256 T512": (ModelConfig(4, 256, 4, 1, 64, vocab_size=4096, dtype="float32"), 8, 512),
}
VARIANTS = {  # name: (attention, autodiff only, keep host memory, remat)
    "plain": ("reference", True, False, "none"),
    "+ memory kept": ("reference", True, True, "none"),
    "+ blockwise": ("blockwise", True, True, "none"),
    "+ backward": ("blockwise", False, True, "none"),
    "remat dots": ("blockwise", False, True, "dots"),
    "remat full": ("blockwise", False, True, "full"),
}
STEPS = 8


def plain_swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def plain_nll(hidden, table, targets, chunk):
    logits = hidden @ table.T
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def measure(config, batch, time_steps, attention, remat):
    graphdef, params = nnx.split(transformer.create(config, 0))
    tx = optax.adamw(1e-3)
    state = params, jax.jit(tx.init)(params)
    tokens = jax.random.randint(jax.random.key(1), (batch, time_steps + 1), 0, config.vocab_size)
    x, y = tokens[:, :-1], tokens[:, 1:]

    def step(state, x, y):
        params, moments = state
        value, gradient = jax.value_and_grad(
            lambda p: loss.next_token_loss(
                nnx.merge(graphdef, p), x, y, attention=attention, remat=remat
            )
        )(params)
        updates, moments = tx.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    start = time.perf_counter()
    step = jax.jit(step, donate_argnums=0).lower(state, x, y).compile()
    compiled = time.perf_counter() - start
    clock, cores = [], []
    for _ in range(STEPS):
        start, start_cores = time.perf_counter(), time.process_time()
        state, value = step(state, x, y)
        value.block_until_ready()
        clock.append(time.perf_counter() - start)
        cores.append(time.process_time() - start_cores)
    temporary = step.memory_analysis().temp_size_in_bytes / 2**20
    return compiled, min(clock) * 1e3, min(cores) * 1e3, x.size / min(clock), temporary


def main(variant):
    attention, autodiff, keep, remat = VARIANTS[variant]
    if keep and computes_on_cpu():
        keep_host_memory()
    if autodiff:
        mock.patch.object(transformer, "swiglu", plain_swiglu).start()
        mock.patch.object(loss, "_mean_nll", plain_nll).start()
    for name, (config, batch, time_steps) in CONFIGS.items():
        row = measure(config, batch, time_steps, attention, remat)
        numbers = "{:9.2f} {:8.1f} {:8.1f} {:9,.0f} {:9.0f}".format(*row)
        print(f"{name:14} {variant:14} {numbers}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:  # a process each: how memory is kept cannot be undone
        print(f"{'':29} compile s       ms  core ms     tok/s  temp MiB", flush=True)
        for variant in VARIANTS:
            subprocess.run([sys.executable, __file__, variant], check=True)
