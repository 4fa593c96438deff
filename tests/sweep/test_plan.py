import dataclasses
import json

import pytest
from rich.console import Console

from gqa_scaling import costs
from gqa_scaling.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Question,
    RunConfig,
)
from gqa_scaling.config import UserError as Refused
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.devices.layout import layout_refusal
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.hardware import Hardware, hardware
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import check_epochs, make_plan
from gqa_scaling.sweep.views import plan_summary, plan_table

CHIP = Hardware("chip", 1e12, 1e11, 2**30, 3.6, mfu=0.5, step_seconds=0.01, start_seconds=60)


def run(name: str = "a", layers: int = 2, **changes) -> RunConfig:
    fields = {"model": ModelConfig(layers, 64, 4, 2), "tokens": 2560_000} | changes
    return RunConfig(name=name, context_length=64, batch_tokens=256, **fields)


def experiment(*runs: RunConfig) -> Experiment:
    return Experiment("exp", runs, Question())


def shown(table) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# ---------------------------------------------------------------------------------------- plan


def test_each_run_states_its_costs():
    planned = make_plan(experiment(run()), CHIP).runs[0]
    r = run()
    assert planned.n_exact == costs.n_exact(r.model)
    assert planned.tokens == costs.training_tokens(r) == 2560_000
    assert planned.steps == 10_000
    assert planned.batch_size == 4
    assert planned.training_flops == costs.training_flops(r)
    assert planned.training_bytes == memory.training_bytes(r).total
    assert planned.seconds == pytest.approx(60 + 10_000 * 0.01 + planned.training_flops / 5e11)
    assert planned.checkpoint_bytes == memory.checkpoint_bytes(r)
    assert planned.finished_bytes == memory.finished_bytes(r)
    assert planned.epochs is None


def test_totals():
    plan = make_plan(experiment(run("a"), run("b", 4)), CHIP, devices=4)
    a, b = plan.runs
    totals = plan.to_dict()["totals"]
    assert totals["runs"] == 2
    assert totals["tokens"] == 2 * 2560_000
    assert totals["training_flops"] == a.training_flops + b.training_flops
    assert totals["hours"] == pytest.approx((a.seconds + b.seconds) / 3600)
    assert totals["device_hours"] == pytest.approx(4 * totals["hours"])
    assert totals["dollars"] == pytest.approx(3.6 * totals["device_hours"])
    assert totals["disk_bytes"] == a.finished_bytes + b.finished_bytes + b.checkpoint_bytes
    assert json.loads(json.dumps(plan.to_dict()))["runs"][1]["name"] == "b"


def test_finished_runs_are_shown_and_left_out_of_the_totals():
    runs = run("a"), run("b", 4)
    plan = make_plan(experiment(*runs), CHIP, finished={runs[0]})
    only = make_plan(experiment(runs[1]), CHIP).totals
    assert plan.totals == only | {"finished": 1}
    assert [each.finished for each in plan.runs] == [True, False]
    assert " done" in shown(plan_table(plan))
    assert plan_summary(plan)[0].startswith("1 run left of 2, ")
    whole = make_plan(experiment(*runs), CHIP, finished=set(runs))
    assert whole.totals["dollars"] == 0
    assert plan_summary(whole) == ["all 2 runs are finished: nothing is left to pay for"]


def test_more_devices_share_the_work_and_not_the_waiting():
    one, four = (make_plan(experiment(run()), CHIP, n).runs[0].seconds for n in (1, 4))
    work = costs.training_flops(run()) / 5e11
    assert one - four == pytest.approx(0.75 * work)


def test_a_layout_that_cannot_be_is_refused():
    with pytest.raises(Refused, match="a: data=3 x fsdp=1 = 3 must divide the 4 sequences"):
        make_plan(experiment(run()), CHIP, 3)


def test_a_context_that_the_layout_cannot_be_judged_at_is_refused():
    """As the run itself would, once the devices are paid for."""
    asked = EvaluationConfig(contexts=(4, 64))
    four = run(evaluation=asked, parallel=ParallelConfig(context=4))
    with pytest.raises(Refused, match="a: judged at 4 tokens: context=4 must divide half of"):
        make_plan(experiment(four), CHIP, 4)
    assert layout_refusal(four, 4, "tpu")
    assert not layout_refusal(dataclasses.replace(four, parallel=ParallelConfig()), 4, "tpu")


@pytest.mark.parametrize(
    ("name", "attention", "needed", "there", "remedy"),
    [
        ("v5e", "triton", "GPU", "TPU", "take auto"),
        ("v5p", "cudnn", "GPU", "TPU", "take auto"),
        ("h100", "splash", "TPU", "GPU", "take auto"),
        ("cpu", "splash", "TPU", "CPU", ".* plan for other devices with --hardware NAME"),
    ],
)
def test_an_attention_that_the_hardware_does_not_have_is_refused(
    name, attention, needed, there, remedy
):
    said = f"a: attention={attention} needs a {needed}, and this is a {there}: {remedy}"
    asked = run(parallel=ParallelConfig(attention=attention))
    with pytest.raises(Refused, match=said):
        make_plan(experiment(run("fine"), asked), hardware(name))


def test_splash_is_refused_where_its_tables_do_not_fit_and_auto_takes_blockwise():
    """A million dense tokens on one chip; four that share them have room."""
    million = dataclasses.replace(run(), context_length=2**20, batch_tokens=2**20)

    def with_attention(name, context=1):
        parallel = ParallelConfig(attention=name, context=context, remat="full")
        return experiment(dataclasses.replace(million, parallel=parallel, tokens=2**21))

    with pytest.raises(Refused, match=r"needs 3,145,728 bytes of tables .* has room for 983,040"):
        make_plan(with_attention("splash"), hardware("v5e"))
    auto, blockwise = (
        make_plan(with_attention(name), hardware("v5e")).runs[0].training_bytes
        for name in ("auto", "blockwise")
    )
    assert auto == blockwise
    assert make_plan(with_attention("splash", 4), hardware("v5e"), 4).runs


def test_a_shard_without_runs_can_be_planned():
    totals = make_plan(experiment(), CHIP).to_dict()["totals"]
    assert (totals["runs"], totals["hours"], totals["disk_bytes"]) == (0, 0, 0)


def test_no_devices_are_refused():
    with pytest.raises(Refused, match="devices=0"):
        make_plan(experiment(run()), CHIP, 0)


def test_epochs_over_a_prepared_corpus():
    store = run().data.store_path
    plan = make_plan(experiment(run()), CHIP, 1, {store: 1024_000})
    assert plan.runs[0].epochs == 2.5
    assert make_plan(experiment(run()), CHIP, 1, {"data/other": 1}).runs[0].epochs is None


def test_more_than_four_epochs_are_refused_unless_allowed():
    check_epochs(run(), 640_000)  # just four
    with pytest.raises(Refused, match=r"a: 2,560,000 tokens are 4\.0 epochs .*allow-repeats True"):
        check_epochs(run(), 639_999)
    with pytest.raises(Refused, match="epochs over the 1,000 tokens"):
        make_plan(experiment(run()), CHIP, 1, {run().data.store_path: 1000})
    allowed = run(data=DataConfig(allow_repeats=True))
    assert make_plan(experiment(allowed), CHIP, 1, {allowed.data.store_path: 1000}).runs[0].epochs


def test_summary_warns_of_runs_that_do_not_fit():
    large = run("large", model=ModelConfig(48, 4096, 32, 32))
    summary = "\n".join(plan_summary(make_plan(experiment(run(), large), CHIP)))
    assert "WARNING: 1 run predicted not to fit 1.00 GiB (large)" in summary
    assert "WARNING" not in "\n".join(plan_summary(make_plan(experiment(run()), CHIP)))


def test_summary_says_what_is_unknown_and_noted():
    noted = run(note="learning rate 0.003 from sweep")
    lines = plan_summary(make_plan(experiment(noted), CHIP))
    assert "epochs: unknown until the data is prepared" in lines
    assert "note: learning rate 0.003 from sweep" in lines
    known = plan_summary(make_plan(experiment(noted), CHIP, 1, {noted.data.store_path: 10**9}))
    assert not any("unknown" in line for line in known)
    many = [run(f"r{i}", seed=i, note=f"note {i}") for i in range(20)]
    assert "note: ... and 8 more (see --json)" in plan_summary(make_plan(experiment(*many), CHIP))


def test_table_has_a_row_for_each_run():
    text = shown(plan_table(make_plan(experiment(run("first"), run("second", 4)), CHIP)))
    assert "exp on 1 x chip" in text
    assert "first" in text
    assert "4,2" in text
    row = next(line for line in text.splitlines() if "second" in line)
    assert "2.56M" in row


def test_patterns_cost_less_and_are_named_where_there_are_any():
    sparse = ContextSharding(16, 1, dense_layers="every 2")
    hybrid = run("hybrid", model=ModelConfig(2, 64, 4, 2, pattern=sparse))
    plan = make_plan(experiment(run("dense"), hybrid), CHIP)
    dense, other = plan.runs
    assert (dense.pattern, other.pattern) == ("", "b16 w1 +dense every 2")
    assert other.training_flops < dense.training_flops
    assert other.hardware_flops < dense.hardware_flops
    assert other.n_exact == dense.n_exact
    text = shown(plan_table(plan))
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()}
    assert "4,2  b16 w1 +dense every 2" in rows["hybrid"]
    assert "4,2  dense " in rows["dense"]
    assert "a stripe each s" in text
    assert "attern" not in shown(plan_table(make_plan(experiment(run("dense")), CHIP)))


def test_plan_reads_the_layout():
    spread = run(parallel=ParallelConfig(fsdp=4, remat="full"))
    narrow = make_plan(experiment(run()), CHIP, 4).runs[0]
    assert make_plan(experiment(spread), CHIP, 4).runs[0].training_bytes < narrow.training_bytes


# ------------------------------------------------------------------------------------ branches


def test_steps_that_another_budget_trains_are_planned_once():
    optimizer = OptimizerConfig(warmup_tokens=2560)
    short = run("short", tokens=256_000, optimizer=optimizer)
    long = run("long", tokens=512_000, optimizer=optimizer)
    plan = make_plan(experiment(long, short), CHIP)
    b, a = plan.runs
    assert (a.first_step, b.first_step) == (0, 800)  # of 1000 and 2000 steps
    assert b.seconds == pytest.approx(60 + 1200 * 0.01 + 0.6 * b.training_flops / 5e11)
    assert b.saved_flops == 0.4 * b.training_flops
    totals = plan.to_dict()["totals"]
    assert totals["training_flops"] == a.training_flops + 0.6 * b.training_flops
    assert totals["saved_flops"] == b.saved_flops
    assert a.kept_bytes == memory.state_bytes(short)
    assert b.kept_bytes == 0
    assert plan.disk_bytes == plan.finished_bytes + a.kept_bytes + a.checkpoint_bytes
    assert "800/2,000" in shown(plan_table(plan))
    assert "1 run to begin where the decay" in "\n".join(plan_summary(plan))
    # a result alone keeps no state: that of the budget declared later has to be trained anew
    late = make_plan(experiment(long, short), CHIP, finished={short})
    assert late.runs[1].first_step == late.totals["saved_flops"] == 0
    assert late.totals["training_flops"] == b.training_flops
    kept = make_plan(experiment(long), CHIP, 1, None, {short}, {long.digest: 800})
    assert (kept.runs[0].first_step, kept.runs[0].seconds) == (800, b.seconds)
    alone = make_plan(experiment(long), CHIP)
    assert alone.runs[0].first_step == 0  # nobody else trains these steps
    assert "first step" not in shown(plan_table(alone))
