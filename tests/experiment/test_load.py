import re
from pathlib import Path

import pytest

from gqa_scaling.config import Question, UserError
from gqa_scaling.experiment.load import Experiment, folder_of, load_experiment
from gqa_scaling.files.runs import run_directory

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


def test_a_file_anywhere(workplace, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "mine.py"
    file.write_text((workplace / "experiments/tiny.py").read_text())
    assert load_experiment(str(file)).name == "mine"


def test_a_file_whose_name_holds_a_dot_has_a_folder_of_its_own(workplace):
    for name in ("one.v2", "two.v2"):
        file = workplace / f"{name}.py"
        file.write_text((workplace / "experiments/tiny.py").read_text())
        assert load_experiment(f"{name}.py").name == folder_of(f"{name}.py") == name
    (workplace / ".compiled.py").write_text(file.read_text())
    with pytest.raises(UserError, match="names no folder for its runs"):
        load_experiment(".compiled.py")


def test_an_experiment_without_question_and_docstring(workplace):
    (workplace / "bare.py").write_text(
        "from experiments.tiny import runs as all_runs\ndef runs():\n    return all_runs()[:2]\n"
    )
    bare = load_experiment("bare.py")
    assert (names(bare), bare.question) == (NAMES[:2], Question())


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
        ("experiments..tiny", "did you mean experiments.tiny?"),
    ],
)
def test_an_unknown_experiment_is_refused_with_the_nearest(workplace, spec, said):
    unknown = re.escape(f"unknown experiment {spec!r}")
    with pytest.raises(UserError, match=f"{unknown}.*{re.escape(said)}"):
        load_experiment(spec)


def test_where_there_are_no_experiments_it_says_so(workplace):
    (workplace / "experiments/tiny.py").unlink()
    with pytest.raises(
        UserError, match=r"there is no folder experiments/ in .*, where this command was given"
    ):
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
        ("L2-h2,L1-h[12],h2", None, ["L1-h1", "L1-h2", "L2-h1", "L2-h2"][:2] + ["L2-h2"]),
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
    for only in ("L3", "L2,L3"):
        with pytest.raises(UserError, match=r"--only 'L3' matches none of 6 runs \(L1-h1, "):
            load_experiment("experiments.tiny").select(only)
    with pytest.raises(UserError, match="has an empty pattern"):
        load_experiment("experiments.tiny").select("L2,")


# -------------------------------------------------------------------------- swept learning rates

SWEPT = """
from dataclasses import replace

from experiments.tiny import runs
from gqa_scaling.config import OptimizerConfig
from gqa_scaling.experiment.learning_rates import LearningRateSweep


def sweep():
    return [
        replace(run, name=f"{run.name}-lr{rate}", seed=7, optimizer=OptimizerConfig(rate))
        for run in runs()[::3]
        for rate in (1e-3, 2e-3, 4e-3)
    ]


LEARNING_RATES = LearningRateSweep("sweep", sweep)
"""


def test_an_experiment_is_trained_at_the_best_rates_of_its_sweep(workplace):
    """Only sizes that the sweep has finished; an override comes after it."""
    (workplace / "experiments/swept.py").write_text(SWEPT)
    declared = load_experiment("experiments.tiny").runs
    before = load_experiment("experiments.swept").runs
    assert [run.digest for run in before] == [run.digest for run in declared]
    assert before[0].note == "learning rate 0.001 as declared; sweep has not finished L1 d32"
    from experiments.swept import sweep

    for run, loss in zip(sweep()[:3], (3.0, 2.0, 2.5), strict=True):
        directory = run_directory("runs", "sweep", run)
        directory.begin(run, {})
        directory.finish({"evaluations": {run.evaluation_digest: {"loss": loss}}}, {})
    after = load_experiment("experiments.swept").runs
    assert [run.optimizer.learning_rate for run in after] == [2e-3] * 3 + [1e-3] * 3
    assert after[0].note == "learning rate 0.002 from sweep (3 tried)"
    assert "has not finished L2 d32" in after[3].note
    elsewhere = load_experiment("experiments.swept", root=workplace / "elsewhere").runs
    assert [run.digest for run in elsewhere] == [run.digest for run in declared]
    given = load_experiment("experiments.swept", ["--optimizer.learning-rate", "3e-4"]).runs
    assert {(run.optimizer.learning_rate, run.note) for run in given} == {(3e-4, "")}


def test_a_sweep_that_is_none_is_refused(workplace):
    text = "from experiments.tiny import runs\nLEARNING_RATES = 'sweep'\n"
    (workplace / "own.py").write_text(text)
    with pytest.raises(UserError, match="must be a LearningRateSweep, not of type str"):
        load_experiment("own.py")
