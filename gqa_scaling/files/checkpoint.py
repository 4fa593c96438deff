"""Saving and restoring training state with Orbax: atomic, asynchronous, verified, onto any mesh.

Every checkpoint carries checksums of two kinds. Those of its files (`checksums`) name the file
that is truncated, altered or missing before anything is restored. Those of its arrays are taken on
the devices from the bits in memory, before the save and again after the restore, so they hold the
whole way between: layout, compression, storage and the mesh that it is restored onto.
"""

import functools
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN
from orbax.checkpoint.path import atomicity

from gqa_scaling.config import UserError
from gqa_scaling.files import orbax_s3
from gqa_scaling.files.array_checksums import ArrayChecksums, array_checksums
from gqa_scaling.files.checksums import (
    COMMIT_NOTES,
    UNFINISHED_SUFFIX,
    DamagedError,
    Seal,
    abridged,
    damaged_files,
    is_saved,
    read_seal,
    seal,
)
from gqa_scaling.files.failures import failure
from gqa_scaling.files.storage import absolute, as_path, is_remote, write_atomic

PyTree = Any
POSITION_NAME = "position.json"  # beside trained parameters
REMOVED = "removed"  # where a checkpoint goes, at one stroke, before its files are deleted


# ----------------------------------------------------------------------------------- sealing


def _verify_arrays(tree: PyTree, saved: Seal) -> None:
    found = array_checksums(tree).values()
    wrong = [name for name in saved.arrays if found.get(name) != saved.arrays[name]]
    wrong += [name for name in found if name not in saved.arrays]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DamagedError(
            f"restored, array {wrong[0]}{more} differs from its checksum though no file does"
        )


class _Sealer:
    """Seals each save on the primary process, in the background, just before it is committed."""

    def __init__(self) -> None:
        self._next: tuple[Path, ArrayChecksums, dict[str, Any] | None] | None = None

    def expect(self, folder: Path, tree: PyTree, position: dict[str, Any] | None = None) -> None:
        """The next save is that of `tree` into `folder`; no other may be under way.

        A `position` that Orbax does not write itself is written beside the tree.
        """
        if not is_remote(folder):  # there it is written in place
            folder = folder.with_name(folder.name + UNFINISHED_SUFFIX)
        self._next = (folder, array_checksums(tree), position)

    def __call__(self) -> None:
        assert self._next is not None
        folder, arrays, position = self._next
        if position is not None:
            write_atomic(folder / POSITION_NAME, json.dumps(position))
        seal(folder, arrays.values())


# ------------------------------------------------------------------------------ verification


def _verify_files(folder: Path) -> Seal:
    """The checksums of a checkpoint whose files are whole. Raises DamagedError naming what is not.

    Processes share the reading, and all come to the same end.
    """
    saved, damage = None, ""
    try:
        saved = read_seal(folder)
        names = [*sorted(saved.files), *COMMIT_NOTES][jax.process_index() :: jax.process_count()]
        damaged = damaged_files(folder, saved, names)
        damage = abridged(f"{name} {text}" for name, text in damaged.items())
    except DamagedError as error:
        damage = str(error)
    damage = _of_all_processes(damage)
    if damage:
        raise DamagedError(damage)
    assert saved is not None
    return saved


def _of_all_processes(text: str, most: int = 1000) -> str:
    """What each process says, joined without repetition and the same on all; "" if none says anything.

    Of each text the first `most` bytes are kept.
    """
    if jax.process_count() == 1:
        return text
    mine, data = np.zeros(most, np.uint8), text.encode()[:most]
    mine[: len(data)] = list(data)
    rows = (bytes(row).rstrip(b"\0") for row in multihost_utils.process_allgather(mine))
    return "; ".join(dict.fromkeys(row.decode(errors="replace") for row in rows if row))


@dataclass(frozen=True)
class Restored:
    """The newest whole checkpoint, and one line for each newer one that was damaged."""

    step: int
    state: PyTree
    position: dict[str, Any]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run; `step` counts the optimizer steps that were taken."""

    manager: ocp.CheckpointManager
    sealer: _Sealer

    @property
    def path(self) -> Path:
        return as_path(self.manager.directory)

    def save(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
        """Save in the background. `position` is what must be known beside the state, as JSON.

        `state` may be donated as soon as this returns. Raises what the save before it raised.
        """
        self.wait()
        self.sealer.expect(self.path / str(step), state)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        )
        self.manager.save(step, args=args, force=True)

    def check(self) -> None:
        """Raise what the last save raised, once it has ended; never waits."""
        if not self.manager.is_saving_in_progress():
            self.manager.wait_until_finished()

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The state of `step`, laid out as the abstract tree `like`, and its position.

        Raises DamagedError when a file or, once restored, an array is not what was saved.
        """
        saved = _verify_files(self.path / str(step))
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
        )
        out = self.manager.restore(step, args=args)
        _verify_arrays(out["state"], saved)
        return out["state"], out["position"]

    def restore_latest(self, like: PyTree) -> Restored | None:
        """The newest checkpoint that is whole; None when there is none at all.

        Damaged ones that are newer are named on stderr and in the result, and are removed once an
        older one is restored, so that training can save those steps again. Raises UserError when
        every one is damaged; nothing is removed then.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                state, position = self.restore(step, like)
            except DamagedError as error:
                damaged[step] = f"checkpoint {self.path / str(step)} is damaged: {error}"
                continue
            for bad, line in damaged.items():
                if jax.process_index() == 0:
                    print(f"{line}; going on from step {step}", file=sys.stderr)
                self.manager.delete(bad)
            self._empty_removed()
            return Restored(step, state, position, tuple(damaged.values()))
        if damaged:
            raise UserError(
                f"{self.path} holds no whole checkpoint: {'; '.join(damaged.values())}. Put the "
                f"files back from a copy, or remove {self.path} to train from the first step"
            )
        return None

    def wait(self) -> None:
        """Return when every save so far is complete on disk; raises what a save raised."""
        self.manager.wait_until_finished()
        self._empty_removed()

    def _empty_removed(self) -> None:
        if jax.process_index() == 0 and not is_remote(self.path):
            shutil.rmtree(self.path / REMOVED, ignore_errors=True)


def _committed_in(path: Path) -> type | None:
    """How Orbax is to tell a complete checkpoint there: by a last object, for want of renaming."""
    if not is_remote(path):
        return None
    orbax_s3.install()
    return atomicity.CommitFileTemporaryPath


@functools.cache
def _hush_late_answers() -> None:
    """TensorStore tells a save that has failed already how its other requests ended, on stderr."""
    tell = sys.unraisablehook

    def tell_others(what: Any) -> None:
        if what.object is not None or str(what.exc_value) != "Event loop is closed":
            tell(what)

    sys.unraisablehook = tell_others


def _in_background(sealer: _Sealer) -> ocp.options.AsyncOptions:
    """How Orbax is to save: it makes the folders in the foreground and writes in the background.

    Its threads would otherwise wait for minutes for a folder that could not be made.
    """
    _hush_late_answers()
    return ocp.options.AsyncOptions(
        post_finalization_callback=sealer, create_directories_asynchronously=False
    )


@contextmanager
def open_checkpoints(path: Path, keep: int, always: Sequence[int] = ()) -> Iterator[Checkpoints]:
    """The checkpoints under `path`, of which the last `keep` and those of the steps `always` are kept.

    What an earlier process left unfinished is removed: only who holds the run's claim may open.
    """
    logging.set_verbosity(logging.FATAL)  # what Orbax logs as an error it also raises
    sealer = _Sealer()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(keep), CustomSteps(always)]),
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
        # at one stroke: no half-deleted checkpoint is ever seen (a bucket deletes 1000 files in one)
        todelete_subdir=None if is_remote(path) else REMOVED,
        temporary_path_class=_committed_in(path),
        async_options=_in_background(sealer),
    )
    manager = ocp.CheckpointManager(absolute(path), options=options)
    abandoned = False
    try:
        yield Checkpoints(manager, sealer)
    except Exception as error:  # its peers wait for this process to end; storage may never answer
        abandoned = jax.process_count() > 1 or failure(error) is not None
        raise
    finally:
        if not abandoned:
            manager.close()  # when every save is complete


def restore_kept(path: Path, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
    """The state of `step` that another run keeps under `path`, and its position.

    Nothing there is changed, as a process may be at that run. Raises DamagedError as `restore` does.
    """
    logging.set_verbosity(logging.FATAL)
    options = ocp.CheckpointManagerOptions(
        read_only=True,
        save_interval_steps=0,
        create=False,
        temporary_path_class=_committed_in(path),
    )
    with ocp.CheckpointManager(absolute(path), options=options) as manager:
        return Checkpoints(manager, _Sealer()).restore(step, like)


# -------------------------------------------------------------------------------- parameters


def save_parameters(path: Path, parameters: PyTree, position: dict[str, Any] | None = None) -> None:
    """Write the trained parameters, and what must be known beside them as JSON.

    An earlier, perhaps unfinished, copy is replaced.
    """
    path, sealer = absolute(path), _Sealer()
    with ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(),
        async_options=_in_background(sealer),
        temporary_path_class=_committed_in(path),
    ) as saving:
        sealer.expect(path, parameters, position)
        saving.save(path, args=ocp.args.StandardSave(parameters), force=True)
        saving.wait_until_finished()


def load_parameters(path: Path, like: PyTree) -> PyTree:
    """The trained parameters, laid out as the abstract tree `like`.

    Raises UserError when they are missing, or when a file or an array is not what was saved.
    """
    remedy = f"remove {path.parent} and run it again"
    if not is_saved(path):
        raise UserError(f"{path} is missing: the run lost its trained parameters; {remedy}")
    try:
        saved = _verify_files(path)
        with ocp.StandardCheckpointer(temporary_path_class=_committed_in(path)) as checkpointer:
            parameters = checkpointer.restore(absolute(path), like)
        _verify_arrays(parameters, saved)
    except DamagedError as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from None
    return parameters


def position_of(path: Path) -> dict[str, Any]:
    """What was saved beside parameters that `load_parameters` found whole."""
    return json.loads((path / POSITION_NAME).read_text(encoding="utf-8"))
