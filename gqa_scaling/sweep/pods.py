"""Whether a run fits a TPU pod, said by its compiler before anything is paid for; no jax here.

`compile_run` starts `gqa_scaling.sweep.compile` in a process of its own and tells what came of it.
"""

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from gqa_scaling import costs
from gqa_scaling.config import ParallelConfig, RunConfig, UserError, require
from gqa_scaling.devices.layout import AXES, attention_implementation, axis_sizes
from gqa_scaling.experiment.load import Experiment
from gqa_scaling.hardware import Topology, hardware
from gqa_scaling.sweep import memory
from gqa_scaling.units import byte_size, quantity

INSTALL = "pip install -e '.[tpu]'"
INVOLUNTARY = re.compile(r"(?i)involuntary full rematerialization.*")
POLICIES = ("none", "dots", "full")  # remat, by what is computed again
TRIES = 3  # changes that are compiled before giving up


@dataclass(frozen=True)
class Compiled:
    """What the train step of one shape needs on each chip, in bytes.

    `pattern` is the label of the keys that heads see, "" for all.
    `needed` is all of it at once: `arguments` (state and batch), `temporaries`, and the program.
    `predicted` is the same by arithmetic. Where it does not fit the compiler says `needed` and
    `allowed` only, and the rest is None or empty. `flops` and the bytes of `collectives` count one
    step with every turn of its loops; `mean_turns` is the assumed mean for loops whose turns the
    data decide. `involuntary` are the partitioner's complaints, `gathered` the parameters that
    are joined in all layers at once: both should be empty.
    """

    run: str
    others: tuple[str, ...]
    pattern: str
    topology: str
    compiler: str
    mesh: dict[str, int]
    parallel: ParallelConfig
    allowed: int
    needed: int
    predicted: int
    arguments: int | None = None
    temporaries: int | None = None
    code: int | None = None
    donated: float | None = None
    flops: float | None = None
    model_flops: float | None = None
    mean_turns: float | None = None
    kernels: int = 0
    collectives: tuple[dict[str, Any], ...] = ()
    involuntary: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    seconds: float | None = None
    change: "Compiled | None" = None

    @property
    def fits(self) -> bool:
        return self.needed <= self.allowed

    @property
    def received(self) -> float:
        """Bytes that a chip receives from others in one step."""
        return sum(row["bytes"] for row in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits, "received": self.received}


def require_compiler() -> None:
    """Raise UserError unless the TPU compiler is installed."""
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--compile needs the TPU compiler, the libtpu package: {INSTALL}, which needs no TPU",
    )


def compiler_environment(place: Topology) -> dict[str, str]:
    """What makes libtpu compile on a CPU host, ask no metadata server and say its warnings."""
    cores = place.chips * (2 if place.kind == "v5p" else 1)  # how each kind is named
    kind = {"v5e": "v5litepod"}.get(place.kind, place.kind)
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{kind}-{cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "1",
        "TPU_STDERR_LOG_LEVEL": "1",  # at its default the partitioner's warnings are not heard
    }


def compile_run(run: RunConfig, place: Topology) -> Compiled:
    """What the compiler says of one run. Out of memory is an answer, not an error.

    Raises UserError when the run cannot be laid out over the chips, or the compiler fails.
    """
    predicted = memory.training_bytes(run, place.chips, "tpu").total
    request = {"run": run.to_dict(), "topology": place.name, "parent": os.getpid()}
    command = [sys.executable, "-m", "gqa_scaling.sweep.compile"]
    environment = compiler_environment(place)
    done = subprocess.run(
        command, input=json.dumps(request), env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise UserError(f"{run.name}: {_crash(place, done.returncode, done.stderr)}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "refused" in found:
        raise UserError(f"{run.name} on {place.name}: {found['refused']}")
    common = {
        "run": run.name,
        "others": (),
        "pattern": run.model.pattern.label if run.model.pattern else "",
        "topology": place.name,
        "compiler": found["compiler"],
        "mesh": found["mesh"],
        "parallel": run.parallel,
        "predicted": predicted,
        "involuntary": tuple(dict.fromkeys(INVOLUNTARY.findall(done.stderr))),
    }
    if "needed" in found:
        needed, allowed = int(found["needed"]), int(found["allowed"])
        return Compiled(**common, needed=needed, allowed=allowed)
    parts = ("arguments", "temporaries", "code", "fresh")
    flops = costs.training_flops_per_token(run.model, run.context_length) * run.batch_tokens
    return Compiled(
        **common,
        needed=sum(found[part] for part in parts),
        allowed=hardware(place.kind).memory,
        model_flops=flops / place.chips,
        collectives=tuple(found["collectives"]),
        gathered=tuple(found["gathered"]),
        **{k: found[k] for k in ("arguments", "temporaries", "code", "donated", "flops")},
        **{k: found[k] for k in ("mean_turns", "kernels", "seconds")},
    )


def _crash(place: Topology, code: int, said: str) -> str:
    """One line for a compiler that died: the last thing it said that is not a stack trace."""
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    fatal = [x for x in lines if re.match(r"(F\d{4} |[\w.]*(Error|Exception)\b)", x)]
    last = (fatal or lines or ["it said nothing"])[-1]
    return f"the TPU compiler failed for {place.name} ({how}): {last[:400]}"


def shapes(runs: tuple[RunConfig, ...]) -> list[tuple[RunConfig, ...]]:
    """Runs whose train steps are one program, together: the rest of a run is only numbers in it."""
    alike: dict[Any, list[RunConfig]] = {}
    for run in runs:
        spikes = run.optimizer.spike_factor > 0  # then the state holds more
        key = (run.model, run.context_length, run.batch_tokens, run.parallel, spikes)
        alike.setdefault(key, []).append(run)
    return [tuple(group) for group in alike.values()]


def check(experiment: Experiment, place: Topology) -> None:
    """Raise UserError unless every run can be laid out over the chips, with the attention that it
    asks for, and the compiler is there."""
    for first, *_ in shapes(experiment.runs):
        try:
            axis_sizes(first, place.chips)
            attention_implementation(first, "tpu")
        except UserError as error:
            raise UserError(f"{first.name} on {place.name}: {error}") from None
    require_compiler()


def compile_experiment(
    experiment: Experiment, place: Topology, say: Callable[[str], None]
) -> list[Compiled]:
    """Every distinct shape of an experiment, compiled; for those that do not fit the change.

    `say` is told of progress. Raises UserError as `check` and `compile_run` do.
    """
    check(experiment, place)
    groups = shapes(experiment.runs)
    out = []
    for i, (first, *others) in enumerate(groups, 1):
        say(f"compiling {i} of {len(groups)} for {place.name}: {first.name}")
        found = compile_run(first, place)
        if not found.fits:
            found = replace(found, change=nearest_fit(first, place, found, say))
        out.append(replace(found, others=tuple(run.name for run in others)))
    return out


def nearest_fit(
    run: RunConfig, place: Topology, found: Compiled, say: Callable[[str], None]
) -> Compiled | None:
    """The change of remat, accumulation or mesh that costs least and makes the run fit.

    Candidates are ordered by FLOPs executed, then microbatches, then collectives; those that
    arithmetic predicts to fit, scaled by how far it was off for this run, are compiled in turn.
    """
    off = max(1.0, found.needed / found.predicted)
    tried = 0
    for changed in candidates(run, place):
        if off * memory.training_bytes(changed, place.chips, "tpu").total > found.allowed:
            continue
        say(f"  does not fit; trying {difference(run, changed)}")
        answer = compile_run(changed, place)
        if answer.fits:
            return answer
        tried += 1
        if tried == TRIES:
            break
    return None


def candidates(run: RunConfig, place: Topology) -> Iterator[RunConfig]:
    """Other ways to spread the run that are possible, those that cost least first.

    As much remat, accumulation and tensor as there is or more; fsdp and context as they come.
    """
    now, sizes_now = run.parallel, axis_sizes(run, place.chips)
    data, fsdp, _, tensor = sizes_now
    heavier = POLICIES[POLICIES.index(now.remat) :]
    parts = [
        i
        for i in range(now.accumulation, run.batch_size + 1, now.accumulation)
        if run.batch_size % i == 0
    ]
    axes = (_powers(fsdp * data), _powers(place.chips), (tensor, 2 * tensor, 4 * tensor))
    found = []
    for remat, accumulation, f, c, t in itertools.product(heavier, parts, *axes):
        spread = replace(
            now, data=-1, fsdp=f, context=c, tensor=t, accumulation=accumulation, remat=remat
        )
        changed = replace(run, parallel=spread)
        sizes = _possible(changed, place)
        same = sizes == sizes_now and (remat, accumulation) == (now.remat, now.accumulation)
        if sizes is None or sizes[0] > data or same:
            continue
        full = now.attention == "reference"
        flops = costs.hardware_flops_per_token(run.model, run.context_length, remat, full)
        moved = sum(a != b for a, b in zip(sizes, sizes_now, strict=True))
        found.append((flops, t, accumulation, moved, -sizes[0], c, changed))
    for *_, changed in sorted(found, key=lambda x: x[:-1]):
        yield changed


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length())]


def _possible(run: RunConfig, place: Topology) -> tuple[int, int, int, int] | None:
    try:
        sizes = axis_sizes(run, place.chips)
        attention_implementation(run, "tpu")
    except UserError:
        return None
    return sizes if sizes[0] % place.slices == 0 else None


def difference(old: RunConfig, new: RunConfig) -> str:
    """The options that turn one layout into the other: --parallel.remat full."""
    a, b = old.parallel.to_dict(), new.parallel.to_dict()
    return " ".join(f"--parallel.{key} {b[key]}" for key in b if a[key] != b[key])


# ----------------------------------------------------------------------------------- printing


def mesh_name(mesh: dict[str, int]) -> str:
    """Such as fsdp 4 x context 64; axes of one device are left out."""
    return " x ".join(f"{axis} {mesh[axis]}" for axis in AXES if mesh[axis] > 1) or "one chip"


def compiled_table(found: list[Compiled], place: Topology) -> Table:
    """A row for each shape, as people read it."""
    allowed = found[0].allowed if found else hardware(place.kind).memory
    compiler = found[0].compiler if found else "the TPU compiler"
    table = Table(
        title=f"compiled for {place.name}: {place.chips} chips of {byte_size(allowed)}",
        caption=f"{compiler}. Per chip; FLOPs and bytes of one step, loops counted as often as they "
        "turn. Model FLOPs: causal attention, no recomputation. Received: what a chip gets from "
        "others in all-gathers, reductions and exchanges.",
        box=SIMPLE_HEAD,
    )
    columns = ("run", "mesh", "remat", "state + batch", "temporaries", "total", "predicted")
    columns += ("FLOPs", "model FLOPs", "received", "fits")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right", overflow="fold")
    for each in found:
        for one in (each, each.change) if each.change else (each,):
            table.add_row(*_cells(one))
    return table


def _cells(one: Compiled) -> list[Any]:
    def size(value: int | None) -> str:
        return "?" if value is None else byte_size(value)

    accumulation = one.parallel.accumulation
    return [
        " ".join(filter(None, (one.run, one.others and f"+{len(one.others)}", one.pattern))),
        mesh_name(one.mesh) + (f", accumulation {accumulation}" if accumulation > 1 else ""),
        one.parallel.remat,
        size(one.arguments),
        size(one.temporaries),
        byte_size(one.needed),
        f"{byte_size(one.predicted)} ({one.predicted / one.needed - 1:+.0%})",
        "?" if one.flops is None else quantity(one.flops),
        "?" if one.model_flops is None else quantity(one.model_flops),
        size(None if one.flops is None else round(one.received)),
        Text("yes") if one.fits else Text("no", style="red"),
    ]


def compiled_summary(found: list[Compiled], runs: dict[str, RunConfig]) -> list[str]:
    """What is to be done and to be known, a line each."""
    lines = []
    for each in found:
        if each.change is not None:
            change = difference(
                runs[each.run], replace(runs[each.run], parallel=each.change.parallel)
            )
            lines.append(
                f"{each.run} needs {byte_size(each.needed)} of {byte_size(each.allowed)}; it fits, "
                f"with {byte_size(each.change.needed)}, by {change}"
            )
        elif not each.fits:
            lines.append(
                f"{each.run} needs {byte_size(each.needed)} of {byte_size(each.allowed)}, and no "
                "change of remat, accumulation, fsdp, context or tensor was found to fit: take more "
                "or larger chips"
            )
        for one in (each, each.change) if each.change else (each,):
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
        lines += [f"{each.run}: a chip receives"] if top else []
        lines += [
            f"  {byte_size(row['bytes']):>10}  {row['kind']} {row['array']}"
            + (f" among {row['devices']}" if row["devices"] else "")
            + f", {row['times']:g} times"
            for row in top
        ]
    return lines
