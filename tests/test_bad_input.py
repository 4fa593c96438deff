"""What people and disks get wrong, kind by kind: one line that names it, exit code 2, nothing changed.

Every case runs a verb in an empty working directory with a small experiment, and compares every file
there before and after.
"""

import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from gqa_scaling import cli
from gqa_scaling.config import DataConfig, UserError
from gqa_scaling.costs import n_exact
from gqa_scaling.data import prepare
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files.checksums import COMMIT_NOTES, SEAL_NAME, seal
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.sweep import display
from gqa_scaling.sweep.status import read_status
from launch import cli as launch

TINY = "experiments.tiny"
PLAN = ("plan", TINY, "--hardware", "v5e")
HUGE, LONG = str(10**30), "9" * 5000


def files(folder: Path) -> dict[str, str]:
    """What lies below a folder: the hash of each file, the target of each link."""
    out = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "__pycache__" in name:
            continue
        kind = "link " + os.readlink(path) if path.is_symlink() else "folder"
        plain = path.is_file() and not path.is_symlink()
        out[name] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else kind
    return out


@pytest.fixture
def refused(workplace, capsys, monkeypatch):
    """refused(said, *arguments): the command ends so, in one line that says that, and changes nothing."""
    monkeypatch.setattr("gqa_scaling.devices.processes.join", lambda alone: None)
    monkeypatch.setenv("GQA_SCALING_CACHE", str(workplace / "cache"))

    def check(said: str, *arguments: str, code: int = 2, main: Callable = cli.main) -> str:
        before = files(workplace)
        found = main(arguments)
        out, err = capsys.readouterr()
        assert (found, out if code == 2 else "") == (code, ""), err
        assert said in err
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert files(workplace) == before
        return err

    return check


# --------------------------------------------------------------------------- fields of a run

WHOLE = [
    "model.n-layers",
    "model.d-model",
    "model.n-heads",
    "model.n-kv-heads",
    "model.head-dim",
    "model.d-ff",
    "model.vocab-size",
    "context-length",
    "batch-tokens",
    "tokens",
    "seed",
    "parallel.data",
    "parallel.fsdp",
    "parallel.context",
    "parallel.tensor",
    "parallel.accumulation",
    "evaluation.tokens",
    "evaluation.longest-context",
    "evaluation.every-steps",
    "checkpoint.every-steps",
    "checkpoint.keep",
    "max-nonfinite-steps",
]
REAL = [
    "model.rope-theta",
    "model.norm-eps",
    "optimizer.learning-rate",
    "optimizer.warmup",
    "optimizer.decay",
    "optimizer.final-fraction",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.epsilon",
    "optimizer.weight-decay",
    "optimizer.clip-norm",
    "optimizer.spike-factor",
    "tokens-per-param",
    "data.heldout-fraction",
]


@pytest.mark.parametrize("value", [HUGE, "-" + HUGE, LONG, "-2", "nan", "1e3", "True"])
@pytest.mark.parametrize("field", WHOLE)
def test_whole_numbers(refused, field, value):
    err = refused("", *PLAN, f"--{field}={value}")
    assert field.rpartition(".")[2].replace("-", "_") in err.replace("-", "_")
    assert value in (LONG, HUGE, "-" + HUGE) or value in err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300", "-1e-3", LONG, "x"])
@pytest.mark.parametrize("field", REAL)
def test_real_numbers(refused, field, value):
    err = refused("", *PLAN, f"--{field}={value}")
    assert field.rpartition(".")[2].replace("-", "_") in err.replace("-", "_")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("n_layers=10001 must be at most 10,000", "--model.n-layers 10001"),
        ("n_heads=20000 must be at most 10,000", "--model.n-heads 20000"),
        ("d_model=2147483648 must be at most 2,147,483,647", "--model.d-model 2147483648"),
        ("seed=2147483648 must be at most 2,147,483,647", "--seed 2147483648"),
        ("seed=1099511627776", "--seed 1099511627776"),
        ("seed=-1 must not be negative", "--seed -1"),
        ("learning_rate=0.0 must be greater than 0", "--optimizer.learning-rate 0"),
        ("learning_rate=1e-300 must be at least 1.2e-38", "--optimizer.learning-rate 1e-300"),
        ("epsilon=1e-50 must be at least", "--optimizer.epsilon 1e-50"),
        ("at most 2,147,483,647 can be counted", "--tokens 999999999999999999"),
        ("at most 2,147,483,647 can be counted", "--tokens-per-param 1e30"),
        ("head_dim=7 must be even", "--model.head-dim 7"),
        ("dtype='fp8' must be one of", "--model.dtype fp8"),
        ("remat='all' must be one of", "--parallel.remat all"),
        ("attention='flash' must be one of", "--parallel.attention flash"),
        ("schedule='linear' must be one of", "--optimizer.schedule linear"),
        ("profile='1:99999999999999999999'", "--profile 1:99999999999999999999"),
        (f"profile='1:{LONG}'", f"--profile 1:{LONG}"),
        ("profile='5:3'", "--profile 5:3"),
        ("corpus must name a corpus", "--data.corpus="),
        ("a pattern needs", "--model.pattern.block 4"),
        (
            "block=2147483648 must be an integer",
            "--model.pattern.block 2147483648 --model.pattern.local 1",
        ),
        (f"block={HUGE}", f"--model.pattern.block {HUGE} --model.pattern.local 1"),
        ("stride=0 must be an integer", "--model.pattern.block 4 --model.pattern.local 1 "
         "--model.pattern.stride 0"),
        (
            "dense_layers='every 99999999999999'",
            "--model.pattern.block 4 --model.pattern.local 1 "
            "--model.pattern.dense-layers=every_99999999999999",
        ),
        (
            "a pattern may have at most 65,536 KV heads in all layers",
            "--model.pattern.block 4 --model.pattern.local 1 --model.n-layers 9999 --model.n-heads 8 "
            "--model.n-kv-heads 8",
        ),
        ("tokenizer='bpe-99999999999' must be bpe-N", "--data.tokenizer bpe-99999999999"),
        ("tokenizer='bpe-1000000000' must be bpe-N", "--data.tokenizer bpe-1000000000"),
        ("<= 4,194,304", "--data.tokenizer bpe-4194305"),
        ("tokenizer='bpe-0' must be bpe-N", "--data.tokenizer bpe-0"),
        ("tokenizer='bpe--1' must be bpe-N", "--data.tokenizer bpe--1"),
        ("tokenizer='bpe-1e9' must be bpe-N", "--data.tokenizer bpe-1e9"),
        ("tokenizer='bpe-' must be bpe-N", "--data.tokenizer bpe-"),
        ("must be bpe-N", "--data.tokenizer bpe-٣٠٠"),
        ("must be bpe-N", f"--data.tokenizer bpe-{LONG}"),
        ("tokenizer='gpt2' must be bytes", "--data.tokenizer gpt2"),
        ("tokenizer='' must be bytes", "--data.tokenizer="),
        ("note='a\\x00b' must not hold a NUL", "--note a\0b"),
        ("corpus='a\\x00b' must not hold a NUL", "--data.corpus a\0b"),
        ("store='a\\x00b' must not hold a NUL", "--data.store a\0b"),
        ("unknown field --foo\\nbar", "--foo\nbar 1"),
        ("unexpected argument '\\x1b[31m'", "\x1b[31m"),
    ],
)  # fmt: skip
def test_fields(refused, said, arguments):
    refused(said, *PLAN, *(part.replace("_9", " 9") for part in arguments.split(" ")))


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("has 300 bytes and may have at most 242", "n" * 300),
        ("has 243 bytes", "n" * 243),
        ("has 244 bytes", "ñ" * 122),
        ("name must not be empty", ""),
        ("name='../x'", "../x"),
        ("name='a/b'", "a/b"),
        ("name='..'", ".."),
        ("name='-x'", "-x"),
        ("name='a b'", "a b"),
        ("name='a\\nb'", "a\nb"),
        ("name='run[seed1]'", "run[seed1]"),
        ("name='[/]'", "[/]"),
        ("name='a*'", "a*"),
        ("name='~'", "~"),
        ("must not hold a NUL", "a\0"),
        ("name='\\udcff'", "\udcff"),
        ("name='\\u202e'", "\u202e"),
        ("name=':smile:'", ":smile:"),
    ],
)
def test_names(refused, said, name):
    refused(said, *PLAN, f"--name={name}", "--only", "L1-h1")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("unknown verb 'plna' (did you mean plan?)", "plna experiments.tiny"),
        ("--shard '1' must be i/n", "--shard 1"),
        ("--shard '-1/2' must be i/n", "--shard=-1/2"),
        ("--shard '2/2' must be i/n", "--shard 2/2"),
        (f"--shard '0/{LONG}' must be i/n", f"--shard 0/{LONG}"),
        ("--only '' matches", "--only [!x"),
        ("devices=0", "--hardware v5e --devices 0"),
        ("devices=-3", "--hardware v5e --devices -3"),
        ("invalid int value: 'nan'", "--hardware v5e --devices nan"),
        (HUGE, f"--hardware v5e --devices {HUGE}"),
        ("--mfu: nan must be a finite number", "--hardware v5e --mfu nan"),
        ("--mfu: inf must be a finite number", "--hardware v5e --mfu inf"),
        ("mfu=0.0", "--hardware v5e --mfu 0"),
        ("--price: nan must be a finite number", "--hardware v5e --price nan"),
        ("--price: inf must be a finite number", "--hardware v5e --price inf"),
        ("price=-1.0", "--hardware v5e --price -1"),
        ("unknown hardware ''", "--hardware="),
        ("unknown hardware '[red]'", "--hardware [red]"),
        ("topology '' must be", "--compile="),
        ("no v5e slice is 0x0", "--compile v5e:0x0"),
        ("v5e:99999999999x4", "--compile v5e:99999999999x4"),
        (f"v5e:{LONG}x4", f"--compile v5e:{LONG}x4"),
        ("0xv5e:2x2", "--compile 0xv5e:2x2"),
    ],
)
def test_arguments_of_plan(refused, said, arguments):
    verb = () if arguments.startswith("plna") else ("plan", TINY)
    refused("" if said.startswith("--only") else said, *verb, *arguments.split(" "))


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("--workers 0 must be", "run experiments.tiny --workers 0"),
        ("--workers -1 must be", "run experiments.tiny --workers -1"),
        ("invalid int value: 'two'", "run experiments.tiny --workers two"),
        ("--workers 0 must be", "prepare experiments.tiny --workers 0"),
        ("--workers -2 must be", "prepare experiments.tiny --workers -2"),
        ("invalid int value: '1.5'", "prepare experiments.tiny --workers 1.5"),
        ("--watch is for people", "status experiments.tiny --watch --json"),
        ("--watch needs a terminal", "status experiments.tiny --watch"),
        ("unexpected argument 'extra'", "learning-rates experiments.tiny extra"),
        ("unknown experiment 'experiments.tinny'", "checkpoints experiments.tinny"),
        ("unknown experiment 'experiments'", "checkpoints experiments/none"),
        ("neither a run nor a folder of runs", "checkpoints experiments"),
        ("experiments is a directory: --only", "checkpoints experiments --only x"),
        ("experiments is a directory: --only", "checkpoints experiments --seed 1"),
        ("unknown experiment 'x\\ny'", "status x\ny"),
    ],
)
def test_arguments_of_other_verbs(refused, said, arguments):
    refused("" if "none" in arguments else said, *arguments.split(" "))


# ------------------------------------------------------------------------ an experiment's own code

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


# -------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("verb", ["plan", "status", "checkpoints", "learning-rates", "run"])
@pytest.mark.parametrize("root", ["", "a-file", "a-file/runs", "link", "loop", "n" * 300, "a\0b"])
def test_roots(refused, workplace, verb, root):
    (workplace / "a-file").write_text("x")
    (workplace / "link").symlink_to("nowhere")
    (workplace / "loop").symlink_to("loop")
    refused(repr(root)[1:-1], verb, TINY, "--root", root)


@pytest.mark.parametrize("verb", ["plan", "status", "fit"])
@pytest.mark.parametrize("root", ["http://x", "gs://", "s3:///"])
def test_roots_elsewhere(refused, verb, root):
    refused(root, verb, TINY, "--root", root)


def test_a_store_under_a_file_and_a_page_under_a_file(refused, workplace):
    (workplace / "a-file").write_text("x")
    (workplace / "texts").mkdir()
    for i in range(40):
        (workplace / f"texts/{i}.txt").write_text(f"text {i}")
    own = ("--data.corpus", "texts", "--data.store", "a-file/store")
    refused("a-file/store", "prepare", TINY, *own)
    refused("a-file is no folder", "report", "chen2025", "--output", "a-file/page/report.html")


@pytest.mark.parametrize("root", ["/proc/x", "/dev/null/runs", "/dev/null"])
def test_roots_that_cannot_be_made(refused, workplace, capsys, root):
    """Training is refused before it begins, with its tokens prepared."""
    corpus(workplace)
    assert cli.main(("prepare", TINY, *TEXTS)) == 0
    capsys.readouterr()
    small = ("--evaluation.tokens", "32", "--data.allow-repeats", "True", "--quiet")
    refused(root, "run", TINY, *TEXTS, *small, "--root", root)


# ------------------------------------------------------------------------- tokenizers and corpora

TEXTS = ("--data.corpus", "texts")


def corpus(workplace: Path, documents: int = 40) -> Path:
    folder = workplace / "texts"
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i}.txt").write_text(f"document {i} " * 30)
    return folder


def _one_document(texts: Path) -> None:
    (texts / "1.txt").write_text("alone")


def _binary(texts: Path) -> None:
    (texts / "1.bin").write_bytes(b"\xff\xfe\x00" * 100)


def _loop(texts: Path) -> None:
    (texts / "loop").symlink_to("loop")
    (texts / "up").symlink_to("..")


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda texts: (texts / name).write_bytes(content) and None


LINES = "\n".join(json.dumps({"text": f"line {i}"}) for i in range(60)).encode()
CORPORA: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda texts: None, "corpus='texts' holds no files"),
    "hidden": (_file(".hidden", b"x"), "corpus='texts' holds no files"),
    "one-document": (_one_document, "split is empty: none of the 1 documents"),
    "empty-files": (_file("1.txt", b""), "none of the 0 documents"),
    "binary": (_binary, "none of the 0 documents"),
    "loops": (_loop, "corpus='texts' holds no files"),
    "bad-json": (_file("a.jsonl", LINES + b"\n{"), "line 61 of texts/a.jsonl is not valid JSON"),
    "json-list": (_file("a.jsonl", b"[1]\n"), "line 1 of texts/a.jsonl must be a JSON object"),
    "no-field": (_file("a.jsonl", b'{"body": "x"}\n'), "has no field 'text', only body"),
    "number": (_file("a.jsonl", b'{"text": 3}\n'), "text=3 in line 1"),
    "null": (_file("a.jsonl", b'{"text": null}\n'), "text=None in line 1"),
    "surrogate": (_file("a.jsonl", b'{"text": "\\ud800"}\n'), "half of a surrogate pair"),
    "deep": (_file("a.jsonl", b"[" * 100_000), "line 1 of texts/a.jsonl is not valid JSON"),
    "long-number": (_file("a.jsonl", b'{"text": ' + b"9" * 5000), "line 1 of texts/a.jsonl is"),
    "not-utf8": (_file("a.jsonl", b'{"text": "\xff"}\n'), "line 1 of texts/a.jsonl is not valid"),
    "no-gzip": (_file("a.jsonl.gz", b"plain"), "texts/a.jsonl.gz is damaged"),
    "cut-gzip": (_file("a.jsonl.gz", b"\x1f\x8b\x08\0"), "texts/a.jsonl.gz is damaged"),
    "no-zst": (_file("a.jsonl.zst", b"plain"), "texts/a.jsonl.zst is damaged"),
    "no-parquet": (_file("a.parquet", b"plain"), "texts/a.parquet is damaged"),
    "empty-parquet": (_file("a.parquet", b""), "texts/a.parquet is damaged"),
    "folder-as-records": (lambda texts: (texts / "a.jsonl").mkdir(), "holds no files"),
}


@pytest.mark.parametrize("kind", CORPORA)
def test_corpora(refused, workplace, kind):
    make, said = CORPORA[kind]
    make(corpus(workplace, documents=0))
    store = "data/made"  # its folder stays: making it is no damage
    (workplace / "data").mkdir()
    refused(said, "prepare", TINY, *TEXTS, "--data.store", store)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("corpus='absent' does not exist", "absent"),
        ("corpus='texts/1.txt' must end in one of", "texts/1.txt"),
        ("corpus='pipe.jsonl' must end in one of", "pipe.jsonl"),
        ("corpus='loop' does not exist", "loop"),
        ("names no home folder", "~nobody-of-that-name/texts"),
        ("File name too long", "n" * 300),
        ("must lie on this machine", "s3://bucket/texts"),
        ("must lie on this machine", "https://example.org/texts"),
    ],
)
def test_names_of_corpora(refused, workplace, said, name):
    corpus(workplace)
    os.mkfifo(workplace / "pipe.jsonl")
    (workplace / "loop").symlink_to("loop")
    refused(said, "prepare", TINY, "--data.corpus", name)


WORDS = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TOKENIZERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "`tokenizers` reads"),
    "text": (b"hello", "`tokenizers` reads"),
    "list": (b"[]", "`tokenizers` reads"),
    "null": (b"null", "`tokenizers` reads"),
    "table": (b"{}", "`tokenizers` reads"),
    "deep": (b"[" * 100_000, "`tokenizers` reads"),
    "binary": (b"\xff\xfe\0", "tokenizer='own.json' must be a tokenizer.json"),
    "model": (b'{"version": "1.0", "model": {"type": "Nothing"}}', "`tokenizers` reads"),
    "no-eos": (json.dumps(WORDS).encode(), "has no end-of-text token"),
    "negative": (json.dumps(WORDS).replace("0}", "-1}").encode(), "`tokenizers` reads"),
    "huge-id": (json.dumps(WORDS).replace("0}", HUGE + "}").encode(), "`tokenizers` reads"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(refused, workplace, kind):
    content, said = TOKENIZERS[kind]
    corpus(workplace)
    (workplace / "data").mkdir()
    (workplace / "own.json").write_bytes(content)
    refused(said, "prepare", TINY, *TEXTS, "--data.tokenizer", "own.json")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("cannot read tokenizer='absent.json'", "absent.json"),
        ("cannot read tokenizer='folder.json'", "folder.json"),
        ("cannot read tokenizer='pipe.json'", "pipe.json"),
        ("cannot read tokenizer='loop.json'", "loop.json"),
        ("names no home folder", "~nobody-of-that-name/t.json"),
        ("File name too long", "n" * 300 + ".json"),
        ("needs 4000000 tokens but", "bpe-4000000"),
    ],
)
def test_names_of_tokenizers(refused, workplace, said, name):
    texts = workplace / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text("ab" * (i + 1))
    (workplace / "data").mkdir()
    (workplace / "folder.json").mkdir()
    os.mkfifo(workplace / "pipe.json")
    (workplace / "loop.json").symlink_to("loop.json")
    refused(said, "prepare", TINY, *TEXTS, "--data.tokenizer", name)


@pytest.mark.parametrize(
    ("said", "store"),
    [
        ("texts is in the way", "texts"),
        ("a-file is in the way", "a-file"),
        ("a-file/x", "a-file/x"),
        ("File name too long", "data/" + "n" * 300),
        ("/proc/x", "/proc/x/y"),
        ("is in the way", "."),
        ("is in the way", ".."),
        ("is in the way", "/"),
        ("must be a path of this machine", "http://x/y"),
    ],
)
def test_places_of_stores(refused, workplace, said, store):
    corpus(workplace)
    (workplace / "data").mkdir()
    (workplace / "a-file").write_text("x")
    refused(said, "prepare", TINY, *TEXTS, "--data.store", store)


# ---------------------------------------------------------------------- damaged files of a run


def finished(workplace: Path) -> list[RunDirectory]:
    """The six runs of experiments.tiny, whose first two are finished; the third has failed."""
    runs = load_experiment(TINY).runs
    places = [run_directory("runs", "tiny", run) for run in runs]
    for number, (run, place) in enumerate(zip(runs[:3], places[:3], strict=True)):
        place.begin(run, {"store_hash": "s"})
        began = {"began": 1.8e9, "first_step": 0, "layout": {"device": "cpu"}}
        place.add_attempt(began)
        line = {"step": 5, "time": 1.8e9, "learning/loss": 3.0, "perf/step_time_seconds": 0.1}
        place.metrics_file.write_text("".join(json.dumps(line) + "\n" for _ in range(3)))
        if number == 2:
            place.fail("Traceback\nValueError: no\n", "ValueError")
            continue
        result = {"n_exact": n_exact(run.model), "tokens": 1280, "data": {"store_hash": "s"}}
        judged = {run.evaluation_digest: {"loss": 2.5 + number / 10, "hash": "e"}}
        place.finish(result | {"evaluations": judged}, {"finished": 1.8e9})
    return places


def shape(**changes: object) -> Callable[[bytes], bytes]:
    """The same JSON with fields at the top replaced; those made ... are left out."""

    def change(content: bytes) -> bytes:
        whole = json.loads(content) | changes
        return json.dumps({k: v for k, v in whole.items() if v is not ...}).encode()

    return change


def inner(**changes: object) -> Callable[[bytes], bytes]:
    """The same in a result's own table."""
    return lambda content: shape(result=json.loads(shape(**changes)(_result(content))))(content)


def _result(content: bytes) -> bytes:
    return json.dumps(json.loads(content)["result"]).encode()


def judged(value: object) -> Callable[[bytes], bytes]:
    """The same with every evaluation replaced."""

    def change(content: bytes) -> bytes:
        evaluations = json.loads(content)["result"]["evaluations"]
        return inner(evaluations=dict.fromkeys(evaluations, value))(content)

    return change


ANY: dict[str, Callable[[bytes], bytes]] = {
    "list": lambda content: b"[]",
    "null": lambda content: b"null",
    "number": lambda content: b"3",
    "text": lambda content: b'"x"',
    "table": lambda content: b"{}",
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "cut": lambda content: content[: len(content) // 2],
    "not-utf8": lambda content: b'{"a": "\xff"}',
    "utf16": lambda content: content.decode().encode("utf-16"),
    "deep": lambda content: b"[" * 100_000,
    "long-number": lambda content: b'{"a": ' + b"9" * 5000 + b"}",
    "twice": lambda content: content + content,
}
RESULTS = ANY | {
    "result-list": shape(result=[]),
    "result-absent": shape(result=...),
    "timing-list": shape(timing=[1]),
    "attempts-table": shape(attempts={"a": 1}),
    "attempts-numbers": shape(attempts=[1]),
    "evaluations-absent": inner(evaluations=...),
    "evaluations-list": inner(evaluations=[1]),
    "data-text": inner(data="x"),
    "evaluation-number": judged(2.5),
    "loss-absent": judged({"hash": "e"}),
    "loss-text": judged({"loss": "2.5"}),
    "loss-true": judged({"loss": True}),
    "loss-null": judged({"loss": None}),
    "loss-list": judged({"loss": [2.5]}),
    "loss-huge": judged({"loss": 10**400}),
    "loss-nan": judged({"loss": float("nan")}),
    "loss-infinite": judged({"loss": float("inf")}),
    "positions-number": judged({"loss": 2.5, "loss_by_position": 3}),
    "hash-list": judged({"loss": 2.5, "hash": []}),
}


VERBS = ("frontier", "report", "suggest", "run", "learning-rates")


@pytest.mark.parametrize(
    ("verb", "kind"),
    [(verb, kind) for verb in ("status", "fit") for kind in RESULTS]
    + [(verb, kind) for verb in VERBS for kind in ("cut", "result-list", "loss-text")],
)
def test_damaged_results(refused, workplace, verb, kind):
    place = finished(workplace)[0]
    place.result_file.write_bytes(RESULTS[kind](place.result_file.read_bytes()))
    err = refused(
        f"{place.result_file} is damaged (", verb, TINY, code=1 if verb == "status" else 2
    )
    assert f"remove it, and the run makes it anew from {place.parameters}" in err


def test_status_goes_on_where_a_file_is_damaged(workplace, capsys):
    done, _, failed, *_, last = finished(workplace)
    done.result_file.write_text("[]")
    failed.failure_file.write_text("[]")
    last.claim_file.mkdir(parents=True)
    assert cli.main(("status", TINY, "--json")) == 1
    out, err = capsys.readouterr()
    states = [row["state"] for row in json.loads(out)["runs"]]
    assert states == ["damaged", "done", "damaged", "pending", "pending", "damaged"]
    assert err.count("\n") == 3
    last.claim_file.rmdir()
    done.result_file.unlink()
    failed.failure_file.unlink()
    assert cli.main(("status", TINY)) == 0


@pytest.mark.parametrize(
    "kind", [*ANY, "kind-absent", "traceback-list", "time-text", "folder"]
)  # fmt: skip
def test_damaged_failures(refused, workplace, kind):
    file = finished(workplace)[2].failure_file
    changes = {
        "kind-absent": shape(kind=...),
        "traceback-list": shape(traceback=[]),
        "time-text": shape(time="now"),
    }
    if kind == "folder":
        file.unlink()
        file.mkdir()
        refused(f"{file} cannot be read: Is a directory", "status", TINY, code=1)
        return
    file.write_bytes((ANY | changes)[kind](file.read_bytes()))
    err = refused(f"{file} is damaged (", "status", TINY, code=1)
    assert "remove it, and the run is tried again" in err


LINE_KINDS = [k for k in ANY if k not in ("twice", "cut", "zeros", "utf16", "deep")]


@pytest.mark.parametrize("kind", [*LINE_KINDS, "began-text", "layout-list", "device-absent"])
def test_damaged_attempts(refused, workplace, kind):
    file = finished(workplace)[1].attempts_file
    line = file.read_bytes().strip()
    changes = {
        "began-text": shape(began="now"),
        "layout-list": shape(layout=[]),
        "device-absent": shape(layout={}),
    }
    file.write_bytes((ANY | changes)[kind](line) + b"\n" + line + b"\n")
    err = refused(f"{file} line 1 is damaged (", "status", TINY, code=1)
    assert "remove that line from the file" in err


@pytest.mark.parametrize(
    "kind", [*LINE_KINDS, "step-absent", "step-text", "loss-text", "time-list"]
)
def test_damaged_logs(refused, workplace, kind):
    file = finished(workplace)[2].metrics_file
    line = file.read_bytes().splitlines()[0]
    changes = {
        "step-absent": shape(step=...),
        "step-text": shape(step="5"),
        "loss-text": shape(**{"learning/loss": "3"}),
        "time-list": shape(time=[]),
    }
    wrong = (ANY | changes)[kind](line)
    file.write_bytes(b"\n".join([line, wrong, b'{"step": 6}', b'{"step": 7, "lear']))
    err = refused(f"{file} line 2 is damaged (", "status", TINY, code=1)
    assert "remove that line from the file" in err


def test_a_log_whose_last_line_is_cut_short_is_no_damage(workplace, capsys):
    place = finished(workplace)[2]
    with place.metrics_file.open("ab") as file:
        file.write(b'{"step": 6, "\xc3')
    assert cli.main(("status", TINY)) == 0
    assert [line["step"] for line in place.metrics()] == [5, 5, 5]


@pytest.mark.parametrize(
    "kind", [*ANY, "config-list", "config-absent", "data-list", "schema-text", "folder"]
)  # fmt: skip
def test_damaged_configs(workplace, kind):
    """Only a run that goes on reads its config; it changes nothing then."""
    place = finished(workplace)[2]
    file, run = place.config_file, load_experiment(TINY).runs[2]
    changes = {
        "config-list": shape(config=[]),
        "config-absent": shape(config=...),
        "data-list": shape(data=[]),
        "schema-text": shape(schema="1"),
    }
    if kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes((ANY | changes)[kind](file.read_bytes()))
    before = files(workplace)
    with pytest.raises(UserError) as caught:
        place.begin(run, {"store_hash": "s"})
    words = "cannot be read: Is a directory" if kind == "folder" else "is damaged ("
    assert str(caught.value).startswith(f"{file} {words}")
    assert kind == "folder" or "remove it, and the run writes it anew" in str(caught.value)
    assert files(workplace) == before


@pytest.mark.parametrize("changed", [{"config": {"name": "a"}}, {"schema": 99}])
def test_configs_of_another_version(workplace, changed):
    place = finished(workplace)[2]
    place.config_file.write_bytes(shape(**changed)(place.config_file.read_bytes()))
    with pytest.raises(UserError, match=r"config\.json(: missing field model| has schema 99)"):
        place.config()


@pytest.mark.parametrize("kind", [k for k in ANY if k != "twice"])
def test_damaged_checksums(workplace, capsys, kind):
    """`checkpoints` counts it as damage, of that step, and shows the others."""
    first, second = finished(workplace)[:2]
    for place in (first, second):
        place.parameters.mkdir()
        (place.parameters / "a").write_text("a")
        seal(place.parameters, {"a": "00"})
        for note in COMMIT_NOTES:
            (place.parameters / note).write_text("")
    file = first.parameters / SEAL_NAME
    file.write_bytes(ANY[kind](file.read_bytes()))
    before = files(workplace)
    assert cli.main(("checkpoints", TINY, "--json")) == 1
    out, err = capsys.readouterr()
    kept = [each["kept"][0] for each in json.loads(out)["runs"][:2]]
    assert [each["state"] for each in kept] == ["damaged", "whole"]
    assert kept[0]["damage"] == ["checksums.json is altered"]
    assert err == ""
    assert files(workplace) == before


STORES = ANY | {
    "schema": shape(schema=2),
    "schema-list": shape(schema=[1]),
    "splits-list": shape(splits=[]),
    "tokenizer-text": shape(tokenizer="bytes"),
    "declaration-list": shape(declaration=[]),
    "declaration-absent": shape(declaration=...),
    "corpus-absent": shape(corpus=...),
    "dtype-number": shape(dtype=2),
    "hash-other": shape(hash="0" * 64),
    "hash-number": shape(hash=3),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder of texts and its store."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = corpus(folder)
    data = DataConfig(corpus=str(texts), store=str(folder / "store"))
    prepare(data, workers=1, show=False)
    return folder


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("verb", ["plan", "prepare", "run"])
def test_damaged_stores(refused, workplace, prepared, kind, verb):
    shutil.copytree(prepared, workplace, dirs_exist_ok=True)
    file = workplace / "store/store.json"
    file.write_bytes(STORES[kind](file.read_bytes()))
    said = "has schema 2" if kind == "schema" else f"{Path('store/store.json')} is damaged"
    refused(said, verb, TINY, *TEXTS, "--data.store", "store")


# --------------------------------------------------------------- text that terminals may mistake

ODD = "[red]x[/] [/] :smile: {task} \\[b]"


def test_what_names_have_in_brackets_is_printed_as_it_is(workplace, capsys):
    (workplace / "[red].py").write_text("from experiments.tiny import runs\n")
    for verb in ("plan", "status", "checkpoints"):
        more = ("--hardware", "v5e", f"--note={ODD}") if verb == "plan" else ()
        assert cli.main((verb, "[red].py", *more)) == 0
        out, err = capsys.readouterr()
        assert err == ""
        assert ("[red]" in out) or verb == "checkpoints"
        assert (f"note: {ODD}" in out) == (verb == "plan")


def test_a_csv_named_and_filled_with_brackets_is_printed_as_it_is(workplace, capsys):
    lines = ["name,n_heads,n_kv_heads,loss,n_params"]
    for i, n in enumerate((1e6, 2e6, 4e6, 8e6, 16e6)):
        lines += [f"{ODD} {i},4,4,{2 + 100 / n**0.3},{n}", f"b{i},4,1,{2.1 + 100 / n**0.3},{n}"]
    Path("run[seed1] [red].csv").write_text("\n".join(lines))
    assert cli.main(("fit", "run[seed1] [red].csv", "--refits", "100")) == 0, (
        capsys.readouterr().err
    )
    out = capsys.readouterr().out
    assert "run[seed1] [red].csv: 10 points" in out
    assert f"{ODD} 0" in out


def test_the_display_of_a_sweep_shows_brackets_as_they_are(workplace):
    tiny = replace(load_experiment(TINY), name=ODD)
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with display._progress(console) as progress:
        display._bar(tiny, progress)(read_status(workplace, tiny))
    assert ODD in console.file.getvalue()


def test_watch_shows_brackets_as_they_are(workplace, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    monkeypatch.setattr(sys, "stdout", said)
    for place in finished(workplace):
        place.path.mkdir(parents=True, exist_ok=True)
        place.fail(f"Traceback\nValueError: {ODD}\n", "ValueError")
    assert cli.main(("status", TINY, "--watch")) == 1
    assert ODD in said.getvalue()


# ------------------------------------------------------------------------------- studies of files

HEAD = "n_heads,n_kv_heads,loss,n_params"
ROWS = [f"4,{kv},{2 + 100 / n**0.3 + kv / 100},{n}" for n in (1e6, 2e6, 4e6, 8e6) for kv in (4, 1)]
TABLES: dict[str, tuple[str, str]] = {
    "empty": ("", "holds no runs"),
    "header": (HEAD, "holds no runs"),
    "no-header": (
        "\n".join(ROWS),
        "own.csv line 1: holds the value 4 where the names of the columns belong",
    ),
    "no-loss": (HEAD.replace("loss", "lost") + "\n4,4,2,1e6", "column loss is missing"),
    "twice": (HEAD + ",loss\n4,4,2,1e6,2", "column loss appears twice"),
    "short-line": (HEAD + "\n4,4,2", "line 2: has 3 values for 4 columns"),
    "text": (HEAD + "\n4,4,two,1e6", "column loss='two'"),
    "nan": (HEAD + "\n4,4,nan,1e6", "column loss='nan'"),
    "negative": (HEAD + "\n4,4,-2,1e6", "column loss='-2'"),
    "half-heads": (HEAD + "\n4.5,4,2,1e6", "column n_heads='4.5'"),
    "no-heads": (HEAD + "\n0,4,2,1e6", "column n_heads='0'"),
    "kv": (HEAD + "\n4,3,2,1e6", "n_kv_heads=3 must divide n_heads=4"),
    "huge-heads": (HEAD + f"\n{HUGE},1,2,1e6", f"column n_heads='{HUGE}'"),
    "same": (HEAD + "\n4,4,2,1e6\n4,4,2,1e6", "appears twice"),
    "count": (HEAD + ",n_count\n4,4,2,1e6,mine", "n_count='mine'"),
    "pattern": (HEAD + ",pattern_block\n4,4,2,1e6,16", "needs column pattern_local"),
    "control": (HEAD + "\n4,4,\x1b[31m,1e6", "column loss='\\x1b[31m'"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables(refused, workplace, kind):
    text, said = TABLES[kind]
    Path("own.csv").write_text(text)
    refused(said, "fit", "own.csv")


def test_places_of_tables(refused, workplace):
    (workplace / "folder.csv").mkdir()
    (workplace / "bytes.csv").write_bytes(b"\xff\xfe")
    refused("absent.csv: cannot be read", "fit", "absent.csv")
    refused("folder.csv: cannot be read", "fit", "folder.csv")
    refused("bytes.csv: is not a text file", "fit", "bytes.csv")
    refused("File name too long", "fit", "n" * 300 + ".csv")
    refused("unexpected argument '--seed'", "fit", "chen2025", "--seed", "1")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("refits=0 must be", "fit chen2025 --refits 0"),
        ("refits=-5 must be", "fit chen2025 --refits -5"),
        ("--law: invalid choice: 'cubic'", "fit chen2025 --law cubic"),
        ("--bootstrap: invalid choice", "fit chen2025 --bootstrap none"),
        ("invalid int value: 'long'", "fit chen2025 --context long"),
        ("--baseline '8' must be", "frontier chen2025 --baseline 8"),
        ("--baseline '-8,8' must be", "frontier chen2025 --baseline=-8,8"),
        ("--baseline 'a,b' must be", "frontier chen2025 --baseline a,b"),
        ("must be n_heads,n_kv_heads", f"frontier chen2025 --baseline 8,{LONG}"),
        ("context=0 must be", "frontier chen2025 --contexts 0"),
        ("context=-1 must be", "frontier chen2025 --contexts -1"),
        ("--losses: nan must be a finite number", "frontier chen2025 --losses nan"),
        ("--losses: inf must be a finite number", "frontier chen2025 --losses inf"),
        ("target loss=-1.0 must be", "frontier chen2025 --losses -1"),
        ("target loss=0.0 must be", "frontier chen2025 --losses 0"),
        ("invalid choice: 'joules'", "frontier chen2025 --objective joules"),
        ("unknown hardware 'abacus'", "frontier chen2025 --hardware abacus"),
        ("--train-context belongs to --align", "frontier chen2025 --train-context 8192"),
        ("suggest needs the grid of an experiment", "suggest chen2025"),
        ("no finished runs under runs/tiny", "fit experiments.tiny"),
        ("no finished runs under runs/tiny", "report experiments.tiny"),
        ("no finished runs under runs/tiny", "suggest experiments.tiny"),
    ],
)
def test_questions(refused, said, arguments):
    refused(said, *arguments.split())


# ----------------------------------------------------------------------------------- launching


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("required: TARGET", ""),
        ("invalid choice: 'moon'", "moon v5e-8 experiments.tiny"),
        ("required: slice, experiment", "slurm --dry-run"),
        ("v5e-7", "skypilot v5e-7 experiments.tiny --bucket gs://mine --dry-run"),
        ("v5e-" + HUGE, f"skypilot v5e-{HUGE} experiments.tiny --bucket gs://mine --dry-run"),
        ("0xH100", "slurm 0xH100 experiments.tiny --dry-run"),
        ("--hours nan", "slurm 8xH100 experiments.tiny --hours nan --dry-run"),
        ("--hours 0", "slurm 8xH100 experiments.tiny --hours 0 --dry-run"),
        ("--hours -1", "slurm 8xH100 experiments.tiny --hours -1 --dry-run"),
        ("mfu=2.0", "slurm 8xH100 experiments.tiny --mfu 2 --dry-run"),
        ("price=inf", "slurm 8xH100 experiments.tiny --price inf --dry-run"),
        ("bucket", "skypilot v5e-8 experiments.tiny --dry-run"),
        ("bucket", "skypilot v5e-8 experiments.tiny --bucket /mnt/x --dry-run"),
        ("unknown experiment 'experiments.none'", "slurm 8xH100 experiments.none --dry-run"),
        ("unknown field --sed", "slurm 8xH100 experiments.tiny --dry-run --sed 1"),
        ("n_layers=" + HUGE, f"slurm 8xH100 experiments.tiny --dry-run --model.n-layers {HUGE}"),
        ("seed=4294967296", "slurm 8xH100 experiments.tiny --dry-run --seed 4294967296"),
        ("matches none", "slurm 8xH100 experiments.tiny --dry-run --only none"),
    ],
)
def test_launches(refused, said, arguments):
    refused(said, *arguments.split(), main=launch.main)


def test_launch_takes_no_runs_folder_for_the_working_directory(refused, monkeypatch):
    monkeypatch.setenv("GQA_SCALING_RUNS", "")
    refused("the folder of the runs is ''", "slurm", "8xH100", TINY, "--dry-run", main=launch.main)
