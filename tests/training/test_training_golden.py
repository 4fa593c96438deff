"""Three optimizer steps of a tiny model, pinned: nothing may change what a run computes unseen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_kit import tiny_run

from gqa_scaling.training.setup import set_up
from gqa_scaling.training.step import initial_state, train_step

LOSSES = [6.239962577819824, 6.033593654632568, 6.095376491546631]
NORM = 26.099485397338867

WHY = (
    "The training step computes something else than before: every finished run would differ from "
    "new ones. If that is meant, say so in the commit, raise SCHEMA_VERSION, and paste: "
)


@pytest.mark.usefixtures("full_optimization")
def test_golden_steps() -> None:
    run = tiny_run(tokens=10 * 128)
    setup = set_up(run)
    state, losses = jax.jit(functools.partial(initial_state, setup))(), []
    step = train_step(setup)
    tokens = np.random.default_rng(0).integers(0, 257, (3, 4, 33), np.int32)
    for batch in tokens:
        state, metrics = step(state, batch[:, :-1], batch[:, 1:])
        losses.append(float(metrics.loss))
    norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(state[0]))))
    found = f"LOSSES = {losses}\nNORM = {norm}"
    assert losses == pytest.approx(LOSSES, rel=2e-6), WHY + found
    assert norm == pytest.approx(NORM, rel=2e-6), WHY + found
