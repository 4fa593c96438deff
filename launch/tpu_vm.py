"""Cloud TPU queued resources: one slice for each job, with nothing but gcloud.

Every worker of the slice runs the same start-up script, which gives the slice back at the end.
"""

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from gqa_scaling.config import require
from gqa_scaling.hardware import Slice
from launch.engines import BUCKET, PROJECT, Engine
from launch.jobs import Job, by_slice
from launch.submission import CODE, Step, Study, require_google_account
from launch.targets import TPU_RUNTIME, Target
from launch.work import LOST, PREEMPTED

STARTS_A_DAY = 5
HOME = "/opt/gqa_scaling"


def check(target: Target) -> None:
    """Raise UserError for what is missing."""
    require_google_account()


def refuse(target: Target) -> None:
    """Raise UserError for a bucket that gcloud cannot copy to."""
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
    """What every worker does when it boots: as a start-up script, and then as a service.

    The service outlives the start-up script, and starts the job again when it was preempted or
    lost a process, STARTS_A_DAY times at most. When the machine is shut down systemd ends it with
    SIGTERM, which the run hears, and the next boot begins again. Whatever fails, the worker copies
    its log to the bucket and deletes the slice, as the first would wait in vain for one that failed
    alone; where that is refused the log says what it costs.
    """
    log = f'"{target.bucket}/logs/{job.name}-w-$worker.log"'
    delete = delete_command(job, target)
    refused = f"{job.name} could not be deleted. It is billed {billed(job.slice, target)} until you do: {delete}"
    environment = [f"{name}={shlex.quote(v)}" for name, v in study.environment(job).items()]
    again = "|".join(map(str, (PREEMPTED, *LOST)))
    copy = shlex.join(["gcloud", "storage", "rsync", "--recursive", copied, "."])
    set_up = "\n".join([copy, *target.setup_commands(job.stores)])
    lines = [
        "#!/bin/bash",
        f"export HOME=/root {' '.join(environment)}",
        "worker=$(hostname)",
        "case $worker in *-w-*) worker=${worker##*-w-} ;; *) worker=0 ;; esac",
        "",
        "give_back() {  # the slice is billed until it is deleted",
        '  echo "$1: the slice is given back"',
        f"  gcloud storage cp log {log}",
        f"  until {delete} --async; do",
        f"    echo {shlex.quote(refused)}",
        f"    gcloud storage cp log {log}",
        "    sleep 600 || break",
        "  done",
        "  exit",
        "}",
        "",
        f"mkdir -p {HOME} && cd {HOME} && exec >> log 2>&1 || give_back 'no log can be written'",
        'if [ "$1" != service ]; then',
        "  systemctl is-active --quiet gqa-scaling && exit  # somebody ran this script by hand",
        f'  cp "$0" {HOME}/job.sh &&',
        f"    systemd-run --unit=gqa-scaling /bin/bash {HOME}/job.sh service && exit",
        "  give_back 'the service could not be started'",
        "fi",
        "",
        f"timeout 1h /bin/bash -euo pipefail -c {shlex.quote(set_up)}",  # a command with an open quote fails alone
        "[ $? = 0 ] || give_back 'the machine could not be set up'",
        "",
        "while :; do",
        "  today=$(date +%F)",
        '  echo "started on $today" >> starts &&',
        f'    [ "$(grep -c "$today" starts)" -le {STARTS_A_DAY} ] ||',
        f"    give_back 'the job has ended early {STARTS_A_DAY} times today'",
        f"  {shlex.join(['.venv/bin/python', *study.work(job)])}",
        "  code=$?",
        f"  case $code in {again}) sleep 30 ;; *) break ;; esac",
        "done",
        "[ $worker = 0 ] || [ $code = 0 ] || sleep 60  # the first may be copying its log",
        '[ $worker != 0 ] && [ $code = 0 ] || give_back "the job ended with exit code $code"',
    ]
    return "".join(f"{line}\n" for line in lines)


def delete_command(job: Job, target: Target) -> str:
    """The shell command that deletes a job's slice and its place in the queue."""
    return shlex.join([*_QUEUED, "delete", job.name, *target.google_place, "--force", "--quiet"])


def billed(place: Slice, target: Target) -> str:
    """What a slice costs, as people read it."""
    return f"${place.chips * target.hardware.price:,.2f} an hour"


_QUEUED = ("gcloud", "compute", "tpus", "queued-resources")


def render(jobs: Sequence[Job], target: Target, study: Study) -> list[Step]:
    """The code into the bucket, then one queued resource for each job."""
    names = code(study)
    copied = f"{target.bucket}/code/{code_digest(names)}"
    steps = [Step(("gcloud", "storage", "cp", "--recursive", *names, f"{copied}/"))]
    for job in jobs:
        path = study.folder / f"{job.name}.sh"
        command = (
            *(*_QUEUED, "create", job.name, "--node-id", job.name, *target.google_place),
            *("--accelerator-type", job.slice.cloud_type),
            *("--runtime-version", TPU_RUNTIME[job.slice.kind]),
            *("--metadata-from-file", f"startup-script={path}"),
            *(("--spot",) if target.spot else ()),
        )
        steps.append(Step(command, {path: startup_script(job, target, study, copied)}))
    return steps


def after(jobs: Sequence[Job], target: Target, study: Study) -> list[str]:
    """What to type next."""
    where = shlex.join(target.google_place)
    costs = ", ".join(f"{place.vendor_name} {billed(place, target)}" for place in by_slice(jobs))
    return [
        f"queue:    {shlex.join(_QUEUED)} list {where}",
        f"log:      gcloud compute tpus tpu-vm ssh {jobs[0].name} {where} --worker=0 "
        f"--command='tail -f {HOME}/log'",
        *(f"clean up: {delete_command(job, target)}" for job in jobs),
        f"A slice is billed from when it is made until it is deleted ({costs}). It copies its log to",
        f"{target.bucket}/logs and deletes itself when its job is over or cannot go on. Where it may",
        "not, the last line of that log says so: clean up. One that was preempted must be deleted,",
        "and its job launched again.",
    ]


ENGINE = Engine(
    sends_code=True,
    name="tpu-vm",
    about="Cloud TPU queued resources, with nothing but gcloud",
    options=("on-demand", "project", "zone", "setup"),
    gpus=False,
    needs={"bucket": BUCKET, "project": PROJECT, "zone": "one with such TPUs, such as us-west4-a"},
    refuse=refuse,
    check=check,
    render=render,
    after=after,
)
