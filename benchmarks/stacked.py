"""Runs of one shape stacked into one program by vmap, beside the program of a single run.

    python benchmarks/stacked.py
    python benchmarks/stacked.py --size 4x64 --heads 4x1 --stacked 1 2 4

Milliseconds of processor time for a step of one run, of programs that take turns on one core, as
medians: a worker of --workers has one core and a single run, so stacking can only win by taking less.
Also the seconds of processor time to compile each.
"""

import argparse
import functools
import os
import time

from gqa_scaling.devices.host_memory import ready_host_memory

ready_host_memory()  # before jax starts its threads
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from gqa_scaling.config import ModelConfig, RunConfig  # noqa: E402
from gqa_scaling.training.setup import set_up  # noqa: E402
from gqa_scaling.training.step import initial_state, train_step  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2x32", help="layers x width")
    parser.add_argument("--heads", default="8x8", help="query heads x KV heads")
    parser.add_argument("--stacked", type=int, nargs="+", default=[1, 2], help="runs in a program")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    shape = (int(n) for size in (args.size, args.heads) for n in size.split("x"))
    model = ModelConfig(*shape, head_dim=16, vocab_size=1024, dtype="float32")
    run = RunConfig("one", model, context_length=256, batch_tokens=2048, tokens=2048 * 1000)
    setup = set_up(run)
    step = train_step(setup)
    tokens = np.random.default_rng(0).integers(1024, size=(8, 257), dtype=np.int32)
    programs, states, times = {}, {}, {}
    with jax.set_mesh(setup.mesh):
        first = jax.jit(functools.partial(initial_state, setup))()
        for k in args.stacked:
            state = jax.tree.map(lambda x, k=k: jnp.stack([x] * k), first)
            batch = jnp.stack([tokens[:, :-1]] * k), jnp.stack([tokens[:, 1:]] * k)
            if k == 1:
                state, *batch = jax.tree.map(lambda x: x[0], (state, *batch))
            call = step if k == 1 else jax.jit(jax.vmap(step), donate_argnums=0)
            began = time.process_time()
            program = call.lower(state, *batch).compile()
            print(f"{k} in a program: {time.process_time() - began:.1f} s to compile", flush=True)
            programs[k], states[k], times[k] = (program, batch), state, []
        for _ in range(args.rounds + 2):
            for k, (program, batch) in programs.items():
                began = time.process_time()
                states[k], _ = jax.block_until_ready(program(states[k], *batch))
                times[k].append((time.process_time() - began) / k)
    for k, seconds in times.items():
        print(
            f"{k} in a program: {1000 * float(np.median(seconds[2:])):.1f} ms for a step of one run"
        )


if __name__ == "__main__":
    main()
