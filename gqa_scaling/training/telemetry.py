"""Where a run's numbers go: metrics.jsonl for programs, TensorBoard for people."""

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from gqa_scaling import costs
from gqa_scaling.config import RunConfig
from gqa_scaling.runs import RunDirectory


def is_logged(step: int, steps: int) -> bool:
    """Whether the step (counted from 1) is logged: the first ten, about 500 evenly, the last.

    A function of the run alone, so that a resumed run logs the same steps.
    """
    return step <= 10 or step == steps or step % max(1, steps // 500) == 0


class Telemetry:
    """Appends one line per logged step and the same scalars for TensorBoard."""

    def __init__(self, directory: RunDirectory, start_step: int) -> None:
        directory.truncate_metrics(start_step)
        self._file = open(directory.metrics_file, "a", encoding="utf-8")  # noqa: SIM115
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(directory.path), purge_step=purge, flush_secs=10)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one step under their TensorBoard tags."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._file.close()
        self._writer.close()


def write_hparams(directory: RunDirectory, run: RunConfig, metrics: Mapping[str, float]) -> None:
    """Write what TensorBoard's HParams tab compares runs by, and the final metrics."""
    model = run.model
    values = {
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "context_length": run.context_length,
        "batch_tokens": run.batch_tokens,
        "tokens": costs.training_tokens(run),
        "learning_rate": run.optimizer.learning_rate,
        "n_exact": costs.n_exact(model),
        "seed": run.seed,
    }
    with SummaryWriter(str(directory.path)) as writer:
        for summary in hparams(values, dict(metrics)):
            writer.file_writer.add_summary(summary)
        for tag, value in metrics.items():
            writer.add_scalar(tag, value, costs.training_steps(run))
