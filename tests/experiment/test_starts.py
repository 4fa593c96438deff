"""Runs that start from another: the order of a grid, links that survive overrides, what may differ."""

import dataclasses
import textwrap

import pytest

from gqa_scaling.config import DataConfig, RunConfig, UserError
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.experiment.starts import check_start, parent_of, parents_first, start_of
from gqa_scaling.files.runs import run_directory

LONG = """
from dataclasses import replace
from experiments import tiny
from gqa_scaling.experiment.starts import start_of

def runs():
    first = tiny.runs()[0]
    second = replace(first, name="second", tokens=640, start_from=start_of(first, "long"))
    third = replace(second, name="third", tokens=256, start_from=start_of(second, "long"))
    return [third, second, first]
"""


@pytest.fixture
def long(workplace):
    (workplace / "experiments/long.py").write_text(textwrap.dedent(LONG))
    return workplace


def test_no_run_comes_before_the_one_it_starts_from(long):
    assert [run.name for run in load_experiment("experiments.long").runs] == [
        "L1-h1",
        "second",
        "third",
    ]


def test_runs_without_a_start_keep_their_order(workplace):
    runs = load_experiment("experiments.tiny").runs
    assert parents_first(runs) == list(runs)


@pytest.mark.parametrize("overrides", [[], ["--seed", "3"], ["--model.d-model", "48"]])
def test_overrides_change_a_parent_and_its_children_follow(long, overrides):
    first, second, third = load_experiment("experiments.long", overrides).runs
    assert (parent_of(second, [first]), parent_of(third, [second])) == (first, second)
    assert second.start_from == start_of(first, "long")
    plain = load_experiment("experiments.long").runs
    assert (plain[2].digest == third.digest) == (not overrides)


def test_a_start_is_named_by_the_run_alone(workplace):
    plain = load_experiment("experiments.tiny").runs
    change = ["--start-from", "tiny/L1-h2", "--tokens", "256"]
    for run in load_experiment("experiments.tiny", change).runs:
        assert run.start_from == start_of(plain[1], "tiny")
    elsewhere = run_directory("runs", "older", plain[3])
    elsewhere.path.mkdir(parents=True)
    change[1] = f"older/{plain[3].name}"
    found = {run.start_from for run in load_experiment("experiments.tiny", change).runs}
    assert found == {start_of(plain[3], "older")}


@pytest.mark.parametrize("start", ["older/x", "older", "/", "older/", "a/b/0123456789ab", ""])
def test_a_start_that_names_no_run_is_refused(workplace, start):
    with pytest.raises(UserError, match=r"start_from=.* must be EXPERIMENT/NAME-DIGEST"):
        load_experiment("experiments.tiny", ["--start-from", start])


def test_of_several_runs_of_one_name_the_digest_is_asked_for(workplace):
    for digest in ("0123456789ab", "ab0123456789"):
        (workplace / f"runs/older/L1-h1-{digest}").mkdir(parents=True)
    with pytest.raises(UserError, match="may be L1-h1-0123456789ab or L1-h1-ab0123456789"):
        load_experiment("experiments.tiny", ["--start-from", "older/L1-h1"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_model": 48}, r"another architecture \(model.d_model: 32 -> 48\)"),
        ({"n_heads": 4, "tie_embeddings": False}, "n_heads: 1 -> 4, model.tie_embeddings"),
        ({"qk_norm": True}, "qk_norm: False -> True"),
    ],
)
def test_another_architecture_is_refused(workplace, change, said):
    parent = load_experiment("experiments.tiny").runs[0]
    child = dataclasses.replace(parent, model=dataclasses.replace(parent.model, **change))
    with pytest.raises(UserError, match=said):
        check_start(child, parent)


def test_context_theta_rate_and_text_may_differ(workplace):
    parent = load_experiment("experiments.tiny").runs[0]
    model = dataclasses.replace(parent.model, rope_theta=1e4, dtype="float32")
    rate = dataclasses.replace(parent.optimizer, learning_rate=1e-5)
    check_start(
        dataclasses.replace(
            parent, model=model, context_length=128, optimizer=rate, data=DataConfig("other")
        ),
        parent,
    )


def test_another_tokenizer_is_refused_also_where_it_has_the_same_name(workplace):
    parent = load_experiment("experiments.tiny").runs[0]

    def reads(run: RunConfig, **data: str) -> RunConfig:
        return dataclasses.replace(run, data=DataConfig(**data))

    with pytest.raises(UserError, match=r"other tokens \(bytes -> bpe-4096 of stdlib\)"):
        check_start(reads(parent, tokenizer="bpe-4096"), parent)
    bpe = reads(parent, tokenizer="bpe-4096")
    with pytest.raises(UserError, match=r"\(bpe-4096 of stdlib -> bpe-4096 of texts\)"):
        check_start(reads(parent, tokenizer="bpe-4096", corpus="texts"), bpe)
    check_start(reads(parent, tokenizer="bpe-4096", corpus="/there/stdlib"), bpe)
