"""What follows from a run's config and the devices it is on, worked out once and passed down."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax
from flax import nnx

from gqa_scaling.config import Implementation, RunConfig, require
from gqa_scaling.costs import training_steps
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.devices.compiler_flags import overlap_fault
from gqa_scaling.devices.layout import attention_implementation, judged_at
from gqa_scaling.hardware import cores
from gqa_scaling.model.transformer import create
from gqa_scaling.training.optimizer import learning_rate_schedule, make_optimizer


@dataclass(frozen=True)
class Setup:
    """A run on its devices.

    `steps` are its optimizer steps, `schedule` gives the learning rate by the number of steps taken
    before, `graph` is the model without its parameters, of which `parameters` holds shapes, dtypes
    and shardings.
    """

    run: RunConfig
    steps: int
    mesh: jax.sharding.Mesh
    attention: Implementation
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    graph: nnx.GraphDef
    parameters: Any

    @property
    def tokens(self) -> int:
        """D: the tokens of all steps."""
        return self.steps * self.run.batch_tokens

    def logs(self, step: int) -> bool:
        """Whether a step (counted from 1) is logged: the first ten, about 500 evenly, the last.

        A function of the run alone, so that a resumed run logs the same steps. Where runs of several
        budgets share theirs (`experiment/branches.py`) it hangs on the step alone: 256 to 512 until each
        doubling of their number, and all of the first 1,024.
        """
        every = max(1, self.steps // 500)
        if self.run.optimizer.warmup_tokens:
            every = 2 ** max(0, step.bit_length() - 10)
        return step <= 10 or step == self.steps or step % every == 0

    @property
    def platform(self) -> str:
        """What JAX calls its devices: "cpu", "gpu" or "tpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def layout(self) -> dict[str, Any]:
        """What a run's files record of its devices."""
        return {
            "mesh": dict(self.mesh.shape),
            "processes": jax.process_count(),
            "device": jax.devices()[0].device_kind,
            "cores": len(cores()),
            "attention": self.attention,
        }


def set_up(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Setup:
    """The run on these devices, by default all of all processes; nothing is allocated there.

    Raises UserError where they cannot hold the run's mesh or compute its attention, or where flags
    are set under which they compute it wrongly.
    """
    mesh, steps = parallel.make_mesh(run, devices), training_steps(run)
    device = mesh.devices.flat[0]
    attention = attention_implementation(run, device.platform, device.device_kind)
    fault = overlap_fault(device.device_kind, attention, mesh.shape["context"])
    require(not fault, fault)
    schedule = learning_rate_schedule(run.optimizer, steps, run.batch_tokens)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: create(run.model, run.seed)))
    return Setup(
        run=run,
        steps=steps,
        mesh=mesh,
        attention=attention,
        schedule=schedule,
        optimizer=make_optimizer(run.optimizer, schedule),
        graph=graph,
        parameters=parallel.abstract(shapes, mesh),
    )


def at_length(setup: Setup, length: int) -> Setup:
    """The setup of a run that is judged, not trained, at another context length."""
    run = judged_at(setup.run, length, setup.mesh.size)
    device = setup.mesh.devices.flat[0].device_kind
    return replace(setup, run=run, attention=attention_implementation(run, setup.platform, device))
