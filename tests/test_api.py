"""The Python interface: docs/notebook.py at a tiny scale, every example of docs/api.md, and that the
numbers are those of the command line."""

import doctest
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from gqa_scaling import api, cli
from gqa_scaling.config import ModelConfig, RunConfig, UserError

CHECKOUT = Path(__file__).parents[1]
sys.path.append(str(CHECKOUT / "tests/training"))
from training_kit import write_corpus  # noqa: E402

API = CHECKOUT / "docs/api.md"
TINY = {  # of the notebook, on 40 documents: two configurations, three sizes, eight steps each
    'CORPUS = "stdlib"': 'CORPUS = "corpus"',
    "DataConfig(corpus=CORPUS)": "DataConfig(corpus=CORPUS, heldout_fraction=0.2)",
    "STEPS = 600": "STEPS = 8",
    "SIZES = ((1, 32), (2, 48), (3, 72))": "SIZES = ((1, 16), (1, 32), (1, 48))",
    "HEADS = ((4, 4), (4, 1), (2, 1), (1, 1))": "HEADS = ((4, 4), (1, 1))",
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a corpus, in which pictures are drawn for no window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GQA_SCALING_RUNS", "runs")
    monkeypatch.setattr("gqa_scaling.devices.compilation_cache.keep_compiled", lambda folder: None)
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    write_corpus(tmp_path / "corpus")
    yield tmp_path
    plt.close("all")


def test_the_notebook_goes_from_declaration_to_figure(workplace, capsys):
    text = (CHECKOUT / "docs/notebook.py").read_text(encoding="utf-8")
    for default, tiny in TINY.items():
        assert text.count(default) == 1
        text = text.replace(default, tiny)
    cells = {"__name__": "__main__"}
    exec(compile(text, "notebook.py", "exec"), cells)
    said = capsys.readouterr().out
    assert "L1-d48-h4-kv4        N =  24,720" in said
    assert re.search(r"For [\d.]+ nats at\s+8,192\s+tokens,\s+take ", said)
    assert (workplace / "notebook.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(workplace.glob("runs/notebook/*/result.json"))) == 6
    right = cells["right"]
    assert [text.get_text() for text in cells["left"].get_legend().get_texts()] == [
        "(1,1)",
        "(4,4)",
    ]
    assert right.get_xlabel() == "inference memory (values)"


def test_every_example_of_the_guide_gives_what_it_says(workplace):
    tests = doctest.DocTestParser().get_doctest(
        API.read_text(encoding="utf-8"), {}, API.name, str(API), 0
    )
    assert len(tests.examples) > 30
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    runner.run(tests, out=said.append)
    assert "".join(said) == ""


def test_the_guide_names_every_function_and_no_other():
    own = {
        name
        for name, value in inspect.getmembers(api, inspect.isfunction)
        if value.__module__ == api.__name__ and not name.startswith("_")
    }
    listed = re.findall(r"^\| (`.*?`) \|", API.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {name for cell in listed for name in re.findall(r"`(\w+)\(", cell)}
    assert named == own


# ----------------------------------------------------------- the numbers of the command line


def printed(capsys, *words):
    assert cli.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_fit_an_answer_and_a_comparison_are_those_of_the_command_line(capsys):
    runs = api.read("chen2025", without=["8,4"])
    some = ("--refits", "100", "--without", "8,4")
    assert api.fit(runs, law="product", refits=100).fit.to_dict() == printed(
        capsys, "fit", "chen2025", "--law", "product", *some
    )
    asked = ("--losses", "2.7", "--contexts", "8192", "--baseline", "4,1", "--lambda", "0.5")
    how = {"losses": [2.7], "contexts": [8192], "weight": 0.5, "refits": 100}
    study = api.frontier(runs, baseline=(4, 1), candidates="measured", **how)
    frontier = printed(capsys, "frontier", "chen2025", *asked, "--candidates", "measured", *some)
    assert study.frontier.to_dict() == frontier
    two = api.compare(runs, "4,1", "8,1@L24d1536", contexts=[8192], refits=100)
    words = ("compare", "chen2025", "4,1", "8,1@L24d1536", "--context", "8192", *some)
    assert two.to_dict() == printed(capsys, *words)


def test_a_prediction_lies_on_the_curve_and_holds_the_noise_of_a_run():
    runs = api.read("chen2025")
    found = api.fit(runs, refits=100)
    one = api.predict(runs, found, "8,1@L24d1536")
    k = found.fit.index((8, 1))
    n = 8 * 24 * 1536**2 + 2 * 24 * 1536 * 64 * 9  # the published count, of this shape
    assert one.n == pytest.approx(n)
    assert one == api.predict(runs, found, "8,1", one.n)
    assert one == api.predict(runs, found, MODEL, train_context=8192, tokens=20 * one.n)
    assert one.loss == float(found.fit.curves.loss(k, one.n))
    assert one.run_interval[0] < one.curve_interval[0] < one.loss
    assert one.loss < one.curve_interval[1] < one.run_interval[1]
    assert (one.beyond, api.predict(runs, found, "8,1", 9e9).beyond) == ("", "sizes")


def test_columns_are_the_table_of_the_runs_and_a_frame_has_them():
    runs = api.read("chen2025")
    table = api.columns(runs)
    assert table["loss"].tolist() == runs.results.loss.tolist()
    assert np.isnan(table["learning_rate"]).all()
    assert list(api.frame(runs).columns) == list(table)


def test_without_pandas_a_frame_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install pandas, or take columns\(\)"):
        api.frame(api.read("chen2025"))


MODEL = "8,1@L24d1536"
RUN = RunConfig(
    name="one",
    model=ModelConfig(1, 16, 2, 1, head_dim=8, vocab_size=264),
    context_length=32,
    batch_tokens=64,
    tokens=640,
)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, f: api.declare("mine", []), "mine: an experiment needs at least one run"),
        (lambda s, f: api.read(api.declare("mine", [RUN]), ["--seed", "1"]), "change its runs"),
        (lambda s, f: api.predict(s, f, "8,1"), r"or heads with their N \(n=1e9\)"),
        (lambda s, f: api.predict(s, f, "8,1@L24d1536", 1e9), "must be a whole model such as"),
        (lambda s, f: api.predict(s, f, "8,1", 1.0), "this study speaks of"),
        (lambda s, f: api.predict(s, f, MODEL, tokens=1e12), "not the budget of the finished runs"),
        (lambda s, f: api.predict(s, f, MODEL, tokens=-5), "tokens=-5 must be a number from 1"),
        (lambda s, f: api.predict(s, f, MODEL, train_context=131072), "tokens, only 8,192"),
        (lambda s, f: api.plot(None, f, "heat_map"), "take one of losses, residuals"),
        (lambda s, f: api.load(api.declare("mine", [RUN])), "name one of the runs of mine"),
        (lambda s, f: api.load(api.declare("mine", [RUN]), "two"), "mine has no run named 'two'"),
        (lambda s, f: api.load(api.declare("mine", [RUN]), "one"), "train it with api.train"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = api.read("chen2025")
    found = api.fit(runs, refits=100)
    with pytest.raises(UserError, match=said) as refused:
        call(runs, found)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_is_said_in_one_line():
    chen = api.read("chen2025")
    quick = {"refits": 100, "losses": [2.8], "contexts": [8192]}
    for words, ask in {
        "candidates='al' must be all or measured": lambda: api.frontier(chen, candidates="al"),
        "must be heads such as": lambda: api.frontier(chen, candidates=["8"]),
        "no 'context' (did you mean contexts?)": lambda: api.frontier(chen, context=[8192]),
        "no runs at context length 4096; there are 8,192": lambda: api.frontier(
            chen, context_length=4096
        ),
        "2.7 nats at 8192 tokens was not asked for": lambda: api.frontier(
            chen, **quick
        ).frontier.at(2.7, 8192),
    }.items():
        with pytest.raises(UserError, match=re.escape(words)):
            ask()


def test_a_source_may_be_named_and_heads_be_typed():
    asked = {"refits": 100, "losses": [2.8], "contexts": [8192]}
    named = api.frontier("chen2025", candidates=["8,1", (4, 1)], **asked)
    read = api.frontier(api.read("chen2025"), candidates=[(8, 1), (4, 1)], **asked)
    assert named.frontier.to_dict() == read.frontier.to_dict()
    assert api.columns("chen2025")["loss"][0] == 3.1184
