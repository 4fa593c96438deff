"""How the time of a training step grows with parameters, context and batch, beside what FLOPs say.

    python benchmarks/growth.py --plot growth.png

Three series, each with one thing that changes: the size at 8 sequences of 256 tokens, the context at
4,096 tokens a batch, and the sequences at 256 tokens each. Times are processor seconds (user and
system) of whole train steps, the median of those that took turns with the others of their series.
FLOPs are the model's, causal attention counted as half. The slope of a series is that of the
logarithm of seconds against the logarithm of what changes, over all its points and over the largest
two; beside it that of the FLOPs alone. Devices are no series: virtual devices of one CPU share its
cores, so that their times say nothing of real ones; docs/pods.md has what compilers say of those.
"""

import argparse
import time

import jax
import numpy as np

from gqa_scaling import costs
from gqa_scaling.config import ModelConfig, RunConfig
from gqa_scaling.devices.host_memory import ready_host_memory
from gqa_scaling.units import quantity

SIZES = ((2, 64), (4, 128), (6, 192), (8, 256))  # L, d
SERIES = {  # what changes: (its values, the L, d, context and sequences of each)
    "parameters N": [(L, d, 256, 8) for L, d in SIZES],
    "context T": [(4, 128, T, 4096 // T) for T in (128, 512, 2048, 4096)],
    "sequences B": [(4, 128, 256, B) for B in (1, 4, 16, 32)],
}


def run_of(L: int, d: int, T: int, B: int) -> RunConfig:
    model = ModelConfig(L, d, d // 32, 1, head_dim=32, vocab_size=512, dtype="float32")
    return RunConfig("growth", model, context_length=T, batch_tokens=B * T, tokens=100 * B * T)


def stepper(run: RunConfig):
    """A function that takes one step and waits for it."""
    from gqa_scaling.training.setup import set_up
    from gqa_scaling.training.step import initial_state, train_step

    setup = set_up(run)
    shape = run.batch_size, run.context_length + 1
    tokens = jax.random.randint(jax.random.key(0), shape, 0, run.model.vocab_size)
    with jax.set_mesh(setup.mesh):
        state = [jax.jit(lambda: initial_state(setup))()]
        step = train_step(setup)

    def take() -> None:
        with jax.set_mesh(setup.mesh):
            state[0], metrics = step(state[0], tokens[:, :-1], tokens[:, 1:])
        metrics.loss.block_until_ready()

    return take


def slope(x: list[float], y: list[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(name: str, repeats: int) -> tuple[list[float], list[float], list[float]]:
    """What changes, seconds and FLOPs of a step, at each point of a series; printed as well."""
    runs = [run_of(*point) for point in SERIES[name]]
    steppers, times = [stepper(run) for run in runs], [[] for _ in runs]
    for turn in range(repeats + 1):
        for take, seconds in zip(steppers, times, strict=True):
            began = time.process_time()
            take()
            if turn:  # the first compiles
                seconds.append(time.process_time() - began)
    n = [costs.parameters(run.model).non_embedding for run in runs]
    x = {"parameters N": n, "context T": [run.context_length for run in runs]}
    x = x.get(name, [run.batch_size for run in runs])
    y = [float(np.median(seconds)) for seconds in times]
    flops = [float(costs.training_flops(run)) / costs.training_steps(run) for run in runs]
    print(f"{name:>14}{'ms a step':>12}{'GFLOP':>9}{'GFLOP/s of a core':>19}")
    for row in zip(x, y, flops, strict=True):
        print(f"{row[0]:14,}{row[1] * 1e3:12.1f}{row[2] / 1e9:9.2f}{row[2] / row[1] / 1e9:19.1f}")
    for what, i in (("all", 0), ("the largest two", -2)):
        slopes = slope(x[i:], y[i:]), slope(x[i:], flops[i:])
        print(f"  slope over {what}: {slopes[0]:.2f}, of FLOPs {slopes[1]:.2f}", flush=True)
    return x, y, flops


def plot(found: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(11, 3.6), sharey=True)
    for axes, (name, (x, y, flops)) in zip(panels, found.items(), strict=True):
        axes.loglog(x, y, "o-", label="measured")
        axes.loglog(
            x, [y[-1] * f / flops[-1] for f in flops], "k:", label="FLOPs, from the largest"
        )
        axes.set_xlabel(name)
        axes.set_xticks(x, [quantity(value) for value in x])
        axes.minorticks_off()
    panels[0].set_ylabel("processor seconds a step")
    panels[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="steps at each point (default: 7)")
    parser.add_argument("--plot", metavar="FILE", help="also draw it, as PNG")
    args = parser.parse_args()
    ready_host_memory()
    found = {name: measure(name, args.repeats) for name in SERIES}
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
