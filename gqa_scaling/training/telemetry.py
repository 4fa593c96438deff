"""Where a run's numbers go: metrics.jsonl for programs, TensorBoard for people."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import register_writer_factory
from tensorboardX.summary import hparams, scalar

from gqa_scaling.config import RunConfig
from gqa_scaling.costs import n_exact, training_tokens
from gqa_scaling.files.failures import failure
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.files.storage import SCHEMES, GrowingFile, as_path, is_remote
from gqa_scaling.training.evaluation import Evaluation
from gqa_scaling.training.setup import Setup

FLUSH_SECONDS = 5.0
FIRST_COLUMNS = ("n_heads", "n_kv_heads", "N")  # of the HParams tab
FINAL_METRICS = ("evaluation/loss", "evaluation/bits_per_byte")
REMOTE_FLUSH_SECONDS = 30.0  # a flush puts the whole file there again


class _Buckets:
    """Where tensorboardX writes remote files: its own writers need further packages."""

    def directory_check(self, path: str) -> None:
        pass

    def open(self, path: str) -> GrowingFile:
        return GrowingFile(as_path(path))


for _scheme in SCHEMES:
    register_writer_factory(_scheme, _Buckets())


class TensorBoard:
    """An event file of its own in the run's directory, written in the caller's thread.

    tensorboardX's SummaryWriter writes in a thread that dies unseen on a full disk, and its
    caller then waits for ever.
    """

    def __init__(self, directory: RunDirectory, purge_from: int | None = None) -> None:
        suffix = f".{uuid.uuid4().hex[:8]}"  # names are by the second otherwise
        self._events = EventsWriter(str(directory.path / "events"), suffix)
        self._flushed = time.monotonic()
        self._every = REMOTE_FLUSH_SECONDS if is_remote(directory.path) else FLUSH_SECONDS
        if purge_from is not None:  # hides what an interrupted attempt wrote from that step on
            self._write(Event(step=purge_from, session_log=SessionLog(status=SessionLog.START)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        if time.monotonic() - self._flushed > self._every:
            self.flush()

    def summary(self, summary: Summary, step: int = 0) -> None:
        self._write(Event(step=step, summary=summary))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.summary(scalar(tag, value), step)

    def flush(self) -> None:
        """Have the file hold everything so far."""
        self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._events.close()


class Telemetry:
    """Appends one line per logged step, and the same scalars for TensorBoard.

    Of several processes only the one that `writes` does. In a bucket both files are behind by
    up to `REMOTE_FLUSH_SECONDS`.
    """

    def __init__(self, directory: RunDirectory, start_step: int, writes: bool = True) -> None:
        self._writes = writes
        if writes:
            directory.truncate_metrics(start_step)
            file = directory.metrics_file
            self._remote, self._flushed = is_remote(file), time.monotonic()
            self._file = GrowingFile(file) if self._remote else open(file, "ab")  # noqa: SIM115
            self._board = TensorBoard(directory, start_step + 1)

    def introduce(self, setup: Setup, grid: Sequence[RunConfig] = ()) -> None:
        """Have TensorBoard's HParams tab show the run while it trains, beside those of its grid."""
        if self._writes:
            for summary in _compared(setup.run, grid)[:2]:
                self._board.summary(summary)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one step under their TensorBoard tags."""
        self.note(step, **scalars)
        if self._writes:
            self._board.scalars(step, scalars)

    def note(self, step: int, **values: Any) -> None:
        """Write what is no number, or none to plot, as JSON only."""
        if self._writes:
            line = {"step": step, "time": round(time.time(), 3), **values}
            self._file.write(json.dumps(line).encode() + b"\n")
            if not self._remote or time.monotonic() - self._flushed > REMOTE_FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def flush(self) -> None:
        """Have the bucket hold all so far, so that a run resumed from here has it; disks do already."""
        if self._writes and self._remote:
            self._file.flush()
            self._board.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if not self._writes or (error is not None and failure(error)):
            return  # nobody waits for storage that does not answer
        self._file.close()
        self._board.close()


def write_hparams(
    directory: RunDirectory,
    setup: Setup,
    metrics: Mapping[str, float],
    grid: Sequence[RunConfig] = (),
) -> None:
    """Write what TensorBoard's HParams tab compares the runs of a grid by, and the final metrics."""
    board = TensorBoard(directory)
    for summary in _compared(setup.run, grid):
        board.summary(summary)
    board.scalars(setup.steps, metrics)
    board.close()


def write_further(directory: RunDirectory, value: Evaluation) -> None:
    """Write what else a model was judged by, if anything: losses by context, with the context for
    their step; accuracies of needles, a curve for each length with the depth in percent."""
    if value.loss_by_context is None and value.needles is None:
        return
    board = TensorBoard(directory)
    for context, loss in (value.loss_by_context or {}).items():
        board.scalars(int(context), {"evaluation/loss_by_context": loss})
    if value.needles is not None:
        for length, shares in value.needles.accuracy.items():
            for depth, share in zip(value.needles.depths, shares, strict=True):
                board.scalars(round(100 * depth), {f"needles/accuracy_at_{length}_tokens": share})
    board.close()


def _compared(run: RunConfig, grid: Sequence[RunConfig]) -> tuple[Summary, Summary, Summary]:
    """What the HParams tab is told: its columns, this run's values, and that it has ended.

    It takes its columns from one run, any, and shows five of them and the metrics: those marked as
    differing, then the rest, each by name. So all runs of a grid name the same ones, and mark
    `FIRST_COLUMNS`.
    """
    own = _hyperparameters(run)
    told = _columns([_hyperparameters(other) for other in grid]) or list(own)
    metrics = dict.fromkeys(FINAL_METRICS, 0.0)
    columns, _, ended = hparams({name: own[name] for name in told}, metrics)
    plugin = columns.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in FIRST_COLUMNS
    plugin.content = content.SerializeToString()
    return columns, hparams(own, {})[1], ended


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What tells runs apart: of `FIRST_COLUMNS` those that differ, and what else differs between runs of
    one size and heads. What follows from the size, as learning rates mostly do, would hide the loss."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row[name] for name in FIRST_COLUMNS), []).append(row)

    def differs(name: str) -> bool:
        groups = [rows] if name in FIRST_COLUMNS else alike.values()
        return any(len({row[name] for row in group}) > 1 for group in groups)

    return [name for name in (rows[0] if rows else ()) if differs(name)]


def _hyperparameters(run: RunConfig) -> dict[str, Any]:
    """What runs are told apart by."""
    model = run.model
    return {
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "N": n_exact(model),
        "pattern": model.pattern.label if model.pattern else "dense",
        "context_length": run.context_length,
        "tokens": training_tokens(run),
        "learning_rate": run.optimizer.learning_rate,
        "seed": run.seed,
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "head_dim": model.head_dim,
        "batch_tokens": run.batch_tokens,
    }
