"""What is handed to each engine: whole for one job, by its properties for the published grid.

If a rendering was meant to change: `python tests/launch/test_rendering.py` writes the golden files.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_scaling.config import DataConfig, ModelConfig, RunConfig, UserError
from gqa_scaling.hardware import SLICES, hardware
from launch import cli, skypilot, slurm, tpu_vm, work, xpk
from launch.jobs import Job, group, job_name
from launch.submission import Study
from launch.targets import Target

GOLDEN = Path(__file__).parent / "golden"
OWN = {"project": "my-project", "zone": "us-west4-a"}
TARGETS = {
    "skypilot-v5e-16": Target(
        "skypilot", SLICES["v5e-16"], hardware("v5e"), True, "gs://mine", infra="gcp/us-west4"
    ),
    "skypilot-16xH100": Target(
        "skypilot", SLICES["16xH100"], hardware("h100"), False, "s3://mine/study"
    ),
    "xpk-v5e-64": Target(
        "xpk",
        SLICES["v5e-64"],
        hardware("v5e"),
        False,
        "gs://mine",
        **OWN,
        cluster="c",
        image="i:1",
    ),
    "slurm-16xH200": Target(
        "slurm",
        SLICES["16xH200"],
        hardware("h200"),
        False,
        partition="gpu",
        setup=("module load x",),
    ),
    "tpu-vm-v5p-128": Target(
        "tpu-vm", SLICES["v5p-128"], hardware("v5p"), True, "gs://mine", **OWN
    ),
}
ENGINES = cli.ENGINES


def render(target, jobs, study):
    """As --dry-run prints it, without the paths and the code of this checkout."""
    before, tpu_vm.code_digest = tpu_vm.code_digest, lambda names: "0123456789ab"
    try:
        return ENGINES[target.engine].render(jobs, target, study)
    finally:
        tpu_vm.code_digest = before


def shown(target):
    run = RunConfig("L8-d512-h8-kv2", ModelConfig(8, 512, 8, 2), 1024, 2**16, tokens=10**9)
    study = Study("experiments.grid", "grid", ("--seed", "1", "--note", "it's"), "gs://mine/runs")
    others = (run, RunConfig.from_dict({**run.to_dict(), "name": "second", "seed": 1}))
    jobs = [Job(job_name("grid", each), target.largest, each, 3600.0) for each in ((run,), others)]
    text = "\n".join(step.text() for step in render(target, jobs, study))
    return text.replace(sys.executable, "PYTHON").replace(os.getcwd(), "CHECKOUT")


@pytest.mark.parametrize("name", TARGETS)
def test_golden(name):
    again = f"if this is meant, run python {Path(__file__).name} in tests/launch"
    assert shown(TARGETS[name]) == (GOLDEN / f"{name}.txt").read_text(), again


@pytest.mark.parametrize(
    ("bucket", "store", "extras"),
    [
        ("gs://mine", "gs://mine/data", "tpu,gcs"),
        ("gs://mine", "s3://other/data", "tpu,gcs,s3"),
        ("s3://mine", "gs://other/data", "tpu,gcs,s3"),
    ],
)
def test_a_machine_can_reach_the_bucket_of_the_runs_and_that_of_the_tokens(bucket, store, extras):
    target = replace(TARGETS["skypilot-v5e-16"], bucket=bucket)
    run = RunConfig("r", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32, data=DataConfig(store=store))
    job = Job("j", target.largest, (run,), 60.0)
    setup = skypilot.task(job, target, Study("x.py", "x", (), f"{bucket}/runs"))["setup"]
    assert f"-e '.[{extras}]'\n" in setup


# ------------------------------------------------------------------- all 168 published runs


def jobs_of(target, runs):
    offered = ENGINES[target.engine].offered(target.largest)
    return group("head_ladder", runs, offered, target.hardware, 24.0)


def work_of(step):
    """(experiment, runs, overrides) of each job in a step, read back from its text."""
    texts = [*step.files.values(), *step.command]
    lines = [line for text in texts for line in text.splitlines() if "launch.work" in line]
    lines = lines or [
        line for text in texts for line in text.splitlines() if "gqa_scaling run" in line
    ]
    for line in lines:
        words = shlex.split(line)
        if "launch.work" in words:
            yield work.parse(words[words.index("launch.work") + 1 :])
        else:
            at = words.index("run")
            only = words[words.index("--only") + 1]
            yield (
                words[at + 1],
                [re.sub(r"^\[(.)\]", r"\1", only)],
                words[words.index("--only") + 2 :],
            )


@pytest.mark.parametrize("name", TARGETS)
def test_every_run_of_the_published_grid_is_in_one_job(name, grid):
    target = TARGETS[name]
    overrides = ("--parallel.remat", "full", "--data.store", "gs://mine/data")
    study = Study("experiments.head_ladder", "head_ladder", overrides, "gs://mine/runs")
    jobs = jobs_of(target, grid.runs)
    steps = render(target, jobs, study)
    found = [each for step in steps for each in work_of(step)]
    assert sorted(n for _, names, _ in found for n in names) == sorted(r.name for r in grid.runs)
    assert {(spec, tuple(rest)) for spec, _, rest in found} == {(study.spec, overrides)}
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", n) and len(n) < 40 for n in names)
    paths = [path for step in steps for path in step.files]
    assert len(set(paths)) == len(paths)


def test_the_grid_as_skypilot_reads_it(grid):
    target = TARGETS["skypilot-v5e-16"]
    study = Study("experiments.head_ladder", "head_ladder", (), "gs://mine/runs")
    for job in jobs_of(target, grid.runs):
        task = yaml.safe_load(skypilot.dump(skypilot.task(job, target, study)))
        assert task["name"] == job.name
        assert task["resources"]["accelerators"] == f"tpu-{job.slice.cloud_type}"
        recovery = task["resources"]["job_recovery"]
        assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 143]}


def test_what_is_restarted():
    """0 never, 75 always; 1 and 2 never; what a machine's end leaves behind, but not for ever.

    What tpu-vm starts again is in test_tpu_vm.py.
    """
    assert "--max-restarts 20 --restart-on-exit-codes 75 " in shown(TARGETS["xpk-v5e-64"])
    assert "#SBATCH --requeue" in shown(TARGETS["slurm-16xH200"])
    assert not {1, 2, 134, 137, 139} & set(skypilot.RESTART)  # see the comment there


# ----------------------------------------------------------------------------- injection

NASTY = st.one_of(
    st.sampled_from(
        [
            "$(touch pwned)",
            "`touch pwned`",
            "; touch pwned",
            "' \"",
            "a\\'b",
            "${HOME} $HOME $$ $!",
            "|&>",
        ]
        + [
            "END_OF_JOB",
            ": - #",
            "!!python/object:os.system",
            "%h %%",
            "*",
            "~",
            "--",
            "-",
            "a  b",
            "é漢\U0001f600",
        ]
    ),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.isprintable),
)
SPECS = NASTY.map(lambda text: f"x{text}.py")
NAMES = st.text("aZ09é漢-_.+", min_size=1, max_size=12).filter(lambda t: t[0].isalnum())
FAKE_PYTHON = f"#!{sys.executable} -S\nimport json, os, sys\n" + (
    'print(json.dumps([sys.argv[1:], os.environ["GQA_SCALING_RUNS"]]))\n'
)


def carried_out(script, folder, files):
    """What `bash -c script` gives to python, in a folder with these executables."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        (folder / path).chmod(0o755)
    before = set(folder.rglob("*"))
    environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "LANG": "C.UTF-8"}
    environment |= {"GQA_SCALING_RUNS": "gs://mine/runs"}  # as SkyPilot's envs do
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    own = {folder / name for name in ("job.sh", "log", "starts")}
    assert set(folder.rglob("*")) - before <= own, "it made something of its own"
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def as_kubernetes_reads(text):
    """A container's command: $$ is $, and $(NAME) becomes the variable's value."""
    return re.sub(r"\$\$|\$\(HOSTNAME\)", lambda m: "$" if m[0] == "$$" else "pod-0", text)


def test_kubernetes_replaces_nothing_in_arguments():
    config = RunConfig("r", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
    study = Study("x.py", "x", ("--note", "$$ $(HOSTNAME) $$(HOSTNAME) $"), "gs://mine/runs")
    line = xpk.command_line(Job("x", SLICES["v5e-8"], (config,), 60.0), study)
    assert shlex.split(as_kubernetes_reads(line))[-2:] == list(study.overrides)


@settings(max_examples=30)
@given(
    st.sampled_from([name for name in TARGETS if not name.startswith("slurm")]),
    SPECS,
    st.lists(NAMES, min_size=1, max_size=3),
    st.lists(NASTY, max_size=3),
)
def test_no_name_or_value_is_read_by_a_shell(target, spec, names, overrides):
    target = TARGETS[target]
    config = RunConfig("r", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
    runs = tuple(RunConfig.from_dict({**config.to_dict(), "name": name}) for name in names)
    study = Study(spec, Path(spec).stem, tuple(overrides), "gs://mine/runs")
    job = Job(job_name(study.name, runs), target.largest, runs, 60.0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {"bin/python": FAKE_PYTHON, ".venv/bin/python": FAKE_PYTHON}
        if target.engine == "skypilot":
            text = skypilot.dump(skypilot.task(job, target, study))
            task = yaml.safe_load(text)
            assert task["name"] == job.name
            script = task["run"]
        elif target.engine == "xpk":
            # xpk starts the command in a shell of its own
            script = f"({as_kubernetes_reads(xpk.command_line(job, study))}) & PID=$!; wait $PID"
        else:
            ready = replace(target, setup=("true",))  # .venv is there
            text = tpu_vm.startup_script(job, ready, study, "gs://mine/code/0")
            script = f"/bin/bash {folder}/startup.sh; grep '^\\[' log"
            files |= {f"bin/{tool}": "#!/bin/sh\n" for tool in ("gcloud", "hostname")}
            files["bin/systemctl"] = "#!/bin/sh\nexit 3\n"
            files["bin/systemd-run"] = '#!/bin/bash\nshift\nexec "$@"\n'
            files["startup.sh"] = text.replace(tpu_vm.HOME, str(folder))
        said, errors = carried_out(script, folder, files)
    overrides = ["--", *overrides] if overrides else []
    assert said == [[["-m", "launch.work", spec, *names, *overrides], "gs://mine/runs"]], errors


def test_rendering_for_slurm_leaves_the_logging_of_others_alone(monkeypatch, tmp_path):
    """submitit, left to itself, closes every handler, and absl's closes the stream that it writes to."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "submitit"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delenv("SUBMITIT_LOG_LEVEL", raising=False)
    closed = []
    handler = logging.StreamHandler((tmp_path / "log").open("w"))
    monkeypatch.setattr(handler, "close", lambda: closed.append(handler.stream.close()))
    target, study = TARGETS["slurm-16xH200"], Study("experiments.tiny", "tiny", (), "runs")
    config = RunConfig("r", ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
    jobs = [Job("j", SLICES["8xH200"], (config,), 60.0)]
    assert slurm.render(jobs, target, study)
    assert "submitit" in sys.modules
    assert closed == []
    assert "SUBMITIT_LOG_LEVEL" not in os.environ  # what the jobs inherit
    handler.stream.close()


@given(SPECS, NAMES, st.lists(NASTY, max_size=3))
def test_slurm_has_arguments_and_no_shell(spec, name, overrides):
    config = RunConfig(name, ModelConfig(1, 32, 1, 1), 32, 32, tokens=32)
    study = Study(spec, Path(spec).stem, tuple(overrides), "runs")
    jobs = [Job("j", SLICES["8xH200"], (config,), 60.0)]
    (task,) = slurm.array_tasks(jobs, study)
    assert task.todo[0][3:] == ("run", spec, "--only", work.exactly(name), *overrides)
    (step,) = slurm.render(jobs, TARGETS["slurm-16xH200"], study)
    script = next(iter(step.files.values()))
    assert subprocess.run(["/bin/bash", "-n", "-c", script]).returncode == 0


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\0b", "a\u2028b", "\x1b[0m"])
def test_a_line_break_is_refused(text):
    with pytest.raises(UserError, match="line break or control character"):
        Study("x.py", "x", ("--note", text), "runs")


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    for name, target in TARGETS.items():
        (GOLDEN / f"{name}.txt").write_text(shown(target))
