"""Cloud TPU queued resources: one slice for each job, with nothing but gcloud.

Every worker of the slice runs the same start-up script, and systemd there acts on exit codes.
"""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from gqa_scaling.config import require
from launch.jobs import Job
from launch.skypilot import RUNTIME
from launch.submission import Step, Study, require_google_account, run
from launch.targets import Slice, Target, sizes_up_to
from launch.work import DONE, FAILED, MENDABLE, PREEMPTED

ABOUT = "Cloud TPU queued resources, with nothing but gcloud"
OPTIONS = ("on-demand", "project", "zone", "setup")
CODE = ("gqa_scaling", "launch", "experiments", "pyproject.toml", "requirements.txt", "README.md")
STARTS_A_DAY = 5
HOME = "/opt/gqa_scaling"


def offered(largest: Slice) -> list[Slice]:
    """The slices that a run may get."""
    return sizes_up_to(largest)


def check(target: Target) -> None:
    """Raise UserError for what is missing."""
    require_google_account()
    missing = [name for name in CODE if not Path(name).exists()]
    require(not missing, f"no {', '.join(missing)} here: launch tpu-vm from the checkout")


def require_fields(target: Target) -> None:
    require(
        target.largest.is_tpu,
        f"tpu-vm is for TPUs; take skypilot or slurm for {target.largest.name}",
    )
    target.require_fields(
        bucket="where the runs are kept, such as gs://my-bucket",
        project="the Google Cloud project",
        zone="one with such TPUs, such as us-west4-a",
    )
    require(
        target.bucket.startswith("gs://"),
        f"tpu-vm copies code with gcloud: {target.bucket} is no gs://",
    )


def code(study: Study) -> tuple[str, ...]:
    """The files and folders that a machine needs, the experiment's own included."""
    return tuple(dict.fromkeys((*CODE, study.source.parts[0])))


def code_digest(names: Sequence[str]) -> str:
    """12 hex digits over the files that are copied, so that a queued job keeps its own code."""
    digest = hashlib.sha256()
    for path in sorted(p for name in names for p in [Path(name), *Path(name).rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def startup_script(job: Job, target: Target, study: Study, copied: str) -> str:
    """What every worker does when it boots.

    systemd starts the job again when it was preempted or lost a process, STARTS_A_DAY times at
    most. When it is over the first worker copies its log to the bucket and gives the slice back.
    """
    where = ["--project", target.project, "--zone", target.zone]
    delete = shlex.join([*_QUEUED, "delete", job.name, *where, "--force", "--quiet", "--async"])
    log = f"{target.bucket}/logs/{job.name}.log"
    over = "|".join(f"{code}:*-w-0" for code in (DONE, FAILED, MENDABLE))
    unit = {
        "Restart": "on-failure",
        "RestartForceExitStatus": f"{PREEMPTED} 143",
        "RestartPreventExitStatus": f"{FAILED} {MENDABLE}",
        "RestartSec": "30",
        "StartLimitIntervalSec": "1d",
        "StartLimitBurst": str(STARTS_A_DAY),
        "StandardOutput": f"append:{HOME}/log",
        "StandardError": f"append:{HOME}/log",
    }
    start = ["systemd-run", "--unit=gqa-scaling", f"--working-directory={HOME}"]
    start += [f"--property={key}={value}" for key, value in unit.items()]
    lines = [
        "#!/bin/bash",
        "set -euo pipefail",
        "export HOME=/root",
        f"mkdir -p {HOME}",
        f"cd {HOME}",
        shlex.join(["gcloud", "storage", "rsync", "--recursive", copied, "."]),
        *target.setup_commands,
        "cat > job.sh <<'END_OF_JOB'",
        f"export HOME=/root GQA_SCALING_RUNS={shlex.quote(study.root)}",
        shlex.join([".venv/bin/python", *study.work(job)]),
        "code=$?",
        f'case "$code:$(hostname)" in {over})',
        f"  gcloud storage cp log {shlex.quote(log)}",
        f"  {delete}  # an idle slice is billed",
        "esac",
        "exit $code",
        "END_OF_JOB",
        shlex.join([*start, "/bin/bash", "job.sh"]),
    ]
    return "".join(f"{line}\n" for line in lines)


_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")


def render(jobs: Sequence[Job], target: Target, study: Study) -> list[Step]:
    """The code into the bucket, then one queued resource for each job."""
    names = code(study)
    copied = f"{target.bucket}/code/{code_digest(names)}"
    steps = [Step(("gcloud", "storage", "cp", "--recursive", *names, f"{copied}/"))]
    for job in jobs:
        path = study.folder / f"{job.name}.sh"
        command = (
            *(*_QUEUED, "create", job.name, "--node-id", job.name),
            *("--project", target.project, "--zone", target.zone),
            *("--accelerator-type", job.slice.cloud_type),
            *("--runtime-version", RUNTIME[job.slice.accelerator]),
            *("--metadata-from-file", f"startup-script={path}"),
            *(("--spot",) if target.spot else ()),
        )
        steps.append(Step(command, {path: startup_script(job, target, study, copied)}))
    return steps


def submit(jobs: Sequence[Job], target: Target, study: Study) -> None:
    """In the order of `render`."""
    run(render(jobs, target, study))


def after(jobs: Sequence[Job], target: Target, study: Study) -> list[str]:
    """What to type next."""
    where = shlex.join(["--project", target.project, "--zone", target.zone])
    names = [job.name for job in jobs]
    return [
        f"queue:    {shlex.join(_QUEUED)} list {where}",
        *(
            f"log:      gcloud compute tpus tpu-vm ssh {name} {where} --worker=0 "
            f"--command='tail -f {HOME}/log'"
            for name in names[:1]
        ),
        *(f"clean up: {shlex.join(_QUEUED)} delete {n} {where} --force --quiet" for n in names),
        f"a slice gives itself back when its job is over, and its log is then in {target.bucket}/logs;",
        "one that was preempted must be deleted, and its job launched again",
    ]
