"""What people read of single runs, of two beside each other, and of what lies on disk."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gqa_scaling.sweep.details import ABSENT, NEEDED, Details, Field
from gqa_scaling.sweep.differences import Changed, Difference, Pair
from gqa_scaling.sweep.space import KINDS, Removal, Space
from gqa_scaling.sweep.views import Cell, known, table
from gqa_scaling.units import byte_size, count, duration, quantity

LOOK: dict[str, Any] = {
    "box": SIMPLE_HEAD,
    "padding": (0, 1, 0, 0),
    "pad_edge": False,
    "title_justify": "left",
    "caption_justify": "left",
}
MOST_VALUES = 6  # of a field over a grid, in one cell


def text(value: Any) -> str:
    """A value of a config as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value) if value != "" else '""'


# -------------------------------------------------------------------------------------- show


def details_lines(run: Details) -> list[str | Text]:
    """What a run is and what came of it, a line each."""
    axes = [f"{axis} {size}" for axis, size in run.layout.mesh.items() if size > 1]
    mesh = f" ({' x '.join(axes)})" if axes else ""
    on = f"{run.layout.devices} x {run.layout.device}{mesh}, attention {run.layout.attention}"
    processes = f", {run.layout.processes} processes" if run.layout.processes > 1 else ""
    memory = known(run.training_bytes, byte_size, "an unknown number of bytes")
    per = run.tokens / run.n_exact
    rows = {
        "state": run.state + (f", {count(run.restarts, 'restart')}" if run.restarts else ""),
        "digest": f"{run.digest}, and of its evaluation {run.evaluation_digest}",
        "directory": run.path + ("" if run.state != "pending" else " (not there yet)"),
        "tokens at": run.store,
        "N": f"{run.n_exact:,}, and {run.n_total - run.n_exact:,} of embeddings",
        "trained on": f"{run.tokens:,} tokens, {quantity(per)} for each of N, in {run.steps:,} steps of "
        f"{run.batch_size} x {run.context_length:,}",
        "FLOPs": f"{run.training_flops:.3g} model FLOPs, {run.hardware_flops:.3g} executed, with "
        "recomputation and masked products",
        "layout": ("ran on " if run.layout.ran else "would run on ") + on + processes,
        "memory": f"{memory} on each of them (estimate)",
        "disk": f"{byte_size(run.checkpoint_bytes)} while it trains, {byte_size(run.finished_bytes)} "
        "once it is finished",
    }
    if run.loss is not None:
        rows["held-out loss"] = f"{run.loss:.4f} nats"
    if run.training_seconds is not None:
        rows["steps took"] = duration(run.training_seconds)
    if run.declared:
        rows["declared anew"] = f"since it was begun: {', '.join(run.declared)}"
    width = max(map(len, rows))
    return [Text(f"{run.experiment}: {run.name}", "bold")] + [
        f"  {name:<{width}}  {value}" for name, value in rows.items()
    ]


def config_table(run: Details) -> Table:
    """A row for each field; what differs from the default is marked."""

    def value(f: Field) -> Text:
        return Text(text(f.value), "bold" if f.differs else "")

    def default(f: Field) -> str:
        special = {NEEDED: "-", ABSENT: "none"}
        one = special.get(f.default, text(f.default)) if isinstance(f.default, str) else None
        return one or text(f.default)

    columns: dict[str, Cell[Field]] = {
        " ": lambda f: "*" if f.differs else "",
        "field": lambda f: f.name,
        "value": value,
        "default": default,
        "digest": lambda f: "yes" if f.defines else "",
    }
    return table(
        columns,
        run.config,
        overflow="fold",
        words=columns,
        caption="* differs from the default; - must be given. digest: another value makes another "
        "trained model.",
        **LOOK,
    )


# -------------------------------------------------------------------------------------- diff


def difference_parts(found: Difference) -> list[Table | str]:
    """The fields that differ, the runs that only one side has, and results side by side."""
    parts: list[Table | str] = [fields_table(found)] if found.fields else []
    if not found.fields:
        parts.append("no field differs")
    for side, names in zip(found.sides, found.only, strict=True):
        if names:
            parts.append(f"only in {side}: {count(len(names), 'run')}: {_listed(names)}")
    finished = [pair for pair in found.pairs if pair.losses != (None, None)]
    if finished:
        parts.append(results_table(found, finished))
    waiting = len(found.pairs) - len(finished)
    if waiting:
        parts.append(f"{waiting} of {len(found.pairs)} pairs are not finished on either side")
    return parts


def fields_table(found: Difference) -> Table:
    """A row for each field that is not the same on both sides."""

    def values(side: int) -> Cell[Changed]:
        return lambda one: _listed([text(v) for v in one.values[side]]) or "no such field"

    first, second = _sides(found)
    columns: dict[str, Cell[Changed]] = {
        "field": lambda one: one.field,
        first: values(0),
        second: values(1),
        "digest": lambda one: "yes" if one.defines else "",
    }
    caption = "digest: another value makes another trained model."
    return table(columns, found.fields, overflow="fold", words=columns, caption=caption, **LOOK)


def results_table(found: Difference, pairs: Sequence[Pair]) -> Table:
    """Held-out losses of runs that stand for each other, where either is finished."""
    same = all(pair.names[0] == pair.names[1] for pair in pairs)
    first, second = _sides(found)
    columns: dict[str, Cell[Pair]] = {
        "run": lambda p: p.names[0] if same else " / ".join(p.names),
        "N": lambda p: " / ".join(dict.fromkeys(map(quantity, p.n_exact))),
        f"loss of\n{first}\n(nats)": lambda p: known(p.losses[0], "{:.4f}".format),
        f"loss of\n{second}\n(nats)": lambda p: known(p.losses[1], "{:.4f}".format),
        "second minus\nfirst\n(millinats)": lambda p: known(
            None if p.difference is None else 1e3 * p.difference, "{:+.1f}".format
        ),
        "model": lambda p: "the same" if p.digests[0] == p.digests[1] else "another",
    }
    apart = [pair for pair in pairs if None not in pair.losses and not pair.comparable]
    note = "Losses on other held-out targets are not compared." if apart else ""
    return table(columns, pairs, whole={"run"}, caption=note or None, **LOOK)


def _sides(found: Difference) -> tuple[str, str]:
    """What the two columns are called, never the same: two runs by their names if these differ."""
    first, second = found.sides
    if len(found.pairs) == 1 and not any(found.only) and len(set(found.pairs[0].names)) == 2:
        first, second = found.pairs[0].names
    return (first, second) if first != second else (f"{first} (1)", f"{second} (2)")


def _listed(values: Sequence[str]) -> str:
    more = ", ..." if len(values) > MOST_VALUES else ""
    return ", ".join(values[:MOST_VALUES]) + more


# ---------------------------------------------------------------------------- disk and clean


def space_table(root: str, found: Sequence[Space], now: float) -> Table:
    """A row for each kind of files in each place, with how long ago the newest was written."""
    columns: dict[str, Cell[Space]] = {
        "place": lambda s: s.place,
        "what": lambda s: s.kind,
        "files": lambda s: f"{s.files:,}",
        "size": lambda s: byte_size(s.bytes),
        "newest": lambda s: known(s.newest, lambda t: f"{duration(max(0.0, now - t))} ago", "?"),
    }
    total = sum(each.bytes for each in found)
    title = f"{root} and what belongs to it: {byte_size(total)} in {count(sum(s.files for s in found), 'file')}"
    words, whole = {"place", "what"}, {"size", "newest"}
    return table(columns, found, whole, overflow="fold", words=words, title=title, **LOOK)


def removal_table(found: Sequence[Removal]) -> Table:
    """A row for each folder that can go."""
    columns: dict[str, Cell[Removal]] = {
        "what": lambda r: KINDS[r.kind],
        "folder": lambda r: r.path,
        "files": lambda r: f"{r.files:,}",
        "size": lambda r: byte_size(r.bytes),
        "why": lambda r: r.why,
    }
    words = {"what", "folder", "why"}
    return table(columns, found, whole={"size"}, overflow="fold", words=words, **LOOK)
