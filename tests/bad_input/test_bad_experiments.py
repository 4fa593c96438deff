"""Experiments whose own code is wrong, and names of none."""

import json

import pytest

from gqa_scaling import cli

ONE = "from experiments.tiny import runs as tiny\nfrom gqa_scaling.config import *\n"
BROKEN = {
    "exit": ("import sys\nsys.exit(0)\n", "ends the program (exit code 0)"),
    "exit-1": ("raise SystemExit('enough')\n", "ends the program (exit code enough)"),
    "exit-in-runs": ("def runs():\n    import sys\n    sys.exit(0)\n", "own.py line 3"),
    "none": ("def runs():\n    pass\n", "it returned None"),
    "generator": (ONE + "def runs():\n    yield from tiny()\n", "it returned of type generator"),
    "dict": (ONE + "def runs():\n    return {'a': tiny()}\n", "of type dict"),
    "tuple": (ONE + "def runs():\n    return tuple(tiny())\n", "of type tuple"),
    "one-run": (ONE + "def runs():\n    return tiny()[0]\n", "of type RunConfig"),
    "text": ("def runs():\n    return 'L1'\n", "of type str"),
    "empty": ("def runs():\n    return []\n", "not empty"),
    "not-runs": (ONE + "def runs():\n    return [tiny()[0], 3]\n", "one is of type int"),
    "a-none": (ONE + "def runs():\n    return [tiny()[0], None]\n", "one is None"),
    "twice": (ONE + "def runs():\n    return tiny() + tiny()\n", "share one name"),
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
    "raises": ("def runs():\n    raise ValueError('two\\nlines')\n", "ValueError: two\\nlines"),
    "empty-error": ("def runs():\n    assert False\n", "own.py line 2)"),
    "deep": ("def runs():\n    return runs()\n", "RecursionError"),
    "file": ("def runs():\n    return open('absent.csv')\n", "absent.csv"),
    "bad-run": (ONE + "def runs():\n    return [RunConfig(3)]\n", "missing 3 required"),
    "bad-field": (ONE + "def runs():\n    return [ModelConfig(True, 32, 1, 1)]\n", "n_layers=True"),
    "huge": (
        ONE + "def runs():\n    return [ModelConfig(10**5000, 32, 1, 1)]\n",
        "n_layers=an int",
    ),
    "huge-real": (ONE + "def runs():\n    OptimizerConfig(10**400)\n", "learning_rate=10000"),
    "nan": (ONE + "def runs():\n    OptimizerConfig(float('nan'))\n", "learning_rate=nan"),
    "table": (ONE + "def runs():\n    RunConfig('a', {1: 2}, 1, 1)\n", "unknown field model.1"),
    "list": (ONE + "def runs():\n    RunConfig('a', [1], 1, 1)\n", "not [1]"),
    "numpy": (
        ONE + "import numpy\ndef runs():\n    ModelConfig(numpy.int64(4), 32, 1, 1)\n",
        "must be of type int",
    ),
    "question": (ONE + "runs = tiny\nQUESTION = {'contexts': 4}\n", "QUESTION must be a Question"),
}


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
