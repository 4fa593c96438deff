"""Experiments whose own code is wrong, and names of none."""

import json

import pytest

from gqa_scaling import cli

ONE = "from experiments.tiny import runs as tiny\nfrom gqa_scaling.config import *\n"
BODIES = {  # of runs()
    "none": ("pass", "it returned None"),
    "generator": ("yield from tiny()", "it returned of type generator"),
    "dict": ("return {'a': tiny()}", "of type dict"),
    "tuple": ("return tuple(tiny())", "of type tuple"),
    "one-run": ("return tiny()[0]", "of type RunConfig"),
    "text": ("return 'L1'", "of type str"),
    "empty": ("return []", "not empty"),
    "not-runs": ("return [tiny()[0], 3]", "one is of type int"),
    "a-none": ("return [tiny()[0], None]", "one is None"),
    "twice": ("return tiny() + tiny()", "share one name"),
    "raises": ("raise ValueError('two\\nlines')", "ValueError: two\\nlines"),
    "deep": ("return runs()", "RecursionError"),
    "file": ("return open('absent.csv')", "absent.csv"),
    "bad-run": ("return [RunConfig(3)]", "missing 3 required"),
    "bad-field": ("return [ModelConfig(True, 32, 1, 1)]", "n_layers=True"),
    "huge": ("return [ModelConfig(10**5000, 32, 1, 1)]", "n_layers=an int"),
    "huge-real": ("OptimizerConfig(10**400)", "learning_rate=10000"),
    "nan": ("OptimizerConfig(float('nan'))", "learning_rate=nan"),
    "table": ("RunConfig('a', {1: 2}, 1, 1)", "unknown field model.1"),
    "list": ("RunConfig('a', [1], 1, 1)", "not [1]"),
}
BROKEN = {
    "exit": ("import sys\nsys.exit(0)\n", "ends the program (exit code 0)"),
    "exit-1": ("raise SystemExit('enough')\n", "ends the program (exit code enough)"),
    "exit-in-runs": ("def runs():\n    import sys\n    sys.exit(0)\n", "own.py line 3"),
    "syntax": ("def runs(:\n", "SyntaxError"),
    "indent": ("def runs():\nreturn 3\n", "IndentationError"),
    "nul": ("x = 1\0\n", "source code string cannot contain null bytes"),
    "not-utf8": ("\udcff\n", "SyntaxError"),
    "import": ("import not_there\n", "No module named 'not_there' ("),
    "from-import": ("from gqa_scaling.config import Nothing\n", "cannot import name 'Nothing'"),
    "own-import": ("import own\n", "own"),
    "name": ("\nruns = nothing\n", "NameError: name 'nothing' is not defined ("),
    "arguments": ("def runs(seed):\n    return []\n", "missing 1 required positional argument"),
    "no-runs": ("x = 1\n", "it defines no runs()"),
    "runs-list": (ONE + "runs = tiny()\n", "it defines no runs()"),
    "class": ("class runs:\n    pass\n", "it returned of type runs"),
    "empty-error": ("def runs():\n    assert False\n", "own.py line 2)"),
    "numpy": (
        ONE + "import numpy\ndef runs():\n    ModelConfig(numpy.int64(4), 32, 1, 1)\n",
        "must be of type int",
    ),
    "question": (ONE + "runs = tiny\nQUESTION = {'contexts': 4}\n", "QUESTION must be a Question"),
}
BROKEN |= {kind: (f"{ONE}def runs():\n    {body}\n", said) for kind, (body, said) in BODIES.items()}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_experiments_own_code(refused, workplace, kind):
    text, said = BROKEN[kind]
    (workplace / "own.py").write_bytes(text.encode(errors="surrogateescape"))
    refused(said, "plan", "own.py", "--hardware", "v5e", "--json")


@pytest.mark.parametrize("verb", ["plan", "run", "status", "prepare", "learning-rates", "fit",
                                  "frontier", "suggest", "report", "checkpoints"])  # fmt: skip
def test_an_experiment_that_ends_the_program_ends_no_verb(refused, workplace, verb):
    (workplace / "experiments/own.py").write_text("import sys\ndef runs():\n    sys.exit(0)\n")
    refused("experiments.own ends the program (exit code 0)", verb, "experiments.own")


@pytest.mark.parametrize(
    ("said", "spec"),
    [
        ("unknown experiment ''", ""),
        ("unknown experiment '.'", "."),
        ("unknown experiment '..'", ".."),
        ("unknown experiment '/'", "/"),
        ("unknown experiment 'a b'", "a b"),
        ("unknown experiment 'tiny\\x00'", "tiny\0"),
        ("unknown experiment 'tiny\\x00.py'", "tiny\0.py"),
        ("no such file", "experiments/folder.py"),
        ("File name too long", "x" * 300 + ".py"),
        ("unknown experiment 'experiments.tiny.runs'", "experiments.tiny.runs"),
        ("unknown experiment '[/]'", "[/]"),
        ("json is no experiment", "json"),
        ("for the file here, name it types.py", "types"),
        ("rename the file", "...py"),
    ],
)
def test_names_of_experiments(refused, workplace, said, spec):
    (workplace / "experiments/folder.py").mkdir()
    for file in ("types.py", "...py"):
        (workplace / file).write_text("from experiments.tiny import runs\n")
    refused(said, "plan", spec, "--hardware", "v5e")


def test_what_an_experiment_prints_does_not_disturb_json(workplace, capsys):
    text = "print('import')\nfrom experiments.tiny import runs as tiny\n"
    text += "def runs():\n    print('runs')\n    return tiny()\n"
    (workplace / "own.py").write_text(text)
    assert cli.main(("plan", "own.py", "--hardware", "v5e", "--json")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["totals"]["runs"] == 6
    assert err == "import\nruns\n"
