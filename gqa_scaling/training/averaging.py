"""The mean of a run's parameters over its last states, which may be judged in place of the last.

States are those after the last step and of the last checkpoints that `checkpoint.every_steps` asks
for: where a run was interrupted plays no part.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.costs import training_steps
from gqa_scaling.devices import processes
from gqa_scaling.files.checkpoint import load_parameters, open_checkpoints, save_parameters
from gqa_scaling.files.checksums import DamagedError, is_saved
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.training.setup import Setup
from gqa_scaling.training.step import abstract_state


def averaged_steps(run: RunConfig) -> list[int]:
    """The steps of the checkpoints that are averaged with the last state; none without averaging."""
    every, count = run.checkpoint.every_steps, run.evaluation.average - 1
    last = (training_steps(run) - 1) // every
    return [every * i for i in range(last - count + 1, last + 1)]


def parameters_to_judge(setup: Setup, directory: RunDirectory, parameters: Any) -> Any:
    """`parameters` or, where the run's evaluation asks for it, the mean over its last states, for
    which `parameters` are given up.

    The mean is saved, as checkpoints are removed when a run is finished. Raises UserError where a
    checkpoint is missing or damaged.
    """
    run, saved = setup.run, directory.averaged(setup.run)
    if run.evaluation.average == 1:
        return parameters
    if not processes.leaders(is_saved(saved)):
        save_parameters(saved, _mean(setup, directory, parameters))
    return load_parameters(saved, setup.parameters)


def _mean(setup: Setup, directory: RunDirectory, parameters: Any) -> Any:
    """The sum, one state after the other, and then the quotient, in float32."""
    run, steps = setup.run, averaged_steps(setup.run)
    remedy = "judge it with --evaluation.average 1"
    add = functools.partial(jax.tree.map, jnp.add)
    with open_checkpoints(directory.checkpoints, run.checkpoint.keep, steps) as checkpoints:
        kept = set(checkpoints.manager.all_steps())
        for step in steps:
            if step not in kept:
                raise UserError(
                    f"{run.name}: evaluation.average={run.evaluation.average} needs the checkpoint of "
                    f"step {step}, and {directory.checkpoints} has none: such checkpoints are kept "
                    f"only while a run trains that is to be judged so; {remedy}"
                )
            try:
                state, _ = checkpoints.restore(step, abstract_state(setup))
            except DamagedError as error:
                raise UserError(
                    f"{checkpoints.path / str(step)} is damaged: {error}; {remedy}"
                ) from None
            parameters = jax.jit(add, donate_argnums=0)(parameters, state[0])
    return jax.tree.map(lambda x: x / run.evaluation.average, parameters)
