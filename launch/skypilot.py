"""SkyPilot managed jobs: any cloud, spot with recovery."""

import shlex
from collections.abc import Sequence

import yaml

from launch.engines import BUCKET, Engine
from launch.jobs import Job
from launch.submission import Step, Study, require_tool
from launch.targets import TPU_RUNTIME, Target
from launch.work import PREEMPTED

GPUS = {"a100": "A100-80GB", "h100": "H100", "h200": "H200"}
# A lost machine SkyPilot sees for itself. It gives 137 to the healthy peers of a failed process:
# to recover from that would restart every bug for ever.
RESTART = (PREEMPTED, 143)


def check(target: Target) -> None:
    """Raise UserError for what is missing."""
    require_tool(
        "sky", "pip install 'skypilot[gcp]' into an environment of its own, then sky check"
    )


def task(job: Job, target: Target, study: Study) -> dict[str, object]:
    """The managed job as SkyPilot's task YAML has it."""
    place = job.slice
    infra = target.infra or ("gcp" if place.is_tpu else "")
    resources: dict[str, object] = {"infra": infra} if infra else {}
    if place.is_tpu:
        resources["accelerators"] = f"tpu-{place.cloud_type}"
        runtime = TPU_RUNTIME[place.kind]
        resources["accelerator_args"] = {"tpu_vm": True, "runtime_version": runtime}
    else:
        resources["accelerators"] = f"{GPUS[place.kind]}:{place.chips_per_host}"
    if target.image:
        resources["image_id"] = target.image
    resources["use_spot"] = target.spot
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": list(RESTART),
    }
    command = shlex.join([".venv/bin/python", *study.work(job)])
    return {
        "name": job.name,
        "workdir": ".",
        "num_nodes": 1 if place.is_tpu else place.hosts,  # the hosts of a TPU slice are one node
        "resources": resources,
        "envs": study.environment(job),
        "setup": _script(target.setup_commands(job.stores)),
        "run": _script([*(_PEERS if not place.is_tpu and place.hosts > 1 else ()), command]),
    }


_PEERS = (
    'export JAX_COORDINATOR_ADDRESS="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):8476"',
    'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
)


def _script(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def render(jobs: Sequence[Job], target: Target, study: Study) -> list[Step]:
    """One managed job for each job."""
    steps = []
    for job in jobs:
        path = study.folder / f"{job.name}.yaml"
        files = {path: dump(task(job, target, study))}
        steps.append(Step(("sky", "jobs", "launch", "--detach-run", "--yes", str(path)), files))
    return steps


def after(jobs: Sequence[Job], target: Target, study: Study) -> list[str]:
    """What to type next."""
    return [
        "queue:    sky jobs queue",
        "log:      sky jobs logs --name JOB",
        "cancel:   sky jobs cancel --name JOB",
        "clean up: sky jobs cancel --all, then sky down the controller that sky status names",
    ]


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks, as people write them."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def dump(value: object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=10**6, allow_unicode=True)


ENGINE = Engine(
    sends_code=True,
    name="skypilot",
    about="SkyPilot managed jobs on any cloud, spot with recovery",
    options=("on-demand", "infra", "image", "setup"),
    needs={"bucket": BUCKET},
    check=check,
    render=render,
    after=after,
)
