"""One run from its config to its result, whatever interrupts it on the way.

The state that is saved is (parameters, optimizer moments); batches are a function of the step and
initial weights one of the seed, so the step alone says where data and randomness stand. What the
result tells of the steps is saved beside it: the log is for people, and may be lost.
"""

import dataclasses
import functools
import importlib.metadata
import math
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
import zstandard
from flax import nnx

from gqa_scaling import __version__, costs
from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data import TokenStore
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.devices import processes
from gqa_scaling.devices.layout import attention_implementation
from gqa_scaling.files.checkpoint import (
    Checkpoints,
    Restored,
    load_parameters,
    open_checkpoints,
    position_of,
    save_parameters,
)
from gqa_scaling.files.checksums import is_saved
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.hardware import cores
from gqa_scaling.training.evaluation import Evaluation, evaluator
from gqa_scaling.training.optimizer import make_optimizer
from gqa_scaling.training.profiler import Profiler
from gqa_scaling.training.step import (
    abstract_parameters,
    abstract_state,
    initial_state,
    train_step,
)
from gqa_scaling.training.telemetry import FINAL_METRICS, Telemetry, write_hparams
from gqa_scaling.training.watch import NonFiniteLoss, Tally, Watch, position_at


def keep_compiled(folder: Path) -> None:
    """Keep compiled programs in a folder that processes share, so that a restart need not wait.

    An entry that a kill cut short would be refused and never replaced: it is removed. One that the
    disk refuses costs time only, and a run that needs the disk as well says so itself.
    """
    refused = r"Error (reading|writing) persistent compilation cache entry .*: \w+: \[Errno"
    warnings.filterwarnings("ignore", refused)
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


def train(
    run: RunConfig,
    directory: RunDirectory,
    store: TokenStore,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Train and evaluate the run in its directory, from its last checkpoint if there is one.

    Its result.json is then on disk. Called by every process of a job; the first one writes. Raises
    UserError when run, data and directory do not go together, NonFiniteLoss or LastingSpike when
    training diverges, Preempted once the state is saved. Speeds are measured by the clock, in
    seconds.
    """
    began, leader = time.time(), processes.is_leader()
    data, mesh = check_data(run, store), parallel.make_mesh(run)
    if leader:
        directory.begin(run, store.describe())
    processes.wait_for_all("run directory")
    require(
        directory.config_file.exists(),
        f"{directory.path} is not seen by process {jax.process_index()}: all processes must share "
        "one file system; set GQA_SCALING_RUNS to a folder there",
    )
    layout = {
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "device": jax.devices()[0].device_kind,
        "cores": len(cores()),
        "attention": attention_implementation(run, parallel.platform_of(mesh)),
    }
    graph, like = abstract_parameters(run, mesh)
    trained = processes.leaders(is_saved(directory.parameters))
    with jax.set_mesh(mesh):
        evaluate = evaluator(run, graph, store, mesh)
        if trained:  # and interrupted in its evaluation
            parameters = load_parameters(directory.parameters, like)
            saved, steps = position_of(directory.parameters), costs.training_steps(run)
            tally = Tally.of(position_at(run, directory, steps, saved))
        else:
            with open_checkpoints(directory.checkpoints, run.checkpoint.keep) as checkpoints:
                loop = _Loop(run, directory, data, checkpoints, graph, mesh, evaluate, clock)
                start = loop.begin()
                if leader:
                    directory.add_attempt(
                        {
                            "began": began,
                            "first_step": start.step,
                            "damaged_checkpoints": start.damaged,
                            "layout": layout,
                            "versions": versions(),
                            "parallel": run.parallel.to_dict(),
                            "checkpoint": run.checkpoint.to_dict(),
                        }
                    )
                parameters, tally = loop.take_steps(start)
                checkpoints.wait()
            position = _position(run, costs.training_steps(run), tally)
            save_parameters(directory.parameters, parameters, position)
        value = evaluate(parameters)
    require_finite(value)
    if leader:
        metrics = {tag: getattr(value, tag.partition("/")[2]) for tag in FINAL_METRICS}
        write_hparams(directory, run, metrics)
        result = _result(run, store, tally, value, layout)
        directory.finish(result, _timing(run, directory))
    processes.wait_for_all("result")


def require_finite(value: Evaluation) -> None:
    """Raise NonFiniteLoss for an evaluation that is no number; results are JSON."""
    if not math.isfinite(value.loss):
        raise NonFiniteLoss(f"evaluation loss {value.loss} after the last step")


def _timing(run: RunConfig, directory: RunDirectory) -> dict[str, float]:
    """How fast it went: steps on average and what was done apart from them, both of the last
    attempt, and from the average the time of all steps.
    """
    last = directory.last_metrics("perf/step_time_seconds")
    timing = {k.removeprefix("perf/"): v for k, v in last.items() if k.startswith("perf/")}
    if last:
        steps = costs.training_steps(run)
        timing["training_seconds"] = steps * last["perf/step_time_seconds"]
    return {**timing, "finished": time.time()}


def _position(run: RunConfig, step: int, tally: Tally) -> dict[str, Any]:
    """What is saved with the state of a step, as JSON."""
    return {"step": step, "seed": run.seed, "digest": run.digest, **dataclasses.asdict(tally)}


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
    clock: Callable[[], float]

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.run.optimizer, costs.training_steps(self.run))

    def begin(self) -> Restored:
        """The newest whole checkpoint or a fresh state, allocated once, sharded."""
        like = abstract_state(self.run, self.optimizer, self.mesh)
        restored = self.checkpoints.restore_latest(like)
        if restored is None:
            build = functools.partial(initial_state, self.run, self.optimizer)
            return Restored(0, parallel.create_sharded(build, self.mesh), {}, ())
        digest, path = restored.position["digest"], self.directory.checkpoints
        require(digest == self.run.digest, f"{path} holds digest {digest}, not {self.run.digest}")
        position = position_at(self.run, self.directory, restored.step, restored.position)
        return dataclasses.replace(restored, position=position)

    def take_steps(self, start: Restored) -> tuple[Any, Tally]:
        """Take the steps that are left and return the trained parameters and the tally.

        Metrics are read one step late, so the device never waits for the host. Raises
        NonFiniteLoss, LastingSpike, and Preempted once the state is saved.
        """
        state, first = start.state, start.step
        run, steps = self.run, costs.training_steps(self.run)
        devices = parallel.platform_of(self.mesh)
        step_fn = train_step(self.graph, run, self.optimizer, devices)
        layout = parallel.BatchLayout(self.mesh, run.batch_size, run.context_length)
        batches = self.data.iterate(first, layout.pieces)
        leader = processes.is_leader()
        with (
            Telemetry(self.directory, first, leader) as telemetry,
            Profiler(run, self.directory, leader) as profiler,
        ):
            telemetry.introduce(run)
            watch = Watch(run, self.checkpoints, self.data, telemetry, start, self.clock)
            for step in range(first + 1, steps + 1):
                profiler.before(step, watch)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = step_fn(state, *layout.place(next(batches)))
                self.checkpoints.check()
                watch.read()
                watch.pending = step, metrics
                stop = processes.preempted() and step < steps
                every = run.evaluation.every_steps
                if every and step % every == 0 and step < steps:
                    with watch.apart("evaluation"):
                        loss = self.evaluate(state[0]).loss
                    telemetry.log(step, {"evaluation/loss": loss})
                if stop or (step % run.checkpoint.every_steps == 0 and step < steps):
                    with watch.apart("checkpoint"):  # what is saved has been judged
                        telemetry.flush()
                        self.checkpoints.save(step, state, _position(run, step, watch.tally))
                    watch.last_saved = step
                if stop:
                    self.checkpoints.wait()
                    raise processes.Preempted(f"{run.name}: saved step {step} of {steps}")
            watch.read()
        return state[0], watch.tally


def _result(
    run: RunConfig,
    store: TokenStore,
    tally: Tally,
    value: Evaluation,
    layout: dict[str, Any],
) -> dict[str, Any]:
    """What the run is worth; equal to the byte however often it was interrupted."""
    steps = costs.training_steps(run)
    config = dataclasses.replace(run, profile="").to_dict()  # tracing changes no result
    del config["max_spike_steps"]  # nor does a limit that was not reached
    return {
        "name": run.name,
        "digest": run.digest,
        "config": config,
        "n_exact": costs.n_exact(run.model),
        "n_total": costs.parameters(run.model).total,
        "tokens": costs.training_tokens(run),
        "steps": steps,
        "training_flops": costs.training_flops(run),
        "epochs": costs.training_tokens(run) / store.train_tokens,
        "train_loss": tally.train_loss,
        "skipped_steps": tally.skipped_steps,
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
    directory.require_same_data(whole["result"].get("data", {}), store.describe())
    mesh = parallel.make_mesh(run)
    graph, like = abstract_parameters(run, mesh)
    with jax.set_mesh(mesh):
        parameters = load_parameters(directory.parameters, like)
        value = evaluator(run, graph, store, mesh)(parameters)
    require_finite(value)
    if processes.is_leader():
        whole["result"]["evaluations"][run.evaluation_digest] = dataclasses.asdict(value)
        directory.finish(whole["result"], whole.get("timing") or {})
    processes.wait_for_all("result")


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    ours = {"python": platform.python_version(), "gqa-scaling": __version__}
    return ours | {name: importlib.metadata.version(name) for name in names}
