"""What a step turned out to be: its loss judged and logged, its speed measured."""

import math
import sys
import time

import jax

from gqa_scaling import costs, processes
from gqa_scaling.checkpoint import Checkpoints
from gqa_scaling.config import RunConfig
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.hardware import detected
from gqa_scaling.training.optimizer import learning_rate_schedule
from gqa_scaling.training.step import StepMetrics
from gqa_scaling.training.telemetry import Telemetry, is_logged


class NonFiniteLoss(RuntimeError):
    """Loss or gradient norm were NaN or infinite; the message names the step and its data."""


class Watch:
    """Reads the metrics of each step once it is done, logs them, and refuses to go on in vain."""

    def __init__(
        self,
        run: RunConfig,
        checkpoints: Checkpoints,
        data: TrainingData,
        telemetry: Telemetry,
    ) -> None:
        self.pending: tuple[int, StepMetrics] | None = None
        self.last_saved = 0
        self.in_a_row = 0  # steps without a finite loss and gradient
        self._run, self._checkpoints, self._data = run, checkpoints, data
        self.meter = Meter(run)
        self._telemetry = telemetry
        self._steps = costs.training_steps(run)
        self._schedule = learning_rate_schedule(run.optimizer, self._steps)

    def read(self) -> None:
        """Wait for the pending step, if there is one."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if not metrics.taken:
            self._skipped(step, loss, norm)
        else:
            self.in_a_row = 0
        self.meter.tick(step)
        if metrics.taken and is_logged(step, self._steps):
            scalars = {
                "learning/loss": loss,
                "learning/grad_norm": norm,
                "learning/current_learning_rate": float(self._schedule(step - 1)),
            }
            self._telemetry.log(step, {**scalars, **self.meter.scalars()})

    def _skipped(self, step: int, loss: float, norm: float) -> None:
        finite = math.isfinite(loss) and math.isfinite(norm)
        chunks = self._data.chunks(step - 1)
        what = f"loss {loss} and gradient norm {norm} at step {step}, chunks {chunks} of the data"
        self._telemetry.note(step, skipped="spike" if finite else "not finite", chunks=chunks)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if not finite and self.in_a_row >= max(1, self._run.max_nonfinite_steps):
            self._checkpoints.wait()  # the one that is named may still be on its way
            raise NonFiniteLoss(
                f"{what}; "
                + (f"{self.in_a_row} such steps in a row; " if self.in_a_row > 1 else "")
                + (
                    f"the last good checkpoint is step {self.last_saved} in "
                    f"{self._checkpoints.path}"
                    if self.last_saved
                    else "there is no checkpoint before it"
                )
            )
        if processes.is_leader():
            print(f"{self._run.name}: {what}: step skipped", file=sys.stderr)


class Meter:
    """Speed over the steps since this attempt or `restart`, the first two (compilation) left out."""

    def __init__(self, run: RunConfig) -> None:
        self._run, self._start, self._now = run, (0, 0.0), (0, 0.0)
        self._ticks = 0
        self._devices = jax.device_count()
        self._flops = costs.training_flops_per_token(run.model, run.context_length)
        found = detected(jax.devices()[0].device_kind, self._devices)
        self._peak = found.peak_flops if found else None

    def restart(self) -> None:
        """Forget what was slower than usual."""
        self._ticks = 0

    def tick(self, step: int) -> None:
        self._ticks += 1
        self._now = (step, time.perf_counter())
        if self._ticks <= 2:
            self._start = self._now

    def scalars(self) -> dict[str, float]:
        steps = self._now[0] - self._start[0]
        if steps == 0:
            return {}
        seconds = (self._now[1] - self._start[1]) / steps
        rate = self._run.batch_tokens / seconds / self._devices
        out = {
            "perf/step_time_seconds": seconds,
            "perf/per_device_tokens_per_sec": rate,
            "perf/per_device_tflops_per_sec": rate * self._flops / 1e12,
        }
        if self._peak is not None:
            out["perf/mfu"] = rate * self._flops / self._peak
        return out
