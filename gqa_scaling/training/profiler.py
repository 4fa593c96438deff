"""Traces of single steps, for the Profile tab of TensorBoard (the package xprof)."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import jax

from gqa_scaling.config import RunConfig
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import is_remote, sizes, write_atomic
from gqa_scaling.training.monitor import Monitor


class Profiler:
    """Traces the steps that `run.profile` names into plugins/profile of the run's directory.

    Of several processes only the one that `writes` does, its own devices. A trace is written to
    local disk, and from there put into a bucket.
    """

    def __init__(self, run: RunConfig, directory: RunDirectory, writes: bool) -> None:
        self._steps = run.profiled_steps if writes else range(0)
        self._directory = directory
        self._trace: ExitStack | None = None

    def before(self, step: int, monitor: Monitor) -> None:
        """Begin or end the trace if this step is the first one in it, or after it."""
        tracing = self._trace is not None
        if (step in self._steps) == tracing:
            return
        with monitor.outside_steps("profiling"):  # when the device is done with the step before
            self._end() if tracing else self._begin()
        if tracing:
            monitor.speed.restart()  # traced steps are slow

    def _begin(self) -> None:
        with ExitStack() as stack:
            folder = self._directory.path
            if is_remote(folder):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                stack.callback(_put, folder, self._directory.path)
            stack.enter_context(jax.profiler.trace(str(folder)))
            self._trace = stack.pop_all()

    def _end(self) -> None:
        if self._trace is not None:
            trace, self._trace = self._trace, None
            trace.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()


def _put(folder: Path, place: Path) -> None:
    """Put every file below a local folder at the same path below a remote one."""
    for name in sizes(folder):
        write_atomic(place / name, (folder / name).read_bytes())
