"""What people open beside a run: TensorBoard's HParams tab and traces of single steps."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import jax
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from training_kit import tiny_run, traced_steps

from gqa_scaling.config import OptimizerConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.costs import n_exact
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import sizes
from gqa_scaling.sweep.plan import check_profile
from gqa_scaling.training.profiler import Profiler
from gqa_scaling.training.setup import set_up
from gqa_scaling.training.telemetry import FINAL_METRICS, Telemetry, write_hparams


def backend(folder):
    """The backend of the HParams tab, reading a folder of runs."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(folder))
    runs.Reload()
    return Context(
        SimpleNamespace(data_provider=MultiplexerDataProvider(runs, str(folder)), sampling_hints={})
    )


def columns(folder):
    """The columns that it shows: what runs are told apart by, and by what they are judged."""
    told, context = backend(folder), RequestContext()
    tags = told.hparams_metadata(context, "")
    found = told.experiment_from_metadata(context, "", True, tags, None)
    return [i.name for i in found.hparam_infos], [i.name.tag for i in found.metric_infos]


def session_groups(folder):
    """What it tells of the runs, by name."""
    told = backend(folder)
    every = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=api_pb2.Status.values()
    )
    groups = Handler(RequestContext(), told, "", every).run().session_groups
    return {group.sessions[0].name: group for group in groups}


def test_hparams_of_all_runs_of_a_folder_are_shown_together(tmp_path):
    dense = tiny_run()
    sparse = tiny_run(model=replace(dense.model, pattern=ContextSharding(8, 1)), seed=1)
    for name, run, loss in (("dense", dense, 2.25), ("sparse", sparse, 2.5)):
        directory = RunDirectory(tmp_path / name)
        directory.path.mkdir()
        write_hparams(directory, set_up(run), dict.fromkeys(FINAL_METRICS, loss), (dense, sparse))
    (tmp_path / "training").mkdir()
    with Telemetry(RunDirectory(tmp_path / "training"), 0) as telemetry:
        telemetry.introduce(set_up(replace(dense, seed=2)))
        telemetry.log(1, {"learning/loss": 5.0})
    found = session_groups(tmp_path)
    assert found.keys() == {"dense", "sparse", "training"}
    assert found["dense"].hparams["pattern"].string_value == "dense"
    assert found["sparse"].hparams["pattern"].string_value == sparse.model.pattern.label
    for number, name in enumerate(("dense", "sparse", "training")):
        hparams = found[name].hparams
        assert (hparams["seed"].number_value, hparams["n_kv_heads"].number_value) == (number, 2)
    losses = {
        name: {m.name.tag: m.value for m in group.metric_values} for name, group in found.items()
    }
    assert losses["dense"] == dict.fromkeys(FINAL_METRICS, 2.25)
    assert losses["sparse"] == dict.fromkeys(FINAL_METRICS, 2.5)
    assert losses["training"] == {}
    ended = {name: group.sessions[0].status for name, group in found.items()}
    assert ended["dense"] == api_pb2.STATUS_SUCCESS
    assert ended["training"] == api_pb2.STATUS_UNKNOWN  # it has not ended


@pytest.mark.parametrize("only", [range(4), [0], [3, 1]])
def test_hparams_of_a_grid_are_its_heads_size_and_loss_without_what_is_the_same(tmp_path, only):
    small, model = tiny_run(), tiny_run().model
    grid = [
        replace(
            small,
            name=f"{d}-{kv}",
            model=replace(model, d_model=d, n_kv_heads=kv),
            optimizer=OptimizerConfig(learning_rate=1 / d),
        )
        for d in (16, 32)
        for kv in (1, 2)
    ]
    grid.append(replace(grid[0], name="again", optimizer=OptimizerConfig(learning_rate=0.5)))
    for i in only:
        directory = RunDirectory(tmp_path / grid[i].name)
        directory.path.mkdir()
        with Telemetry(directory, 0) as telemetry:
            telemetry.introduce(set_up(grid[i]), grid)
        assert columns(tmp_path) == (["N", "n_kv_heads", "learning_rate"], list(FINAL_METRICS))
        write_hparams(directory, set_up(grid[i]), dict.fromkeys(FINAL_METRICS, 2.0), grid)
    assert columns(tmp_path) == (["N", "n_kv_heads", "learning_rate"], list(FINAL_METRICS))
    assert FINAL_METRICS[0] == "evaluation/loss"
    sizes = {name: g.hparams["N"].number_value for name, g in session_groups(tmp_path).items()}
    assert sizes == {grid[i].name: n_exact(grid[i].model) for i in only}


def test_hparams_of_a_run_without_a_grid_are_all_its_size_and_heads_first(tmp_path):
    write_hparams(RunDirectory(tmp_path), set_up(tiny_run()), {})
    assert columns(tmp_path)[0][:3] == ["N", "n_heads", "n_kv_heads"]
    assert "head_dim" in columns(tmp_path)[0]


@pytest.mark.parametrize("start", [0, 2])
def test_a_run_that_begins_again_shows_each_step_once(tmp_path, monkeypatch, start):
    clock = SimpleNamespace(time=count(1_800_000_000).__next__)  # event files are named by it
    monkeypatch.setattr("tensorboardX.event_file_writer.time", clock)
    for first, last in ((0, 5), (start, 4)):
        with Telemetry(RunDirectory(tmp_path), first) as telemetry:
            for step in range(first + 1, last + 1):
                telemetry.log(step, {"learning/loss": float(last)})
    shown = event_accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("learning/loss")
    assert [each.step for each in shown] == [1, 2, 3, 4]
    assert [each.value for each in shown] == [5.0] * start + [4.0] * (4 - start)


# -------------------------------------------------------------------------------------- traces


class Still:
    """A run at which nothing is pending."""

    speed = SimpleNamespace(restart=lambda: None)

    def outside_steps(self, name: str) -> nullcontext:
        return nullcontext()


def trace(directory, *steps, profile="3:4", writes=True):
    with Profiler(tiny_run(profile=profile), directory, writes) as profiler:
        for step in steps:
            profiler.before(step, Still())
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                jax.block_until_ready(jax.numpy.ones(step) + 1)


def test_the_last_steps_of_a_run_can_be_traced(tmp_path):
    trace(RunDirectory(tmp_path), 2, 3, 4)
    assert traced_steps(tmp_path) == [3, 4]


def test_a_resumed_run_traces_the_steps_that_are_left(tmp_path):
    trace(RunDirectory(tmp_path), 4, 5)
    assert traced_steps(tmp_path) == [4]


@pytest.mark.parametrize("asked", [{"profile": ""}, {"profile": "6:9"}, {"writes": False}])
def test_nothing_is_traced_without_need(tmp_path, asked):
    trace(RunDirectory(tmp_path), 3, 4, 5, **asked)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_traced_step_leaves_the_profiler_free(tmp_path):
    with pytest.raises(TypeError):
        trace(RunDirectory(tmp_path), 3, "no step")
    trace(RunDirectory(tmp_path / "next"), 3)
    assert traced_steps(tmp_path / "next") == [3]


def test_a_trace_is_put_into_a_bucket(bucket):
    trace(RunDirectory(bucket / "run"), 3, 4, 5)
    names = sizes(bucket / "run/plugins/profile")
    assert sum(name.endswith(".xplane.pb") for name in names) == 1


@pytest.mark.parametrize("text", ["20", "20:", "30:20", "0:3", "a:b", "-1:3", "1:2:3"])
def test_profile_must_be_two_steps(text):
    with pytest.raises(UserError, match=r"must be FIRST:LAST, steps counted from 1, such as 20:30"):
        tiny_run(profile=text)


def test_profiled_steps_must_be_in_the_run():
    check_profile(tiny_run(profile="23:24"))
    with pytest.raises(UserError, match=r"tiny: profile='23:25' ends after its last step 24"):
        check_profile(tiny_run(profile="23:25"))
