"""This project's own programs, small, as this machine's compiler makes them."""

import functools
import re
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from gqa_scaling.config import EvaluationConfig, ModelConfig, ParallelConfig, RunConfig
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.model.embedding import embed
from gqa_scaling.sweep.hlo import Array, Computation, Program
from gqa_scaling.training.setup import set_up
from gqa_scaling.training.step import abstract_step, initial_state

T, MICROBATCHES, VOCABULARY, WIDTH = 256, 2, 264, 64
RANDOM_STEPS = 10


@functools.cache
def run() -> RunConfig:
    """A step with everything that faults need: tied embeddings, norms of queries and keys,
    accumulation, remat, and all devices."""
    dtype: Literal["float32", "bfloat16"] = (
        "float32" if jax.default_backend() == "cpu" else "bfloat16"
    )
    tokens = T * MICROBATCHES * 2 * len(jax.devices())
    return RunConfig(
        name="doctor",
        model=ModelConfig(
            2, WIDTH, 4, 2, head_dim=16, vocab_size=VOCABULARY, qk_norm=True, dtype=dtype
        ),
        context_length=T,
        batch_tokens=tokens,
        tokens=100 * tokens,
        parallel=ParallelConfig(accumulation=MICROBATCHES, remat="dots"),
        evaluation=EvaluationConfig(tokens=T),
    )


@functools.cache
def _compiled_step() -> jax.stages.Compiled:
    step, arguments, mesh = abstract_step(run())
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile()


@functools.cache
def step() -> Program:
    """The compiled training step. Raises ValueError where the compiler tells no text of it."""
    return Program(_compiled_step().as_text() or "")


def finite_steps() -> tuple[int, int]:
    """How many of the first steps had a finite loss and gradient, and how many there were."""
    setup = set_up(run())
    with jax.set_mesh(setup.mesh):
        state = parallel.create_sharded(functools.partial(initial_state, setup), setup.mesh)
        rng = np.random.default_rng(0)
        taken = 0
        for _ in range(RANDOM_STEPS):
            tokens = rng.integers(0, VOCABULARY, (setup.run.batch_size, T + 1), dtype=np.int32)
            sharding = parallel.batch_sharding(setup.mesh)
            inputs, targets = (jax.device_put(x, sharding) for x in (tokens[:, :-1], tokens[:, 1:]))
            state, metrics = _compiled_step()(state, inputs, targets)
            taken += bool(metrics.taken)
    return taken, RANDOM_STEPS


def embedding_gradient(rows: int, width: int) -> jax.stages.Wrapped:
    """(tokens (B, T), dx (B, T, width)) -> the gradient of a table with that many rows."""
    table = jnp.zeros((rows, width))

    def gradient(tokens_BT: jax.Array, dx_BTD: jax.Array) -> jax.Array:
        _, back = jax.vjp(lambda table: embed(table, tokens_BT, dx_BTD.dtype), table)
        return back(dx_BTD)[0]

    return jax.jit(gradient)


def moved_out(program: Program, shape: tuple[int, ...], turns: int) -> int:
    """How many sums over devices of arrays of a shape, transposed or not, run fewer than `turns`
    times: those the compiler moved out of a loop that turns so often."""
    shapes = {shape, shape[::-1]}
    return sum(
        any(array.dims in shapes for array in each.arrays) and each.turns < turns
        for each in program.collectives
        if each.kind in ("all-reduce", "reduce-scatter")
    )


@dataclass(frozen=True)
class Fusion:
    """One program of YNNPACK, XLA's library for CPUs."""

    sums_products_over_rows: bool  # a product is summed over an axis that is not its last
    rank: int  # the most axes that an array in it has, where it sums; 0 where it does not


def ynn_fusions(program: Program) -> list[Fusion]:
    found = []
    for computation in program.computations.values():
        for each in computation.instructions.values():
            if each.opcode == "fusion" and "__ynn_fusion" in each.attributes:
                found.append(_fusion(program.computations[each.called["calls"]]))
    return found


def _fusion(inside: Computation) -> Fusion:
    instructions = inside.instructions.values()
    sums = [each for each in instructions if each.opcode == "reduce"]
    arrays: list[Array] = [array for each in instructions for array in each.arrays]

    def over_rows(axes: str, operand: str) -> bool:
        last = len(inside.instructions[operand].arrays[0].dims) - 1
        return any(int(axis) != last for axis in axes.split(",") if axis)

    over = [
        over_rows(axes[1], each.operands[0])
        for each in sums
        if (axes := re.search(r"dimensions=\{([\d,]*)\}", each.attributes))
    ]
    product = any(each.opcode == "dot" for each in instructions)
    rank = max(len(array.dims) for array in arrays) if sums else 0
    return Fusion(product and any(over), rank)
