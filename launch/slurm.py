"""SLURM: an array job for each size of slice, through submitit, one task for each node.

A job that was preempted or reached its time limit saves, and SLURM starts it again.
"""

import importlib
import importlib.util
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_scaling.config import require
from gqa_scaling.files.storage import make_folder
from gqa_scaling.hardware import GPUS_PER_HOST, Slice
from launch.engines import SAVE_SECONDS, Engine
from launch.jobs import Job, by_slice, label
from launch.submission import Step, Study, require_tool
from launch.targets import Target
from launch.work import LOST, PREEMPTED, Work, commands

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

CPUS_PER_GPU = 8  # where a job has part of a node; every node with such GPUs has more than these
GIB_PER_GPU = 64
LOST_RESTARTS = 3  # a process that dies on a healthy machine will likely die again
REQUEUE_SECONDS = 45  # for SLURM's signal, which may come late, and for asking it to requeue
TIME_LIMITS = 50  # each follows hours of progress, but nothing goes on for ever


def check(target: Target) -> None:
    """Raise UserError for what is missing."""
    for tool in ("sbatch", "srun"):
        require_tool(tool, "launch from a login node of the SLURM cluster")


def refuse(target: Target) -> None:
    """Raise UserError for options that cannot be passed on, and where submitit is not installed."""
    found = importlib.util.find_spec("submitit") is not None
    require(found, "slurm needs submitit: pip install -e '.[launch]'")
    own_options(target)


# What --sbatch may not change, and what says it instead.
OF_THE_SLICE = "the slice decides it"
OF_THE_LAUNCHER = "starting a job again and reading its log depend on it"
SET_HERE = {
    **dict.fromkeys(("nodes", "ntasks", "ntasks-per-node", "tasks-per-node"), OF_THE_SLICE),
    **dict.fromkeys(("gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"), OF_THE_SLICE),
    "ntasks-per-gpu": OF_THE_SLICE,
    **dict.fromkeys(("array", "chdir", "job-name", "output", "error"), OF_THE_LAUNCHER),
    **dict.fromkeys(("open-mode", "requeue", "no-requeue", "signal", "wrap"), OF_THE_LAUNCHER),
    "partition": "give --partition",
    "account": "give --account",
    "time": "give --hours",
}
# Each of these, given with --sbatch, takes the place of what is asked for by default.
INSTEAD_OF = {
    "exclusive": ("exclusive", "oversubscribe"),
    "cpus-per-task": ("cpus-per-task", "cpus-per-gpu"),
    "mem": ("mem", "mem-per-cpu", "mem-per-gpu"),
}


def own_options(target: Target) -> dict[str, str | bool]:
    """The options of `--sbatch qos=high --sbatch hold` by name; True where one takes no value.

    Raises UserError for what is no option of sbatch by its form, or is set here.
    """
    options: dict[str, str | bool] = {}
    for text in target.sbatch:
        name, equals, value = text.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        valid = re.fullmatch(r"[a-z][a-z0-9-]*", name) and value.isprintable()
        require(
            bool(valid) and bool(equals) == bool(value),
            f"--sbatch {text!r} must be a long option of sbatch and its value, such as qos=high",
        )
        require(name not in SET_HERE, f"--sbatch {name} cannot be given: {SET_HERE.get(name)}")
        gpus = name == "gres" and re.search(r"(^|,)(gres[:/])?gpu", value)
        require(not gpus, f"--sbatch {text!r} cannot ask for GPUs: {OF_THE_SLICE}")
        options[name] = value if equals else True
    return options


def resources(place: Slice, target: Target) -> dict[str, str | int | bool]:
    """What is asked for of each node beside its GPUs: all of it, or a fair part of it."""
    given = own_options(target)
    chosen: dict[str, str | int | bool] = (
        {"exclusive": True, "mem": "0"}  # sbatch reads 0 as all memory
        if place.chips_per_host == GPUS_PER_HOST
        else {
            "cpus-per-task": CPUS_PER_GPU * place.chips_per_host,
            "mem": f"{GIB_PER_GPU * place.chips_per_host}G",
        }
    )
    left = {k: v for k, v in chosen.items() if not given.keys() & set(INSTEAD_OF[k])}
    return {**left, **given}


@dataclass(frozen=True)
class ArrayTask:
    """A job as submitit pickles it, to be called on each of its nodes."""

    todo: tuple[tuple[str, ...], ...]
    environment: dict[str, str]
    lost_restarts: int = LOST_RESTARTS

    @property
    def env_command(self) -> list[str]:
        """The environment as a shell command says it, for people to read."""
        return ["env", *(f"{name}={value}" for name, value in self.environment.items())]

    def __call__(self) -> None:
        """Do the runs; an exit code other than 0 becomes an exception and so SLURM's FAILED."""
        global _work, _lost
        os.environ.update(self.environment)
        _work, _lost = Work([list(command) for command in self.todo]), False
        signal.signal(signal.SIGTERM, _work.stop)
        code = _work.run()
        first = os.environ.get("SLURM_PROCID", "0") == "0"
        told = code in (PREEMPTED, 143) and _work.stopped  # 143: before it could save
        if told or (code in (PREEMPTED, *LOST) and not first):
            # Told by SLURM, for a preemption or scancel: it knows whether to start again. Else the
            # first task requeues. Either way SLURM ends this process.
            while True:
                signal.pause()
        _lost = code in LOST and self.lost_restarts > 0
        if code == PREEMPTED or _lost:
            signal.raise_signal(_requeue_signal())
        if code != 0:
            raise RuntimeError(f"gqa-scaling run ended with exit code {code}")

    def checkpoint(self) -> "DelayedSubmission":
        """Called by submitit's handler of its signal, before it requeues: save, and come again.

        A job that has not asked for it when its time is over is never requeued: a run that saves for too
        long is left, and goes on from the checkpoint before.
        """
        from submitit.helpers import DelayedSubmission

        assert _work is not None
        _work.stop()
        _work.wait(SAVE_SECONDS - REQUEUE_SECONDS)
        return DelayedSubmission(replace(self, lost_restarts=self.lost_restarts - _lost))


_work: Work | None = None  # of this process; a task that is pickled has none
_lost = False


def _requeue_signal() -> int:
    from submitit.core.job_environment import JobEnvironment

    return JobEnvironment._usr_sig()


def _load_submitit() -> None:
    """Have submitit imported without configuring logging, which would close everybody's handlers, and
    with them what these write to. In the jobs, which get none of this, it logs as ever."""
    level = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = level or "NOCONFIG"
    try:
        importlib.import_module("submitit")
    finally:
        if level is None:
            del os.environ["SUBMITIT_LOG_LEVEL"]


def array_tasks(jobs: Sequence[Job], study: Study) -> list[ArrayTask]:
    """One for each job, in order."""

    def todo(job: Job) -> tuple[tuple[str, ...], ...]:
        names = [run.name for run in job.runs]
        return tuple(map(tuple, commands(study.spec, names, study.overrides)))

    return [ArrayTask(todo(job), study.environment(job)) for job in jobs]


def parameters(jobs: Sequence[Job], target: Target, study: Study) -> dict[str, Any]:
    """What submitit passes on to sbatch for jobs of one slice.

    Twice the predicted time, as SLURM finds room for short jobs sooner; more is had by requeueing.
    """
    place, longest = jobs[0].slice, max(job.seconds for job in jobs)
    asked = resources(place, target)
    # srun does not take cpus-per-task over from sbatch, and without it may bind a task to one core
    cpus = asked.get("cpus-per-task")
    cores = "--cpu-bind=none" if cpus is None else f"--cpus-per-task={cpus}"
    chosen = {
        "job_name": label(study.name),
        "time": math.ceil(min(60 * target.hours, 30 + 2 * longest / 60)),
        "nodes": place.hosts,
        "ntasks_per_node": 1,
        "gpus_per_node": place.chips_per_host,
        "signal_delay_s": SAVE_SECONDS,
        # nodes whose peer failed wait for their end
        "srun_args": ["--kill-on-bad-exit=1", cores],
        "additional_parameters": {"requeue": True, **asked},
    }
    optional = {
        "partition": target.partition,
        "account": target.account,
        "setup": list(target.setup),
    }
    return chosen | {key: value for key, value in optional.items() if value}


def folder(place: Slice, study: Study) -> Path:
    """Of the pickles and logs; every node must see it."""
    return (study.folder / f"slurm-{place.vendor_name}").absolute()


def render(jobs: Sequence[Job], target: Target, study: Study) -> list[Step]:
    """The sbatch files as submitit will write them; it adds an id to their names."""
    _load_submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    steps = []
    for place, members in by_slice(jobs).items():
        at = folder(place, study)
        command = (
            f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(at))}"
        )
        text = _make_sbatch_string(
            command=command,
            folder=at,
            map_count=len(members) if len(members) > 1 else None,
            **parameters(members, target, study),
        )
        tasks = [
            f"task {i}, {job.name}: {shlex.join([*task.env_command, *command])}\n"
            for i, (job, task) in enumerate(zip(members, array_tasks(members, study), strict=True))
            for command in task.todo
        ]
        path = at / "submission_file.sh"
        steps.append(Step(("sbatch", str(path)), {path: text, at / "pickled": "".join(tasks)}))
    return steps


def after(jobs: Sequence[Job], target: Target, study: Study) -> list[str]:
    """What to type next."""
    return [
        f"queue:    squeue --me --name {label(study.name)}",
        f"log:      tail -f {study.folder}/slurm-*/*_log.out",
        "cancel:   scancel JOBID, or JOBID_TASK",
        f"clean up: rm -r {study.folder}",
    ]


def submit(jobs: Sequence[Job], target: Target, study: Study) -> None:
    """One array for each size of slice."""
    _load_submitit()
    from submitit import SlurmExecutor

    for place, members in by_slice(jobs).items():
        make_folder(folder(place, study))
        executor = SlurmExecutor(folder(place, study), max_num_timeout=TIME_LIMITS)
        executor.update_parameters(**parameters(members, target, study))
        with executor.batch():
            submitted = [executor.submit(task) for task in array_tasks(members, study)]
        job = submitted[0].job_id.partition("_")[0]
        print(f"{place.vendor_name}: SLURM job {job}, {len(members)} tasks")


ENGINE = Engine(
    name="slurm",
    about="a SLURM cluster with GPUs, as array jobs that are requeued",
    options=("partition", "account", "setup", "sbatch"),
    tpus=False,
    shares_files=True,
    refuse=refuse,
    check=check,
    render=render,
    after=after,
    submit_by=submit,
)
