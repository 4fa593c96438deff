"""From the command line to the engine's own commands, with fake engines on the PATH."""

import io
import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from gqa_scaling.experiment.load import load_experiment
from gqa_scaling.files import claims
from gqa_scaling.files.runs import run_directory, runs_root, write_json
from launch import submission, tpu_vm, work
from launch.cli import main
from launch.submission import Study

CHECKOUT = Path(__file__).parents[2]
STORE = ("--data.store", "gs://mine/data")
SKY = ("skypilot", "v5e-64", "--bucket", "gs://mine")
TPU = ("tpu-vm", "v5e-64", "--bucket", "gs://mine", "--project", "p", "--zone", "us-west4-a")
XPK = ("xpk", "v5e-64", "--bucket", "gs://mine", "--project", "p", "--zone", "us-west4-a")
XPK += ("--cluster", "c", "--image", "i:1")
SLURM = ("slurm", "8xH100", "experiments.tiny", "--sbatch")
TINY = ("experiments.tiny", *STORE)
WIDE = ("--batch-tokens", "2048", "--tokens", "20480")  # a sequence for each of 64 chips
LONG = "9000000000000"  # tokens that keep a chip busy for more than an hour
ACCOUNT = ["gcloud", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"]


def finish(run, experiment):
    result = {
        "result": {"evaluations": {run.evaluation_digest: {"loss": 2.5}}},
        "timing": {},
        "attempts": [],
    }
    directory = run_directory(runs_root(), experiment, run)
    directory.path.mkdir(parents=True)
    write_json(directory.result_file, result)
    return directory


def tiny():
    return load_experiment("experiments.tiny", STORE).runs


def submitted(tools):
    """The runs in the task files that `sky` was given."""
    files = [Path(call[-1]) for call in tools.calls() if call[0] == "sky"]
    scripts = [yaml.safe_load(path.read_text())["run"] for path in files]
    words = [shlex.split(script) for script in scripts]
    return sorted(n for w in words for n in work.parse(w[w.index("launch.work") + 1 :])[1])


# ----------------------------------------------------------------------------- what is sent


def test_sky_gets_one_managed_job_for_each_job(workplace, bucket, tools):
    tools.add("sky")
    assert main([*SKY, "--yes", *TINY, "--tokens", LONG]) == 0
    files = sorted(Path(".launch/tiny").glob("*.yaml"))
    jobs = [["sky", "jobs", "launch", "--detach-run", "--yes", str(path)] for path in files]
    assert sorted(tools.calls()) == jobs
    assert submitted(tools) == sorted(run.name for run in tiny())


def test_small_runs_share_a_job(workplace, bucket, tools):
    tools.add("sky")
    assert main([*SKY, "--yes", *TINY]) == 0
    assert len(tools.calls()) == 1
    assert submitted(tools) == sorted(run.name for run in tiny())


def test_gcloud_gets_the_code_and_a_queued_resource(workplace, bucket, tools, monkeypatch):
    tools.add("gcloud", says="someone@example.com")
    monkeypatch.setattr(tpu_vm, "CODE", ("experiments",))
    assert main([*TPU, "--yes", *TINY]) == 0
    (path,) = Path(".launch/tiny").glob("*.sh")
    name, code = path.stem, f"gs://mine/code/{tpu_vm.code_digest(['experiments'])}"
    where = ["--project", "p", "--zone", "us-west4-a"]
    assert tools.calls() == [
        ACCOUNT,
        ["gcloud", "storage", "cp", "--recursive", "experiments", f"{code}/"],
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", name, "--node-id", name),
            *(*where, "--accelerator-type", "v5litepod-1"),
            *("--runtime-version", "v2-alpha-tpuv5-lite"),
            *("--metadata-from-file", f"startup-script={path}", "--spot"),
        ],
    ]


def test_the_digest_of_the_code_moves_with_the_code_alone(workplace):
    before = tpu_vm.code_digest(["experiments"])
    cache = Path("experiments/__pycache__")
    cache.mkdir()
    (cache / "tiny.pyc").write_text("x")
    assert tpu_vm.code_digest(["experiments"]) == before
    Path("experiments/tiny.py").write_text("changed = True")
    assert tpu_vm.code_digest(["experiments"]) != before


def test_xpk_gets_a_workload(workplace, bucket, tools, capsys):
    tools.add("gcloud", says="someone@example.com")
    tools.add("xpk")
    assert main([*XPK, "--yes", *TINY, "--only", "L1-h1", *WIDE]) == 0
    account, call = tools.calls()
    assert account == ACCOUNT
    assert call[:4] == ["xpk", "workload", "create", "--workload"]
    inside = "exec env GQA_SCALING_RUNS=gs://mine/runs JAX_PLATFORMS=tpu,cpu python"
    inside += " -m launch.work experiments.tiny L1-h1"
    assert call[5:] == [
        *("--cluster", "c", "--project", "p", "--zone", "us-west4-a", "--tpu-type", "v5litepod-64"),
        *("--docker-image", "i:1", "--max-restarts", "20", "--restart-on-exit-codes", "75"),
        *("--ttl-seconds-after-finished", "600", "--termination-grace-period-seconds", "120"),
        *("--command", f"{inside} -- --data.store gs://mine/data {shlex.join(WIDE)}"),
    ]
    # of the 16 pods of a v5e-64 kubectl would refuse to follow more than 5
    assert "kubectl logs --follow --max-log-requests=64 --selector" in capsys.readouterr().out


def test_sbatch_gets_the_file_that_the_dry_run_shows(workplace, bucket, tools, capsys):
    tools.add("sbatch", says="Submitted batch job 7")
    tools.add("srun")
    command = ["slurm", "1xH100", "--partition", "gpu", "experiments.tiny", "--hours", "2"]
    command += ["--tokens", LONG]
    assert main([*command, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert main([*command, "--yes"]) == 0
    ((sbatch, file),) = tools.calls()
    assert sbatch == "sbatch"
    assert Path(file).parent == workplace / ".launch/tiny/slurm-1xH100"
    text = Path(file).read_text()
    assert text.rstrip() in dry
    assert "#SBATCH --array=0-5%6\n" in text
    assert len(list(Path(file).parent.glob("7_*.pkl"))) == 6
    assert "SLURM job 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "options", "asked", "srun"),
    [
        ("8xH100", (), {"exclusive", "mem=0"}, "--cpu-bind=none"),
        ("2xH100", (), {"cpus-per-task=16", "mem=128G"}, "--cpus-per-task=16"),
        ("2xH100", ("cpus-per-task=4",), {"cpus-per-task=4", "mem=128G"}, "--cpus-per-task=4"),
        ("2xH100", ("mem_per_cpu=8G",), {"cpus-per-task=16", "mem-per-cpu=8G"}, "-task=16"),
        ("2xH100", ("cpus-per-gpu=4",), {"cpus-per-gpu=4", "mem=128G"}, "--cpu-bind=none"),
        (
            "8xH100",
            ("exclusive=user", "qos=high", "--hold", "comment=it's $(x)"),
            {"exclusive=user", "mem=0", "qos=high", "hold", "comment='it'\"'\"'s $(x)'"},
            "--cpu-bind=none",
        ),
    ],
)
def test_slurm_is_asked_for_cores_memory_and_what_else_is_given(
    place, options, asked, srun, workplace, bucket, tools, capsys
):
    """Whole nodes whole; of a part of a node, 8 cores and 64 GiB for each GPU."""
    given = [f"--sbatch={option}" for option in options]
    command = ["slurm", place, "experiments.tiny", "--dry-run", *given]
    assert main([*command, "--hours", "1e-9", "--batch-tokens", "65536", "--tokens", LONG]) == 0
    said = capsys.readouterr().out
    lines = {line.removeprefix("#SBATCH --") for line in said.splitlines() if "#SBATCH" in line}
    kinds = ("exclusive", "mem", "cpus", "qos", "hold", "comment")
    assert {line for line in lines if line.startswith(kinds)} == asked
    assert f"{srun} " in next(line for line in said.splitlines() if line.startswith("srun "))


@pytest.mark.parametrize("root", ["gs://mine/runs", "s3://mine/runs"])
@pytest.mark.parametrize("target", [SKY, ("slurm", "8xH100")])
def test_a_dry_run_leaves_the_bucket_alone_and_says_so(
    root, target, workplace, tools, capsys, monkeypatch
):
    """It has no credentials here, and no package for gs://."""

    def reached(*_, **__):
        raise AssertionError("a file system was opened")

    monkeypatch.setattr("fsspec.filesystem", reached)
    monkeypatch.setenv("GQA_SCALING_RUNS", root)
    assert main([*target, "--dry-run", *TINY, *WIDE]) == 0
    said = capsys.readouterr()
    root = "gs://mine/runs" if "--bucket" in target else root
    assert f"GQA_SCALING_RUNS={root}" in said.out.replace(": ", "=")
    (line,) = [line for line in said.err.splitlines() if "finished" in line]
    assert line == (
        f"6 runs: 6 to launch, 0 finished (--dry-run does not look into {root}: it assumes that "
        "nothing is finished there)"
    )


def test_machines_are_sent_no_folder_without_the_code(
    workplace, bucket, tools, capsys, monkeypatch
):
    monkeypatch.setattr(submission, "CODE", ("experiments", "gqa_scaling", "pyproject.toml"))
    tools.add("sky")
    assert main([*SKY, "--dry-run", *TINY]) == 0
    said = f"machines are sent this folder, {workplace}, which has no gqa_scaling, pyproject.toml"
    assert f"WARNING: {said}" in capsys.readouterr().err
    assert main([*SKY, "--yes", *TINY]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"launch: {said}: launch from the checkout"
    assert tools.calls() == []


def test_programs_are_told_what_a_dry_run_shows(workplace, bucket, tools, capsys):
    command = [*SKY, *TINY, "--tokens", LONG]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert (said.err, tools.calls()) == ("", [])
    left_out = {"finished": 0, "running": 0, "failed": 0, "waiting": 0}
    assert told["counts"] == {"runs": 6, "to_launch": 6, **left_out}
    assert told["totals"]["jobs"] == len(told["jobs"]) == len(told["steps"]) == 6
    hours = sum(job["seconds"] * job["chips"] for job in told["jobs"]) / 3600
    assert told["totals"]["chip_hours"] == pytest.approx(hours)
    assert told["totals"]["dollars"] == pytest.approx(hours * told["price"])
    assert {run for job in told["jobs"] for run in job["runs"]} == {
        f"L{layers}-h{heads}" for layers in (1, 2) for heads in (1, 2, 4)
    }
    for step in told["steps"]:
        assert shlex.join(step["command"]) in shown
        assert all(text.rstrip() in shown for text in step["files"].values())


@pytest.mark.parametrize("target", [SKY, TPU, XPK, ("slurm", "8xH100", "--bucket", "gs://mine")])
def test_a_dry_run_needs_no_tool_and_leaves_nothing(
    target, workplace, bucket, tools, capsys, monkeypatch
):
    monkeypatch.setattr(tpu_vm, "CODE", ("experiments",))
    before = set(workplace.rglob("*"))
    assert main([*target, "--dry-run", *TINY, *WIDE]) == 0
    assert tools.calls() == []
    assert set(workplace.rglob("*")) == before
    said = capsys.readouterr()
    assert "\n$ " in f"\n{said.out}"
    assert "chip-hours" in said.err
    assert "a chip-hour (an assumption: the on-demand list price" in said.err


@pytest.mark.parametrize("columns", [40, 60, 100])
def test_a_slice_is_never_cut_by_a_narrow_terminal(columns, workplace, tools, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*SKY, "--dry-run", *TINY]) == 0
    said = capsys.readouterr().err
    assert "v5e-1" in said
    assert "\N{HORIZONTAL ELLIPSIS}" not in said
    assert max(map(len, said.split("6 runs")[0].splitlines())) <= columns


# ------------------------------------------------------------------------- what is not sent


def test_a_finished_sweep_submits_nothing_and_what_is_deleted_comes_back(
    workplace, bucket, tools, capsys
):
    tools.add("sky")
    directories = {run.name: finish(run, "tiny") for run in tiny()}
    assert main([*SKY, "--yes", *TINY]) == 0
    assert tools.calls() == []
    assert "6 runs: 0 to launch, 6 finished" in capsys.readouterr().err
    lost = ["L1-h2", "L2-h4"]
    for name in lost:
        directories[name].result_file.unlink()
    assert main([*SKY, "--yes", *TINY]) == 0
    assert "6 runs: 2 to launch, 4 finished" in capsys.readouterr().err
    assert submitted(tools) == lost


def test_running_and_failed_runs_are_left_alone(workplace, bucket, tools, capsys):
    tools.add("sky")
    failed, running, done, *left = tiny()
    for run in (failed, running):
        run_directory(runs_root(), "tiny", run).path.mkdir(parents=True)
    failure = run_directory(runs_root(), "tiny", failed)
    failure.fail("a traceback", "ValueError")
    other = {"host": "another", "pid": 1, "born": "", "token": "t"}
    claim_file = run_directory(runs_root(), "tiny", running).claim_file
    write_json(claim_file, other)
    ends = claims.clock(claim_file.stat().st_mtime + claims.STALE_SECONDS)
    finish(done, "tiny")
    assert main([*SKY, "--yes", *TINY]) == 0
    said = (
        "6 runs: 3 to launch, 1 finished, 1 running (claims of lost machines end by "
        f"{ends}: launch again then), 1 failed (again with --retry-failed)"
    )
    assert said in capsys.readouterr().err
    assert submitted(tools) == sorted(run.name for run in left)
    assert failure.failure_file.exists()
    tools.log.unlink()
    assert main([*SKY, "--yes", "--retry-failed", *TINY]) == 0
    assert submitted(tools) == sorted(run.name for run in (failed, *left))
    assert not failure.failure_file.exists()


CHILD = """
from dataclasses import replace

from experiments import tiny
from gqa_scaling.experiment.starts import start_of


def runs():
    parent = tiny.runs()[0]
    return [parent, replace(parent, name="child", start_from=start_of(parent, "family"))]
"""


def test_a_run_is_launched_once_the_one_that_it_starts_from_is_finished(
    workplace, bucket, tools, capsys
):
    tools.add("sky")
    Path("experiments/family.py").write_text(CHILD)
    command = [*SKY, "--yes", "experiments.family", *STORE]
    parent, child = load_experiment("experiments.family", STORE).runs
    said = (
        "2 runs: 1 to launch, 0 finished, 1 waiting for a parent (launch again when it is finished)"
    )
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert said in shown.err
    assert "child" not in shown.out
    assert main(command) == 0
    assert said in capsys.readouterr().err
    assert submitted(tools) == [parent.name]
    tools.log.unlink()
    failed = run_directory(runs_root(), "family", child)
    failed.path.mkdir(parents=True)
    failed.fail("a traceback", "ValueError")
    assert main([*command, "--retry-failed", "--only", "child"]) == 0
    assert tools.calls() == []
    finish(parent, "family")
    assert main([*command, "--retry-failed"]) == 0
    assert submitted(tools) == ["child"]


def test_nothing_goes_without_a_yes(workplace, bucket, tools, capsys, monkeypatch):
    tools.add("sky")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main([*SKY, *TINY]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "launch: no terminal to ask at: look at --dry-run, then give --yes"
    )
    for answer in ("n\n", "\n", "yess\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert main([*SKY, *TINY]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "launch: nothing was submitted"
    assert tools.calls() == []
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main([*SKY, *TINY]) == 0
    assert "Submit 1 job? [y/N]" in capsys.readouterr().out
    assert len(tools.calls()) == 1


def test_a_command_that_fails_stops_the_rest_and_says_how_far_it_got(
    workplace, bucket, tools, capsys
):
    tools.add("sky", code=3)
    assert main([*SKY, "--yes", *TINY, "--tokens", LONG]) == 2
    assert len(tools.calls()) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "ended with 3; 0 of 6 commands had succeeded before it" in last


# -------------------------------------------------------------------------- one line, before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("skypilot", "v5e-17", *TINY), "unknown slice 'v5e-17'"),
        (("skypilot", "v5e-16", *TINY), "skypilot needs --bucket"),
        (("skypilot", "v5e-16", "--bucket", "mine", *TINY), "must look like gs://my-bucket"),
        (
            ("skypilot", "v5e-16", "--bucket", "gs://mine", "experiments.tiny"),
            "cannot read tokens at data/",
        ),
        (("skypilot", "v5e-16", "--hours", "0", *TINY), "--hours 0 must be greater than 0"),
        (
            ("skypilot", "v5e-16", "--price", "-1", *TINY),
            "price=-1.0 must be a number from 0 to 1e+06 dollars",
        ),
        (("skypilot", "v5e-16", "--mfu", "2", *TINY), "mfu=2.0 must be a number from 1e-06 to 1"),
        ((*SKY, "experiments.tinny"), "unknown experiment 'experiments.tinny'"),
        ((*SKY, *TINY, "--modle.n-layers", "3"), "unknown field --modle.n-layers"),
        ((*SKY, *TINY, "--only", "nothing"), "--only 'nothing' matches none of 6 runs"),
        ((*SKY, *TINY, "--note", "a\nb"), "holds a line break"),
        ((*SKY, *TINY, "--parallel.fsdp", "128"), "no slice is right for"),
        (("xpk", "v5e-4", *XPK[2:], *TINY), "xpk starts no v5e-4: name a larger slice"),
        (("xpk", "v5e:2x2", *XPK[2:], *TINY), "xpk starts no v5e-4: name a larger slice"),
        (
            ("skypilot", "2xv5e-16", *TINY),
            "no job can have 2xv5e-16: a job has one slice of the usual",
        ),
        (("skypilot", "v5p:4x4x16", *TINY), "no job can have v5p:4x4x16: a job has one slice"),
        (("nowhere\x1b[31m",), "invalid choice: 'nowhere\\x1b[31m'"),
        (("skypilot", "\x1b[31mv5e-16", *TINY), "unknown slice '\\x1b[31mv5e-16'"),
        ((*SKY, *TINY, "--seed", "\x1b[31m"), "--seed='\\x1b[31m' must be a whole number"),
        ((*SKY, *TINY, "\x1b[31m\n"), "unexpected argument '\\x1b[31m\\n'"),
        (("local", "--processes", "1", "--\x1b[31m\n"), "launch: "),
        ((*SKY, str(CHECKOUT / "experiments/smoke.py"), *STORE), "must lie in this folder"),
        (("local", "--foo", "1", "experiments.tiny"), "unrecognized arguments: --foo"),
        (SKY, "the following arguments are required: experiment"),
        ((*TPU[:2], "--bucket", "gs://mine", "--zone", "z", *TINY), "tpu-vm needs --project"),
        ((*TPU[:4], "--project", "p", *TINY), "tpu-vm needs --zone"),
        (("tpu-vm", "8xH100", *TPU[2:], *TINY), "tpu-vm is for TPUs"),
        ((*TPU[:3], "s3://mine", *TPU[4:], *TINY), "s3://mine is no gs://"),
        (("xpk", "8xH100", *XPK[2:], *TINY), "xpk is for TPUs"),
        ((*XPK[:-2], *TINY), "xpk needs --image"),
        ((*XPK[:-4], "--image", "i", *TINY), "xpk needs --cluster"),
        (("slurm", "v5e-16", *TINY), "slurm is for GPUs"),
        ((*SLURM, "nodes=2"), "--sbatch nodes cannot be given: the slice decides it"),
        ((*SLURM, "ntasks_per_node=2"), "--sbatch ntasks-per-node cannot be given: the slice"),
        ((*SLURM, "gpus-per-task=1"), "--sbatch gpus-per-task cannot be given: the slice"),
        (
            (*SLURM, "gres=shm:1,gpu:4"),
            "--sbatch 'gres=shm:1,gpu:4' cannot ask for GPUs: the slice",
        ),
        ((*SLURM, "time=1:00:00"), "--sbatch time cannot be given: give --hours"),
        ((*SLURM, "account=x"), "--sbatch account cannot be given: give --account"),
        ((*SLURM, "requeue"), "--sbatch requeue cannot be given: starting a job again"),
        ((*SLURM, "-q high"), "'-q high' must be a long option of sbatch and its value"),
        ((*SLURM, "qos="), "'qos=' must be a long option of sbatch and its value"),
        ((*SLURM, "comment=a\nb"), "must be a long option of sbatch and its value"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, workplace, bucket, tools, capsys):
    for name in ("sky", "xpk", "gcloud", "sbatch", "srun"):
        tools.add(name, says="someone@example.com")
    yes = ["--yes"] if arguments[0] != "local" else []
    assert main([*arguments, *yes]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert tools.calls() == []
    assert not Path(".launch").exists()


@pytest.mark.parametrize(
    ("target", "there", "message"),
    [
        (SKY, [], "sky is not on the PATH: pip install 'skypilot[gcp]'"),
        (TPU, [], "gcloud is not on the PATH"),
        (XPK, ["gcloud"], "xpk is not on the PATH: pip install xpk"),
        (XPK, ["xpk"], "gcloud is not on the PATH"),
        (("slurm", "8xH100"), ["srun"], "sbatch is not on the PATH: launch from a login node"),
        (("slurm", "8xH100"), ["sbatch"], "srun is not on the PATH"),
    ],
)
def test_a_missing_tool_is_one_line(target, there, message, workplace, bucket, tools, capsys):
    for name in there:
        tools.add(name, says="someone@example.com")
    assert main([*target, "--yes", *TINY, *WIDE]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path(".launch").exists()


def test_no_account_is_one_line(workplace, bucket, tools, capsys):
    tools.add("gcloud", says="")
    assert main([*TPU, "--yes", *TINY]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "launch: gcloud has no active account: gcloud auth login"
    assert tools.calls() == [ACCOUNT]


def test_tokens_that_are_not_prepared_are_missed_before_a_machine_is(workplace, tools, capsys):
    for tool in ("sbatch", "srun"):
        tools.add(tool)
    assert main(["slurm", "8xH100", "--yes", "experiments.tiny", *WIDE]) == 2
    assert "prepare" in capsys.readouterr().err.splitlines()[-1]
    assert tools.calls() == []


def test_an_experiment_elsewhere_in_the_folder_is_copied_too():
    for spec, names in (
        ("experiments/x.py", ()),
        ("mine.py", ("mine.py",)),
        ("mine.py@small", ("mine.py",)),
        ("own.grid@small", ("own",)),
        ("own.grid", ("own",)),
    ):
        assert tpu_vm.code(Study(spec, "x", (), "runs")) == (*tpu_vm.CODE, *names)


def test_launching_loads_no_jax():
    script = "import sys, launch.cli; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKOUT
    )
    assert done.stdout == "False\n"


def test_the_code_that_is_copied_is_there():
    assert [name for name in tpu_vm.CODE if not (CHECKOUT / name).exists()] == []
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    requirements = project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"]
    read = {project["project"]["readme"], *project["project"]["license-files"], *requirements}
    assert read <= set(tpu_vm.CODE)  # where they are not, no environment is made


def test_an_image_holds_what_is_copied_and_nothing_that_git_ignores():
    ignored = set((CHECKOUT / ".dockerignore").read_text().splitlines())
    for line in (CHECKOUT / ".gitignore").read_text().splitlines():
        name = line.strip("/")
        assert (name if line.startswith("/") else f"**/{name}") in ignored
    assert ignored >= {".git", "data", "runs", "tests"}
    assert not ignored & set(tpu_vm.CODE)


def test_fakes_record_arguments_exactly(tools, tmp_path):
    tools.add("tool")
    subprocess.run(["tool", "a b", "", "é"], check=True, capture_output=True)
    assert json.loads(tools.log.read_text()) == ["tool", "a b", "", "é"]
