"""How fast the steps of one attempt are, apart from what is done between them."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from gqa_scaling.costs import training_flops_per_token
from gqa_scaling.hardware import HARDWARE, name_of
from gqa_scaling.training.setup import Setup


class Speed:
    """Speed over the steps since this attempt or `restart`, the first two (compilation) left out.

    A step's time is the time between the ends of two steps, less what was spent `outside_steps`.
    That is told by its name, as the seconds since the attempt began. Times are by `clock`, in
    seconds.
    """

    def __init__(self, setup: Setup, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first, self._last = (0, 0.0), (0, 0.0)  # (step, when it ended) of those measured
        self._ended = 0
        self._outside: dict[str, float] = {}
        self._devices = jax.device_count()
        self._tokens = setup.run.batch_tokens
        self._flops = training_flops_per_token(setup.run.model, setup.run.context_length)
        name = name_of(jax.devices()[0].device_kind)
        # MFU is against a vendor's figure, which CPUs lack
        self._peak = HARDWARE[name].peak_flops if name and name != "cpu" else None

    def restart(self) -> None:
        """Forget the steps so far, which were slower than usual."""
        self._ended = 0

    @contextlib.contextmanager
    def outside_steps(self, name: str) -> Iterator[None]:
        """Count the body's time under this name; no step may be in flight."""
        began = self._clock()
        yield
        self._outside[name] = self._outside.get(name, 0.0) + self._clock() - began

    def step_ended(self, step: int) -> None:
        self._ended += 1
        self._last = (step, self._clock() - sum(self._outside.values()))
        if self._ended <= 2:
            self._first = self._last

    def scalars(self) -> dict[str, float]:
        """What is known so far, by TensorBoard tags; times in seconds, rates per device."""
        out = {f"perf/{name}_seconds": seconds for name, seconds in self._outside.items()}
        steps = self._last[0] - self._first[0]
        if steps == 0:
            return out
        seconds = (self._last[1] - self._first[1]) / steps
        rate = self._tokens / seconds / self._devices
        out |= {
            "perf/step_time_seconds": seconds,
            "perf/per_device_tokens_per_sec": rate,
            "perf/per_device_tflops_per_sec": rate * self._flops / 1e12,
        }
        if self._peak is not None:
            out["perf/mfu"] = rate * self._flops / self._peak
        return out
