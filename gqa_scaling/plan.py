"""What a grid will cost, before any spend."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, require
from gqa_scaling.experiment import Experiment
from gqa_scaling.hardware import GIB, Hardware

MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class PlannedRun:
    """One run's cost: FLOPs are model FLOPs with causal attention, bytes are per device."""

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    context_length: int
    batch_size: int
    n_exact: int
    tokens: int
    steps: int
    training_flops: int
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
        run.context_length,
        run.batch_size,
        costs.n_exact(m),
        tokens,
        steps,
        flops,
        costs.training_bytes(run, devices).total,
        hardware.seconds(flops, steps, devices),
        costs.checkpoint_bytes(run),
        costs.finished_bytes(run),
        None if train_tokens is None else tokens / train_tokens,
        run.note,
    )


def make_plan(
    experiment: Experiment,
    hardware: Hardware,
    devices: int = 1,
    train_tokens: dict[str, int] | None = None,
) -> Plan:
    """The plan of every run; `train_tokens` by store path, for the corpora that are prepared.

    Raises UserError when a run would see its corpus more than 4 times and does not allow it.
    """
    known = train_tokens or {}
    require(devices > 0, f"devices={devices} must be greater than 0")
    for run in experiment.runs:
        if run.data.store_path in known:
            check_epochs(run, known[run.data.store_path])
    runs = tuple(
        plan_run(run, hardware, devices, known.get(run.data.store_path)) for run in experiment.runs
    )
    return Plan(experiment.name, hardware, devices, runs)


def check_epochs(run: RunConfig, train_tokens: int) -> None:
    """Refuse a run that repeats its corpus more than 4 times, unless it allows repeats."""
    tokens = costs.training_tokens(run)
    require(
        run.data.allow_repeats or tokens <= MAX_EPOCHS * train_tokens,
        f"{run.name}: {tokens:,} tokens are {tokens / train_tokens:.1f} epochs over the "
        f"{train_tokens:,} tokens of {run.data.name}, more than {MAX_EPOCHS:g}; use a larger corpus, "
        "fewer tokens, or --data.allow-repeats True",
    )


def quantity(value: float, unit: str = "") -> str:
    """1234567 -> '1.23M'; with the unit after it."""
    value = float(f"{value:.3g}")  # 999,999 is 1M, not 1000k
    for scale, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{'B' if prefix == 'G' and not unit else prefix}{unit}"
    return f"{value:.3g}{unit}"


def bytes_text(value: float) -> str:
    """Bytes in binary units."""
    for scale, unit in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            count = value / scale
            return f"{count:.0f} {unit}" if count >= 100 else f"{count:.3g} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 7 h 20 min, 12 d 3 h."""
    seconds = round(seconds)
    if seconds < 90:
        return f"{seconds} s"
    if seconds < 5400:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def plan_table(plan: Plan) -> Table:
    """The plan as people read it."""
    h = plan.hardware
    table = Table(
        title=f"{plan.experiment} on {plan.devices} x {h.name}",
        caption=f"FLOPs: model FLOPs of forward and backward, causal attention, output head "
        f"included. Time: {h.peak_flops / 1e12:.3g} TFLOP/s peak x MFU {h.mfu:g}, and "
        f"{h.start_seconds:g} s to start. Memory: per device, an estimate ({bytes_text(h.memory)} "
        "there).",
        caption_justify="left",
    )
    columns = (
        "run",
        "L",
        "d",
        "heads",
        "N",
        "T",
        "batch",
        "tokens",
        "steps",
        "FLOPs",
        "memory",
        "time",
        "epochs",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for r in plan.runs:
        too_large = r.training_bytes > h.memory
        table.add_row(
            r.name,
            str(r.n_layers),
            str(r.d_model),
            f"{r.n_heads},{r.n_kv_heads}",
            quantity(r.n_exact),
            f"{r.context_length:,}",
            str(r.batch_size),
            quantity(r.tokens),
            f"{r.steps:,}",
            f"{r.training_flops:.2e}",
            f"{'[red]' if too_large else ''}{bytes_text(r.training_bytes)}",
            duration(r.seconds),
            "?" if r.epochs is None else f"{r.epochs:.2f}",
        )
    return table


def plan_summary(plan: Plan) -> list[str]:
    """Totals and warnings, a line each."""
    t = plan.to_dict()["totals"]
    lines = [
        f"{t['runs']} runs, {quantity(t['tokens'])} tokens, {t['training_flops']:.3g} FLOPs, "
        f"{duration(3600 * plan.hours)} one after another, {t['device_hours']:.3g} device-hours, "
        f"${t['dollars']:,.2f} at ${plan.hardware.price:g} a device-hour",
        f"disk: {bytes_text(plan.disk_bytes)} at most, "
        f"{bytes_text(sum(r.finished_bytes for r in plan.runs))} once finished",
    ]
    large = [r.name for r in plan.runs if r.training_bytes > plan.hardware.memory]
    if large:
        lines.append(
            f"WARNING: {len(large)} runs are predicted not to fit {bytes_text(plan.hardware.memory)} "
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
