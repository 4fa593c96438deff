"""One run and one sweep: what is written, what is refused, what goes on after a failure."""

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_kit import tiny_run, traced_steps

from gqa_scaling import costs
from gqa_scaling.config import (
    EvaluationConfig,
    ParallelConfig,
    Question,
    RunConfig,
    UserError,
    require,
)
from gqa_scaling.data import TokenStore, open_store
from gqa_scaling.data.loader import TrainingData, evaluation_hash, heldout_chunks
from gqa_scaling.devices import processes
from gqa_scaling.devices.compilation_cache import keep_compiled
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.files.checkpoint import load_parameters
from gqa_scaling.files.runs import RunDirectory, run_directory, write_json
from gqa_scaling.files.storage import make_folder
from gqa_scaling.model.loss import per_position_nll
from gqa_scaling.sweep import run as sweep
from gqa_scaling.sweep.display import report_end
from gqa_scaling.training import loop, step
from gqa_scaling.training.evaluation import Evaluation, evaluator
from gqa_scaling.training.monitor import NonFiniteLoss
from gqa_scaling.training.setup import Setup, set_up


def experiment(*runs: RunConfig) -> Experiment:
    return Experiment("tiny", runs, Question())


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a prepared corpus and one finished run, `tiny`."""
    folder = tmp_path_factory.mktemp("work") / "copy"
    shutil.copytree(trained, folder)
    return folder


@pytest.fixture(autouse=True)
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def finished() -> RunDirectory:
    return run_directory("runs", "tiny", tiny_run())


def store() -> TokenStore:
    return open_store(tiny_run().data)


def initial_state(setup: Setup) -> step.State:
    return jax.jit(functools.partial(step.initial_state, setup))()


def test_result_records_what_made_it() -> None:
    result, run = finished().result()["result"], tiny_run()
    assert RunConfig.from_dict(result["config"]) == run
    assert result["digest"] == run.digest
    assert result["tokens"] == costs.training_tokens(run) == 24 * 128
    assert result["data"] == store().describe()
    assert result["n_exact"] == costs.n_exact(run.model)
    assert result["versions"]["jax"] == jax.__version__


def test_finished_run_keeps_parameters_only() -> None:
    assert finished().parameters.exists()
    assert not finished().checkpoints.exists()
    assert not finished().claim_file.exists()


def test_loss_is_the_mean_over_every_held_out_target() -> None:
    run = tiny_run()
    (value,) = finished().result()["result"]["evaluations"].values()
    chunks = heldout_chunks(store(), 32, 1024, 32)
    setup = set_up(run)
    parameters = load_parameters(finished().parameters, setup.parameters)

    @jax.jit
    def logits_of(parameters: object, inputs: jax.Array) -> jax.Array:
        model = nnx.merge(setup.graph, parameters)
        return model.logits(model(inputs))

    logits = np.asarray(logits_of(parameters, chunks[:, :-1]), np.float64)
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(logp, chunks[:, 1:, None], -1)
    assert value["loss"] == pytest.approx(nll.mean(), rel=1e-5)
    assert value["targets"] == nll.size == 1024
    assert value["loss_by_position"] == pytest.approx(nll[..., 0].mean(0), rel=1e-5)
    bits = value["loss"] / math.log(2) / store().heldout_bytes_per_token
    assert value["bits_per_byte"] == pytest.approx(bits)


def test_training_lowered_the_loss() -> None:
    lines = [line for line in finished().metrics() if "learning/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert lines[-1]["learning/loss"] < 0.8 * lines[0]["learning/loss"]
    assert lines[0]["learning/loss"] == pytest.approx(math.log(264), abs=1)


def test_tensorboard_shows_the_known_tags_and_hparams() -> None:
    events = EventAccumulator(str(finished().path)).Reload()
    tags = events.Tags()["scalars"]
    for tag in ("learning/loss", "learning/grad_norm", "perf/step_time_seconds", "evaluation/loss"):
        assert tag in tags
    losses = [e.value for e in events.Scalars("learning/loss")]
    logged = [m["learning/loss"] for m in finished().metrics() if "learning/loss" in m]
    assert losses == pytest.approx(logged)
    measured = events.Scalars("evaluation/loss")  # seven while it trained, then the result
    assert [e.step for e in measured] == [*range(3, 24, 3), 24]
    value = finished().result()["result"]["evaluations"][tiny_run().evaluation_digest]
    assert measured[-1].value == pytest.approx(value["loss"])
    assert measured[-2].value == pytest.approx(value["loss"], abs=0.2)
    assert measured[-2].value < measured[0].value
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_tracing_steps_and_measuring_nothing_on_the_way_change_no_result() -> None:
    never = dataclasses.replace(tiny_run().evaluation, every_steps=1000)
    run = tiny_run(profile="12:14", evaluation=never)
    traced = dataclasses.replace(experiment(run), name="traced")
    assert sweep.run_sweep(traced, Path("runs")).exit_code == 0
    directory = run_directory("runs", "traced", run)
    assert traced_steps(directory.path) == [12, 13, 14]
    assert not any("evaluation/loss" in line for line in directory.metrics())
    result = directory.result()["result"]
    result["config"]["evaluation"]["every_steps"] = 0
    assert result == finished().result()["result"]


def test_a_run_that_is_told_to_stop_saves_first_and_is_measured_there_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, order = iter(range(1, 100)), []
    make, save = loop.evaluator, loop.Checkpoints.save

    def evaluator(*setup: object) -> Callable[..., Evaluation]:
        evaluate = make(*setup)
        return lambda *what: order.append("measured") or evaluate(*what)

    def saved(self: loop.Checkpoints, step: int, *what: object) -> None:
        order.append(step)
        save(self, step, *what)

    monkeypatch.setattr(loop, "evaluator", evaluator)
    monkeypatch.setattr(loop.Checkpoints, "save", saved)
    monkeypatch.setattr(processes, "preempted", lambda: next(asked) == 6)
    directory = run_directory(tmp_path, "tiny", tiny_run())
    with pytest.raises(processes.Preempted, match="saved step 6 of 24"):
        loop.train(tiny_run(), directory, store())
    assert order == ["measured", 5, 6]
    loop.train(tiny_run(), directory, store())
    assert order[3:6] == ["measured", "measured", 10]  # of step 6 and of step 9
    assert directory.result()["result"] == finished().result()["result"]

    def curve(directory: RunDirectory) -> list[tuple[int, float]]:
        lines = directory.metrics()
        return [(m["step"], m["evaluation/loss"]) for m in lines if "evaluation/loss" in m]

    assert curve(directory) == curve(finished())


def test_a_second_sweep_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", None)  # calling it would raise
    before = finished().result_file.read_bytes()
    assert sweep.pending(experiment(tiny_run()), Path("runs")) == []
    assert sweep.run_sweep(experiment(tiny_run()), Path("runs")) == sweep.Outcome(1, 0)
    assert finished().result_file.read_bytes() == before


def test_a_new_evaluation_never_retrains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train", None)
    run = tiny_run(evaluation=EvaluationConfig(tokens=512))
    old = finished().result()["result"]["evaluations"][tiny_run().evaluation_digest]
    assert sweep.run_sweep(experiment(run), Path("runs")).done == 1
    values = finished().result()["result"]["evaluations"]
    assert values[tiny_run().evaluation_digest] == old
    assert values[run.evaluation_digest]["targets"] == 512


def test_a_new_evaluation_leaves_the_states_that_larger_budgets_begin_with() -> None:
    kept = finished().checkpoints / "5"
    kept.mkdir(parents=True)
    run = tiny_run(evaluation=EvaluationConfig(tokens=320))
    loop.reevaluate(run, finished(), store())  # as `judge` does, which knows of no other run
    assert kept.exists()
    assert run.evaluation_digest in finished().result()["result"]["evaluations"]
    finished().clean()


def test_a_new_evaluation_on_other_tokens_is_refused() -> None:
    run = tiny_run(evaluation=EvaluationConfig(tokens=256))
    changed = store()
    changed.manifest["hash"] = "0" * 64
    before = finished().result_file.read_bytes()
    with pytest.raises(UserError, match="trained on other data"):
        loop.reevaluate(run, finished(), changed)
    assert finished().result_file.read_bytes() == before


def test_runs_of_all_context_lengths_are_judged_by_the_same_targets() -> None:
    values = []
    for context in (32, 64):
        whole = EvaluationConfig(tokens=1000, longest_context=256)
        run = tiny_run(context_length=context, evaluation=whole)
        setup = set_up(run)
        with jax.set_mesh(setup.mesh):
            values.append(evaluator(setup, store())(initial_state(setup)[0]))
    assert [value.targets for value in values] == [768, 768]
    assert values[0].hash == values[1].hash == evaluation_hash(store(), 1000, 256)


def test_a_part_of_the_targets_is_spread_evenly_and_holds_a_batch_at_least() -> None:
    setup = set_up(tiny_run())
    with jax.set_mesh(setup.mesh):
        evaluate, parameters = evaluator(setup, store()), initial_state(setup)[0]
        whole, part, least = (evaluate(parameters, most) for most in (None, 320, 1))
        assert evaluate(parameters, 1024) == whole
    rows = heldout_chunks(store(), 32, 1024, 32)
    assert (whole.targets, part.targets, least.targets) == (1024, 320, 4 * 32)
    chosen = [0, 3, 7, 10, 14, 17, 21, 24, 28, 31]  # of 32 rows
    model = nnx.merge(setup.graph, parameters)
    nll = per_position_nll(model, rows[chosen, :-1], rows[chosen, 1:])
    assert part.loss == pytest.approx(float(nll.mean()), rel=1e-5)


def test_a_torn_compiled_program_is_removed(tmp_path: Path) -> None:
    whole, torn = tmp_path / "a-cache", tmp_path / "b-cache"
    for entry in (whole, torn):
        entry.write_bytes(zstandard.compress(b"program" * 100))
    torn.write_bytes(torn.read_bytes()[:-5])
    folder = jax.config.jax_compilation_cache_dir
    try:
        keep_compiled(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    assert whole.exists()
    assert not torn.exists()


def test_a_layout_that_cannot_be_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = tiny_run(parallel=ParallelConfig(tensor=3))
    with pytest.raises(UserError, match="tiny: tensor=3 must divide"):
        sweep.run_sweep(experiment(run), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_attention_of_other_hardware_is_refused_before_any_run_is_trained(
    tmp_path: Path,
) -> None:
    run = tiny_run()
    other = dataclasses.replace(run, name="other", parallel=ParallelConfig(attention="splash"))
    with pytest.raises(UserError, match="other: attention=splash needs a TPU, and this is a CPU"):
        sweep.run_sweep(experiment(run, other), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failure_is_recorded_and_the_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def train(
        run: RunConfig, directory: RunDirectory, store: TokenStore, *_: object, **__: object
    ) -> None:
        trained.append(run.name)
        if run.name == "bad":
            raise RuntimeError("out of luck")
        directory.finish({"evaluations": {run.evaluation_digest: {"loss": 2.5}}}, {})

    monkeypatch.setattr(loop, "train", train)
    grid = experiment(tiny_run("bad", seed=1), tiny_run("good", seed=2))
    assert sweep.run_sweep(grid, tmp_path) == sweep.Outcome(1, 1)
    bad = run_directory(tmp_path, "tiny", grid.runs[0])
    assert bad.state() == "failed"
    assert "out of luck" in json.loads(bad.failure_file.read_text())["traceback"]
    assert sweep.run_sweep(grid, tmp_path).exit_code == 1
    assert trained == ["bad", "good"]  # a failed run is not tried again by itself
    monkeypatch.setattr(
        loop, "train", lambda r, d, s, *_, **__: train(dataclasses.replace(r, name="x"), d, s)
    )
    sweep.forget_failures(grid, tmp_path)
    assert sweep.run_sweep(grid, tmp_path) == sweep.Outcome(2, 0)


def test_a_run_that_can_be_mended_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, mended = [], []

    def train(run: RunConfig, directory: RunDirectory, *_: object, **__: object) -> None:
        trained.append(run.name)
        require(run.name == "good" or bool(mended), "checkpoints/500 is damaged; remove it")
        directory.finish({"evaluations": {run.evaluation_digest: {"loss": 2.5}}}, {})

    monkeypatch.setattr(loop, "train", train)
    grid = experiment(tiny_run("bad", seed=1), tiny_run("good", seed=2))
    for _ in range(2):  # the second time from what is recorded
        found = sweep.run_sweep(grid, tmp_path)
        assert (found, found.exit_code) == (sweep.Outcome(1, 1, 1), 2)
    assert trained == ["bad", "good"]
    assert report_end(grid, tmp_path) == 1
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith("bad failed: checkpoints/500 is damaged; remove it (")
    sweep.forget_failures(grid, tmp_path)
    monkeypatch.setattr(processes, "several", lambda: True)
    with pytest.raises(UserError, match="checkpoints/500 is damaged"):
        sweep.run_sweep(grid, tmp_path)  # the others of a job cannot go on
    bad = run_directory(tmp_path, "tiny", grid.runs[0])
    assert bad.failure()["kind"] == "UserError"
    sweep.forget_failures(grid, tmp_path)
    mended.append("bad")
    assert sweep.run_sweep(grid, tmp_path) == sweep.Outcome(2, 0)


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_run_held_elsewhere_is_said_once_and_looked_for_less_and_less_often(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    root = request.getfixturevalue("bucket") if place == "bucket" else tmp_path
    run, looks, slept = tiny_run(seed=1), [], 0
    directory = run_directory(root, "tiny", run)
    make_folder(directory.path)
    other = {"host": "node7", "pid": 123, "born": "1", "token": "t"}
    write_json(directory.claim_file, other)

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        if slept == 100:
            directory.claim_file.unlink()

    hold = sweep.claim

    def claim(file: Path) -> AbstractContextManager[bool]:
        looks.append(slept)
        return hold(file)

    def train(
        run: RunConfig, directory: RunDirectory, store: TokenStore, *_: object, **__: object
    ) -> None:
        directory.finish({"evaluations": {run.evaluation_digest: {}}}, {})

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(sweep, "claim", claim)
    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert sweep.run_sweep(experiment(run), root) == sweep.Outcome(1, 0)
    in_bucket = [0, 2, 6, 14, 30, 62, 94, 126]
    assert looks == (in_bucket if place == "bucket" else list(range(101)))
    said = capsys.readouterr().err
    assert said.startswith("waiting for tiny: process 123 of node7 is at it; it is taken over at ")
    assert said.count("\n") == 1


def test_a_sweep_that_waits_stops_when_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slept = tiny_run(seed=1), []
    directory = run_directory(tmp_path, "tiny", run)
    make_folder(directory.path)
    write_json(directory.claim_file, {"host": "node7", "pid": 1, "born": "1", "token": "t"})
    monkeypatch.setattr(processes, "preempted", lambda: len(slept) == 3)
    monkeypatch.setattr(sweep.time, "sleep", slept.append)
    with pytest.raises(processes.Preempted, match="stopped before tiny"):
        sweep.run_sweep(experiment(run), tmp_path)
    assert slept == [1, 1, 1]


SPOILED = (1.0, math.nan, math.inf, 1e4, 1e8)  # what a batch's loss is multiplied by
MARK = 1000  # times the place in SPOILED is added to every token of a batch


def spoil(monkeypatch: pytest.MonkeyPatch, run: RunConfig, bad: Collection[int], by: float) -> None:
    """Multiply the loss of these steps' batches, and with it the gradient.

    The factor travels with the tokens, so that one compiled step serves all tests.
    """
    data, read, real = loop.check_data(run, store()), TrainingData._read, step.next_token_loss
    marked = {tuple(data.chunks(number - 1)) for number in bad}
    mark = MARK * [str(factor) for factor in SPOILED].index(str(by))

    def read_marked(self: TrainingData, chunks: np.ndarray, *where: range) -> np.ndarray:
        return read(self, chunks, *where) + np.int32(mark * (tuple(chunks) in marked))

    def loss(model: nnx.Module, inputs: jax.Array, targets: jax.Array, **more: object) -> jax.Array:
        factor = jnp.array(SPOILED)[inputs[0, 0] // MARK]
        return real(model, inputs % MARK, targets % MARK, **more) * factor

    monkeypatch.setattr(TrainingData, "_read", read_marked)
    monkeypatch.setattr(step, "next_token_loss", loss)


def test_the_first_step_that_is_not_finite_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run()
    spoil(monkeypatch, run, {13}, np.nan)
    directory = RunDirectory(tmp_path / "run")
    chunks = loop.check_data(run, store()).chunks(12)
    message = f"loss nan and gradient norm nan at step 13, chunks {chunks} of the data; the last"
    with pytest.raises(NonFiniteLoss, match=re.escape(message) + " good checkpoint is step 10"):
        loop.train(run, directory, store())
    assert [m["step"] for m in directory.metrics() if "skipped" in m] == [13]


def test_a_batch_that_is_not_finite_leaves_every_bit_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_run()
    spoil(monkeypatch, run, {2}, np.inf)
    setup = set_up(run)
    step_fn, data = step.train_step(setup), loop.check_data(run, store())
    state = initial_state(setup)
    for number in (1, 2, 3):
        before, _ = bits_and_steps(state)
        tokens = data.batch(number - 1)
        state, metrics = step_fn(state, tokens[:, :-1], tokens[:, 1:])
        after, steps = bits_and_steps(state)
        assert (after == before) == (number == 2)
        assert steps == number  # by which the learning rate goes
        assert bool(metrics.taken) == (number != 2)


def bits_and_steps(state: step.State) -> tuple[list[bytes], int]:
    """All of a state, Adam's count for its bias correction too, but for the count of all steps."""
    leaves = jax.tree.leaves(state, is_leaf=step.counts_steps)
    (counter,) = filter(step.counts_steps, leaves)
    parts = [np.asarray(x).tobytes() for x in leaves if not step.counts_steps(x)]
    return parts, int(counter.count)


@pytest.mark.parametrize(
    "spoiled",
    [lambda loss: loss + jax.lax.stop_gradient(jnp.nan), lambda loss: loss + jnp.sqrt(0 * loss)],
    ids=["loss", "gradient"],
)
def test_a_step_is_skipped_where_one_of_loss_and_gradient_is_finite(
    monkeypatch: pytest.MonkeyPatch, spoiled: Callable
) -> None:
    real = step.next_token_loss
    monkeypatch.setattr(step, "next_token_loss", lambda *args, **more: spoiled(real(*args, **more)))
    setup = set_up(tiny_run())
    state, tokens = initial_state(setup), loop.check_data(setup.run, store()).batch(0)
    before = [np.asarray(x).copy() for x in jax.tree.leaves(state[0])]
    state, metrics = step.train_step(setup)(state, tokens[:, :-1], tokens[:, 1:])
    assert jnp.isfinite(metrics.loss) != jnp.isfinite(metrics.gradient_norm)
    assert not metrics.taken
    for x, y in zip(jax.tree.leaves(state[0]), before, strict=True):
        np.testing.assert_array_equal(x, y)


def test_as_many_in_a_row_as_allowed_stop_the_run_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(max_nonfinite_steps=5)
    spoil(monkeypatch, run, {3, *range(13, 25)}, np.nan)
    directory = RunDirectory(tmp_path / "run")
    message = r"at step 17, .*; 5 such steps in a row; the last good checkpoint is step 15 "
    for _ in range(2):  # the second time from step 15, where there had been three
        with pytest.raises(NonFiniteLoss, match=message):
            loop.train(run, directory, store())
    assert [m["step"] for m in directory.metrics() if "skipped" in m] == [3, 13, 14, 15, 16, 17]


def test_a_run_that_took_no_step_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(max_nonfinite_steps=1000)
    spoil(monkeypatch, run, set(range(1, 1000)), np.nan)
    with pytest.raises(NonFiniteLoss, match="every logged step was skipped"):
        loop.train(run, RunDirectory(tmp_path / "run"), store())
    assert not RunDirectory(tmp_path / "run").result_file.exists()


def test_skipped_steps_are_counted_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "NORMS_REMEMBERED", 5)
    run = spiky()
    spoil(monkeypatch, run, {13}, 1e4)
    directory = RunDirectory(tmp_path / "run")
    loop.train(run, directory, store())
    skipped = {m["step"]: m["skipped"] for m in directory.metrics() if "skipped" in m}
    assert skipped == {13: "spike"}
    assert directory.result()["result"]["skipped_steps"] == 1
    assert "at step 13, chunks [" in capsys.readouterr().err


def spiky(factor: float = 20.0, **changes: object) -> RunConfig:
    optimizer = dataclasses.replace(tiny_run().optimizer, spike_factor=factor)
    return tiny_run(optimizer=optimizer, **changes)


def test_a_norm_that_stays_too_high_stops_the_run_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "NORMS_REMEMBERED", 5)
    run = spiky(max_spike_steps=5)
    spoil(monkeypatch, run, {8, *range(13, 25)}, 1e8)
    directory = run_directory(tmp_path, "tiny", run)
    for _ in range(2):  # the second time from step 15, where there had been three
        assert sweep.run_sweep(experiment(run), tmp_path) == sweep.Outcome(0, 1)
        told = json.loads(directory.failure_file.read_text())
        assert told["kind"] == "LastingSpike"
        message = (
            r"loss \S+ and gradient norm \S+ at step 17, chunks \[.*\] of the data: more than "
            r"spike_factor=20 times its running mean \S+; 5 such steps in a row; the last good "
            r"checkpoint is step 15 in \S+/checkpoints; try a lower --optimizer.learning-rate or "
            r"a higher --optimizer.spike-factor, each another run, or go on with a higher "
            r"--max-spike-steps and --retry-failed\n$"
        )
        assert re.search(message, told["traceback"])
        sweep.forget_failures(experiment(run), tmp_path)
    assert [m["step"] for m in directory.metrics() if "skipped" in m] == [8, 13, 14, 15, 16, 17]
    assert [a["first_step"] for a in directory.attempts()] == [0, 15]
    capsys.readouterr()
    directory.metrics_file.unlink()  # the count is not lost with it
    patient = dataclasses.replace(run, max_spike_steps=50)  # the same run, from there
    assert sweep.run_sweep(experiment(patient), tmp_path).exit_code == 0
    result = directory.result()["result"]
    assert result["skipped_steps"] == 1 + 12
    assert "max_spike_steps" not in result["config"]


class Norms:
    """The rule written plainly: which norms are taken, and the mean that they are held against."""

    def __init__(self, factor: float, remembered: int) -> None:
        self.factor, self.remembered, self.mean, self.count = factor, remembered, 0.0, 0

    def taken(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return False
        if self.count == self.remembered and norm > self.factor * self.mean:
            self.mean = min(1.1 * self.mean, norm)
            return False
        self.count = min(self.count + 1, self.remembered)
        self.mean += (norm - self.mean) / self.count
        return True


@pytest.fixture
def step_of_norm(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable]:
    """For a spike_factor a function that takes a step whose gradient has the norm asked for."""

    def make(factor: float) -> Callable[[float], tuple[bool, float]]:
        run = spiky(factor, tokens=1000 * 128)
        setup = set_up(run)
        scale = np.sqrt(sum(x.size for x in jax.tree.leaves(setup.parameters)))

        def loss(model: nnx.Module, norm: jax.Array, *_: object, **__: object) -> jax.Array:
            every = sum(x.sum() for x in jax.tree.leaves(nnx.state(model)))
            return every * norm[0, 0] / scale

        monkeypatch.setattr(step, "next_token_loss", loss)
        step_fn, state = step.train_step(setup), initial_state(setup)

        def take(norm: float) -> tuple[bool, float]:
            nonlocal state
            batch = np.full((4, 32), norm, np.float32)
            state, metrics = step_fn(state, batch, batch)
            return bool(metrics.taken), float(metrics.usual_norm)

        return take

    return make


def test_norms_are_judged_as_the_rule_says(step_of_norm: Callable) -> None:
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(0, 0.3, 400))
    norms[rng.random(400) < 0.1] *= 30.0
    norms[200:] *= 50.0
    norms[[50, 150, 250]] = np.nan, np.inf, np.nan
    take, rule = step_of_norm(4.0), Norms(4.0, step.NORMS_REMEMBERED)
    skipped = 0
    for norm in norms:
        mean = rule.mean
        taken, usual = take(norm)
        assert usual == pytest.approx(mean, rel=1e-4)
        assert taken == rule.taken(norm)
        skipped += not taken
    assert 20 < skipped < 100


def test_one_spike_hardly_moves_the_mean_and_a_rise_that_lasts_is_followed(
    step_of_norm: Callable,
) -> None:
    take = step_of_norm(20.0)
    for _ in range(step.NORMS_REMEMBERED):
        assert take(1.0)[0]
    assert not take(1e9)[0]
    assert take(1.0) == (True, pytest.approx(1.1))
    for _ in range(300):
        _, mean = take(1.0)
    assert mean == pytest.approx(1.0, abs=0.01)
    for times, most in ((2, 8), (10, 25), (100, 49)):  # so many times the limit
        norm = 20.0 * times * 0.99 * take(0.0)[1]  # 0.99: a norm of 0 has lowered the mean
        skipped = next(n for n in range(100) if take(norm)[0])
        assert skipped == most < tiny_run().max_spike_steps


@pytest.mark.parametrize("comes", [True, False])
def test_a_directory_that_another_process_has_just_made_is_looked_for_a_minute(
    comes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where it is not seen at first."""
    directory, slept = RunDirectory(tmp_path / "runs/tiny/L1"), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if comes and sum(slept) >= 40:
            directory.path.mkdir(parents=True, exist_ok=True)
            directory.config_file.touch()

    monkeypatch.setattr(loop.time, "sleep", sleep)
    assert loop._is_seen(directory) is comes
    assert sum(slept) == (40 if comes else 60)


def test_resume_under_another_definition_or_data_is_refused(tmp_path: Path) -> None:
    run = tiny_run()
    directory = run_directory(tmp_path, "tiny", run)
    directory.begin(run, store().describe())
    before = directory.config_file.read_bytes()
    with pytest.raises(UserError, match=r"another config: seed: 0 -> 3"):
        loop.train(tiny_run(seed=3), directory, store())
    changed = store()
    changed.manifest["hash"] = "0" * 64
    with pytest.raises(UserError, match="other data"):
        loop.train(run, directory, changed)
    assert directory.config_file.read_bytes() == before


def test_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    run = tiny_run()
    small = dataclasses.replace(run, model=dataclasses.replace(run.model, vocab_size=128))
    with pytest.raises(UserError, match="vocab_size=128 must be at least the tokenizer's 257"):
        sweep.check(experiment(small), Path("runs"))


def test_context_longer_than_the_corpus_is_refused() -> None:
    length = 2**20
    judged = EvaluationConfig(tokens=length)
    data = dataclasses.replace(tiny_run().data, allow_repeats=True)
    long = tiny_run(
        context_length=length, batch_tokens=length, tokens=length, evaluation=judged, data=data
    )
    with pytest.raises(UserError, match="context_length=1048576"):
        sweep.check(experiment(long), Path("runs"))


def test_more_than_four_epochs_are_refused_unless_allowed() -> None:
    many = tiny_run(tokens=5 * store().train_tokens)
    with pytest.raises(UserError, match=r"5\.0 epochs"):
        sweep.check(experiment(many), Path("runs"))
    allowed = dataclasses.replace(many, data=dataclasses.replace(many.data, allow_repeats=True))
    sweep.check(experiment(allowed), Path("runs"))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    run = tiny_run()
    micro = dataclasses.replace(run, parallel=ParallelConfig(accumulation=4))
    tokens = loop.check_data(run, store()).batch(0)
    out = []
    for each in (run, micro):
        setup = set_up(each)
        state = initial_state(setup)
        _, metrics = step.train_step(setup)(state, tokens[:, :-1], tokens[:, 1:])
        out.append(metrics[:2])
    np.testing.assert_allclose(out[0], out[1], rtol=1e-5)
