"""The tables and lines that people read of a sweep, and the same for programs.

A table is a dict of columns: for each heading, the text that a row has there.
"""

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import JustifyMethod, OverflowMethod
from rich.table import Table
from rich.text import Text

from gqa_scaling.config import RunConfig
from gqa_scaling.devices.layout import AXES
from gqa_scaling.experiment.learning_rates import LearningRateChoice
from gqa_scaling.files.checksums import abridged
from gqa_scaling.hardware import Slice, hardware
from gqa_scaling.narrow import Fitting
from gqa_scaling.sweep.plan import Plan, PlannedRun
from gqa_scaling.sweep.pods import Compiled, difference
from gqa_scaling.sweep.status import ORDER, RunCheckpoints, RunStatus
from gqa_scaling.units import byte_size, count, duration, quantity

Row = TypeVar("Row")
Cell = Callable[[Row], str | Text]

WORDS = {"run", "state", "pattern", "mesh", "remat", "kept", "saved", "a resume uses"}
COLOURS = {"done": "green", "running": "cyan", "stale": "yellow", "failed": "red"}
COLOURS |= {"pending": "dim", "damaged": "red", "whole": "green", "unfinished": "dim"}


def table(
    columns: Mapping[str, Cell[Row]],
    rows: Iterable[Row],
    whole: Container[str] = (),
    overflow: OverflowMethod = "ellipsis",
    words: Container[str] = WORDS,
    **look: Any,
) -> Table:
    """The table of these rows; `look` are options of rich's Table.

    Columns of `words` stand to the left and numbers to the right. Columns named in `whole` are never folded on a
    narrow terminal; `overflow` is what becomes of text that is too long.
    """
    made = Fitting(**look)
    for name in columns:
        justify: JustifyMethod = "left" if name in words else "right"
        made.add_column(name, justify=justify, no_wrap=name in whole, overflow=overflow)
    for row in rows:
        made.add_row(*(cell(row) for cell in columns.values()))
    return made


def known(value: float | None, text: Callable[[float], str], otherwise: str = "") -> str:
    """The value as text, or what stands for one that is not known."""
    return otherwise if value is None else text(value)


# -------------------------------------------------------------------------------------- plan


def plan_table(plan: Plan) -> Table:
    """A row for each run. Columns that say nothing, or the same of every run, are left out."""
    h, runs = plan.hardware, plan.runs
    batches = {(r.batch_size, r.context_length) for r in runs}
    sparse = any(r.pattern for r in runs)
    hidden = {"batch x T"} if len(batches) == 1 else set()
    hidden |= set() if sparse else {"pattern"}
    hidden |= set() if any(r.first_step for r in runs) else {"first step"}
    hidden |= {"epochs"} if all(r.epochs is None for r in runs) else set()

    def memory(r: PlannedRun) -> Text:
        return Text(byte_size(r.training_bytes), "red" if r.training_bytes > h.memory else "")

    columns: dict[str, Cell[PlannedRun]] = {
        "run": lambda r: r.name,
        "L x d": lambda r: f"{r.n_layers}x{r.d_model}",
        "heads": lambda r: f"{r.n_heads},{r.n_kv_heads}",
        "pattern": lambda r: r.pattern or "dense",
        "N": lambda r: quantity(r.n_exact),
        "batch x T": lambda r: f"{r.batch_size}x{r.context_length}",
        "tokens": lambda r: quantity(r.tokens),
        "FLOPs": lambda r: f"{r.training_flops:.1e}",
        "first step": lambda r: f"{r.first_step:,}/{r.steps:,}" if r.first_step else "",
        "memory": memory,
        "time": lambda r: Text("done", COLOURS["done"]) if r.finished else duration(r.seconds),
        "epochs": lambda r: known(r.epochs, "{:.2f}".format, "?"),
    }
    each = "".join(f", batches of {b} x {t:,} tokens" for b, t in batches if len(batches) == 1)
    measured = ", as measured in matrix products" if h.name == "cpu" else ""
    parts = " Pattern: blocks of b tokens, w local, a stripe each s, k sinks; dense parts with +."
    return table(
        {name: cell for name, cell in columns.items() if name not in hidden},
        runs,
        whole=columns.keys() - WORDS,
        overflow="fold",
        title=f"{plan.experiment} on {plan.devices} x {h.name}{each}",
        caption=f"FLOPs: model FLOPs of forward and backward, causal attention, output head "
        f"included. Time: {h.mfu:.0%} of {h.peak_flops / 1e12:.3g} TFLOP/s{measured} (--mfu), and "
        f"{h.start_seconds:g} s to start. Memory: per device, an estimate ({byte_size(h.memory)} "
        f"there).{parts if sparse else ''}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def plan_summary(plan: Plan) -> list[str]:
    """Totals and warnings, a line each."""
    t = plan.totals
    runs = count(int(t["runs"]), "run") + (f" left of {len(plan.runs)}" if t["finished"] else "")
    if plan.runs and not plan.left:
        return [f"all {len(plan.runs)} runs are finished: nothing is left to pay for"]
    lines = [
        f"{runs}, {quantity(t['tokens'])} tokens, {t['training_flops']:.3g} model FLOPs "
        f"({t['hardware_flops']:.3g} executed, with recomputation and masked products), "
        f"{duration(3600 * plan.hours)} one after another, {t['device_hours']:.3g} device-hours, "
        f"${t['dollars']:,.2f} at ${plan.hardware.price:g} a device-hour",
        f"disk: {byte_size(plan.disk_bytes)}{' more' if t['finished'] else ''} at most, {byte_size(plan.finished_bytes)} once finished",
    ]
    branches = sum(r.first_step > 0 for r in plan.left)
    if branches:
        saved = t["saved_flops"] / (t["saved_flops"] + t["training_flops"])
        lines.append(
            f"{count(branches, 'run')} to begin where the decay of one with a smaller token budget does: "
            f"{t['saved_flops']:.3g} model FLOPs ({saved:.0%}) are saved and in none of these sums"
        )
    large = [r.name for r in plan.left if r.training_bytes > plan.hardware.memory]
    if large:
        lines.append(
            f"WARNING: {count(len(large), 'run')} predicted not to fit {byte_size(plan.hardware.memory)} "
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


# ------------------------------------------------------------------------------ compiled steps


def compiled_table(found: Sequence[Compiled], place: Slice) -> Table:
    """A row for each shape that was compiled and, below it, for the change that makes it fit."""

    def name(one: Compiled) -> str:
        others = f"+{len(one.others)}" if one.others else ""
        return " ".join(part for part in (one.run, others, one.pattern) if part)

    def mesh(one: Compiled) -> str:
        sizes = " x ".join(f"{axis} {one.mesh[axis]}" for axis in AXES if one.mesh[axis] > 1)
        parts = one.parallel.accumulation
        return (sizes or "one chip") + (f", accumulation {parts}" if parts > 1 else "")

    def predicted(one: Compiled) -> str:
        return f"{byte_size(one.predicted)} ({one.predicted / one.needed - 1:+.0%})"

    def received(one: Compiled) -> str:
        return "?" if one.flops is None else byte_size(round(one.received))

    columns: dict[str, Cell[Compiled]] = {
        "run": name,
        "mesh": mesh,
        "remat": lambda one: one.parallel.remat,
        "state + batch": lambda one: known(one.arguments, byte_size, "?"),
        "temporaries": lambda one: known(one.temporaries, byte_size, "?"),
        "total": lambda one: byte_size(one.needed),
        "predicted": predicted,
        "FLOPs": lambda one: known(one.flops, quantity, "?"),
        "model FLOPs": lambda one: known(one.model_flops, quantity, "?"),
        "received": received,
        "fits": lambda one: Text("yes") if one.fits else Text("no", "red"),
    }
    allowed = found[0].allowed if found else hardware(place.kind).memory
    compiler = found[0].compiler if found else "the TPU compiler"
    return table(
        columns,
        _with_changes(found),
        overflow="fold",
        title=f"compiled for {place.name}: {place.chips} chips of {byte_size(allowed)}",
        caption=f"{compiler}. Per chip; FLOPs and bytes of one step, loops counted as often as they "
        "turn. Model FLOPs: causal attention, no recomputation. Received: what a chip gets from "
        "others in all-gathers, reductions and exchanges.",
        box=SIMPLE_HEAD,
    )


def _with_changes(found: Sequence[Compiled]) -> list[Compiled]:
    """Each, and after it the change that makes it fit where there is one."""
    return [one for each in found for one in (each, each.change) if one is not None]


def compiled_summary(found: Sequence[Compiled], runs: Mapping[str, RunConfig]) -> list[str]:
    """What is to be done and to be known, a line each; `runs` by name."""
    lines = []
    for each in found:
        needs = f"{each.run} needs {byte_size(each.needed)} of {byte_size(each.allowed)}"
        if each.change is not None:
            run = runs[each.run]
            options = difference(run, replace(run, parallel=each.change.parallel))
            lines.append(f"{needs}; it fits, with {byte_size(each.change.needed)}, by {options}")
        elif not each.fits:
            lines.append(
                f"{needs}, and no change of remat, accumulation, fsdp, context or tensor was found "
                "to fit: take more or larger chips"
            )
        for one in _with_changes([each]):
            lines += [f"WARNING: {one.run}: {text}" for text in one.involuntary]
            lines += [f"WARNING: {one.run}: all layers joined at once: {x}" for x in one.gathered]
            if one.donated is not None and one.donated < 0.99:
                lines.append(f"WARNING: {one.run}: only {one.donated:.1%} of the state is donated")
            if one.kernels:
                lines.append(f"{one.run}: FLOPs leave out {one.kernels} kernel calls")
    turns = sorted({each.mean_turns for each in found if each.mean_turns is not None})
    if turns:
        values = ", ".join(f"{value:g}" for value in turns)
        lines.append(
            f"attention stops at the diagonal: the loop over tiles of keys counts as {values} turns, "
            "its mean"
        )
    for each in found:
        top = [row for row in each.collectives if row["bytes"] > 0.02 * each.received][:8]
        if top and each.model_flops:
            share = f"{each.overlapped / each.received:.0%} of it while computing"
            density = f"{1000 * each.received / each.model_flops:.2g} bytes for 1,000 model FLOPs"
            lines.append(f"{each.run}: a chip receives {density}, {share}")
        for row in top:
            among = f" among {row['devices']}" if row["devices"] else ""
            flops = f", meanwhile {row['meanwhile'] / row['bytes']:,.0f} FLOPs for each byte"
            meanwhile = flops if row["overlaps"] else ", waiting"
            what = f"{row['kind']} {row['array']}{among}, {row['times']:g} times{meanwhile}"
            lines.append(f"  {byte_size(row['bytes']):>10}  {what}")
    return lines


# ------------------------------------------------------------------------------------ status


def status_counts(rows: Sequence[RunStatus]) -> str:
    """Such as 3 done, 1 failed."""
    return ", ".join(f"{n} {s}" for s in ORDER if (n := sum(r.state == s for r in rows)))


def status_title(experiment: str, rows: Sequence[RunStatus]) -> str:
    return f"{experiment}: {count(len(rows), 'run')}, {status_counts(rows)}"


def coloured_state(row: RunStatus) -> Text:
    return Text(row.state, COLOURS[row.state])


def time_use(row: RunStatus) -> str:
    """What the time went to: goodput, evaluation and saving as '81+12+3%', or '81%' alone."""
    if row.goodput is None:
        return ""
    shares = [row.goodput]
    if row.evaluation or row.saving:
        shares += [row.evaluation or 0.0, row.saving or 0.0]
    return "+".join(f"{100 * share:.0f}" for share in shares) + "%"


def loss(row: RunStatus) -> str:
    return known(row.loss, "{:.4f}".format)


def evaluation_loss(row: RunStatus) -> str:
    return known(row.evaluation_loss, "{:.4f}".format)


def status_table(experiment: str, rows: Sequence[RunStatus]) -> Table:
    """A row for each run and, below one that failed, why."""
    columns: dict[str, Cell[RunStatus]] = {
        "run": lambda r: r.name,
        "state": coloured_state,
        "step": lambda r: f"{r.step:,}/{r.steps:,}",
        "train\nloss\n(nats)": loss,
        "held-out\nloss\n(nats)": evaluation_loss,
        "tok/s\nper\ndevice": lambda r: known(r.tokens_per_second, "{:,.0f}".format),
        "goodput\n+ eval\n+ saving": time_use,
        "starts\nagain": lambda r: str(r.restarts),
    }
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    look |= {"pad_edge": False, "show_edge": False}
    made = table(columns, (), whole={"run"}, title=status_title(experiment, rows), **look)
    for r in rows:
        made.add_row(*(cell(r) for cell in columns.values()))
        if r.failure:
            made.add_row("", Text(r.failure[:70], "red"), end_section=True)
    return made


def status_dict(experiment: str, rows: Sequence[RunStatus]) -> dict[str, Any]:
    """The status for programs."""
    return {
        "experiment": experiment,
        "counts": {s: sum(r.state == s for r in rows) for s in ORDER},
        "runs": [asdict(r) for r in rows],
    }


# ------------------------------------------------------------------------------- checkpoints


def checkpoints_table(runs: Sequence[RunCheckpoints]) -> Table:
    """A row for each checkpoint that is kept; the run is named in its first."""
    counts = [
        f"{n} {state}"
        for state in ("whole", "damaged", "unfinished")
        if (n := sum(kept.state == state for run in runs for kept in run.kept))
    ]
    made = Fitting(title=f"checkpoints of {count(len(runs), 'run')}: {', '.join(counts) or 'none'}")
    for column in ("run", "kept", "size", "saved", "state", "a resume uses"):
        right = column == "size"
        made.add_column(column, justify="right" if right else "left", no_wrap=column == "kept")
    for run in runs:
        first = (run.name, run.resume)
        for kept in run.kept:
            when = "" if kept.saved is None else time.strftime("%F %T", time.localtime(kept.saved))
            said = f"{kept.state}: {abridged(kept.damage)}" if kept.damage else kept.state
            state = Text(said, COLOURS[kept.state])
            made.add_row(Text(first[0]), kept.name, byte_size(kept.bytes), when, state, first[1])
            first = ("", "")
        if not run.kept:
            made.add_row(Text(run.name), "none", "", "", "", run.resume)
    return made


def checkpoints_dict(runs: Sequence[RunCheckpoints]) -> dict[str, Any]:
    """The checkpoints for programs; bytes, and seconds since 1970."""
    rows = [
        {
            "name": run.name,
            "path": run.path,
            "state": run.state,
            "resume": run.resume,
            "kept": [{"name": kept.name, **asdict(kept)} for kept in run.kept],
        }
        for run in runs
    ]
    return {"damaged": sum(run.damaged for run in runs), "runs": rows}


# ----------------------------------------------------------------------------- learning rates


Choices = Mapping[tuple[int, int], LearningRateChoice]  # by (n_layers, d_model)


def learning_rates_dict(choices: Choices) -> list[dict[str, Any]]:
    """The best learning rate of each size for programs; losses in nats."""
    return [
        {
            "n_layers": layers,
            "d_model": width,
            "learning_rate": c.learning_rate,
            "loss": dict(c.tried)[c.learning_rate],
            "tried": dict(c.tried),
            "edge": c.edge,
        }
        for (layers, width), c in choices.items()
    ]


def learning_rates_table(experiment: str, choices: Choices, runs: Sequence[RunConfig]) -> Table:
    """The same for people, and the sizes of `runs` of which nothing can be said yet."""
    columns: dict[str, Cell[dict[str, Any]]] = {
        "L": lambda c: str(c["n_layers"]),
        "d": lambda c: str(c["d_model"]),
        "learning rate": lambda c: f"{c['learning_rate']:g}",
        "held-out loss (nats)": lambda c: f"{c['loss']:.4f}",
        "tried": lambda c: " ".join(f"{rate:g}" for rate in c["tried"]),
        "flag": lambda c: f"the {c['edge']} rate tried: widen the sweep" if c["edge"] else "",
    }
    title = f"{experiment}: best maximum learning rate by size"
    made = table(columns, learning_rates_dict(choices), title=title)
    sizes = {(run.model.n_layers, run.model.d_model) for run in runs}
    for layers, width in sorted(sizes - choices.keys()):
        made.add_row(str(layers), str(width), "", "", "", "not all of its runs are finished")
    return made
