"""One run from its config to its result, whatever interrupts it on the way.

The state that is saved is (parameters, optimizer moments); batches are a function of the step and
initial weights one of the seed, so the step alone says where data and randomness stand.
"""

import dataclasses
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import zstandard
from flax import nnx

from gqa_scaling import __version__, costs, parallel
from gqa_scaling.checkpoint import (
    Checkpoints,
    load_parameters,
    open_checkpoints,
    placed,
    save_parameters,
)
from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data import TokenStore
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.evaluation.loss import Evaluation, evaluator
from gqa_scaling.hardware import cores, detected
from gqa_scaling.model.loss import next_token_loss
from gqa_scaling.model.transformer import create
from gqa_scaling.runs import RunDirectory
from gqa_scaling.training.optimizer import learning_rate_schedule, make_optimizer
from gqa_scaling.training.telemetry import Telemetry, is_logged, write_hparams

State = tuple[Any, optax.OptState]


class NonFiniteLoss(RuntimeError):
    """The loss or gradient norm became NaN or infinite; the message names the step."""


def keep_compiled(folder: Path) -> None:
    """Keep compiled programs in a folder that processes share, so that a restart need not wait.

    An entry that a kill cut short would be refused and never replaced: it is removed.
    """
    for entry in folder.glob("*-cache"):
        try:
            zstandard.ZstdDecompressor().decompress(entry.read_bytes())
        except (zstandard.ZstdError, FileNotFoundError):
            entry.unlink(missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def check_data(run: RunConfig, store: TokenStore) -> TrainingData:
    """The run's training batches, or a UserError when model and tokens do not go together."""
    require(
        run.model.vocab_size >= store.vocab_size,
        f"{run.name}: vocab_size={run.model.vocab_size} must be at least the tokenizer's "
        f"{store.vocab_size}",
    )
    return TrainingData(store, run.context_length, run.batch_size, run.seed)


def train_step(graph: nnx.GraphDef, run: RunConfig, optimizer: optax.GradientTransformation) -> Any:
    """The jitted step: (state, inputs [B, T], targets [B, T]) -> (state, loss, gradient norm).

    With accumulation the batch is cut into equal microbatches whose gradients are averaged.
    """
    settings = {"remat": run.parallel.remat, "attention": run.parallel.attention}

    def loss_of(parameters: Any, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return next_token_loss(nnx.merge(graph, parameters), inputs_BT, targets_BT, **settings)

    def gradients(parameters: Any, *batch: jax.Array) -> tuple[jax.Array, Any]:
        micro = run.parallel.accumulation
        if micro == 1:
            return jax.value_and_grad(loss_of)(parameters, *batch)

        def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            new = jax.value_and_grad(loss_of)(parameters, *part)
            return jax.tree.map(jnp.add, total, new), None

        # every device keeps a share of each microbatch: rows are dealt out, not cut in runs
        parts = [x.reshape(-1, micro, x.shape[-1]).swapaxes(0, 1) for x in batch]
        parts = tuple(parallel.constrain(x, None, "batch", "time") for x in parts)
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))
        total, _ = jax.lax.scan(add, zero, parts)
        return jax.tree.map(lambda x: x / micro, total)

    def step(
        state: State, inputs_BT: jax.Array, targets_BT: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        parameters, moments = state
        loss, grads = gradients(parameters, inputs_BT, targets_BT)
        updates, moments = optimizer.update(grads, moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), loss, optax.tree.norm(grads)

    return jax.jit(step, donate_argnums=0)


def train(run: RunConfig, directory: RunDirectory, store: TokenStore) -> dict[str, Any]:
    """Train and evaluate the run in its directory, from its last checkpoint if there is one.

    Returns the `result` part of result.json, which is then on disk. Raises UserError when run,
    data and directory do not go together, NonFiniteLoss when training diverges.
    """
    began = time.time()
    data, mesh = check_data(run, store), parallel.make_mesh(run)
    directory.begin(run, store.describe())
    layout = {
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "device": jax.devices()[0].device_kind,
        "cores": len(cores()),
    }
    graph, like = _abstract_parameters(run, mesh)
    with jax.set_mesh(mesh):
        evaluate = evaluator(run, graph, store, mesh)
        if directory.parameters.exists():  # trained, and interrupted in its evaluation
            parameters = load_parameters(directory.parameters, like)
        else:
            with open_checkpoints(directory.checkpoints, run.checkpoint.keep) as checkpoints:
                first = checkpoints.latest_step() or 0
                execution = {
                    "parallel": run.parallel.to_dict(),
                    "checkpoint": run.checkpoint.to_dict(),
                }
                directory.add_attempt(
                    {"began": began, "first_step": first, "layout": layout, "versions": versions()}
                    | execution
                )
                loop = _Loop(run, directory, data, checkpoints, graph, mesh, evaluate)
                parameters = loop.take_steps(first)
                checkpoints.wait()
            save_parameters(directory.parameters, parameters)
        result = _result(run, directory, store, evaluate(parameters), layout)
    value = result["evaluations"][run.evaluation_digest]
    metrics = {f"evaluation/{name}": value[name] for name in ("loss", "bits_per_byte")}
    write_hparams(directory, run, metrics)
    directory.finish(result, _timing(run, directory))
    return result


def _timing(run: RunConfig, directory: RunDirectory) -> dict[str, float]:
    """How fast it went: means over the last attempt, and from them the time of all steps."""
    last = directory.last_metrics("perf/step_time_seconds")
    timing = {k.removeprefix("perf/"): v for k, v in last.items() if k.startswith("perf/")}
    if last:
        steps = costs.training_steps(run)
        timing["training_seconds"] = steps * last["perf/step_time_seconds"]
    return {**timing, "finished": time.time()}


def abstract_step(
    run: RunConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[Any, tuple[State, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], jax.sharding.Mesh]:
    """The very step that `train` calls, its abstract arguments and mesh; nothing is allocated.

    Inside `jax.set_mesh(mesh)`, `step.lower(*arguments)` can be compiled for devices that are not
    there (`jax.experimental.topologies`).
    """
    mesh = parallel.make_mesh(run, devices)
    graph, _ = _abstract_parameters(run, mesh)
    optimizer = make_optimizer(run.optimizer, costs.training_steps(run))
    tokens = jax.ShapeDtypeStruct(
        (run.batch_size, run.context_length), jnp.int32, sharding=parallel.batch_sharding(mesh)
    )
    state = abstract_state(run, optimizer, mesh)
    return train_step(graph, run, optimizer), (state, tokens, tokens), mesh


def abstract_state(
    run: RunConfig, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> State:
    """Shapes and shardings of parameters and moments; nothing is allocated."""
    shapes = jax.eval_shape(lambda: _initial_state(run, optimizer))
    return placed(shapes, parallel.shardings(shapes, mesh))


def _initial_state(run: RunConfig, optimizer: optax.GradientTransformation) -> State:
    parameters = nnx.state(create(run.model, run.seed))
    return parameters, optimizer.init(parameters)


def _abstract_parameters(run: RunConfig, mesh: jax.sharding.Mesh) -> tuple[nnx.GraphDef, Any]:
    """The model's graph, and shapes and shardings of its parameters; nothing is allocated."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: create(run.model, run.seed)))
    return graph, placed(shapes, parallel.shardings(shapes, mesh))


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Everything that taking steps needs."""

    run: RunConfig
    directory: RunDirectory
    data: TrainingData
    checkpoints: Checkpoints
    graph: nnx.GraphDef
    mesh: jax.sharding.Mesh
    evaluate: Callable[[Any], Evaluation]

    def initial_state(self, optimizer: optax.GradientTransformation, first: int) -> State:
        """A fresh state, or that of checkpoint `first`; either is allocated once, sharded."""
        if not first:
            return parallel.create_sharded(lambda: _initial_state(self.run, optimizer), self.mesh)
        like = abstract_state(self.run, optimizer, self.mesh)
        state, position = self.checkpoints.restore(first, like)
        digest, path = position["digest"], self.directory.checkpoints
        require(digest == self.run.digest, f"{path} holds digest {digest}, not {self.run.digest}")
        return state

    def take_steps(self, first: int) -> Any:
        """Take every step after `first` and return the trained parameters.

        Metrics are read one step late, so the device never waits.
        """
        run, steps = self.run, costs.training_steps(self.run)
        optimizer = make_optimizer(run.optimizer, steps)
        state = self.initial_state(optimizer, first)
        step_fn = train_step(self.graph, run, optimizer)
        schedule = learning_rate_schedule(run.optimizer, steps)
        meter, last_good = _Meter(run), first

        with Telemetry(self.directory, first) as telemetry:

            def settle(pending: tuple[int, jax.Array, jax.Array] | None) -> None:
                """Read a step's metrics, refuse what is not finite, log."""
                if pending is None:
                    return
                step, loss, norm = pending[0], float(pending[1]), float(pending[2])
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise NonFiniteLoss(
                        f"loss {loss} and gradient norm {norm} at step {step}; "
                        + (
                            f"the last good checkpoint is step {last_good} in "
                            f"{self.directory.checkpoints}"
                            if last_good
                            else "there is no checkpoint before it"
                        )
                    )
                meter.tick(step)
                if is_logged(step, steps):
                    scalars = {
                        "learning/loss": loss,
                        "learning/grad_norm": norm,
                        "learning/current_learning_rate": float(schedule(step - 1)),
                    }
                    telemetry.log(step, {**scalars, **meter.scalars()})

            pending = None
            layout = parallel.BatchLayout(self.mesh, run.batch_size, run.context_length)
            batches = self.data.iterate(first, layout.pieces)
            for step in range(first + 1, steps + 1):
                state, loss, norm = step_fn(state, *layout.place(next(batches)))
                settle(pending)
                pending = (step, loss, norm)
                if step % run.checkpoint.every_steps == 0 and step < steps:
                    settle(pending)  # only a state whose loss was finite is saved
                    pending = None
                    position = {"step": step, "seed": run.seed, "digest": run.digest}
                    self.checkpoints.save(step, state, position)
                    last_good = step
                every = run.evaluation.every_steps
                if every and step % every == 0 and step < steps:
                    telemetry.log(step, {"evaluation/loss": self.evaluate(state[0]).loss})
            settle(pending)
        return state[0]


def _result(
    run: RunConfig,
    directory: RunDirectory,
    store: TokenStore,
    value: Evaluation,
    layout: dict[str, Any],
) -> dict[str, Any]:
    """What the run is worth; equal to the byte however often it was interrupted."""
    if not math.isfinite(value.loss):
        raise NonFiniteLoss(f"evaluation loss {value.loss} after the last step")
    steps = costs.training_steps(run)
    losses = [m["learning/loss"] for m in directory.metrics() if "learning/loss" in m]
    tail = losses[-max(1, len(losses) // 20) :]
    return {
        "name": run.name,
        "digest": run.digest,
        "config": run.to_dict(),
        "n_exact": costs.n_exact(run.model),
        "n_total": costs.parameters(run.model).total,
        "tokens": costs.training_tokens(run),
        "steps": steps,
        "training_flops": costs.training_flops(run),
        "epochs": costs.training_tokens(run) / store.train_tokens,
        "train_loss": sum(tail) / len(tail),
        "data": store.describe(),
        "evaluations": {run.evaluation_digest: dataclasses.asdict(value)},
        "versions": versions(),
        "layout": layout,
    }


def reevaluate(run: RunConfig, directory: RunDirectory, store: TokenStore) -> None:
    """Judge a finished run by a new evaluation; the old values stay, nothing is trained."""
    whole = directory.result()
    if whole is None:
        raise UserError(f"{directory.path} has no result yet; run it first")
    directory.require_same_data(whole["result"]["data"], store.describe())
    mesh = parallel.make_mesh(run)
    graph, like = _abstract_parameters(run, mesh)
    with jax.set_mesh(mesh):
        parameters = load_parameters(directory.parameters, like)
        value = evaluator(run, graph, store, mesh)(parameters)
    whole["result"]["evaluations"][run.evaluation_digest] = dataclasses.asdict(value)
    directory.finish(whole["result"], whole["timing"])


class _Meter:
    """Speed over the steps of this attempt, the first two (compilation) left out."""

    def __init__(self, run: RunConfig) -> None:
        self._run, self._start, self._now = run, (0, 0.0), (0, 0.0)
        self._ticks = 0
        self._devices = jax.device_count()
        self._flops = costs.training_flops_per_token(run.model, run.context_length)
        found = detected(jax.devices()[0].device_kind, self._devices)
        self._peak = found.peak_flops if found else None

    def tick(self, step: int) -> None:
        self._ticks += 1
        self._now = (step, time.perf_counter())
        if self._ticks <= 2:
            self._start = self._now

    def scalars(self) -> dict[str, float]:
        steps = self._now[0] - self._start[0]
        if steps == 0:
            return {}
        seconds = (self._now[1] - self._start[1]) / steps
        rate = self._run.batch_tokens / seconds / self._devices
        out = {
            "perf/step_time_seconds": seconds,
            "perf/per_device_tokens_per_sec": rate,
            "perf/per_device_tflops_per_sec": rate * self._flops / 1e12,
        }
        if self._peak is not None:
            out["perf/mfu"] = rate * self._flops / self._peak
        return out


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    ours = {"python": platform.python_version(), "gqa-scaling": __version__}
    return ours | {name: importlib.metadata.version(name) for name in names}
