"""A run that begins with a state which another run of its trunk keeps (`experiment/branches.py`)."""

import sys
from collections.abc import Callable
from typing import Any

from gqa_scaling.costs import training_flops_per_token
from gqa_scaling.data import TokenStore
from gqa_scaling.devices import processes
from gqa_scaling.experiment.branches import Trunk
from gqa_scaling.files.checkpoint import Restored, restore_kept
from gqa_scaling.files.checksums import DamagedError
from gqa_scaling.files.runs import RunDirectory, run_directory
from gqa_scaling.training.monitor import History, saved_history
from gqa_scaling.training.setup import Setup
from gqa_scaling.training.step import abstract_state


def branch_off(
    setup: Setup, trunk: Trunk, directory: RunDirectory, store: TokenStore
) -> tuple[Restored, History, dict[str, Any]] | None:
    """The latest state of the trunk that is whole, the history up to it, and what is recorded of it:
    whose it is and the FLOPs saved. None where nobody keeps any.

    Called by every process of a job. States of other data and damaged ones are left out, and the
    damage recorded; stderr names them, and says which steps are trained that others have trained.
    """
    run, folder = setup.run, directory.path.parent
    damaged: list[str] = []
    refused: set[tuple[int, str]] = set()

    def say(text: str) -> None:
        if processes.is_leader():
            print(f"{run.name}: {text}", file=sys.stderr)

    while True:
        found = [s for s in trunk.states(run, folder) if (s[0], s[1].digest) not in refused]
        step = processes.leaders(found[0][0] if found else 0)
        which = processes.leaders(trunk.runs.index(found[0][1]) if found else 0)
        if not step:
            _say_what_is_missing(say, trunk, setup, 0)
            return None
        other = trunk.runs[which]
        place = run_directory(folder.parent, folder.name, other)
        refused.add((step, other.digest))
        if place.data() != store.describe():
            say(f"{other.name} was trained on other data; its state of step {step} is left alone")
            continue
        try:
            state, position = restore_kept(place.checkpoints, step, abstract_state(setup))
        except DamagedError as error:
            damaged.append(f"checkpoint {place.checkpoints / str(step)} is damaged: {error}")
            say(damaged[-1])
            continue
        _say_what_is_missing(say, trunk, setup, step)
        history = saved_history(position)
        saved = step * run.batch_tokens * training_flops_per_token(run.model, run.context_length)
        origin = {"branched_from": place.path.name, "flops_saved": saved}
        return Restored(step, state, position, tuple(damaged)), history, origin


def _say_what_is_missing(say: Callable[[str], None], trunk: Trunk, setup: Setup, step: int) -> None:
    """Where a run of a smaller budget should have left a later state than that of `step`."""
    wanted = trunk.begins(setup.run)
    if step < wanted:
        begins = f"goes on from step {step:,}" if step else "begins at the first step"
        say(f"{begins}: no run of a smaller budget has kept its state of step {wanted:,}")
