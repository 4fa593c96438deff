"""xpk: JobSets on a GKE cluster, queued by Kueue."""

import shlex
from collections.abc import Sequence

from gqa_scaling.files.claims import STALE_SECONDS
from gqa_scaling.hardware import Slice
from launch.engines import BUCKET, PROJECT, SAVE_SECONDS, Engine
from launch.jobs import Job
from launch.submission import Step, Study, require_google_account, require_tool
from launch.targets import Target
from launch.work import PREEMPTED

# xpk also restarts on 127 to 255, and there is no way to have it not: so not for ever.
MAX_RESTARTS = 20
# A finished job's workload and logs. While it is there xpk asks whether to overwrite it when the same job
# is launched again: so no longer than a claim of the job may last.
KEPT_SECONDS = STALE_SECONDS


def offered(largest: Slice) -> list[Slice]:
    """The one that was named: a cluster has slices of one size. None below v5e-8."""
    small = largest.kind == "v5e" and largest.chips < 8
    return [] if small else [largest]


def check(target: Target) -> None:
    """Raise UserError for what is missing."""
    require_tool("xpk", "pip install xpk into an environment of its own, with Python 3.12 or newer")
    require_google_account()


def command_line(job: Job, study: Study) -> str:
    """The shell command of the container. `exec`, as xpk sends SIGTERM to its shell only."""
    environment = [f"{name}={value}" for name, value in study.environment(job).items()]
    line = shlex.join(["exec", "env", *environment, "python", *study.work(job)])
    return line.replace("$", "$$")  # Kubernetes replaces $(NAME) and reads $$ as $


def render(jobs: Sequence[Job], target: Target, study: Study) -> list[Step]:
    """One workload for each job."""
    return [
        Step(
            (
                *("xpk", "workload", "create"),
                *("--workload", job.name),
                *("--cluster", target.cluster, *target.google_place),
                *("--tpu-type", job.slice.cloud_type),
                *("--docker-image", target.image),
                *("--max-restarts", str(MAX_RESTARTS)),
                *("--restart-on-exit-codes", str(PREEMPTED)),
                *("--ttl-seconds-after-finished", str(KEPT_SECONDS)),
                *("--termination-grace-period-seconds", str(SAVE_SECONDS)),
                *("--command", command_line(job, study)),
            )
        )
        for job in jobs
    ]


def after(jobs: Sequence[Job], target: Target, study: Study) -> list[str]:
    """What to type next."""
    where = shlex.join(["--cluster", target.cluster, *target.google_place])
    most = max(
        job.slice.chips for job in jobs
    )  # of pods there are fewer; unless told kubectl follows 5
    return [
        f"queue:    xpk workload list {where}",
        f"log:      kubectl logs --follow --max-log-requests={most} "
        "--selector jobset.sigs.k8s.io/jobset-name=JOB",
        f"cancel:   xpk workload delete --workload JOB {where}",
        f"clean up: xpk cluster delete {where}",
    ]


ENGINE = Engine(
    name="xpk",
    about="JobSets on a GKE cluster with TPUs, queued by Kueue, through xpk",
    options=("cluster", "project", "zone", "image"),
    gpus=False,
    needs={
        "bucket": BUCKET,
        "cluster": "the GKE cluster",
        "project": PROJECT,
        "zone": "that of the cluster, such as us-west4-a",
        "image": "a container with this checkout and its environment (docs/launch.md)",
    },
    offered=offered,
    check=check,
    render=render,
    after=after,
)
