"""One run from its config to its result, whatever interrupts it on the way.

The state that is saved is (parameters, optimizer moments); batches are a function of the step and
initial weights one of the seed, so the step alone says where data and randomness stand. What the
result tells of the steps is saved beside it: the log is for people, and may be lost.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data import TokenStore
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.devices import mesh as parallel
from gqa_scaling.devices import processes
from gqa_scaling.experiment.branches import Trunk
from gqa_scaling.files.checkpoint import (
    Checkpoints,
    Restored,
    load_parameters,
    open_checkpoints,
    position_of,
    save_parameters,
)
from gqa_scaling.files.checksums import is_saved
from gqa_scaling.files.runs import RunDirectory, parent_directory
from gqa_scaling.training.averaging import averaged_steps, parameters_to_judge
from gqa_scaling.training.branching import branch_off
from gqa_scaling.training.evaluation import (
    Evaluation,
    evaluator,
    is_measured,
    targets_of_a_point,
)
from gqa_scaling.training.judging import judge
from gqa_scaling.training.monitor import History, Monitor, saved_history
from gqa_scaling.training.profiler import Profiler
from gqa_scaling.training.setup import Setup, set_up
from gqa_scaling.training.speed import Speed
from gqa_scaling.training.step import State, abstract_state, initial_state, train_step
from gqa_scaling.training.telemetry import (
    FINAL_METRICS,
    Telemetry,
    write_further,
    write_hparams,
)
from gqa_scaling.versions import commit, versions

LOOK_SECONDS = 2  # between two looks for what another process has just made


def check_data(run: RunConfig, store: TokenStore) -> TrainingData:
    """The run's training batches, or a UserError when model and tokens do not go together."""
    require(
        run.model.vocab_size >= store.vocab_size,
        f"{run.name}: vocab_size={run.model.vocab_size} must be at least the tokenizer's "
        f"{store.vocab_size}",
    )
    return TrainingData(store, run.context_length, run.batch_size, run.seed, run.data.needles)


def train(
    run: RunConfig,
    directory: RunDirectory,
    store: TokenStore,
    trunk: Trunk | None = None,
    clock: Callable[[], float] = time.perf_counter,
    grid: Sequence[RunConfig] = (),
) -> None:
    """Train and evaluate the run in its directory, from its last checkpoint if there is one, else from
    a state that another run of its `trunk` keeps.

    Its result.json is then on disk. `grid` are the runs that TensorBoard is to compare it with. Called by every process of a job; the first one writes. Raises
    UserError when run, data and directory do not go together, NonFiniteLoss or LastingSpike when
    training diverges, Preempted once the state is saved. Speeds are measured by the clock, in
    seconds.
    """
    began = time.time()
    data, setup = check_data(run, store), set_up(run)
    if processes.is_leader():
        directory.begin(run, store.describe())
    processes.wait_for_all("run directory")
    require(
        _is_seen(directory),
        f"{directory.path} is not seen by process {jax.process_index()}: all processes must share "
        "one file system; set GQA_SCALING_RUNS to a folder there",
    )
    with jax.set_mesh(setup.mesh):
        evaluate = evaluator(setup, store)
        if processes.leaders(is_saved(directory.parameters)):  # and interrupted in its evaluation
            parameters = load_parameters(directory.parameters, setup.parameters)
            history = saved_history(position_of(directory.parameters))
        else:
            keep, shared = run.checkpoint.keep, trunk.kept_steps(run) if trunk else ()
            always = [*averaged_steps(run), *shared]
            with open_checkpoints(directory.checkpoints, keep, always) as checkpoints:
                attempt = _Attempt(
                    setup, directory, store, data, checkpoints, evaluate, grid, clock, trunk
                )
                parameters, history = attempt.train(began)
            position = _position(run, setup.steps, history)
            if processes.is_leader():
                directory.forget_judgements()  # of a model that was trained here before
            save_parameters(directory.parameters, parameters, position)
        parameters = parameters_to_judge(setup, directory, parameters)
        value = judge(setup, store, directory, evaluate, parameters)
    if processes.is_leader():
        metrics = {tag: getattr(value, tag.partition("/")[2]) for tag in FINAL_METRICS}
        write_hparams(directory, setup, metrics | value.measures(), grid)
        write_further(directory, value)
        result = _result(setup, store, history, value)
        directory.finish(result, _timing(setup, directory), trunk.kept_steps(run) if trunk else ())
    processes.wait_for_all("result")


def _is_seen(directory: RunDirectory) -> bool:
    """Whether this process sees the directory that the first one began, looking for about a minute.

    It looked for results there before. An NFS client keeps that there was nothing for up to a minute, or
    until it lists the folders above.
    """
    for pause in (0, *[LOOK_SECONDS] * (60 // LOOK_SECONDS)):
        time.sleep(pause)
        if directory.config_file.exists():
            return True
        for folder in (directory.path.parent.parent, directory.path.parent, directory.path):
            list(folder.glob("*"))
    return False


def reevaluate(
    run: RunConfig,
    directory: RunDirectory,
    store: TokenStore,
    devices: Sequence[jax.Device] | None = None,
) -> None:
    """Judge a finished run by a new evaluation, on these devices, by default all; the old values
    stay, as do states that others begin with, and nothing is trained."""
    whole = directory.result()
    if whole is None:
        raise UserError(f"{directory.path} has no result yet; run it first")
    before, data = whole["result"].get("data", {}), store.describe()
    if run.imported:  # of what it was trained on, the tokenizer alone is known
        before = data | before
    directory.require_same_data(before, data)
    setup = set_up(run, devices)
    with jax.set_mesh(setup.mesh):
        averaged = run.evaluation.average > 1
        saved = directory.averaged(run) if averaged else directory.parameters
        parameters = load_parameters(saved, setup.parameters)
        value = judge(setup, store, directory, evaluator(setup, store), parameters)
    if processes.is_leader():
        write_further(directory, value)
        whole["result"]["evaluations"][run.evaluation_digest] = value.to_dict()
        directory.write_result(whole["result"], whole.get("timing") or {})
    processes.wait_for_all("result")


def first_state(setup: Setup, directory: RunDirectory) -> State:
    """The state before the first step, sharded: fresh, or with the parameters of the run that this
    one starts from. Raises UserError where that is not finished or its parameters are damaged."""
    parent = parent_directory(directory, setup.run)
    if parent is None:
        return parallel.create_sharded(functools.partial(initial_state, setup), setup.mesh)
    require(
        parent.result_file.exists(),
        f"{setup.run.name} starts from {setup.run.start_from}, and {parent.path} is not finished: "
        "train that run first",
    )
    parameters = load_parameters(parent.parameters, setup.parameters)
    return parameters, parallel.create_sharded(lambda: initial_state(setup)[1], setup.mesh)


# --------------------------------------------------------------------------------- the steps


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """One start of training: everything that taking steps needs."""

    setup: Setup
    directory: RunDirectory
    store: TokenStore
    data: TrainingData
    checkpoints: Checkpoints
    evaluate: Callable[..., Evaluation]
    grid: Sequence[RunConfig]
    clock: Callable[[], float]
    trunk: Trunk | None

    def train(self, began: float) -> tuple[Any, History]:
        """The trained parameters and the history of all steps; `began` is when train was called.

        Raises as `take_steps` does.
        """
        start, history, origin = self.restore()
        if processes.is_leader():
            self.directory.add_attempt(
                {
                    "began": began,
                    "first_step": start.step,
                    "damaged_checkpoints": start.damaged,
                    "layout": self.setup.layout,
                    "versions": versions(),
                    "commit": commit(),
                    "parallel": self.setup.run.parallel.to_dict(),
                    "checkpoint": self.setup.run.checkpoint.to_dict(),
                    **origin,
                }
            )
        parameters = self.take_steps(start, history)
        self.checkpoints.wait()
        return parameters, history

    def restore(self) -> tuple[Restored, History, dict[str, Any]]:
        """The newest whole checkpoint, or a state of the trunk, or a fresh one, allocated once, sharded;
        and what is recorded of a state that another run kept.
        """
        setup, directory = self.setup, self.directory
        found = self.checkpoints.restore_latest(abstract_state(setup))
        if found is None and self.trunk is not None:
            branch = branch_off(setup, self.trunk, directory, self.store)
            if branch is not None:
                return branch
        if found is None:
            return Restored(0, first_state(setup, directory), {}, ()), History(), {}
        digest, expected = found.position["digest"], setup.run.digest
        require(
            digest == expected, f"{directory.checkpoints} holds digest {digest}, not {expected}"
        )
        return found, saved_history(found.position), {}

    def owes_measurement(self, step: int) -> bool:
        """Whether the loss after this step, with which training goes on, is due and not in the log: it
        was told to stop there, and what is left of its time may be short."""
        told = any(m["step"] == step and "evaluation/loss" in m for m in self.directory.metrics())
        return step > 0 and is_measured(self.setup, step) and not told

    def take_steps(self, start: Restored, history: History) -> Any:
        """Take the steps that are left, added to the history, and return the trained parameters.

        Raises NonFiniteLoss, LastingSpike, and Preempted once the state is saved.
        """
        setup, run, steps = self.setup, self.setup.run, self.setup.steps
        state, step_fn = start.state, train_step(setup)
        layout = parallel.BatchLayout(setup.mesh, run.batch_size, run.context_length)
        batches = self.data.iterate(start.step, layout.pieces)
        leader = processes.is_leader()
        shared = self.trunk.kept_steps(run) if self.trunk else ()
        with (
            Telemetry(self.directory, start.step, leader) as telemetry,
            Profiler(run, self.directory, leader) as profiler,
        ):
            telemetry.introduce(setup, self.grid)
            speed = Speed(setup, self.clock)
            monitor = Monitor(
                setup, self.data, self.checkpoints, telemetry, speed, history, start.step
            )

            def measure(step: int) -> None:
                with monitor.outside_steps("evaluation"):
                    value = self.evaluate(state[0], targets_of_a_point(setup))
                telemetry.log(step, value.measures())

            if processes.leaders(leader and self.owes_measurement(start.step)):
                measure(start.step)
            for step in range(start.step + 1, steps + 1):
                profiler.before(step, monitor)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = step_fn(state, *layout.place(next(batches)))
                self.checkpoints.check()
                monitor.dispatched(step, metrics)
                stop = processes.preempted() and step < steps
                if is_measured(setup, step) and not stop:  # else it is measured when it goes on
                    measure(step)
                due = step % run.checkpoint.every_steps == 0 and step < steps
                if stop or due or step in shared:
                    with monitor.outside_steps("checkpoint"):  # what is saved has been judged
                        telemetry.flush()
                        self.checkpoints.save(step, state, _position(run, step, history))
                    monitor.last_saved = step
                if stop:
                    self.checkpoints.wait()
                    raise processes.Preempted(f"{run.name}: saved step {step} of {steps}")
            monitor.read()
        return state[0]


def _position(run: RunConfig, step: int, history: History) -> dict[str, Any]:
    """What is saved with the state of a step, as JSON."""
    return {"step": step, "seed": run.seed, "digest": run.digest, **dataclasses.asdict(history)}


# -------------------------------------------------------------------------------- the result


def _result(setup: Setup, store: TokenStore, history: History, value: Evaluation) -> dict[str, Any]:
    """What the run is worth; equal to the byte however often it was interrupted."""
    run = setup.run
    parameters = costs.parameters(run.model)
    return {
        "name": run.name,
        "digest": run.digest,
        "config": _recorded(run),
        "n_exact": parameters.non_embedding,
        "n_total": parameters.total,
        "tokens": setup.tokens,
        "steps": setup.steps,
        "training_flops": costs.training_flops(run),
        "epochs": setup.tokens / store.train_tokens,
        "train_loss": history.train_loss,
        "skipped_steps": history.skipped_steps,
        "data": store.describe(),
        "evaluations": {run.evaluation_digest: value.to_dict()},
        "versions": versions(),
        "layout": setup.layout,
    }


def _recorded(run: RunConfig) -> dict[str, Any]:
    """The config as a result has it, without what changes no result."""
    config = run.to_dict() | {"profile": ""}  # tracing does not
    del config["max_spike_steps"]  # nor does a limit that was not reached
    later: list[tuple[dict[str, Any], str, Any]] = [
        (config, "start_from", None),
        (config["optimizer"], "warmup_tokens", 0),
        (config["data"], "needles", None),
        (config["evaluation"], "contexts", ()),
        (config["evaluation"], "needles", None),
        (config["evaluation"], "average", 1),
    ]
    for table, name, default in later:  # fields that came later: without them a result is as before
        if table[name] == default:
            del table[name]
    return config


def _timing(setup: Setup, directory: RunDirectory) -> dict[str, float]:
    """How fast it went, in seconds: what the last attempt's steps took on average, and what was done
    outside them; from that average the time of all steps; when the run was finished.
    """
    last = directory.last_metrics("perf/step_time_seconds")
    timing = {k.removeprefix("perf/"): v for k, v in last.items() if k.startswith("perf/")}
    if last:
        timing["training_seconds"] = setup.steps * last["perf/step_time_seconds"]
    return {**timing, "finished": time.time()}
