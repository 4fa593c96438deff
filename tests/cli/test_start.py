"""To begin with: a starter experiment, and completion in the shell."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gqa_scaling import cli
from gqa_scaling.cli import completion
from gqa_scaling.cli.start import SHELLS
from gqa_scaling.experiment.load import load_experiment

# --------------------------------------------------------------------------------------- new


@pytest.mark.parametrize(
    ("name", "folder", "file", "spec"),
    [
        ("mine", True, "experiments/mine.py", "experiments.mine"),
        ("mine", False, "mine.py", "mine.py"),
        ("mine.py", True, "mine.py", "mine.py"),
        ("experiments/mine.py", True, "experiments/mine.py", "experiments.mine"),
        ("cache/mine", False, "cache/mine.py", "cache/mine.py"),
        ("my studies/mine", True, "my studies/mine.py", "my studies/mine.py"),
    ],
)
def test_a_starter_is_an_experiment_under_the_name_that_is_printed(
    said, workplace, name, folder, file, spec
):
    for made in ("cache", "my studies"):
        (workplace / made).mkdir()
    if not folder:
        shutil.rmtree("experiments")
    code, out, err = said("new", name)
    assert (code, err) == (0, "")
    assert out.startswith(f"{file}: 12 small runs")
    commands = [
        shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  gqa-scaling ")
    ]
    assert [words[1] for words in commands] == [spec] * 4
    assert len(load_experiment(spec).runs) == 12
    assert f"gqa-scaling run {shlex.quote(spec)} " in Path(file).read_text()
    assert cli.main(["plan", spec, "--hardware", "v5e"]) == 0


def test_a_starter_reads_ones_own_text(said, workplace):
    folder = workplace / 'my "text"'
    folder.mkdir()
    code, _, err = said("new", "mine", "--corpus", str(folder))
    assert (code, "holds no files" in err) == (2, True)
    (folder / "a.txt").write_text("words")
    assert said("new", "mine", "--corpus", 'my "text"')[0] == 0
    assert {run.data.corpus for run in load_experiment("experiments.mine").runs} == {'my "text"'}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny"], "experiments/tiny.py is there already"),
        (["random.py"], "would be taken for the module random"),
        (["9x"], "'9x' cannot name an experiment"),
        (["a-b"], "'a-b' cannot name an experiment"),
        (["no/such/mine.py"], "there is no folder no/such for mine.py"),
        (["mine", "--corpus", "absent"], "where this command was given"),
        (["mine", "--seed", "1"], "unexpected argument '--seed'"),
    ],
)
def test_a_starter_overwrites_nothing_and_is_refused_in_one_line(said, workplace, arguments, words):
    before = (workplace / "experiments/tiny.py").read_text()
    code, out, err = said("new", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert (workplace / "experiments/tiny.py").read_text() == before
    assert not list(workplace.rglob("mine.py"))


# -------------------------------------------------------------------------------- completion

TRY = """
{script}
complete_word() {{
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _shtab_gqa_scaling gqa-scaling "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
  printf '%s ' "${{COMPREPLY[@]}}"; echo
}}
"""


def test_bash_completes_verbs_options_fields_and_experiments(said):
    code, script, err = said("completion", "bash")
    assert (code, err) == (0, "")
    tried = {
        "learn": "learning-rates",
        "plan experiments.t": "experiments.tiny",
        "plan experiments.tiny --hard": "--hardware",
        "plan experiments.tiny --model.n-h": "--model.n-heads",
        "plan experiments.tiny --model.dtype b": "bfloat16",
        "run experiments.tiny --start": "--start-from",
        "frontier chen": "chen2025",
        "frontier chen2025 --objective sec": "seconds",
        "completion z": "zsh",
    }
    lines = "".join(f"complete_word gqa-scaling {words}\n" for words in tried)
    done = subprocess.run(
        ["/bin/bash"],
        input=TRY.format(script=script) + lines,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.split() == list(tried.values())


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_that_knows_all_verbs(said, shell):
    _, script, _ = said("completion", shell)
    assert all(verb in script for verb in cli.VERBS)
    assert completion.PREAMBLE[shell].strip() in script
    program = shutil.which(shell)
    if program:
        assert subprocess.run([program, "-n"], input=script, text=True).returncode == 0
