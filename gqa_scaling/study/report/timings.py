"""What `bench-inference` measured, as a table and a picture."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gqa_scaling.config import ModelConfig
from gqa_scaling.files.timings import Machine, Phase, Timing, Timings
from gqa_scaling.study.report import drawing as draw
from gqa_scaling.study.report.looks import LINES, style
from gqa_scaling.study.report.table import Column, Table, percent
from gqa_scaling.units import byte_size, quantity

_Axis = Callable[[Timing], float]


@dataclass(frozen=True)
class Cell:
    """Prefill and decoding of one model, context, batch and type of cache, as far as they were timed."""

    machine: Machine
    rows: dict[Phase, Timing]

    @property
    def any(self) -> Timing:
        return next(iter(self.rows.values()))


def model_label(model: ModelConfig) -> str:
    """(8,1)@L12d768, with what else it has."""
    pattern = f" {model.pattern.label}" if model.pattern else ""
    heads = f"({model.n_heads},{model.n_kv_heads})"
    return f"{heads}@L{model.n_layers}d{model.d_model}{pattern}"


def machine_line(machine: Machine) -> str:
    flops = ", ".join(f"{quantity(f)}FLOP/s in {dtype}" for dtype, f in machine.flops.items())
    many = f"{machine.devices} x " if machine.devices > 1 else ""
    return (
        f"{many}{machine.device}: {quantity(machine.bandwidth)}B/s, {flops}, "
        f"{byte_size(machine.memory_bytes)} of memory"
    )


def row_line(row: Timing, machine: Machine) -> str:
    what = (
        f"{row.phase} {model_label(row.model)}, {row.context:,} tokens x {row.batch}, {row.cache}: "
    )
    if row.skipped is not None:
        return f"{what}skipped, {row.skipped}"
    return (
        f"{what}{seconds(row.seconds)}, {quantity(row.tokens_per_second)} tokens/s, "
        f"{percent(row.bandwidth_share(machine), 0)} of the bandwidth, "
        f"{percent(row.flops_share(machine), 0)} of the FLOP/s"
    )


def seconds(value: float) -> str:
    """Seconds with three digits, as ms below one."""
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def cells(timings: Timings) -> list[Cell]:
    """Both phases of a case together, in the order of contexts, batches, models and caches."""
    found: dict[tuple, dict[Phase, Timing]] = {}
    for row in sorted(timings.rows, key=lambda row: (row.context, row.batch)):
        case = row.model, row.context, row.batch, row.cache
        found.setdefault(case, {})[row.phase] = row
    return [Cell(timings.machine, rows) for rows in found.values()]


def timings_table(timings: Timings) -> Table:
    """Time to the first token and for each further one; shares are of what the machine did meanwhile."""
    rows = [cell for cell in cells(timings) if any(r.skipped is None for r in cell.rows.values())]
    skipped = [row for row in timings.rows if row.skipped is not None]

    def of(phase: Phase, show: Callable[[Timing], str]) -> Callable[[Cell], str]:
        def cell(cell: Cell) -> str:
            row = cell.rows.get(phase)
            return "-" if row is None or row.skipped is not None else show(row)

        return cell

    machine = timings.machine
    return Table(
        "Time to the first token, and for each one after it",
        [
            Column("model", lambda c: model_label(c.any.model)),
            Column("context", lambda c: f"{c.any.context:,}", "tokens"),
            Column("batch", lambda c: f"{c.any.batch}"),
            Column("cache", lambda c: c.any.cache),
            Column("first\ntoken", of("prefill", lambda r: seconds(r.seconds))),
            Column("of FLOP/s", of("prefill", lambda r: percent(r.flops_share(machine), 0))),
            Column("each\ntoken", of("decode", lambda r: seconds(r.seconds))),
            Column("spread", of("decode", lambda r: percent(r.spread, 0)), spare=2),
            Column("tokens/s", of("decode", lambda r: quantity(r.tokens_per_second))),
            Column("read", of("decode", lambda r: byte_size(r.bytes)), spare=3),
            Column(
                "of band-\nwidth", of("decode", lambda r: percent(r.bandwidth_share(machine), 0))
            ),
            Column("in use", of("decode", lambda r: byte_size(r.memory_bytes)), spare=1),
        ],
        rows,
        [machine_line(machine), *(row_line(row, machine) for row in skipped)],
        about="Medians of rounds in which configurations took turns; spread is the distance of the "
        "quartiles. Shares are of the bytes a second and FLOP/s that were measured between the rounds.",
    )


# ----------------------------------------------------------------------------------- the picture


@draw.styled
def timings_picture(timings: Timings) -> Figure:
    """Steps that decode against the bytes that they read, and prefill against its FLOPs."""
    machine = timings.machine
    figure, (left, right) = draw.frames(11.0, 4.6, 2)
    dtypes = [dtype for dtype in machine.flops if any(r.model.dtype == dtype for r in timings.rows)]
    decoded = [row for row in timings.timed if row.phase == "decode"]
    filled = [row for row in timings.timed if row.phase == "prefill"]
    looks = _looks(timings.timed)
    _panel(left, decoded, looks, lambda row: row.bytes, {"measured": machine.bandwidth})
    left.set_xlabel("bytes read: weights and cache")
    left.set_ylabel("seconds")
    left.set_title("a step that decodes one token of each sequence")
    rates = {f"measured, {dtype}": machine.flops[dtype] for dtype in dtypes}
    _panel(right, filled, looks, lambda row: row.flops, rates)
    right.set_xlabel("model FLOPs")
    right.set_title("prefill: until the first token")
    names = {(row.model.n_heads, row.model.n_kv_heads, row.cache): row for row in timings.timed}
    handles = [
        Line2D([], [], label=f"({h},{kv}) {cache}", **{**looks[h, kv, cache], "linestyle": ""})
        for h, kv, cache in sorted(names)
    ]
    figure.legend(handles=handles, loc="outside right upper", title="heads, KV, cache")
    return figure


def _looks(rows: Iterable[Timing]) -> dict[tuple[int, int, str], dict[str, Any]]:
    """A colour for each heads, a marker for each type of cache."""
    heads = sorted({(row.model.n_heads, row.model.n_kv_heads) for row in rows})
    caches = ["float32", "bfloat16", "int8"]
    return {
        (*each, cache): style(i, j)
        for i, each in enumerate(heads)
        for j, cache in enumerate(caches)
    }


def _panel(
    axis: Axes,
    rows: Sequence[Timing],
    looks: dict[tuple[int, int, str], dict[str, Any]],
    work: _Axis,
    rates: dict[str, float],
) -> None:
    """Seconds against work, both logarithmic, and how long the work takes at what was measured."""
    for row in rows:
        look = looks[row.model.n_heads, row.model.n_kv_heads, row.cache]
        axis.plot(work(row), row.seconds, **{**look, "linestyle": "", "alpha": 0.8})
    axis.set_yscale("log")
    if not rows:
        axis.set_xscale("log")
        return
    ends = np.array([min(map(work, rows)) / 2, max(map(work, rows)) * 2])
    for (label, rate), line in zip(rates.items(), LINES, strict=False):
        axis.plot(ends, ends / rate, color=draw.GREY, linestyle=line, label=label)
        axis.plot(ends, 2 * ends / rate, color=draw.GREY, linestyle=line, alpha=0.4)
    axis.set_xlim(*ends)
    draw.decades_axis(axis)
    axis.legend(
        loc="upper left", title="at the rate that was\n(pale: half of it)", title_fontsize=9
    )
