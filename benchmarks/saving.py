"""How long saving holds up training, and what is done in the background.

    python benchmarks/saving.py
    python benchmarks/saving.py --parameters 1e7 --every 50

A state of that many parameters, with two moments each, is saved three times as training saves it;
the first also compiles. *Held up* is the time until `save` returns, by which the state may be
donated to the next step: in processor seconds of all threads, and in brackets by the wall, which a
busy machine stretches. *Behind* are the processor seconds until it is complete on disk: compressed,
checked and synced while steps are taken. On a CPU these compete with the steps for its cores, on an
accelerator they have the host's. Below it the shortest step for which what holds up training stays
under 2%, and for which, on these cores, all of it does.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gqa_scaling.files.checkpoint import open_checkpoints

SHARE = 0.02
ARRAYS = 20  # in which the parameters lie


def state(parameters: int) -> list[dict[str, jax.Array]]:
    def tree(key):
        keys = jax.random.split(key, ARRAYS)
        size = parameters // ARRAYS
        return {f"w{i}": jax.random.normal(k, (size,), jnp.float32) for i, k in enumerate(keys)}

    made = jax.jit(lambda: [tree(jax.random.key(seed)) for seed in range(3)])()
    return jax.block_until_ready(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e8, help="(default: 1e8)")
    parser.add_argument("--every", type=int, default=50, help="steps between saves (default: 50)")
    args = parser.parse_args()
    saved = state(int(args.parameters))
    gigabytes = sum(x.nbytes for x in jax.tree.leaves(saved)) / 1e9
    print(f"{args.parameters:,.0f} parameters, {gigabytes:.2f} GB of state")
    print(f"{'save':>4}{'held up s':>16}{'behind s':>16}")
    with tempfile.TemporaryDirectory() as folder, open_checkpoints(Path(folder), 2) as checkpoints:
        for step in range(1, 4):
            began = time.process_time(), time.perf_counter()
            checkpoints.save(step, saved, {"step": step})
            held = time.process_time(), time.perf_counter()
            checkpoints.wait()
            done = time.process_time(), time.perf_counter()
            up, behind = (
                [b - a for a, b in zip(x, y, strict=True)] for x, y in ((began, held), (held, done))
            )
            print(
                f"{step:4}{up[0]:8.2f} ({up[1]:.2f}){behind[0]:8.2f} ({behind[1]:.2f})", flush=True
            )
    cores = os.cpu_count() or 1
    least = up[0] / SHARE / args.every, (up[0] + behind[0] / cores) / SHARE / args.every
    print(
        f"with a save every {args.every} steps: held up below {SHARE:.0%} for steps from "
        f"{least[0]:.2f} s on; with what is done behind, on {cores} busy cores, from {least[1]:.2f} s on"
    )


if __name__ == "__main__":
    main()
