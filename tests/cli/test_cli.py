import errno
import html
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from gqa_scaling import __version__, cli
from gqa_scaling.config import ModelConfig
from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.experiment.branches import decay_begins
from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files import failures
from gqa_scaling.files.claims import claim
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.versions import MATTERING

SCRIPT = shutil.which("gqa-scaling", path=sysconfig.get_path("scripts"))
ENTRIES = {"script": [SCRIPT], "module": [sys.executable, "-m", "gqa_scaling"]}
TINY = "experiments.tiny"
V5E = ("--hardware", "v5e")


@pytest.fixture
def call(workplace, capsys, monkeypatch):
    """main([...]) in the empty working directory: (exit code, stdout, stderr)."""
    # this process has used jax before, and is no job of its own
    monkeypatch.setattr("gqa_scaling.devices.processes.join", lambda alone: None)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as leave:  # --help
            code = leave.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def directories(experiment: str = TINY) -> list[RunDirectory]:
    found = load_experiment(experiment)
    return [run_directory("runs", found.name, run) for run in found.runs]


def finish(directory: RunDirectory, loss: float = 2.5, experiment: str = TINY) -> None:
    run = load_experiment(experiment).runs[directories(experiment).index(directory)]
    directory.begin(run, {})
    directory.finish({"evaluations": {run.evaluation_digest: {"loss": loss}}}, {})


# --------------------------------------------------------------------------------- entry points


def test_where_the_reader_has_seen_enough_it_ends_well(call, monkeypatch):
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    gone = Gone()
    monkeypatch.setattr(sys, "stdout", gone)
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    assert cli.main(["plan", TINY, *V5E]) == 0
    assert "tiny on" in gone.getvalue()


def test_without_an_output_nothing_is_printed_and_all_is_done(call, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["plan", TINY, *V5E]) == 0
    sys.stdout.close()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_a_folder_that_takes_no_files_is_refused(call):
    code, _, said = call("new", "/proc/x.py")
    assert code == 2
    assert said.endswith("/proc/x.py cannot be written: /proc takes no files; name another place\n")


@pytest.mark.parametrize("entry", ENTRIES)
def test_both_entry_points_find_experiments_in_the_working_directory(workplace, entry):
    command = [*ENTRIES[entry], "plan", TINY, *V5E, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["totals"]["runs"] == 6


@pytest.mark.parametrize("entry", ENTRIES)
def test_both_entry_points_refuse_in_one_line_with_exit_code_2(workplace, entry):
    command = [*ENTRIES[entry], "plan", "experiments.tinny"]
    done = subprocess.run(command, capture_output=True, text=True)
    expected = (
        "gqa-scaling: unknown experiment 'experiments.tinny' (did you mean experiments.tiny?)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected + "\n")


@pytest.mark.parametrize("entry", ENTRIES)
def test_both_entry_points_say_their_version(entry):
    done = subprocess.run([*ENTRIES[entry], "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    first, *others = done.stdout.splitlines()
    assert re.fullmatch(
        re.escape(f"gqa-scaling {__version__}") + r"( \(commit \w{12}(, with changes)?\))?", first
    )
    told = dict(line.split(" ") for line in others)
    assert told == {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in MATTERING
    }


LOADED = """
import sys
from gqa_scaling.cli import main
for command in sys.argv[1:]:
    try:
        main(command.split())
    except SystemExit:
        pass
    heavy = {"jax", "flax", "grain", "scipy", "matplotlib"} & set(sys.modules)
    print("loaded by", command, *sorted(heavy))
"""


def test_nothing_heavy_is_loaded_before_it_is_needed(workplace):
    """Nor to see that an experiment is finished."""
    for directory in directories():
        finish(directory)
    commands = ["--help", *(f"{verb} --help" for verb in ("plan", "run", "fit"))]
    commands += [f"plan {TINY} --hardware v5e", "plan experiments.tinny"]
    commands += [f"{verb} {TINY}" for verb in ("status", "checkpoints", "learning-rates", "run")]
    command = [sys.executable, "-c", LOADED, *commands]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[-2] == "tiny: all 6 runs are finished in runs/tiny"
    loaded = [line for line in lines if line.startswith("loaded by")]
    assert loaded == [f"loaded by {command}" for command in commands]


def test_help_lists_every_verb_and_each_verb_has_help(call):
    code, out, _ = call("--help")
    assert code == 0
    for verb in (
        "prepare",
        "plan",
        "run",
        "status",
        "checkpoints",
        "learning-rates",
        "generate",
        "fit",
        "frontier",
        "report",
    ):
        assert f"\n    {verb}" in out
        code, about, err = call(verb, "--help")
        assert (code, err) == (0, "")
        assert f"usage: gqa-scaling {verb}" in about


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "required: VERB"),
        ("plam x", "unknown verb 'plam' (did you mean plan?)"),
        ("zzzz x", "unknown verb 'zzzz'; see gqa-scaling --help"),
        ("plan", "required: experiment"),
        ("plan experiments.tinny", "(did you mean experiments.tiny?)"),
        ("plan experiments/tinny.py", "no such file (did you mean experiments.tiny?)"),
        ("plan ./experiments/tiny", "(did you mean experiments.tiny?)"),
        ("plan json", "json is no experiment"),
        ("plan experiments.tiny --model.n-head 4", "(did you mean --model.n-heads?)"),
        (
            "plan experiments.tiny --hardwear v5e",
            "plan has no --hardwear (did you mean --hardware?)",
        ),
        ("frontier chen2025 --loss 2.8", "frontier has no --loss (did you mean --losses?)"),
        ("frontier experiments.tiny --loss=2.8 2.9", "frontier has no --loss (did you mean --los"),
        ("frontier chen2025 --losses 2.8,2.9", "have spaces between them, 2.8 2.9"),
        ("frontier chen2025 --contexts 8,9", "have spaces between them, 8 9"),
        (
            "frontier chen2025 --context 8192 9",
            "--context takes one value, not '9' as well (did you mean --contexts, which takes several?)",
        ),
        ("frontier chen2025 --co 8192", "--context or --contexts or --convention or --cost?"),
        ("run experiments.tiny --worker 2", "run has no --worker (did you mean --workers?)"),
        ("plan experiments.tiny --learning-rate 1", "(did you mean --optimizer.learning-rate?)"),
        ("plan experiments.tiny --only L1 --only nothing,L2", "--only 'nothing' matches none of 6"),
        ("plan experiments.tiny --seed x", "--seed='x' must be a whole number such as 1000000"),
        ("plan experiments.tiny --seed", "--seed needs a value"),
        ("plan experiments.tiny --model.n-kv-heads 3", "n_kv_heads=3 must divide n_heads=1"),
        ("plan experiments.tiny --context-length 48", "must be a multiple of context_length=48"),
        ("plan experiments.tiny --name b", "share one name"),
        ("plan experiments.tiny --tokens 1 --hardware v5e", "at least one batch of 128"),
        ("plan experiments.tiny --only nothing", "matches none of 6 runs"),
        ("plan experiments.tiny --shard 4/4", "--shard '4/4' must be i/n"),
        ("plan experiments.tiny --hardware v5q", "unknown hardware 'v5q' (did you mean v5"),
        ("plan experiments.tiny --hardware v5e --devices 0", "devices=0"),
        ("plan experiments.tiny --hardware v5e --devices two", "invalid int value: 'two'"),
        ("plan experiments.tiny --hardware v5e --mfu 2", "mfu=2.0"),
        ("plan experiments.tiny --hardware v5e --price -1", "price=-1.0"),
        ("plan experiments.tiny --compile v5e", "unknown slice 'v5e'"),
        ("plan experiments.tiny --compile v5e:3x5", "no v5e slice is 3x5: it may be 1x1, 2x2"),
        (
            "plan experiments.tiny --compile v5e:2x2 --devices 4",
            "leave out --hardware and --devices",
        ),
        ("plan experiments.tiny --compile v5e:4x4", "must divide the 4 sequences"),
        (
            "plan experiments.tiny --hardware v5e --parallel.attention triton",
            "attention=triton needs a GPU, and this is a TPU",
        ),
        (
            "plan experiments.tiny --compile v5e:1x1 --parallel.attention cudnn",
            "on v5e:1x1: attention=cudnn needs a GPU, and this is a TPU",
        ),
        (
            "plan experiments.tiny --hardware h100 --parallel.attention splash",
            "attention=splash needs a TPU, and this is a GPU",
        ),
        ("plan experiments.tiny --profile 8", "profile='8' must be FIRST:LAST"),
        ("plan experiments.tiny --hardware v5e --profile 8:11", "ends after its last step 10"),
        ("plan experiments.tiny --root", "expected one argument"),
        ("run experiments.tiny --workers 0", "--workers 0 must be greater than 0"),
        ("status experiments.tiny extra", "unexpected argument 'extra'"),
        ("fit experiments.tinny", "(did you mean experiments.tiny?)"),
        ("fit nothing.csv", "nothing.csv"),
        ("fit chen2025 --law x", "--law: invalid choice: 'x'"),
        ("fit chen2025 --seed 4", "unexpected argument '--seed': chen2025 has no fields"),
        ("frontier chen2025 --baseline 8", "--baseline '8' must be n_heads,n_kv_heads"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(call, workplace, arguments, said):
    code, out, err = call(*arguments.split())
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("gqa-scaling: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert not (workplace / "runs").exists()


def test_training_without_prepared_data_is_refused_before_anything_is_made(call, workplace):
    code, out, err = call("run", TINY, "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "prepare" in err
    assert not (workplace / "runs").exists()


def test_a_damaged_result_is_named_and_the_other_runs_are_shown(call):
    first, second = directories()[:2]
    for directory in (first, second):
        finish(directory)
    first.result_file.write_text('{"schema": 1, "resu')
    code, out, err = call("status", TINY, "--json")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{first.result_file} is damaged (Unterminated string" in err
    assert f"remove it, and the run makes it anew from {first.parameters}" in err
    status = json.loads(out)
    assert [row["state"] for row in status["runs"][:3]] == ["damaged", "done", "pending"]
    assert status["counts"]["damaged"] == 1
    assert status["runs"][0]["failure"] in err
    code, out, err = call("fit", TINY)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{first.result_file} is damaged" in err


@pytest.mark.parametrize("number", sorted(failures.REMEDIES), ids=errno.errorcode.get)
def test_a_disk_that_cannot_be_used_is_one_line(call, monkeypatch, number):
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), "runs/tiny/x")

    about = cli.VERBS["status"][1:]
    monkeypatch.setitem(cli.VERBS, "status", (fail, *about))
    code, out, err = call("status", TINY)
    assert (code, out) == (2, "")
    assert err == (
        f"gqa-scaling: cannot use the disk (runs/tiny/x): {os.strerror(number)}: "
        f"{failures.REMEDIES[number]}, then give the same command again\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_output_on_a_full_disk_is_said_where_it_can_be(workplace, full):
    """Neither a traceback nor a second error at the interpreter's end."""
    verb = [] if full == "stderr" else ["--json"]
    argument = TINY if full == "stdout" else "experiments.nothing"
    with open("/dev/full", "w") as device:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, full: device}
        done = subprocess.run(
            [sys.executable, "-m", "gqa_scaling", "status", argument, *verb], text=True, **pipes
        )
    assert done.returncode == 2
    if full == "stdout":
        assert done.stderr == (
            "gqa-scaling: cannot use the disk: No space left on device: make room there, then give "
            "the same command again\n"
        )


def test_a_mistake_of_ours_is_not_hidden(call, monkeypatch):
    def fail(*_: object) -> int:
        raise KeyError("bug")

    monkeypatch.setitem(cli.VERBS, "status", (fail, *cli.VERBS["status"][1:]))
    with pytest.raises(KeyError):
        call("status", TINY)


def test_an_interruption_says_how_to_go_on(call, monkeypatch):
    def fail(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "status", (fail, *cli.VERBS["status"][1:]))
    code, _, err = call("status", TINY)
    assert (code, err) == (130, "gqa-scaling: interrupted; the same command continues\n")


# ----------------------------------------------------------------------------------------- plan


def test_plan_counts_the_steps_whose_states_are_gone(call):
    Path("budgets.py").write_text(
        "from experiments import tiny\n"
        "from gqa_scaling.experiment.branches import at_budgets\n"
        "def runs():\n"
        "    return at_budgets(tiny.runs()[0], (20, 40))\n"
    )
    short, long = directories("budgets.py")
    finish(short, experiment="budgets.py")

    def first_step() -> int:
        rows = json.loads(call("plan", "budgets.py", *V5E, "--json")[1])["runs"]
        return {row["name"]: row["first_step"] for row in rows}[long.path.name[:-13]]

    assert first_step() == 0
    begins = decay_begins(load_experiment("budgets.py").runs[0])
    (short.checkpoints / str(begins)).mkdir(parents=True)
    assert first_step() == begins


def test_plan_for_people(call):
    code, out, err = call("plan", TINY, *V5E, "--devices", "4")
    assert (code, err) == (0, "")
    assert "tiny on 4 x v5e" in out
    for name in ("L1-h1", "L2-h4"):
        assert name in out
    assert "6 runs, 7.68k tokens" in out


@pytest.mark.parametrize("spec", [TINY, "experiments/tiny.py"])
def test_plan_for_programs(call, spec):
    code, out, _ = call("plan", spec, *V5E, "--price", "2", "--mfu", "0.5", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["experiment"] == "tiny"
    assert (plan["hardware"]["price"], plan["hardware"]["mfu"]) == (2, 0.5)
    assert [r["name"] for r in plan["runs"]][::5] == ["L1-h1", "L2-h4"]
    assert plan["totals"]["tokens"] == 6 * 1280


def test_plan_takes_a_selection_and_overrides(call):
    arguments = ("--only", "L2", "--shard", "0/2", "--parallel.data", "-1", "--tokens=2560")
    code, out, _ = call("plan", TINY, *V5E, "--json", *arguments)
    plan = json.loads(out)
    assert code == 0
    assert [(r["name"], r["tokens"]) for r in plan["runs"]] == [("L2-h1", 2560), ("L2-h4", 2560)]


def test_plan_of_an_empty_shard(call):
    code, out, err = call("plan", TINY, *V5E, "--shard", "7/8")
    assert (code, err) == (0, "")
    assert "0 runs" in out


def test_run_of_an_empty_shard(call):
    assert call("run", TINY, "--shard", "7/8") == (0, "tiny: this share has no runs\n", "")


def test_status_of_an_empty_shard(call):
    assert call("status", TINY, "--shard", "7/8") == (0, "tiny: this share has no runs\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("frontier", TINY, "--only", "L2"),
            "frontier has no --only; leave runs out with --without",
        ),
        (
            ("plan", TINY, *V5E, "--tokens", "1e6"),
            "--tokens='1e6' must be a whole number such as 1000000",
        ),
    ],
)
def test_what_is_refused_is_said_with_its_remedy(call, arguments, said):
    assert call(*arguments) == (2, "", f"gqa-scaling: {said}\n")


def test_plan_leaves_out_what_is_finished(call):
    for directory in directories()[:2]:
        finish(directory)
    _, out, _ = call("plan", TINY, *V5E, "--json")
    plan = json.loads(out)
    assert (plan["totals"]["runs"], plan["totals"]["finished"]) == (4, 2)
    _, out, _ = call("plan", TINY, *V5E, "--root", "elsewhere", "--json")
    assert json.loads(out)["totals"]["runs"] == 6


def test_a_note_is_printed_as_it_is(call):
    _, out, _ = call("plan", TINY, *V5E, "--note", "tuned [by hand] [/not markup]")
    assert "note: tuned [by hand] [/not markup]" in out


# --------------------------------------------------------------------------------------- status


def test_status_tells_the_states_apart(call):
    done, running, failed, begun, *_ = directories()
    finish(done, loss=2.25)
    running.path.mkdir(parents=True)
    running.metrics_file.write_text(
        '{"step": 5, "learning/loss": 3.5, "perf/per_device_tokens_per_sec": 1000}\n'
    )
    failed.path.mkdir(parents=True)
    failed.fail("Traceback\nValueError: [/no] such [shape]\n", "ValueError")
    begun.path.mkdir(parents=True)
    with claim(running.claim_file):
        code, out, err = call("status", TINY, "--json")
        _, table, _ = call("status", TINY)
    assert (code, err) == (0, "")
    status = json.loads(out)
    assert status["counts"] == {
        "done": 1,
        "running": 1,
        "stale": 0,
        "failed": 1,
        "pending": 3,
        "damaged": 0,
    }
    rows = {r["name"]: r for r in status["runs"]}
    assert (rows["L1-h1"]["state"], rows["L1-h1"]["evaluation_loss"]) == ("done", 2.25)
    assert rows["L1-h1"]["step"] == rows["L1-h1"]["steps"] == 10
    assert (rows["L1-h2"]["state"], rows["L1-h2"]["step"], rows["L1-h2"]["loss"]) == (
        "running",
        5,
        3.5,
    )
    assert rows["L1-h2"]["tokens_per_second"] == 1000
    assert rows["L1-h4"]["failure"] == "ValueError: [/no] such [shape]"
    assert "1 done, 1 running, 1 failed, 3 pending" in table
    assert "ValueError: [/no] such [shape]" in table
    assert "5/10" in table
    assert "2.2500" in table


def test_status_reads_the_root_that_it_is_given(call, workplace):
    finish(directories()[0])
    (workplace / "runs").rename(workplace / "archive")
    for root, done in (("archive", 1), ("runs", 0)):
        _, out, _ = call("status", TINY, "--json", "--root", root)
        assert json.loads(out)["counts"]["done"] == done


def test_a_finished_experiment_is_not_run_again(call):
    for directory in directories():
        finish(directory)
    assert call("run", TINY) == (0, "tiny: all 6 runs are finished in runs/tiny\n", "")


def test_learning_rates_for_programs(call):
    for directory in directories():
        finish(directory)
    code, out, err = call("learning-rates", TINY)
    assert (code, out) == (2, "")
    assert "L1-h1 and L1-h2 have one size, and their losses do not tell which rate is better" in err
    sweep = ("sweep.py", "--json")
    Path("sweep.py").write_text(
        "from experiments.tiny import runs as grid\n"
        "def runs():\n    return [run for run in grid() if run.name.endswith('h1')]\n"
    )
    for directory in directories("sweep.py"):
        finish(directory, experiment="sweep.py")
    code, out, _ = call("learning-rates", *sweep)
    assert code == 0
    rows = json.loads(out)
    assert [(r["n_layers"], r["learning_rate"], r["edge"]) for r in rows] == [
        (1, 1e-3, "only"),
        (2, 1e-3, "only"),
    ]
    _, table, _ = call("learning-rates", "sweep.py")
    assert "the only rate tried: widen the sweep" in table


# --------------------------------------------------------------------- from an answer to its model

SMALL = """
from gqa_scaling.config import ModelConfig, OptimizerConfig, Question, RunConfig

QUESTION = Question(contexts=(4096,), losses=(2.0,))


def runs():
    return [
        RunConfig(
            name=f"L{layers}-d{width}-h{heads}-kv{kv}" + (f"-seed{seed}" if seed else ""),
            model=ModelConfig(layers, width, heads, kv, head_dim=8, vocab_size=264),
            context_length=32,
            batch_tokens=128,
            tokens_per_param=20.0,
            seed=seed,
            optimizer=OptimizerConfig(rate),
            note=f"rate of L{layers}",
        )
        for layers, width, rate in ((2, 32, 3e-3), (2, 64, 2e-3), (4, 96, 1e-3), (5, 160, 5e-4))
        for heads, kv in ((4, 4), (4, 1))
        for seed in (0, 1)
    ]
"""


def loss_of(run) -> float:
    wobble = 0.002 * ((n_exact(run.model) + 7 * run.seed) % 5 - 2)
    return 1.2 + (2e4 / n_exact(run.model)) ** 0.25 + 0.01 / run.model.n_kv_heads + wobble


def finish_all(runs, loss=loss_of) -> None:
    for run in runs:
        directory = run_directory("runs", "small", run)
        directory.begin(run, {})
        judged = {run.evaluation_digest: {"loss": loss(run), "hash": "e"}}
        result = {"n_exact": n_exact(run.model), "tokens": training_tokens(run), "data": {}}
        directory.finish(result | {"evaluations": judged}, {})


@pytest.fixture
def small(workplace, call):
    """The experiment above, finished."""
    (workplace / "experiments/small.py").write_text(SMALL)
    finish_all(load_experiment("experiments.small").runs)
    return call


ASKED = ("experiments.small", "--refits", "100")


def printed(out: str) -> list[str]:
    """The arguments of the command in what was printed, as a shell takes them."""
    text = out[out.index("gqa-scaling run") :].split("\n\n")[0]
    assert max(map(len, text.splitlines())) <= 80
    return shlex.split(text.replace("\\\n", " "))


def test_the_printed_command_trains_exactly_the_model_that_was_answered(small):
    code, out, err = small("frontier", *ASKED)
    assert (code, err) == (0, "")
    assert "Train the model to build for 2 nats at 4,096 tokens" in out
    _, text, _ = small("frontier", *ASKED, "--json")
    model = json.loads(text)["answers"][0]["model"]
    name, verb, spec, *overrides = printed(out)
    assert (name, verb, spec) == ("gqa-scaling", "run", "experiments.small")
    assert shlex.split(model["command"].replace("\\\n", " "))[3:] == overrides
    assert overrides[-2:] == ["--forecast", "experiments.small"]
    overrides = overrides[:-2]
    grid = load_experiment(spec).runs
    (run,) = load_experiment(spec, overrides).runs
    near = next(r for r in grid if r.name == "L2-d32-h4-kv1")
    assert run == replace(
        near,
        name=f"built-L{model['n_layers']}-d{model['d_model']}-h4-kv1",
        model=ModelConfig(**model["config"]),
        note="learning rate 0.003 of L2-d32-h4-kv1",
    )
    assert run.digest not in {r.digest for r in grid}
    assert model["trained"] == ""


def test_overrides_and_the_root_of_the_study_are_in_the_command(small, workplace):
    finish_all(load_experiment("experiments.small", ["--tokens", "2560"]).runs)
    (workplace / "runs").rename(workplace / "else where")
    _, out, _ = small("frontier", *ASKED, "--tokens", "2560", "--root", "else where")
    overrides = printed(out)[3:]
    assert overrides[-4:-2] == ["--forecast", "experiments.small --tokens 2560"]
    assert overrides[-2:] == ["--root", "else where"]
    (run,) = load_experiment("experiments.small", overrides[:-4]).runs
    assert (run.tokens, run.tokens_per_param) == (2560, None)


def test_what_the_command_trained_is_measured_and_never_fitted(small):
    _, before, _ = small("frontier", *ASKED, "--json")
    _, out, _ = small("frontier", *ASKED)
    (run,) = load_experiment("experiments.small", printed(out)[3:-2]).runs
    finish_all([run], loss=lambda run: 2.05)
    _, text, _ = small("frontier", *ASKED, "--json")
    after = json.loads(text)
    (check,) = after.pop("checks")
    assert (check["name"], check["measured"]) == (run.name, 2.05)
    assert check["difference"] == 2.05 - check["predicted"]
    assert check["run_interval"][0] < check["predicted"] < check["run_interval"][1]
    assert after | {"checks": []} == json.loads(before)
    assert check["predicted"] == after["answers"][0]["model"]["loss"]
    _, out, _ = small("frontier", *ASKED)
    assert "Trained since and not in the fit" in out
    assert f"{1e3 * check['difference']:+.1f}" in out
    _, out, _ = small("status", "experiments.small", "--json")
    status = json.loads(out)
    assert status["counts"]["done"] == 16
    assert [(r["name"], r["state"]) for r in status["beside"]] == [(run.name, "done")]
    _, out, _ = small("status", "experiments.small")
    assert "small, beside its grid: 1 run, 1 done" in out


def test_a_model_that_the_study_has_trained_is_named(small):
    run = next(r for r in load_experiment("experiments.small").runs if r.name == "L4-d96-h4-kv1")
    _, out, _ = small("frontier", *ASKED, "--losses", f"{loss_of(run):.3f}")
    assert "is a run of this study: L4-d96-h4-kv1." in out
    assert "gqa-scaling run" not in out


def test_the_report_holds_every_command_and_its_pictures(small, workplace):
    losses = ("--losses", "1.8", "2")
    code, out, _ = small("report", *ASKED, *losses, "--tensorboard", "--json")
    assert code == 0
    answers = json.loads(out)["frontier"]["answers"]
    text = html.unescape((workplace / "runs/small/report.html").read_text())
    for answer in answers:
        assert answer["model"]["command"] in text
    assert len(list((workplace / "runs/small/study").iterdir())) == 1
    _, out, _ = small(
        "report", *ASKED, *losses, "--tensorboard"
    )  # writes again, into the same folder
    assert "The commands of the other models are in the report" in out
    assert len(list((workplace / "runs/small/study").iterdir())) == 1
    _, out, _ = small("status", "experiments.small", "--json")
    assert json.loads(out)["beside"] == []


def test_runs_without_a_corpus_say_what_the_model_is(call):
    asked = ("--losses", "2.8", "--contexts", "131072", "--refits", "100")
    code, out, _ = call("frontier", "chen2025", *asked)
    assert code == 0
    (line,) = [x for x in out.splitlines() if x.startswith("To build for 2.8 nats")]
    assert "ModelConfig(n_layers=24, d_model=1536, n_heads=8, n_kv_heads=1, head_dim=64" in line
    assert "declare an experiment" in line


@pytest.mark.parametrize(
    ("error", "alone", "several"), [("StorageError", 74, 134), ("DiskError", 2, 2)]
)
def test_a_process_whose_bucket_is_away_is_one_that_its_peers_lost(
    error, alone, several, call, monkeypatch
):
    def verb(args, rest):
        raise getattr(failures, error)("away")

    monkeypatch.setitem(cli.VERBS, "status", (verb, *cli.VERBS["status"][1:]))
    assert call("status", TINY) == (alone, "", "gqa-scaling: away\n")
    monkeypatch.setattr(cli, "_one_of_several", lambda: True)
    assert call("status", TINY) == (several, "", "gqa-scaling: away\n")
