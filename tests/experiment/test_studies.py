"""The studies that come with it: each is declared, and planned, at every scale, on no device."""

import importlib
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_scaling.costs import n_exact, training_flops
from gqa_scaling.experiment import scales
from gqa_scaling.experiment.ladder import at_size
from gqa_scaling.experiment.load import Experiment, load_experiment
from gqa_scaling.fields import UserError
from gqa_scaling.hardware import hardware
from gqa_scaling.sweep.plan import Plan, make_plan

CHECKOUT = Path(__file__).parents[2]
MODULES = [f"experiments.{path.stem}" for path in sorted((CHECKOUT / "experiments").glob("*.py"))]
AT_SCALES = ["context_invariance", "equal_training", "fixed_size", "head_ladder", "patterns"]
AT_SCALES += ["shape", "token_budgets"]
DEVICES = {"llama3_vs_optimal": 64, "pods": 256}  # that a pod's runs share


def specs() -> list[str]:
    """Every module, plain and with each of its variants."""
    variants = {name: getattr(importlib.import_module(name), "VARIANTS", ()) for name in MODULES}
    return [*MODULES, *(f"{name}@{v}" for name in MODULES for v in variants[name])]


def load(spec: str) -> Experiment:
    return load_experiment(spec, (), Path("no-runs"))


def planned(spec: str) -> Plan:
    experiment = load(spec)
    on_a_pod = any(run.model.dtype == "bfloat16" for run in experiment.runs)
    devices = DEVICES.get(spec.removeprefix("experiments."), 8) if on_a_pod else 1
    return make_plan(experiment, hardware("v5p" if on_a_pod else "cpu"), devices)


@pytest.mark.parametrize("spec", specs())
def test_every_study_is_planned_at_every_scale(spec):
    plan = planned(spec)
    assert plan.experiment == spec.removeprefix("experiments.").replace("@", "_")
    assert plan.totals["training_flops"] > 0
    if spec.endswith("@smoke"):  # minutes of a CPU
        assert plan.totals["training_flops"] < 4e12


@pytest.mark.parametrize("name", AT_SCALES)
def test_a_study_asks_the_same_at_each_scale(name):
    """Smaller scales are smaller, and have a question of their own."""
    full, laptop, smoke = (load(f"experiments.{name}{at}") for at in ("", "@laptop", "@smoke"))
    costs = [sum(map(training_flops, each.runs)) for each in (full, laptop, smoke)]
    assert costs == sorted(costs, reverse=True)
    assert not full.question.demonstration
    assert laptop.question.demonstration
    assert smoke.question.demonstration
    assert importlib.import_module(f"experiments.{name}").VARIANTS[-2:] == scales.VARIANTS


@pytest.mark.parametrize("name", ["fixed_size", "shape"])
@pytest.mark.parametrize("at", ["", "@laptop", "@smoke"])
def test_one_size_is_one_number_of_parameters(name, at):
    runs = load(f"experiments.{name}{at}").runs
    for size in scales.at(at[1:]).sizes[1:4]:
        sizes = [n_exact(run.model) for run in runs if run.name.startswith(f"{size.name}-")]
        assert max(sizes) / min(sizes) < 1.03


def test_equal_training_spends_the_same():
    runs = load("experiments.equal_training@laptop").runs
    for _, group in itertools.groupby(runs, key=lambda r: r.name.rpartition("-F")[2]):
        spent = [training_flops(run) for run in group]
        assert max(spent) / min(spent) < 1.01  # to a batch


def test_budgets_share_their_steps():
    assert planned("experiments.token_budgets").totals["saved_flops"] > 4e19


def test_a_model_that_cannot_have_this_size_is_refused():
    model = load("experiments.shape@smoke").runs[0].model
    tiny = replace(model, n_layers=1, d_model=4, n_heads=1, n_kv_heads=1)
    with pytest.raises(UserError, match=r"no model of N=.* has 2 layers"):
        at_size(tiny, replace(model, n_heads=64), multiple=4)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("experiments.smoke@laptop", "experiments.smoke has no variants: leave out @laptop"),
        ("experiments.shape@labtop", "has no variant 'labtop' (did you mean laptop?)"),
        ("experiments.shape@x", "known: laptop, smoke"),
    ],
)
def test_a_variant_that_is_not_there_is_refused(spec, said):
    with pytest.raises(UserError) as refused:
        load(spec)
    assert said in str(refused.value)


def test_the_at_of_a_folder_is_none_of_a_variant(tmp_path):
    (tmp_path / "me@home").mkdir()
    file = tmp_path / "me@home/mine.py"
    file.write_text("from experiments.smoke import runs as runs\n")
    assert load(str(file)).name == "mine"
