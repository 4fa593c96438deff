"""Every command that README, docs/, --help and the experiments show, as far as it can be run here.

Bash reads them, so that variables, quotes and comments mean what they mean to a reader; the programs
are functions that only note how they were called. Then they are run: `plan`, `status`, `launch
--dry-run` and every question, of an experiment on results that are made up here, by few refits and
without pictures. What trains (`prepare`, `run`), needs a trained model (`generate`, `checkpoints`,
`export`, `import`, `harness`), the network (`fetch`), a TPU's compiler (`--compile`) or an end
(`--watch`) goes through the same parsers and experiments as when it is run; other tests run those. And
commands of other tools must be among those listed here.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from pathlib import Path

import pytest

from gqa_scaling import cli, hardware
from gqa_scaling.cli import bench, exchange, questions, report, runs, start, study
from gqa_scaling.cli import experiment as cli_experiment
from gqa_scaling.config import require
from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.data.corpus import FETCHED
from gqa_scaling.experiment.load import Experiment, load_experiment
from gqa_scaling.files.runs import run_directory
from gqa_scaling.study import choices
from gqa_scaling.study.calibrate import calibrate
from gqa_scaling.study.calibration import write_calibration
from gqa_scaling.study.report import pictures
from launch import cli as launching
from launch import tpu_vm, work

CHECKOUT = Path(__file__).parents[1]
DOCUMENTS = [
    CHECKOUT / "README.md",
    CHECKOUT / "CONTRIBUTING.md",
    *sorted((CHECKOUT / "docs").glob("*.md")),
]
EXPERIMENTS = sorted((CHECKOUT / "experiments").glob("*.py"))

OURS = ("gqa-scaling", ".venv/bin/gqa-scaling", "python", ".venv/bin/python", "make")
# Other tools' commands, by how they begin. Look at a new one before it is added: is it spelt as
# that tool has it, and does the text say what must be there first, and what it costs?
OTHERS = """
docker build --platform linux/amd64 --tag us-docker.pkg.dev/my-project/gqa/gqa:1 .
docker push us-docker.pkg.dev/my-project/gqa/gqa:1
gcloud artifacts repositories create gqa --repository-format=docker --location=us --project
gcloud auth application-default login
gcloud auth configure-docker us-docker.pkg.dev
gcloud auth login
gcloud compute tpus queued-resources list --project my-project --zone us-west4-a
gcloud config set project my-project
gcloud projects create my-project
gcloud services enable artifactregistry.googleapis.com
gcloud services enable tpu.googleapis.com compute.googleapis.com container.googleapis.com
gcloud storage buckets create gs://mine --location=us-west4
gcloud storage rm --recursive gs://mine
pip install xpk
pip install skypilot[gcp]
pip install xprof
python3 -m venv
python3.12 -m venv
scancel JOBID
sky check gcp
sky down
sky jobs cancel --all
sky jobs logs --name JOB
sky jobs queue
sky status
squeue --me
tail -f .launch/head-ladder/
tar czf study.tar.gz experiments runs/smoke data/stdlib-bytes
tar xzf study.tar.gz
tensorboard --logdir runs/
xpk cluster create --cluster mine --project my-project --zone us-west4-a --tpu-type v5litepod-16
xpk cluster delete --cluster mine --project my-project --zone us-west4-a
xpk workload list --cluster mine --project my-project --zone us-west4-a
""".strip().splitlines()
# Indented text that is no command, by how it begins.
NOT_COMMANDS = """
QUESTION = Question(contexts
125 jobs, 16.9k chip-hours
Demonstration, too small to decide by
Do differences between configurations move with T
FROM python:3.12-slim
ModelConfig(36, 1536
No movement found from
Trained since and not in the fit
declare -> plan
def runs(
from gqa_scaling.config import
from gqa_scaling.experiment import scales
head_ladder on skypilot
n_heads,n_kv_heads
runs/<experiment>
slice    chips   jobs
waiting for L2-h4kv1
168 runs: 168 to launch
""".strip().splitlines()
# Also none: what other tests run (test_api.py, test_extending.py).
NOT_COMMANDS += [">>> ", "# gqa_scaling/", "# launch/", "$ ", "For 2.7 nats"]
# What stands for something of the reader's, and what a reader might put there.
PLACEHOLDERS = {
    "TARGET SLICE EXPERIMENT [options] [overrides]": (
        "skypilot v5e-8 experiments.smoke --bucket gs://mine --data.store gs://mine/data --hours 1"
    ),
    "EXPERIMENT RUN...": "experiments.smoke L2-d24-h1-kv1",
    "VERB ": "plan ",
    "new NAME --corpus FOLDER": "new own --corpus docs",
    "experiments.NAME": "experiments.smoke",
    "path/to/NAME.py": "experiments/smoke.py",
    "run ... --shard i/n": "run experiments.smoke --shard 0/2",
    "DEVICES=i ": "DEVICES=0 ",
    "--compile ...": "--compile v5e:16x16",
    "--only PATTERN": "--only L2*",
}

ASSIGNMENT = r"(?:[A-Z_]+=(?:\"[^\"]*\"|\S*)\s+)*"


def programs() -> list[str]:
    """The first words of commands."""
    return [*OURS, *dict.fromkeys(line.split()[0] for line in OTHERS)]


def is_command(text: str) -> bool:
    """Whether text that looks like code begins as a command does."""
    first = re.sub(f"^{ASSIGNMENT}", "", text).split()
    return not first or first[0].split("/")[-1] in ("export", ".", "pip", *programs())


def shown_commands(text: str, name: str) -> list[str]:
    """The commands of a Markdown text: indented ones, then those within `backticks`."""
    assert "```" not in text, f"{name}: code is indented here, not fenced"
    blocks = re.findall(r"(?:^    .*\n)+", text, flags=re.MULTILINE)
    blocks = [textwrap.dedent(block) for block in blocks]
    known = tuple(NOT_COMMANDS)
    found = []
    for block in blocks:
        if is_command(block):
            found.append(block)
        else:
            assert block.startswith(known), (
                f"{name}: put into NOT_COMMANDS here if it is none:\n{block}"
            )
    inline = re.findall(r"`([^`\n]+)`", text)
    return found + [code for code in inline if " " in code and is_command(code)]


def called(shown: list[str], folder: Path) -> list[list[str]]:
    """How a shell in `folder` calls the programs of these commands, in order."""
    calls = folder / "calls"
    calls.write_text("")
    names = [*programs(), *(f"{folder}/{tool}/bin/pip" for tool in ("skypilot", "xpk")), "pip"]
    note = "".join(f'{name}() {{ note {name} "$@"; }}\n' for name in dict.fromkeys(names))
    script = "\n".join(shown)
    for placeholder, instead in PLACEHOLDERS.items():
        script = script.replace(placeholder, instead)
    done = subprocess.run(
        ["/bin/bash"],
        input=f'note() {{ printf \'%s\\0\' "$#" "$@" >> {calls}; }}\n{note}{script}\n',
        cwd=folder,
        env={"PATH": "", "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    words, found = calls.read_text().split("\0")[:-1], []
    while words:
        n = int(words.pop(0))
        found.append([word.replace(f"{folder}/", "") for word in words[:n]])
        del words[:n]
    return found


# ------------------------------------------------------------------------------- our commands


def try_gqa(words: list[str]) -> None:
    """Run what a second is enough for; else parse it and load its experiment."""
    if len(words) == 1:  # the text speaks of a verb
        assert words[0] in (*cli.VERBS, "--version")
        return
    args, rest = cli._parse(words)
    if args.verb == "doctor":  # tests/doctor runs it
        return
    if args.verb == "fetch":
        assert args.corpus in FETCHED
        return
    if args.verb == "new":  # not in experiments/, which are those of the checkout here
        words = [words[0], f"{Path(args.name).stem}.py", *words[2:]]
    if args.verb in (*start.VERBS, *runs.VERBS):  # they take a moment, and clean asks nobody
        assert cli.main([*words, "--json"] if args.verb == "clean" else words) == 0
        return
    if args.verb in exchange.VERBS:  # what follows `harness RUN` is lm-eval's
        assert args.verb == "harness" or rest == []
        return
    if args.verb == "bench-inference":  # it takes minutes
        bench._named(args, rest)
        return
    if args.verb == "calibrate":
        assert cli.main(words) == 0
        return
    source = getattr(args, "source", None) or args.experiment
    if args.verb == "report" and source.endswith("/"):  # there are no pages
        return
    if args.verb in ("generate", "judge"):  # there is no trained run
        source, _, name = source.rpartition(":")
        assert name in {run.name for run in load_experiment(source, rest).runs}
        return
    is_experiment = choices.is_experiment(source) and not Path(source).is_dir()
    decides = args.verb in (*study.VERBS, *report.VERBS, *questions.VERBS)
    quick = args.verb in ("plan", "status", "learning-rates") or decides
    if getattr(args, "compile", None) or getattr(args, "watch", False):
        quick = False
    if decides:
        words = [*words, "--refits", "100"] if "--refits" not in words else words
    if decides and is_experiment:
        root = Path(tempfile.mkdtemp(dir="."))
        make_up_results(load_experiment(source, rest), root, all_of=args.verb != "forecast")
        words = [*words, "--root", str(root)]
    if quick:
        assert cli.main(words) == 0
        return
    if is_experiment:
        load_experiment(source, rest).select(
            cli_experiment.only(args), getattr(args, "shard", None)
        )
    else:
        assert rest == []
    if getattr(args, "compile", None):
        hardware.slice_of(args.compile)


def make_up_results(experiment: Experiment, root: Path, all_of: bool) -> None:
    """Finish the runs of an experiment without training them, all but the largest or `all_of` them."""
    sizes = {run: n_exact(run.model) for run in experiment.runs}
    for i, (run, n) in enumerate(sizes.items()):
        if n == max(sizes.values()) and not all_of:
            continue
        loss = 1.2 + (300 / n) ** 0.25 + (1e5 / training_tokens(run)) ** 0.3
        loss += 0.01 / run.model.n_kv_heads + 0.0005 * (i % 5)
        value = {"loss": loss, "bits_per_byte": loss / 2, "hash": "e"}
        value["loss_by_context"] = {str(c): loss + 0.1 for c in run.evaluation.contexts} or None
        task = run.evaluation.needles
        if task is not None:
            shares = dict.fromkeys(map(str, task.lengths), [0.5] * task.depths)
            told = {"form": task.form, "trials": task.trials, "depths": task.places}
            value["needles"] = told | {"accuracy": shares}
        data = {"store_hash": "s", "corpus_hash": "c", "tokenizer_hash": "t", "vocab_size": 256}
        directory = run_directory(root, experiment.name, run)
        directory.begin(run, data)
        result = {
            "name": run.name,
            "n_exact": n,
            "tokens": training_tokens(run),
            "epochs": 0.5,
            "data": data,
            "evaluations": {run.evaluation_digest: {k: v for k, v in value.items() if v}},
            "versions": {"jax": "1"},
        }
        directory.finish(result, {"training_seconds": 2.0})


def try_launch(words: list[str]) -> None:
    """Render it, without credentials and tools; a local job goes through the parser of `run`."""
    if words[:1] == ["local"]:
        args, rest = launching._parser().parse_known_args(words)
        assert rest == []
        try_gqa(["run", *args.run])
        return
    words = [word for word in words if word != "--compile"]  # its compiler need not be there
    assert launching.main([*words, "--dry-run"]) == 0


def try_python(words: list[str]) -> None:
    if words in (["-m", "gqa_scaling"], ["-m", "launch"]):  # the text speaks of the program
        return
    if words[:2] == ["-m", "gqa_scaling"]:
        try_gqa(words[2:])
    elif words[:2] == ["-m", "launch"]:
        try_launch(words[2:])
    elif words[:2] == ["-m", "launch.work"]:
        experiment, runs, overrides = work.parse(words[2:])
        names = {run.name for run in load_experiment(experiment, overrides).runs}
        assert names >= set(runs)
    elif words[:2] == ["-m", "pytest"]:
        paths = [word.partition("::")[0] for word in words[2:] if word.startswith("tests/")]
        assert [path for path in paths if not (CHECKOUT / path).exists()] == []
    else:
        script = (CHECKOUT / words[0]).read_text()
        unknown = [word for word in words[1:] if not word.isdecimal() and word not in script]
        assert unknown == []


def try_pip(words: list[str]) -> None:
    """`pip install -e .[...]` names extras that there are."""
    found = re.fullmatch(r"\.\[([a-z0-9,]+)\]", words[-1])
    assert words[:-1] == ["install", "-e"]
    assert found is not None
    extras = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert set(found[1].split(",")) <= set(extras["optional-dependencies"])


def try_make(words: list[str]) -> None:
    rules = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), flags=re.MULTILINE)
    targets = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    assert targets
    assert set(targets) <= set(rules)


def attempt(call: list[str]) -> None:
    program, words = call[0].split("/")[-1], call[1:]
    if program == "gqa-scaling":
        try_gqa(words)
    elif program == "python":
        try_python(words)
    elif program == "make":
        try_make(words)
    elif program == "pip" and "-e" in words:
        try_pip(words)
    else:
        listed = " ".join([program, *words]).startswith(tuple(OTHERS))
        require(listed, "not among OTHERS in tests/test_docs.py")


def write_csv(path: Path) -> None:
    """Losses of a token law, three budgets for each of four sizes of two configurations."""
    lines = ["n_heads,n_kv_heads,n_layers,d_model,context_length,tokens,loss"]
    for kv in (8, 1):
        for layers, d in ((6, 512), (12, 768), (16, 1024), (24, 1280)):
            n = 8 * layers * d**2 + 2 * layers * d * 64 * (8 + kv)
            for k, ratio in enumerate((10, 20, 40)):
                noise = 0.001 * ((7 * layers + 3 * k + kv) % 5 - 2)
                loss = 1.7 + (2e6 / n) ** 0.25 + (4e8 / (n * ratio)) ** 0.3 + 0.01 * (8 - kv) / 7
                lines.append(f"8,{kv},{layers},{d},8192,{n * ratio},{loss + noise:.4f}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout with no runs, no tokens and no environment, a CSV file of somebody's runs, and timings
    of a machine with what was calibrated of them."""
    for name in (*tpu_vm.CODE, "benchmarks", "docs", "Makefile"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "runs/smoke").mkdir(parents=True)
    write_csv(tmp_path / "runs.csv")
    shutil.copy(CHECKOUT / "tests/study/timings.json", tmp_path)
    write_calibration(tmp_path / "calibration.json", calibrate(tmp_path / "timings.json"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GQA_SCALING_RUNS", "runs")
    monkeypatch.setattr(pictures, "PICTURES", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def require_all_to_work(calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """Try every call once; fail with those that do not do what they should."""
    found = []
    for call in dict.fromkeys(tuple(w for w in call if w != "--dry-run") for call in calls):
        os.environ["GQA_SCALING_RUNS"] = "runs"  # launch points it elsewhere
        capsys.readouterr()
        try:
            attempt(list(call))
        except (Exception, SystemExit) as error:
            said = capsys.readouterr().err.strip().splitlines()[-1:]
            found.append(f"{' '.join(call)}\n    {type(error).__name__} {error} {' '.join(said)}")
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_a_document_works(document, folder, capsys):
    shown = shown_commands(document.read_text(encoding="utf-8"), document.name)
    require_all_to_work(called(shown, folder), capsys)


def test_every_command_of_an_experiment_and_of_the_launchers_help_works(folder, capsys):
    texts = [(path.name, path.read_text(encoding="utf-8").split('"""')[1]) for path in EXPERIMENTS]
    texts.append(
        ("launch --help", textwrap.indent(launching.USAGE, "  ").replace("    Over", "Over"))
    )
    shown = [command for name, text in texts for command in shown_commands(f"{text}\n", name)]
    assert len(shown) > len(EXPERIMENTS)
    require_all_to_work(called(shown, folder), capsys)
