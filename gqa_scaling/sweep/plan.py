"""What a grid will cost, before any spend."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gqa_scaling import costs
from gqa_scaling.config import MAX_EPOCHS, MOST_DEVICES, RunConfig, UserError, require
from gqa_scaling.devices.layout import check_layout
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.fields import INT32_MAX
from gqa_scaling.hardware import Hardware
from gqa_scaling.sweep import memory
from gqa_scaling.units import byte_size, duration, quantity


@dataclass(frozen=True)
class PlannedRun:
    """One run's cost. `training_flops` are model FLOPs with causal attention; `hardware_flops` are
    what is executed, recomputation and masked products included. Bytes are per device. `pattern` is
    the label of the keys that heads see, "" for all.
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


@dataclass(frozen=True)
class Plan:
    """Every run of an experiment on `devices` of one kind of hardware."""

    experiment: str
    hardware: Hardware
    devices: int
    runs: tuple[PlannedRun, ...]

    @property
    def hours(self) -> float:
        """Wall time of all runs one after another."""
        return sum(r.seconds for r in self.runs) / 3600

    @property
    def dollars(self) -> float:
        return self.hours * self.devices * self.hardware.price

    @property
    def disk_bytes(self) -> int:
        """Most disk at any time: what finished runs keep and the largest run in training."""
        return sum(r.finished_bytes for r in self.runs) + max(
            (r.checkpoint_bytes for r in self.runs), default=0
        )

    def to_dict(self) -> dict[str, Any]:
        totals = {
            "runs": len(self.runs),
            "tokens": sum(r.tokens for r in self.runs),
            "training_flops": sum(r.training_flops for r in self.runs),
            "hardware_flops": sum(r.hardware_flops for r in self.runs),
            "hours": self.hours,
            "device_hours": self.hours * self.devices,
            "dollars": self.dollars,
            "disk_bytes": self.disk_bytes,
        }
        return {**asdict(self), "totals": totals}


def plan_run(
    run: RunConfig, hardware: Hardware, devices: int = 1, train_tokens: int | None = None
) -> PlannedRun:
    """The cost of one run. `train_tokens` is the size of its corpus, None when not prepared."""
    m, flops = run.model, costs.training_flops(run)
    tokens, steps = costs.training_tokens(run), costs.training_steps(run)
    return PlannedRun(
        run.name,
        m.n_layers,
        m.d_model,
        m.n_heads,
        m.n_kv_heads,
        m.pattern.label if m.pattern else "",
        run.context_length,
        run.batch_size,
        costs.n_exact(m),
        tokens,
        steps,
        flops,
        hardware_flops(run),
        memory.training_bytes(run, devices, hardware.platform).total,
        hardware.seconds(flops, steps, devices),
        memory.checkpoint_bytes(run),
        memory.finished_bytes(run),
        None if train_tokens is None else tokens / train_tokens,
        run.note,
    )


def hardware_flops(run: RunConfig) -> int:
    """FLOPs that the run's attention implementation and remat policy execute in all."""
    full = run.parallel.attention == "reference"
    per_token = costs.hardware_flops_per_token(
        run.model, run.context_length, run.parallel.remat, full
    )
    return per_token * costs.training_tokens(run)


def make_plan(
    experiment: Experiment,
    hardware: Hardware,
    devices: int = 1,
    train_tokens: dict[str, int] | None = None,
) -> Plan:
    """The plan of every run; `train_tokens` by store path, for the corpora that are prepared.

    Raises UserError when a run cannot be laid out over the devices, asks for an attention that they
    do not have, or would see its corpus more than 4 times and does not allow it.
    """
    known = train_tokens or {}
    require(devices > 0, f"devices={devices} must be greater than 0")
    require(devices <= MOST_DEVICES, f"devices={devices} must be at most {MOST_DEVICES:,}")
    for run in experiment.runs:
        check_steps(run)
        check_profile(run)
        try:
            check_layout(run, devices, hardware.platform)
        except UserError as error:
            other = "plan for other devices with --hardware NAME --devices N"
            raise UserError(f"{error}; {other}") from None
        if run.data.store_path in known:
            check_epochs(run, known[run.data.store_path])
    runs = tuple(
        plan_run(run, hardware, devices, known.get(run.data.store_path)) for run in experiment.runs
    )
    return Plan(experiment.name, hardware, devices, runs)


def check_steps(run: RunConfig) -> None:
    """Refuse more steps than the optimizer counts."""
    steps = costs.training_steps(run)
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


def check_epochs(run: RunConfig, train_tokens: int) -> None:
    """Refuse a run that repeats its corpus more than 4 times, unless it allows repeats."""
    tokens = costs.training_tokens(run)
    require(
        run.data.allow_repeats or tokens <= MAX_EPOCHS * train_tokens,
        f"{run.name}: {tokens:,} tokens are {tokens / train_tokens:.1f} epochs over the "
        f"{train_tokens:,} tokens of {run.data.name}, more than {MAX_EPOCHS:g}; use a larger corpus, "
        "fewer tokens, or --data.allow-repeats True",
    )


def plan_table(plan: Plan) -> Table:
    """The plan as people read it."""
    h = plan.hardware
    batches = {(r.batch_size, r.context_length) for r in plan.runs}
    each = "".join(f", batches of {b} x {t:,} tokens" for b, t in batches if len(batches) == 1)
    sharded = (
        " Pattern: blocks of b tokens, w local, a stripe each s, k sinks; dense parts with +."
        if any(r.pattern for r in plan.runs)
        else ""
    )
    table = Table(
        title=f"{plan.experiment} on {plan.devices} x {h.name}{each}",
        caption=f"FLOPs: model FLOPs of forward and backward, causal attention, output head "
        f"included. Time: {h.peak_flops / 1e12:.3g} TFLOP/s peak x MFU {h.mfu:g}, and "
        f"{h.start_seconds:g} s to start. Memory: per device, an estimate ({byte_size(h.memory)} "
        f"there).{sharded}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    columns = (
        "run",
        "L x d",
        "heads",
        "pattern",
        "N",
        "batch x T",
        "tokens",
        "FLOPs",
        "memory",
        "time",
        "epochs",
    )
    hidden = {"batch x T"} if len(batches) == 1 else set()
    hidden |= {"pattern"} if not any(r.pattern for r in plan.runs) else set()
    hidden |= {"epochs"} if all(r.epochs is None for r in plan.runs) else set()
    shown = [i for i, column in enumerate(columns) if column not in hidden]
    for i in shown:
        wraps = columns[i] in ("run", "pattern")  # narrow terminals fold words, never numbers
        table.add_column(
            columns[i], justify="left" if wraps else "right", no_wrap=not wraps, overflow="fold"
        )
    for r in plan.runs:
        too_large = r.training_bytes > h.memory
        cells = (
            r.name,
            f"{r.n_layers}x{r.d_model}",
            f"{r.n_heads},{r.n_kv_heads}",
            r.pattern or "dense",
            quantity(r.n_exact),
            f"{r.batch_size}x{r.context_length}",
            quantity(r.tokens),
            f"{r.training_flops:.1e}",
            Text(byte_size(r.training_bytes), style="red" if too_large else ""),
            duration(r.seconds),
            "?" if r.epochs is None else f"{r.epochs:.2f}",
        )
        table.add_row(*(cells[i] for i in shown))
    return table


def plan_summary(plan: Plan) -> list[str]:
    """Totals and warnings, a line each."""
    t = plan.to_dict()["totals"]
    lines = [
        f"{t['runs']} runs, {quantity(t['tokens'])} tokens, {t['training_flops']:.3g} model FLOPs "
        f"({t['hardware_flops']:.3g} executed, with recomputation and masked products), "
        f"{duration(3600 * plan.hours)} one after another, {t['device_hours']:.3g} device-hours, "
        f"${t['dollars']:,.2f} at ${plan.hardware.price:g} a device-hour",
        f"disk: {byte_size(plan.disk_bytes)} at most, "
        f"{byte_size(sum(r.finished_bytes for r in plan.runs))} once finished",
    ]
    large = [r.name for r in plan.runs if r.training_bytes > plan.hardware.memory]
    if large:
        lines.append(
            f"WARNING: {len(large)} runs are predicted not to fit {byte_size(plan.hardware.memory)} "
            f"({', '.join(large[:3])}{', ...' if len(large) > 3 else ''}); try --parallel.remat full, "
            "--parallel.accumulation or --parallel.fsdp"
        )
    if any(r.epochs is None for r in plan.runs):
        lines.append("epochs: unknown until the data is prepared")
    notes = sorted({r.note for r in plan.runs if r.note})
    lines += [f"note: {note}" for note in notes[:12]]
    if len(notes) > 12:
        lines.append(f"note: ... and {len(notes) - 12} more (see --json)")
    return lines
