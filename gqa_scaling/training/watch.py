"""What a step turned out to be: its loss judged and logged, its speed measured."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, require
from gqa_scaling.data.loader import TrainingData
from gqa_scaling.devices import processes
from gqa_scaling.files.checkpoint import Checkpoints, Restored
from gqa_scaling.files.runs import RunDirectory
from gqa_scaling.hardware import detected
from gqa_scaling.training.optimizer import learning_rate_schedule
from gqa_scaling.training.step import StepMetrics
from gqa_scaling.training.telemetry import Telemetry, is_logged


class NonFiniteLoss(RuntimeError):
    """Loss or gradient norm were NaN or infinite; the message names the step and its data."""


class LastingSpike(RuntimeError):
    """The gradient norm rose and stayed too high; the message names the step, norm and mean."""


@dataclasses.dataclass
class Tally:
    """What the result and the next step need to know of the steps before, the state aside.

    It is saved with every checkpoint and with the trained parameters, so that the log may be lost.
    Steps are skipped in a row when none is taken between them.
    """

    logged_losses: list[float] = dataclasses.field(default_factory=list)
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    spikes_in_a_row: int = 0

    @classmethod
    def of(cls, position: Mapping[str, Any]) -> Self:
        """What a checkpoint's position holds of it; nothing before the first step."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in position.items() if name in names})

    @property
    def train_loss(self) -> float:
        """The mean over the last twentieth of the logged steps; NonFiniteLoss if all were skipped."""
        if not self.logged_losses:
            raise NonFiniteLoss("every logged step was skipped: nothing was learned")
        tail = self.logged_losses[-max(1, len(self.logged_losses) // 20) :]
        return sum(tail) / len(tail)


def position_at(
    run: RunConfig, directory: RunDirectory, step: int, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """The position saved at a step, with the tally that earlier versions kept in the log alone.

    Raises UserError when the tally is not in what was saved and the log lacks a step.
    """
    if "logged_losses" in saved:
        return dict(saved)
    lines = [line for line in directory.metrics() if line["step"] <= step]
    losses = {line["step"]: line["learning/loss"] for line in lines if "learning/loss" in line}
    skipped = {line["step"] for line in lines if "skipped" in line}
    steps, known = costs.training_steps(run), losses.keys() | skipped
    lacking = (n for n in range(1, step + 1) if is_logged(n, steps) and n not in known)
    first = next(lacking, None)
    require(
        first is None,
        f"{directory.metrics_file} lacks step {first}, but the losses up to step {step}, at which "
        f"{directory.path} was saved by an earlier version, are in that log alone: put it back "
        f"from a copy, or remove {directory.path} to train from the first step",
    )
    tally = Tally([losses[n] for n in sorted(losses)], len(skipped))
    return {**dataclasses.asdict(tally), **saved}


class Watch:
    """Reads the metrics of each step once it is done, logs them, and refuses to go on in vain."""

    def __init__(
        self,
        run: RunConfig,
        checkpoints: Checkpoints,
        data: TrainingData,
        telemetry: Telemetry,
        start: Restored,
        clock: Callable[[], float],
    ) -> None:
        self.pending: tuple[int, StepMetrics] | None = None
        self.last_saved = start.step
        self.tally = Tally.of(start.position)
        self._run, self._checkpoints, self._data = run, checkpoints, data
        self.meter = Meter(run, clock)
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
            self._skipped(step, loss, norm, metrics.usual_norm)
        else:
            self.tally.nonfinite_in_a_row = self.tally.spikes_in_a_row = 0
        self.meter.tick(step)
        if metrics.taken and is_logged(step, self._steps):
            self.tally.logged_losses.append(loss)
            scalars = {
                "learning/loss": loss,
                "learning/grad_norm": norm,
                "learning/current_learning_rate": float(self._schedule(step - 1)),
            }
            self._telemetry.log(step, {**scalars, **self.meter.scalars()})

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Have the body's time not count as that of steps; the one in flight is waited for first."""
        self.read()
        with self.meter.apart(what):
            yield

    def _skipped(self, step: int, loss: float, norm: float, usual: jax.Array | None) -> None:
        run, tally, chunks = self._run, self.tally, self._data.chunks(step - 1)
        what = f"loss {loss} and gradient norm {norm} at step {step}, chunks {chunks} of the data"
        tally.skipped_steps += 1
        spike = math.isfinite(loss) and math.isfinite(norm)
        if spike:
            tally.spikes_in_a_row += 1
            in_a_row, most, kind = tally.spikes_in_a_row, run.max_spike_steps, LastingSpike
            assert usual is not None
            factor = run.optimizer.spike_factor
            what += f": more than spike_factor={factor:g} times its running mean {float(usual):g}"
            remedy = (
                "; try a lower --optimizer.learning-rate or a higher --optimizer.spike-factor, each "
                "another run, or go on with a higher --max-spike-steps and --retry-failed"
            )
        else:
            tally.nonfinite_in_a_row += 1
            in_a_row, most, kind = tally.nonfinite_in_a_row, run.max_nonfinite_steps, NonFiniteLoss
            remedy = ""
        self._telemetry.note(step, skipped="spike" if spike else "not finite", chunks=chunks)
        if in_a_row >= max(1, most):
            self._checkpoints.wait()  # the one that is named may still be on its way
            raise kind(
                f"{what}; "
                + (f"{in_a_row} such steps in a row; " if in_a_row > 1 else "")
                + (
                    f"the last good checkpoint is step {self.last_saved} in "
                    f"{self._checkpoints.path}"
                    if self.last_saved
                    else "there is no checkpoint before it"
                )
                + remedy
            )
        if processes.is_leader():
            print(f"{self._run.name}: {what}: step skipped", file=sys.stderr)


class Meter:
    """Speed over the steps since this attempt or `restart`, the first two (compilation) left out.

    A step's time is the time between the ends of two steps, less what was spent `apart`. That is
    told by its name, as the seconds since the attempt began.
    """

    def __init__(self, run: RunConfig, clock: Callable[[], float]) -> None:
        self._run, self._start, self._now = run, (0, 0.0), (0, 0.0)
        self._ticks = 0
        self._clock = clock
        self._apart: dict[str, float] = {}
        self._devices = jax.device_count()
        self._flops = costs.training_flops_per_token(run.model, run.context_length)
        found = detected(jax.devices()[0].device_kind, self._devices)
        self._peak = found.peak_flops if found else None

    def restart(self) -> None:
        """Forget what was slower than usual."""
        self._ticks = 0

    @contextlib.contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Count the body's time as `what`; no step may be in flight."""
        began = self._clock()
        yield
        self._apart[what] = self._apart.get(what, 0.0) + self._clock() - began

    def tick(self, step: int) -> None:
        self._ticks += 1
        self._now = (step, self._clock() - sum(self._apart.values()))
        if self._ticks <= 2:
            self._start = self._now

    def scalars(self) -> dict[str, float]:
        out = {f"perf/{what}_seconds": seconds for what, seconds in self._apart.items()}
        steps = self._now[0] - self._start[0]
        if steps == 0:
            return out
        seconds = (self._now[1] - self._start[1]) / steps
        rate = self._run.batch_tokens / seconds / self._devices
        out |= {
            "perf/step_time_seconds": seconds,
            "perf/per_device_tokens_per_sec": rate,
            "perf/per_device_tflops_per_sec": rate * self._flops / 1e12,
        }
        if self._peak is not None:
            out["perf/mfu"] = rate * self._flops / self._peak
        return out
