"""Saving and restoring training state with Orbax: atomic, asynchronous, onto any mesh."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from gqa_scaling.config import UserError

PyTree = Any


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Abstract arrays with a place on the mesh: what a restore needs to know."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run; `step` counts the optimizer steps that were taken."""

    manager: ocp.CheckpointManager

    def latest_step(self) -> int | None:
        """The last complete checkpoint; one cut short by a kill does not count."""
        return self.manager.latest_step()

    def save(self, step: int, state: PyTree, position: dict[str, Any]) -> None:
        """Save in the background. `position` says where data and randomness stand, as JSON."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        )
        self.manager.save(step, args=args, force=True)

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """The state of `step`, laid out as the abstract tree `like`, and its position."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), position=ocp.args.JsonRestore()
        )
        out = self.manager.restore(step, args=args)
        return out["state"], out["position"]

    def wait(self) -> None:
        """Return when every save so far is complete on disk; raises what a save raised."""
        self.manager.wait_until_finished()


@contextmanager
def open_checkpoints(path: Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints under `path`, of which the last `keep` are kept."""
    logging.set_verbosity(logging.FATAL)  # what Orbax logs as an error it also raises
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
    )
    manager = ocp.CheckpointManager(path.absolute(), options=options)
    try:
        yield Checkpoints(manager)
    finally:
        manager.close()


def save_parameters(path: Path, parameters: PyTree) -> None:
    """Write the trained parameters; an earlier, perhaps unfinished, copy is replaced."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), parameters, force=True)


def load_parameters(path: Path, like: PyTree) -> PyTree:
    """The trained parameters, laid out as the abstract tree `like`."""
    if not path.exists():
        raise UserError(
            f"{path} is missing: the run lost its trained parameters; remove {path.parent} and run it again"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), like)
