"""Carrying a grid out: every run that is not done is trained, one after the other."""

import enum
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data import TokenStore, open_store
from gqa_scaling.data.store import stores_of
from gqa_scaling.devices.layout import check_layout
from gqa_scaling.experiment.branches import Trunk
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.experiment.starts import check_starts, parent_of, require_parent
from gqa_scaling.files.checksums import is_saved
from gqa_scaling.files.claims import claim, waited_for
from gqa_scaling.files.failures import failure
from gqa_scaling.files.runs import (
    RunDirectory,
    evaluation_in,
    parent_directory,
    run_directories,
    run_directory,
)
from gqa_scaling.files.storage import (
    cache_folder,
    check_writable,
    is_remote,
    make_folder,
    together,
)
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import check_average, check_epochs, check_profile, check_steps
from gqa_scaling.units import byte_size, count

LONGEST_PAUSE = 32  # seconds between two looks at runs in a bucket that others are at


@dataclass(frozen=True)
class Outcome:
    """How many runs are done and how many failed, now or before; of these, how many by what the user
    can mend."""

    done: int
    failed: int
    mendable: int = 0

    @property
    def exit_code(self) -> int:
        return 2 if self.mendable else int(self.failed > 0)


class _End(enum.Enum):
    """How one run of a sweep has ended, now or before."""

    DONE = enum.auto()
    FAILED = enum.auto()
    MENDABLE = enum.auto()  # failed by what the user can mend


class _Left(enum.IntEnum):
    """What is left to do of a run. Numbers, as the leader tells them to the other processes."""

    NOTHING = 0  # it failed before
    MENDING = 1  # it failed before, by what the user can mend
    TRAINING = 2
    EVALUATION = 3
    CLEANING = 4


def pending(experiment: Experiment, root: Path) -> list[RunConfig]:
    """The runs that have no result, or none under the current evaluation."""
    directories = run_directories(root, experiment.name, experiment.runs)
    results = together(RunDirectory.result, directories)
    pairs = zip(experiment.runs, results, strict=True)
    return [run for run, result in pairs if not _is_judged(run, result)]


def forget_failures(experiment: Experiment, root: Path) -> None:
    """Have the runs that failed tried again."""
    for run in experiment.runs:
        run_directory(root, experiment.name, run).failure_file.unlink(missing_ok=True)


def _is_judged(run: RunConfig, result: dict[str, Any] | None) -> bool:
    """Whether a run has a result, and in it one under its current evaluation."""
    return evaluation_in(result, run.evaluation_digest) is not None


# ---------------------------------------------------------------------------------- the sweep


def check(experiment: Experiment, root: Path) -> dict[str, TokenStore]:
    """Open every token store and check every run against it, the devices, and the disk's room or
    that the bucket can be written to.

    Raises UserError before anything is trained or compiled.
    """
    import jax

    from gqa_scaling.devices.processes import is_leader, require_platform
    from gqa_scaling.training.judging import check_evaluation
    from gqa_scaling.training.loop import check_data

    require_platform()
    check_starts(experiment.runs, experiment.name, root)
    _require_judged(experiment, root)
    stores = {path: open_store(data) for path, data in stores_of(experiment.runs).items()}
    for store in stores.values():
        store.verify()
    need = 0
    for run in experiment.runs:
        path = run.data.store_path
        kind = jax.devices()[0].device_kind
        check_layout(run, jax.device_count(), jax.default_backend(), kind)
        check_steps(run)
        check_profile(run)
        check_epochs(run, stores[path].train_tokens)
        check_data(run, stores[path])
        check_evaluation(run, stores[path])
        check_average(run)
        directory = run_directory(root, experiment.name, run)
        parent = parent_directory(directory, run)
        own = parent is not None and parent_of(run, experiment.runs) is not None
        done = directory.state() == "done"
        if parent is not None and (not own or (not done and parent.state() == "done")):
            require_parent(run, parent, stores[path].describe()["tokenizer_hash"])
        _require_average(run, directory)
        if not done:
            need = max(need, memory.checkpoint_bytes(run) + memory.finished_bytes(run))
    if is_remote(root):
        if is_leader():
            check_writable(root)
        return stores
    make_folder(root)
    free = shutil.disk_usage(root).free
    require(
        free >= need,
        f"{root} has {byte_size(free)} free and the largest run needs {byte_size(need)} for its "
        "checkpoints; make room or set GQA_SCALING_RUNS",
    )
    return stores


def _require_judged(experiment: Experiment, root: Path) -> None:
    """Refuse a new evaluation of runs that were put back without their parameters."""
    directories = run_directories(root, experiment.name, experiment.runs)
    pairs = zip(experiment.runs, directories, strict=True)
    restored = [(run, each.result()) for run, each in pairs if each.is_restored()]
    named = [run.name for run, result in restored if result and not _is_judged(run, result)]
    require(
        not named,
        f"{count(len(named), 'run')} of {experiment.name} ({', '.join(named[:4])}{', ...' * (len(named) > 4)}) "
        "were put back from a kept study, and cannot be judged by another evaluation without their parameters: "
        "keep to that of the study, leave them out with --only, or remove their directories to train them again",
    )


def _require_average(run: RunConfig, directory: RunDirectory) -> None:
    """Refuse to judge the mean of states that are gone: checkpoints go when a run is finished."""
    result = directory.result() if run.evaluation.average > 1 else None
    require(
        result is None or _is_judged(run, result) or directory.averaged(run).exists(),
        f"{run.name} is finished and its checkpoints are removed: evaluation.average="
        f"{run.evaluation.average} can be asked for only before; judge it with "
        "--evaluation.average 1, or train it anew under another --root",
    )
    if result is None and not directory.averaged(run).exists():
        _require_states(run, directory)


def _require_states(run: RunConfig, directory: RunDirectory) -> None:
    """Refuse to go on with a run that was begun without this average, and has dropped a state of it."""
    from gqa_scaling.training.averaging import averaged_steps

    steps = [each.name for each in directory.checkpoints.glob("*") if is_saved(each)]
    kept = sorted(int(step) for step in steps if step.isdecimal())
    gone = [step for step in averaged_steps(run) if kept and step < kept[-1] and step not in kept]
    if gone:
        raise UserError(
            f"{run.name} was begun with another evaluation or checkpoint.every_steps: "
            f"evaluation.average={run.evaluation.average} needs the checkpoint of step {gone[0]}, and "
            f"it has kept {', '.join(map(str, kept))}; go on with --evaluation.average 1, or train it "
            "anew under another --root"
        )


def run_sweep(experiment: Experiment, root: Path) -> Outcome:
    """Train every run that is not done; those that another process is at are waited for.

    A run that fails is recorded with its traceback and the next one starts; it is not tried again
    until `forget_failures`. In a job of several processes all of them call this and a failure is
    raised, as RunFailed or UserError, since the others cannot go on. Raises UserError for what `check` finds, OSError for a
    disk or a bucket that cannot be used, when no later run could do better, and Preempted once all
    is saved.
    """
    from gqa_scaling.devices import processes
    from gqa_scaling.devices.compilation_cache import keep_compiled

    stores = check(experiment, root)
    folder = _compiled_folder(root)
    if folder is not None:
        keep_compiled(folder)
    left, found, ends = list(experiment.runs), experiment.trunks, list[_End]()
    left_out = list[RunConfig]()
    grid = experiment.declared or experiment.runs
    longest = LONGEST_PAUSE if is_remote(root) else 1
    pause, announced = 1, set[str]()
    while left:
        elsewhere = []
        for run in left:
            _stop_if_told(run)
            directory = run_directory(root, experiment.name, run)
            leads, trunk = processes.is_leader(), found.get(run.digest)
            waits = _Waits.NO
            if run.start_from or trunk:
                known = _waits(run, directory, trunk, left, left_out)
                waits = _Waits(processes.leaders(known))
            if waits == _Waits.IN_VAIN:
                ends.append(_End.FAILED)
                left_out.append(run)
                if leads:
                    print(
                        f"{run.name} is left out: {run.start_from} failed or is left out",
                        file=sys.stderr,
                    )
                continue
            if waits == _Waits.YES:
                elsewhere.append(run)
                continue
            with claim(directory.claim_file) if leads else nullcontext(False) as mine:
                if not processes.leaders(mine):
                    elsewhere.append(run)
                else:
                    store = stores[run.data.store_path]
                    ends.append(_finish(run, directory, store, trunk, grid))
        pause = min(2 * pause, longest) if elsewhere == left else 1
        left = elsewhere
        if processes.is_leader():
            for run in left:
                _announce_holder(run, run_directory(root, experiment.name, run), announced)
        for _ in range(pause if left else 0):
            _stop_if_told(left[0])
            time.sleep(1)
    done, mendable = ends.count(_End.DONE), ends.count(_End.MENDABLE)
    return Outcome(done, len(ends) - done, mendable)


def _compiled_folder(root: Path) -> Path | None:
    """Where compiled programs are kept; None where they must not be.

    Only the first process writes them. Where the others do not see its folder they compile what it reads,
    and on GPUs wait for ever for its part of choosing kernels, which XLA divides among the processes.
    """
    import jax

    from gqa_scaling.devices import processes

    if not is_remote(root):
        return root / ".compiled"
    apart = processes.several() and jax.default_backend() == "gpu"
    return None if apart else cache_folder() / "compiled"


class _Waits(enum.IntEnum):
    """Whether a run waits for the one whose parameters it starts from, or for a state of its trunk."""

    NO = 0
    YES = 1
    IN_VAIN = 2  # that one failed, or waited in vain itself


def _waits(
    run: RunConfig,
    directory: RunDirectory,
    trunk: Trunk | None,
    left: Sequence[RunConfig],
    left_out: Sequence[RunConfig],
) -> _Waits:
    if directory.result_file.exists():
        return _Waits.NO
    parent = parent_directory(directory, run)
    if parent is not None and not parent.result_file.exists():
        lost = parent.failure_file.exists() or parent_of(run, left_out) is not None
        return _Waits.IN_VAIN if lost else _Waits.YES
    if trunk is None or directory.checkpoints.exists():  # it has begun
        return _Waits.NO
    # One of a smaller budget that this sweep trains too, and that is not yet where this one begins.
    digests = {each.digest for each in left}
    for step, other in trunk.sources(run):
        place = run_directory(directory.path.parent.parent, directory.path.parent.name, other)
        settled = place.result_file.exists() or place.failure_file.exists()
        if other.digest in digests and not settled and not is_saved(place.checkpoints / str(step)):
            return _Waits.YES
    return _Waits.NO


def _announce_holder(run: RunConfig, directory: RunDirectory, announced: set[str]) -> None:
    """Print once what a run of another machine, or one with a damaged claim, is waited for."""
    holder = waited_for(directory.claim_file) if run.name not in announced else None
    if holder is not None:
        print(f"waiting for {run.name}: {holder}", file=sys.stderr)
        announced.add(run.name)


def _stop_if_told(run: RunConfig) -> None:
    """Raise Preempted if this job is to stop; all its processes must ask equally often."""
    from gqa_scaling.devices import processes

    if processes.preempted():
        raise processes.Preempted(f"stopped before {run.name}")


# ----------------------------------------------------------------------- one run of the sweep


def _finish(
    run: RunConfig,
    directory: RunDirectory,
    store: TokenStore,
    trunk: Trunk | None,
    grid: tuple[RunConfig, ...],
) -> _End:
    """Do what is left of one run of a grid. Raises as `run_sweep` does."""
    from gqa_scaling.devices import processes
    from gqa_scaling.training.loop import reevaluate, train

    try:
        left = processes.leaders(_left_to_do(run, directory))
        if left in (_Left.NOTHING, _Left.MENDING):
            return _End.MENDABLE if left == _Left.MENDING else _End.FAILED
        if left == _Left.TRAINING:
            train(run, directory, store, trunk, grid=grid)
        elif left == _Left.EVALUATION:
            reevaluate(run, directory, store)
        if processes.is_leader():
            clean(run, directory, trunk)
    except processes.Preempted:
        raise
    except Exception as error:
        mendable = isinstance(error, UserError)
        storage_away = None if mendable else failure(error, directory.path)
        if storage_away is not None:
            raise storage_away from None
        if processes.several() and _may_be_a_peers(error):
            processes.wait_to_end()
        directory.fail(traceback.format_exc(), type(error).__name__)
        if processes.several():
            if mendable:
                raise
            raise processes.RunFailed(run.name) from error
        return _End.MENDABLE if mendable else _End.FAILED
    return _End.DONE


def tidy(experiment: Experiment, root: Path) -> None:
    """Drop what a kill just after the last result left."""
    for run in experiment.runs:
        directory = run_directory(root, experiment.name, run)
        if directory.checkpoints.exists():
            clean(run, directory, experiment.trunks.get(run.digest))


def clean(run: RunConfig, directory: RunDirectory, trunk: Trunk | None) -> None:
    """Drop what a finished run does not need, and with the last of a trunk what all of them kept."""
    if trunk is None or not trunk.finished(directory.path.parent):
        directory.clean(trunk.kept_steps(run) if trunk else ())
        return
    for _, each in trunk.directories(directory.path.parent):
        each.clean()


def _left_to_do(run: RunConfig, directory: RunDirectory) -> _Left:
    failed = directory.failure()
    if failed is not None:
        return _Left.MENDING if failed["kind"] == UserError.__name__ else _Left.NOTHING
    result = directory.result()
    if result is None:
        return _Left.TRAINING
    return _Left.CLEANING if _is_judged(run, result) else _Left.EVALUATION


def _may_be_a_peers(error: Exception) -> bool:
    """Whether a collective failed, as it does when another process is gone."""
    import jax

    own = "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and not own
