import dataclasses

import pytest

from gqa_scaling.config import DataConfig, ModelConfig, RunConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.experiment.overrides import apply_overrides, overrides_to, parse_overrides


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ("--seed 3", {"seed": 3}),
        ("--seed=3", {"seed": 3}),
        ("--model.n-layers 4", {"model.n_layers": 4}),
        ("--model.n_layers=4", {"model.n_layers": 4}),
        ("--parallel.data -1", {"parallel.data": -1}),
        ("--optimizer.learning-rate 3e-4", {"optimizer.learning_rate": 3e-4}),
        ("--tokens-per-param 20", {"tokens_per_param": 20.0}),
        ("--evaluation.longest-context None", {"evaluation.longest_context": None}),
        ("--data.allow-repeats True", {"data.allow_repeats": True}),
        ("--data.corpus /a/texts", {"data.corpus": "/a/texts"}),
        ("--data.store None", {"data.store": None}),
        ("--parallel.remat full --seed 1", {"parallel.remat": "full", "seed": 1}),
        ("--note=", {"note": ""}),
        ("", {}),
    ],
)
def test_overrides(arguments, parsed):
    assert parse_overrides(arguments.split()) == parsed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model.n-head 4", "unknown field --model.n-head (did you mean --model.n-heads?)"),
        ("--n-layers 4", "unknown field --n-layers (did you mean --model.n-layers?)"),
        ("--lerning-rate=1", "unknown field --lerning-rate (did you mean --optimizer.learning-"),
        ("--tokns 1", "unknown field --tokns (did you mean --tokens?)"),
        ("--zzz 1", "unknown field --zzz; see --help"),
        ("--seed", "--seed needs a value"),
        ("--seed=", "--seed='' must be a whole number such as 1000000"),
        ("--seed x", "--seed='x' must be a whole number such as 1000000"),
        ("--seed 1.5", "--seed='1.5' must be a whole number such as 1000000"),
        ("--tokens 1e6", "--tokens='1e6' must be a whole number such as 1000000"),
        ("--data.allow-repeats perhaps", "must be True or False"),
        ("--model.pattern dense", "--model.pattern='dense' must be one of none"),
        ("--model.dtype fp8", "--model.dtype='fp8' must be one of bfloat16, float32"),
        ("3", "unexpected argument '3': overrides look like --seed 1"),
        ("-s 3", "unexpected argument '-s'"),
    ],
)
def test_overrides_that_are_refused(arguments, said, capsys):
    with pytest.raises(UserError) as caught:
        parse_overrides(arguments.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def run() -> RunConfig:
    data = DataConfig(tokenizer="bpe-4096")
    return RunConfig("a", ModelConfig(2, 32, 4, 2), 64, 256, tokens=2560, data=data)


def test_applied_overrides_change_their_fields_and_no_others():
    changed = apply_overrides(run(), {"model.n_layers": 4, "seed": 3, "data.store": "/fast"})
    expected = dataclasses.replace(
        run(),
        model=ModelConfig(4, 32, 4, 2),
        seed=3,
        data=DataConfig(tokenizer="bpe-4096", store="/fast"),
    )
    assert changed == expected
    assert apply_overrides(run(), {}) == run()


def test_one_token_budget_clears_the_other():
    per_parameter = apply_overrides(run(), {"tokens_per_param": 20.0})
    assert (per_parameter.tokens, per_parameter.tokens_per_param) == (None, 20.0)
    back = apply_overrides(per_parameter, {"tokens": 2560})
    assert back == run()
    with pytest.raises(UserError, match="exactly one"):
        apply_overrides(run(), {"tokens": 2560, "tokens_per_param": 20.0})


def test_overrides_to_one_run_leave_one_run(workplace):
    grid = load_experiment("experiments.tiny").runs
    target = dataclasses.replace(
        grid[0],
        name="built",
        model=dataclasses.replace(grid[0].model, d_model=48, n_heads=4, n_kv_heads=2),
        tokens=None,
        tokens_per_param=12.5,
        optimizer=dataclasses.replace(grid[0].optimizer, learning_rate=1.7e-05),
        note="learning rate 1.7e-05 of 'L1-h1'",
    )
    arguments = overrides_to(grid, target)
    assert {"--model.d-model", "--name", "--tokens-per-param"} <= set(arguments)
    assert not {"--tokens", "--seed", "--context-length"} & set(arguments)
    assert [apply_overrides(run, parse_overrides(arguments)) for run in grid] == [target] * 6
    assert load_experiment("experiments.tiny", arguments).runs == (target,)
    assert overrides_to([target], target) == []


def test_overrides_to_and_from_a_pattern(workplace):
    grid = load_experiment("experiments.tiny").runs
    dense = grid[0]
    sharded = dataclasses.replace(
        dense,
        model=dataclasses.replace(
            dense.model,
            n_layers=2,
            pattern=ContextSharding(16, 2, stride=4, dense_layers="every 2"),
        ),
    )
    for start, target in ((dense, sharded), (sharded, dense)):
        arguments = overrides_to([start], target)
        assert apply_overrides(start, parse_overrides(arguments)) == target
    assert arguments[-2:] == ["--model.pattern", "none"]
    window = parse_overrides(["--model.pattern.stride", "none", "--model.pattern.local", "3"])
    assert apply_overrides(sharded, window).model.pattern.stride is None
    with pytest.raises(UserError, match="L1-h1 is dense: a pattern needs"):
        apply_overrides(dense, parse_overrides(["--model.pattern.block", "16"]))
    with pytest.raises(UserError, match="dense_layers='9' names layer 9"):
        apply_overrides(sharded, parse_overrides(["--model.pattern.dense-layers", "9"]))


def test_an_override_that_does_not_fit_the_run_is_refused():
    with pytest.raises(UserError, match="n_kv_heads=3 must divide n_heads=4"):
        apply_overrides(run(), {"model.n_kv_heads": 3})


def test_an_override_of_how_it_runs_keeps_every_digest(workplace):
    plain = load_experiment("experiments.tiny")
    spread = load_experiment("experiments.tiny", ["--parallel.remat", "full"])
    assert [r.digest for r in spread.runs] == [r.digest for r in plain.runs]
    assert {r.parallel.remat for r in spread.runs} == {"full"}
