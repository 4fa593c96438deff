"""What a grid will cost, by arithmetic alone and before any spend; `views` prints it."""

from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gqa_scaling import costs
from gqa_scaling.config import MAX_EPOCHS, MOST_DEVICES, RunConfig, require
from gqa_scaling.devices.layout import layout_refusal
from gqa_scaling.experiment.branches import Trunk, trunks
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.experiment.starts import check_start, parent_of
from gqa_scaling.fields import INT32_MAX
from gqa_scaling.hardware import Hardware
from gqa_scaling.sweep import memory


@dataclass(frozen=True)
class PlannedRun:
    """What one run costs.

    `training_flops` are model FLOPs with causal attention; `hardware_flops` are those executed,
    recomputation and masked products included. `training_bytes` are per device, the bytes of
    checkpoints on disk. `pattern` is the label of the keys that heads see, "" for all of them.
    `epochs` is None where the corpus is not prepared yet. What is `finished` costs nothing any more.

    `first_step` is where the run branches off one of a smaller budget (`experiment/branches.py`), 0
    where it begins itself. FLOPs are of all its steps, `seconds` of those that are left; `kept_bytes`
    are those of the states that it keeps for others until they are done.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    pattern: str
    context_length: int
    batch_size: int
    n_exact: int
    tokens: int
    steps: int
    training_flops: int
    hardware_flops: int
    training_bytes: int
    seconds: float
    checkpoint_bytes: int
    finished_bytes: int
    epochs: float | None
    note: str
    first_step: int
    kept_bytes: int
    finished: bool = False

    @property
    def saved_flops(self) -> int:
        """Model FLOPs of the steps that it does not take."""
        return self.training_flops // self.steps * self.first_step


@dataclass(frozen=True)
class Plan:
    """Every run of an experiment on `devices` of one kind of hardware. All sums are over those left."""

    experiment: str
    hardware: Hardware
    devices: int
    runs: tuple[PlannedRun, ...]

    @property
    def left(self) -> tuple[PlannedRun, ...]:
        """The runs that are not finished."""
        return tuple(run for run in self.runs if not run.finished)

    @property
    def hours(self) -> float:
        """Wall time of all runs that are left, one after another."""
        return sum(r.seconds for r in self.left) / 3600

    @property
    def finished_bytes(self) -> int:
        """Disk that the runs that are left keep once they are finished."""
        return sum(r.finished_bytes for r in self.left)

    @property
    def disk_bytes(self) -> int:
        """Most disk that they take at any time: what is kept of them, for themselves and for others, and
        the largest in training."""
        kept = self.finished_bytes + sum(r.kept_bytes for r in self.left)
        return kept + max((r.checkpoint_bytes for r in self.left), default=0)

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the runs that are left: FLOPs that are spent, and those saved, hours, device-hours,
        dollars and bytes of disk."""
        device_hours = self.hours * self.devices
        return {
            "runs": len(self.left),
            "finished": len(self.runs) - len(self.left),
            "tokens": sum(r.tokens for r in self.left),
            "training_flops": sum(r.training_flops - r.saved_flops for r in self.left),
            "hardware_flops": sum(
                r.hardware_flops // r.steps * (r.steps - r.first_step) for r in self.left
            ),
            "saved_flops": sum(r.saved_flops for r in self.left),
            "hours": self.hours,
            "device_hours": device_hours,
            "dollars": device_hours * self.hardware.price,
            "disk_bytes": self.disk_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The plan for programs."""
        return {**asdict(self), "totals": self.totals}


def plan_run(
    run: RunConfig,
    hardware: Hardware,
    devices: int = 1,
    train_tokens: int | None = None,
    trunk: Trunk | None = None,
    finished: Container[RunConfig] = (),
    kept_step: int = 0,
) -> PlannedRun:
    """The cost of one run. `train_tokens` is the size of its corpus, None when not prepared; with a
    `trunk` the runs of smaller budgets are trained before it. Those that are `finished` are not: of
    them only what they have kept counts, up to `kept_step`."""
    m, flops = run.model, costs.training_flops(run)
    tokens, steps = costs.training_tokens(run), costs.training_steps(run)
    first = max(kept_step, trunk.begins(run, () if run in finished else finished) if trunk else 0)
    kept = [step for step in trunk.kept_steps(run) if step > first] if trunk else []
    return PlannedRun(
        name=run.name,
        n_layers=m.n_layers,
        d_model=m.d_model,
        n_heads=m.n_heads,
        n_kv_heads=m.n_kv_heads,
        pattern=m.pattern.label if m.pattern else "",
        context_length=run.context_length,
        batch_size=run.batch_size,
        n_exact=costs.n_exact(m),
        tokens=tokens,
        steps=steps,
        training_flops=flops,
        hardware_flops=hardware_flops_per_token(run) * tokens,
        training_bytes=memory.training_bytes(run, devices, hardware.platform).total,
        seconds=hardware.seconds(flops // steps * (steps - first), steps - first, devices),
        checkpoint_bytes=memory.checkpoint_bytes(run),
        finished_bytes=memory.finished_bytes(run),
        epochs=None if train_tokens is None else tokens / train_tokens,
        note=run.note,
        first_step=first,
        kept_bytes=len(kept) * memory.state_bytes(run),
        finished=run in finished,
    )


def hardware_flops_per_token(run: RunConfig) -> int:
    """FLOPs that the run's attention implementation and remat policy execute for each token."""
    full = run.parallel.attention == "reference"
    return costs.hardware_flops_per_token(run.model, run.context_length, run.parallel.remat, full)


def make_plan(
    experiment: Experiment,
    hardware: Hardware,
    devices: int = 1,
    train_tokens: dict[str, int] | None = None,
    finished: Container[RunConfig] = (),
    kept_steps: Mapping[str, int] | None = None,
) -> Plan:
    """The plan of every run; `train_tokens` by store path, for the corpora that are prepared.
    `finished` are the runs that have their result, `kept_steps`, by their digests, the steps whose
    states runs can begin with that others have kept.

    Raises UserError when a run cannot be laid out over the devices, asks for an attention that they
    do not have, or would see its corpus more than 4 times and does not allow it.
    """
    known = train_tokens or {}
    require(devices > 0, f"devices={devices} must be greater than 0")
    require(devices <= MOST_DEVICES, f"devices={devices} must be at most {MOST_DEVICES:,}")
    for run in experiment.runs:
        parent = parent_of(run, experiment.runs)
        if parent is not None:
            check_start(run, parent)
        check_steps(run)
        check_profile(run)
        check_average(run)
        reason = layout_refusal(run, devices, hardware.platform)
        other = "plan for other devices with --hardware NAME --devices N"
        require(not reason, f"{run.name}: {reason}; {other}")
        if run.data.store_path in known:
            check_epochs(run, known[run.data.store_path])
    trunk_of = trunks(experiment.runs)  # those that are planned alone: no others train their steps
    runs = tuple(
        plan_run(
            run,
            hardware,
            devices,
            known.get(run.data.store_path),
            trunk_of.get(run.digest),
            finished,
            (kept_steps or {}).get(run.digest, 0),
        )
        for run in experiment.runs
    )
    return Plan(experiment.name, hardware, devices, runs)


def check_steps(run: RunConfig) -> None:
    """Refuse more steps than the optimizer counts, and fewer than warmup and decay take."""
    steps, o = costs.training_steps(run), run.optimizer
    warmup, decay = o.phases(steps, run.batch_tokens)[0], round(o.decay * steps)
    decay = decay if o.schedule == "wsd" else 0
    require(
        not o.warmup_tokens or warmup + decay <= steps,
        f"{run.name}: of {steps:,} steps warmup_tokens={o.warmup_tokens:,} take {warmup:,} "
        f"and the decay {decay:,}: warm up with fewer tokens",
    )
    require(
        steps <= INT32_MAX,
        f"{run.name}: {costs.training_tokens(run):,} tokens in batches of {run.batch_tokens:,} are "
        f"{steps:,} steps and at most {INT32_MAX:,} can be counted: take fewer tokens or larger "
        "batches",
    )


def check_profile(run: RunConfig) -> None:
    """Refuse to trace steps that the run does not have."""
    steps = costs.training_steps(run)
    require(
        run.profiled_steps.stop <= steps + 1,
        f"{run.name}: profile={run.profile!r} ends after its last step {steps:,}; name earlier steps, "
        "or the runs with --only",
    )


def check_average(run: RunConfig) -> None:
    """Refuse to average over more states than the run saves."""
    count, every = run.evaluation.average, run.checkpoint.every_steps
    steps = costs.training_steps(run)
    saved = (steps - 1) // every + 1
    require(
        count <= saved,
        f"{run.name}: evaluation.average={count} must be at most {saved}: of {steps:,} steps a state is "
        f"saved every checkpoint.every_steps={every:,} and after the last",
    )


def check_epochs(run: RunConfig, train_tokens: int) -> None:
    """Refuse a run that repeats its corpus more than 4 times, unless it allows repeats."""
    tokens = costs.training_tokens(run)
    require(
        run.data.allow_repeats or tokens <= MAX_EPOCHS * train_tokens,
        f"{run.name}: {tokens:,} tokens are {tokens / train_tokens:.1f} epochs over the "
        f"{train_tokens:,} tokens of {run.data.name}, more than {MAX_EPOCHS:g}; use a larger corpus, "
        "fewer tokens, or --data.allow-repeats True",
    )
