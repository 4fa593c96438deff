"""One optimizer step as a pure function of the state, and the state it begins with.

The state is (parameters, optimizer moments); with spike skipping also what is known of gradient
norms. A step whose loss or gradient is not finite changes neither; only the number of steps, by which
the learning rate goes, goes on.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gqa_scaling.config import RunConfig
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.model.einsum import full_precision
from gqa_scaling.model.loss import next_token_loss
from gqa_scaling.model.transformer import create
from gqa_scaling.training.setup import Setup, set_up

State = tuple[Any, Any]
NORMS_REMEMBERED = 100  # steps over which a usual gradient norm is averaged
SPIKE_GROWTH = 1.1  # times which the mean grows at each step skipped for its norm


class StepMetrics(NamedTuple):
    """Scalars of one step; when not `taken`, parameters and moments are as they were.

    `usual_norm` is the mean that the gradient norm was held against; None without spike skipping.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    taken: jax.Array
    usual_norm: jax.Array | None = None


class Norms(NamedTuple):
    """Running mean of the gradient norms of the steps taken, and how many, as float32.

    A step that is skipped for its norm raises the mean to `SPIKE_GROWTH` times what it was, however
    large the norm: one spike hardly moves it, and a rise that lasts is followed. A norm that stays
    at ten times the limit is taken after 25 skipped steps.
    """

    mean: jax.Array
    count: Any  # an array; as a type it would contradict the method `count` of tuples


def train_step(setup: Setup) -> Any:
    """The jitted step: (state, inputs [B, T], targets [B, T]) -> (state, StepMetrics).

    With accumulation the batch is cut into equal microbatches whose gradients are averaged.
    """
    run = setup.run

    def loss_of(parameters: Any, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        model = nnx.merge(setup.graph, parameters)
        return next_token_loss(
            model, inputs_BT, targets_BT, remat=run.parallel.remat, attention=setup.attention
        )

    def gradients(parameters: Any, *batch: jax.Array) -> tuple[jax.Array, Any]:
        micro = run.parallel.accumulation
        if micro == 1:
            return jax.value_and_grad(loss_of)(parameters, *batch)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            new = jax.value_and_grad(loss_of)(parameters, *part)
            return jax.tree.map(jnp.add, total, new), None

        # every device keeps a share of each microbatch: rows are dealt out, not cut in runs
        dealt = [x.reshape(-1, micro, x.shape[-1]).swapaxes(0, 1) for x in batch]
        parts = tuple(parallel.constrain(x, None, "batch", "time") for x in dealt)
        zero: Any = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / micro, total)

    def step(
        state: State, inputs_BT: jax.Array, targets_BT: jax.Array
    ) -> tuple[State, StepMetrics]:
        parameters, moments = state
        with full_precision(run.model.dtype):
            loss, grads = gradients(parameters, inputs_BT, targets_BT)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        taken, usual_norm = finite, None
        norms: Norms | None = None
        factor = run.optimizer.spike_factor
        if factor:
            moments, norms = moments
            assert norms is not None
            usual_norm = norms.mean
            taken &= (norms.count < NORMS_REMEMBERED) | (norm <= factor * norms.mean)
        updates, new_moments = setup.optimizer.update(grads, moments, parameters)
        new = optax.apply_updates(parameters, updates), new_moments
        old = parameters, moments
        if norms is not None:
            count = jnp.minimum(norms.count + 1, NORMS_REMEMBERED)
            new_norms = Norms(norms.mean + (norm - norms.mean) / count, count)
            followed = jnp.minimum(norm, SPIKE_GROWTH * norms.mean)
            norms = Norms(jnp.where(finite, followed, norms.mean), norms.count)  # when skipped
            new, old = (new[0], (new[1], new_norms)), (old[0], (old[1], norms))

        def unless_skipped(new: Any, old: Any) -> Any:
            # the schedule's counter goes on: the learning rate is that of the step's number
            return new if counts_steps(new) else jnp.where(taken, new, old)

        metrics = StepMetrics(loss, norm, taken, usual_norm)
        return jax.tree.map(unless_skipped, new, old, is_leaf=counts_steps), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options(setup))


def counts_steps(part: Any) -> bool:
    """Whether this part of the optimizer's state counts all steps, those that are not taken too."""
    return isinstance(part, optax.ScaleByScheduleState)


def _compiler_options(setup: Setup) -> dict[str, Any] | None:
    """What the compiler of TPU programs must not do with accumulation: move sums over devices out
    of the loop over microbatches. Under some versions of libtpu that corrupts an embedding's
    gradient (xla issue 49143). In the steps that were looked at it moved the gradients of norms,
    a few kilobytes; the large ones stayed in the loop either way."""
    if setup.platform != "tpu" or setup.run.parallel.accumulation == 1:
        return None
    return {"xla_disable_hlo_passes": "while-loop-all-reduce-code-motion"}


def initial_state(setup: Setup) -> State:
    """The state before the first step, a function of the seed."""
    parameters = nnx.state(create(setup.run.model, setup.run.seed))
    moments = setup.optimizer.init(parameters)
    if setup.run.optimizer.spike_factor:
        moments = moments, Norms(jnp.zeros(()), jnp.zeros(()))
    return parameters, moments


def abstract_state(setup: Setup) -> State:
    """Shapes and shardings of parameters and moments; nothing is allocated."""
    return parallel.abstract(jax.eval_shape(lambda: initial_state(setup)), setup.mesh)


def abstract_step(
    run: RunConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[Any, tuple[State, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], jax.sharding.Mesh]:
    """The very step that a run takes, its abstract arguments and mesh; nothing is allocated.

    Inside `jax.set_mesh(mesh)`, `step.lower(*arguments)` can be compiled for devices that are not
    there (`jax.experimental.topologies`).
    """
    setup = set_up(run, devices)
    tokens = jax.ShapeDtypeStruct(
        (run.batch_size, run.context_length),
        jnp.int32,
        sharding=parallel.batch_sharding(setup.mesh),
    )
    return train_step(setup), (abstract_state(setup), tokens, tokens), setup.mesh
