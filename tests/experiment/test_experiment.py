import dataclasses
from pathlib import Path

import pytest

from gqa_scaling.config import DataConfig, ModelConfig, Question, RunConfig, UserError
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.experiment.load import (
    Experiment,
    apply_overrides,
    load_experiment,
    overrides_to,
    parse_overrides,
)

CHECKOUT = Path(__file__).parents[2]
NAMES = ["L1-h1", "L1-h2", "L1-h4", "L2-h1", "L2-h2", "L2-h4"]


def names(experiment: Experiment) -> list[str]:
    return [run.name for run in experiment.runs]


# ------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    "spec", ["experiments.tiny", "experiments/tiny.py", "./experiments/tiny.py"]
)
def test_an_experiment_is_a_module_or_a_file(workplace, spec):
    experiment = load_experiment(spec)
    assert experiment.name == "tiny"
    assert names(experiment) == NAMES
    assert experiment.question == Question(contexts=(64,))
    assert experiment.about == "What the tests ask."


def test_a_file_anywhere(workplace, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "mine.py"
    file.write_text((workplace / "experiments/tiny.py").read_text())
    assert load_experiment(str(file)).name == "mine"


def test_an_experiment_without_question_and_docstring(workplace):
    (workplace / "bare.py").write_text(
        "from experiments.tiny import runs as all_runs\ndef runs():\n    return all_runs()[:2]\n"
    )
    bare = load_experiment("bare.py")
    assert (names(bare), bare.question, bare.about) == (NAMES[:2], Question(), "")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("experiments.tinny", "(did you mean experiments.tiny?)"),
        ("experiments/tinny.py", "no such file (did you mean experiments.tiny?)"),
        ("experiments/tiny", "(did you mean experiments.tiny?)"),
        ("./experiments/tiny", "(did you mean experiments.tiny?)"),
        ("tiny", "did you mean experiments.tiny?"),
        ("zzz.zzz", "known: experiments.tiny"),
        ("", "known: experiments.tiny"),
        ("experiments..tiny", "unknown experiment"),
    ],
)
def test_an_unknown_experiment_is_refused_with_the_nearest(workplace, spec, said):
    with pytest.raises(UserError) as caught:
        load_experiment(spec)
    assert f"unknown experiment {spec!r}" in str(caught.value)
    assert said in str(caught.value)


def test_where_there_are_no_experiments_it_says_so(workplace):
    (workplace / "experiments/tiny.py").unlink()
    with pytest.raises(UserError, match="there is no folder experiments/ here"):
        load_experiment("experiments.tiny")


@pytest.mark.parametrize("spec", ["json", "experiments", "gqa_scaling"])
def test_a_module_that_is_no_experiment(workplace, spec):
    import gqa_scaling.files.runs  # noqa: F401  (then gqa_scaling has something named runs)

    with pytest.raises(UserError, match=f"{spec} is no experiment: it defines no runs"):
        load_experiment(spec)


def test_what_an_experiment_itself_cannot_import_is_said_with_its_line(workplace):
    (workplace / "experiments/broken.py").write_text("\nimport not_there_at_all\n")
    said = r"ModuleNotFoundError: .*not_there_at_all.*experiments/broken\.py line 2"
    with pytest.raises(UserError, match=said) as caught:
        load_experiment("experiments.broken")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_empty_experiment_and_twin_runs_are_refused(workplace):
    (workplace / "empty.py").write_text("def runs():\n    return []\n")
    with pytest.raises(UserError, match=r"must return a list of RunConfig, not empty"):
        load_experiment("empty.py")
    with pytest.raises(UserError, match="share one name"):
        load_experiment("experiments.tiny", ["--name", "b"])
    with pytest.raises(UserError, match="share one definition"):
        load_experiment("experiments.tiny", ["--model.n-heads", "1"])


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in (CHECKOUT / "experiments").glob("*.py") if p.stem != "__init__")
)
def test_the_experiments_shipped_here_load(workplace, monkeypatch, name):
    monkeypatch.setenv("GQA_SCALING_RUNS", str(workplace / "runs"))
    monkeypatch.chdir(CHECKOUT)
    experiment = load_experiment(f"experiments.{name}")
    assert experiment.runs
    assert experiment.about


def test_the_published_grid_is_21_heads_by_8_sizes(workplace, monkeypatch):
    monkeypatch.setenv("GQA_SCALING_RUNS", str(workplace / "runs"))
    monkeypatch.chdir(CHECKOUT)
    runs = load_experiment("experiments.head_ladder").runs
    cells = {(r.model.n_layers, r.model.d_model, r.model.n_heads, r.model.n_kv_heads) for r in runs}
    assert len(cells) == 21 * 8
    assert len({cell[:2] for cell in cells}) == 8
    assert {(r.context_length, r.batch_tokens, r.tokens_per_param) for r in runs} == {
        (8192, 2**19, 20.0)
    }


# ----------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    ("only", "shard", "chosen"),
    [
        (None, None, NAMES),
        ("L2", None, NAMES[3:]),
        ("*-h[12]", None, ["L1-h1", "L1-h2", "L2-h1", "L2-h2"]),
        ("L1-h1", None, ["L1-h1"]),
        (None, "0/4", ["L1-h1", "L2-h2"]),
        (None, "3/4", ["L2-h1"]),
        ("L2", "1/2", ["L2-h2"]),
        (None, "7/8", []),
    ],
)
def test_select(workplace, only, shard, chosen):
    assert names(load_experiment("experiments.tiny").select(only, shard)) == chosen


def test_shards_share_the_runs_out(workplace):
    experiment = load_experiment("experiments.tiny")
    shared = [name for i in range(4) for name in names(experiment.select(shard=f"{i}/4"))]
    assert sorted(shared) == NAMES


@pytest.mark.parametrize("shard", ["4/4", "x/4", "1", "1/", "-1/4", "1/0", "²/4", ""])
def test_nonsense_shards(workplace, shard):
    with pytest.raises(UserError, match=r"must be i/n with 0 <= i < n"):
        load_experiment("experiments.tiny").select(shard=shard)


def test_a_pattern_that_matches_nothing(workplace):
    with pytest.raises(UserError, match=r"--only 'L3' matches none of 6 runs \(L1-h1, "):
        load_experiment("experiments.tiny").select("L3")


# ----------------------------------------------------------------------------------- overrides


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
        ("--zzz 1", "unknown field --zzz; see --help"),
        ("--seed", "--seed needs a value"),
        ("--seed=", "--seed='' must be of type int"),
        ("--seed x", "--seed='x' must be of type int"),
        ("--seed 1.5", "--seed='1.5' must be of type int"),
        ("--tokens 1e6", "--tokens='1e6' must be of type int | None"),
        ("--data.allow-repeats perhaps", "must be of type bool"),
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
