"""One run in full: every field of its config, what it takes by arithmetic, and what came of it."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gqa_scaling import costs
from gqa_scaling.config import RunConfig, UserError, defining_fields
from gqa_scaling.devices.layout import AXES, attention_implementation, axis_sizes
from gqa_scaling.fields import Json
from gqa_scaling.files.runs import RunDirectory, State, evaluation_in
from gqa_scaling.hardware import HARDWARE, Hardware, name_of
from gqa_scaling.sweep import memory
from gqa_scaling.sweep.plan import hardware_flops_per_token

NEEDED = "must be given"  # in place of a default
ABSENT = (
    "no such table"  # the same of a field of model.pattern and others that are left out by default
)


@dataclass(frozen=True)
class Field:
    """One field of a config by its dotted name, such as model.n_layers.

    `default` is NEEDED where every run has to say it. `differs` from it counts only where there is
    one. Those that define the trained model are in its digest.
    """

    name: str
    value: Any
    default: Any
    differs: bool
    defines: bool


@dataclass(frozen=True)
class Layout:
    """How a run lies over devices: `ran` as its last attempt had it, else as it would be."""

    ran: bool
    device: str
    processes: int
    mesh: dict[str, int]
    attention: str

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())


@dataclass(frozen=True)
class Details:
    """A run and where it stands. FLOPs are of the whole run: `training_flops` model FLOPs with causal
    attention, `hardware_flops` those executed. Bytes of training are per device of the layout.

    `declared` names the fields in which the experiment now declares it otherwise than it was begun.
    `loss` is the held-out loss in nats under the run's evaluation; None where there is none yet.
    """

    name: str
    experiment: str
    state: State
    path: str
    store: str
    digest: str
    evaluation_digest: str
    n_exact: int
    n_total: int
    tokens: int
    steps: int
    batch_size: int
    context_length: int
    training_flops: int
    hardware_flops: int
    training_bytes: int | None
    checkpoint_bytes: int
    finished_bytes: int
    layout: Layout
    restarts: int
    loss: float | None
    training_seconds: float | None
    declared: tuple[str, ...]
    config: tuple[Field, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self) | {"differs": [f.name for f in self.config if f.differs]}


def fields_of(run: RunConfig) -> list[Field]:
    """Every field of a run, those of its tables by their dotted names, in the order of the classes."""
    defining = defining_fields(run).keys()
    return [
        Field(name, value, default, default != NEEDED and value != default, name in defining)
        for name, value, default in _fields(run, "")
    ]


def _fields(config: Json, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value, default); all of a table that is left out by default has ABSENT as its own."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        default = NEEDED if field.default is dataclasses.MISSING else field.default
        if not isinstance(value, Json):
            yield name, value, default
            continue
        for inner, its_value, its_default in _fields(value, f"{name}."):
            yield inner, its_value, ABSENT if default is None else its_default


def details(
    run: RunConfig, directory: RunDirectory, row: Hardware | None = None, devices: int = 1
) -> Details:
    """What this run is and what came of it. A run that has not begun is laid out over that many devices
    of the kind `row` (default: CPUs).

    Raises UserError where a file of it is damaged or it cannot be laid out over the devices.
    """
    attempts, begun = directory.attempts(), directory.config_file.exists()
    layout = _ran(attempts[-1]["layout"]) if attempts else None
    if layout is not None:
        known = name_of(layout.device)
        row = HARDWARE[known] if known else None
    else:
        row = row or HARDWARE["cpu"]
        layout = _would_run(run, row, devices)
    result = directory.result()
    judged = evaluation_in(result, run.evaluation_digest) or {}
    timing = (result or {}).get("timing") or {}
    training_bytes = None
    if row is not None:
        training_bytes = memory.training_bytes(run, layout.devices, row.platform).total
    return Details(
        name=run.name,
        experiment=directory.path.parent.name,
        state=directory.state(),
        path=str(directory.path),
        store=run.data.store_path,
        digest=run.digest,
        evaluation_digest=run.evaluation_digest,
        n_exact=costs.n_exact(run.model),
        n_total=costs.parameters(run.model).total,
        tokens=costs.training_tokens(run),
        steps=costs.training_steps(run),
        batch_size=run.batch_size,
        context_length=run.context_length,
        training_flops=costs.training_flops(run),
        hardware_flops=hardware_flops_per_token(run) * costs.training_tokens(run),
        training_bytes=training_bytes,
        checkpoint_bytes=memory.checkpoint_bytes(run),
        finished_bytes=memory.finished_bytes(run),
        layout=layout,
        restarts=max(0, len(attempts) - 1),
        loss=judged.get("loss"),
        training_seconds=timing.get("training_seconds"),
        declared=tuple(differences(directory.config(), run)) if begun else (),
        config=tuple(fields_of(run)),
    )


def differences(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two runs differ, by their dotted names; () where one has no such field."""
    mine, other = ({f.name: f.value for f in fields_of(run)} for run in (a, b))
    names = dict.fromkeys([*mine, *other])
    both = {name: (mine.get(name, ()), other.get(name, ())) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _ran(told: dict[str, Any]) -> Layout | None:
    """The layout that an attempt noted; None where it is not all there."""
    mesh, attention = told.get("mesh"), told.get("attention")
    if not isinstance(mesh, dict) or not isinstance(attention, str):
        return None
    sizes = {axis: int(mesh.get(axis, 1)) for axis in AXES}
    return Layout(True, told["device"], int(told.get("processes", 1)), sizes, attention)


def _would_run(run: RunConfig, row: Hardware, devices: int) -> Layout:
    try:
        mesh = dict(zip(AXES, axis_sizes(run, devices), strict=True))
        attention = attention_implementation(run, row.platform)
    except UserError as error:
        where = f"{run.name} on {devices} x {row.name}"
        raise UserError(f"{where}: {error}; show it on others with --hardware") from None
    return Layout(False, row.name, 1, mesh, attention)
