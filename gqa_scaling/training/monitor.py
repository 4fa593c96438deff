"""What became of each step: its loss is judged and logged, and a run that diverges is stopped."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from gqa_scaling.data.loader import TrainingData
from gqa_scaling.devices import processes
from gqa_scaling.files.checkpoint import Checkpoints
from gqa_scaling.training.setup import Setup
from gqa_scaling.training.speed import Speed
from gqa_scaling.training.step import StepMetrics
from gqa_scaling.training.telemetry import Telemetry


class NonFiniteLoss(RuntimeError):
    """Loss or gradient norm were NaN or infinite; the message names the step and its data."""


class LastingSpike(RuntimeError):
    """The gradient norm rose and stayed too high; the message names the step, norm and mean."""


@dataclass
class History:
    """What the result and the next step need to know of the steps before, the state aside.

    It is saved with every checkpoint and with the trained parameters, so that the log may be lost.
    Steps are skipped in a row when none is taken between them.
    """

    logged_losses: list[float] = field(default_factory=list)
    skipped_steps: int = 0
    nonfinite_in_a_row: int = 0
    spikes_in_a_row: int = 0

    @property
    def train_loss(self) -> float:
        """The mean over the last twentieth of the logged steps; NonFiniteLoss if all were skipped."""
        if not self.logged_losses:
            raise NonFiniteLoss("every logged step was skipped: nothing was learned")
        last = self.logged_losses[-max(1, len(self.logged_losses) // 20) :]
        return sum(last) / len(last)


def saved_history(position: Mapping[str, Any]) -> History:
    """The history up to a state, from the position that was saved with it."""
    return History(**{each.name: position[each.name] for each in dataclasses.fields(History)})


@dataclass
class Monitor:
    """Reads the metrics of each step once it is done, logs them, and refuses to go on in vain.

    Metrics are read one step late, so that the device never waits for the host: `pending` is the
    step that was dispatched last. `last_saved` is the step of the last checkpoint, 0 for none.
    """

    setup: Setup
    data: TrainingData
    checkpoints: Checkpoints
    telemetry: Telemetry
    speed: Speed
    history: History
    last_saved: int
    pending: tuple[int, StepMetrics] | None = None

    def __post_init__(self) -> None:
        self._rate = jax.jit(self.setup.schedule)  # one small program, not one for each operation

    def dispatched(self, step: int, metrics: StepMetrics) -> None:
        """Note that a step is on its way; the one before is read."""
        self.read()
        self.pending = step, metrics

    def read(self) -> None:
        """Wait for the pending step, if there is one. Raises NonFiniteLoss and LastingSpike."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        loss, norm = float(metrics.loss), float(metrics.gradient_norm)
        if metrics.taken:
            self.history.nonfinite_in_a_row = self.history.spikes_in_a_row = 0
        else:
            self._skipped(step, loss, norm, metrics.usual_norm)
        self.speed.step_ended(step)
        if metrics.taken and self.setup.logs(step):
            self.history.logged_losses.append(loss)
            scalars = {
                "learning/loss": loss,
                "learning/grad_norm": norm,
                "learning/current_learning_rate": float(self._rate(step - 1)),
            }
            self.telemetry.log(step, {**scalars, **self.speed.scalars()})

    @contextlib.contextmanager
    def outside_steps(self, name: str) -> Iterator[None]:
        """Have the body's time not count as that of steps; the one in flight is waited for first."""
        self.read()
        with self.speed.outside_steps(name):
            yield

    def _skipped(self, step: int, loss: float, norm: float, usual: jax.Array | None) -> None:
        """Note a step that changed nothing, and stop where as many in a row are not allowed."""
        run, history, chunks = self.setup.run, self.history, self.data.chunks(step - 1)
        told = f"loss {loss} and gradient norm {norm} at step {step}, chunks {chunks} of the data"
        history.skipped_steps += 1
        spike = math.isfinite(loss) and math.isfinite(norm)
        if spike:
            history.spikes_in_a_row += 1
            assert usual is not None
            factor = run.optimizer.spike_factor
            told += f": more than spike_factor={factor:g} times its running mean {float(usual):g}"
        else:
            history.nonfinite_in_a_row += 1
        self.telemetry.note(step, skipped="spike" if spike else "not finite", chunks=chunks)
        in_a_row = history.spikes_in_a_row if spike else history.nonfinite_in_a_row
        if in_a_row >= max(1, run.max_spike_steps if spike else run.max_nonfinite_steps):
            self.checkpoints.wait()  # the one that is named may still be on its way
            told += f"; {in_a_row} such steps in a row" if in_a_row > 1 else ""
            if not spike:
                raise NonFiniteLoss(f"{told}; {self._last_checkpoint()}")
            raise LastingSpike(
                f"{told}; {self._last_checkpoint()}; try a lower --optimizer.learning-rate or a "
                "higher --optimizer.spike-factor, each another run, or go on with a higher "
                "--max-spike-steps and --retry-failed"
            )
        if processes.is_leader():
            print(f"{run.name}: {told}: step skipped", file=sys.stderr)

    def _last_checkpoint(self) -> str:
        if not self.last_saved:
            return "there is no checkpoint before it"
        return f"the last good checkpoint is step {self.last_saved} in {self.checkpoints.path}"
