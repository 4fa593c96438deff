"""The verb that times inference on this machine."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_scaling.cli.shared import Verb, add_json, finite, print_json, print_table, say, whole
from gqa_scaling.config import ModelConfig, UserError, require
from gqa_scaling.files.storage import as_path

if TYPE_CHECKING:
    from gqa_scaling.files.timings import Timings
    from gqa_scaling.inference.cases import Grid

MEMORY_SHARE = "0.92"  # of a GPU, that jax may use: 0.75 where nothing is said
CONTEXTS = (1024, 8192)
LONGEST = {True: 3.0, False: 20.0}  # seconds at a time on a CPU, and elsewhere


def _batch(text: str) -> int | str:
    return text if text == "max" else int(text)


_batch.__name__ = "number of sequences"  # argparse names it


def _add_bench(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "shapes",
        nargs="*",
        metavar="SHAPES",
        help="an experiment, for the models of its runs, or models such as 24,8@L36d1536 "
        "(default: sizes and heads that suit this machine)",
    )
    add("--contexts", type=whole, nargs="+", help="tokens of each sequence")
    add("--batches", type=_batch, nargs="+", help="sequences at a time; max: as many as fit")
    add(
        "--caches",
        nargs="+",
        choices=("float32", "bfloat16", "int8"),
        help="what keys and values are kept in (default: the model's dtype)",
    )
    add("--devices", type=int, help="how many to compute on together (default: all)")
    add(
        "--longest",
        type=finite,
        help="seconds; what would take longer at a time is skipped (default: 3 on a CPU, else 20)",
    )
    add(
        "--output",
        help="file of the timings (default: timings/DEVICE.json in the folder of the runs)",
    )
    add_json(parser)


def _bench(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.devices.host_memory import computes_on_cpu

    if not computes_on_cpu() and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", MEMORY_SHARE)
    require(
        args.longest is None or args.longest > 0,
        f"--longest {args.longest} must be greater than 0",
    )
    models, contexts = _named(args, rest)

    import jax

    from gqa_scaling.devices.compilation_cache import keep_compiled
    from gqa_scaling.devices.processes import require_platform
    from gqa_scaling.files.storage import cache_folder, write_atomic
    from gqa_scaling.files.timings import Timings, to_json, write_timings
    from gqa_scaling.inference.cases import cases_of
    from gqa_scaling.inference.machine import Meter, versions
    from gqa_scaling.inference.timing import PHASES, key_of, time_cases
    from gqa_scaling.study.report.pictures import rendered
    from gqa_scaling.study.report.timings import (
        machine_line,
        row_line,
        timings_picture,
        timings_table,
    )

    require_platform()
    keep_compiled(cache_folder() / "compiled")
    devices = _devices(args.devices)
    grids = _grids(args, models, contexts)
    path = _file(args, devices)
    timings = _begun(path, devices)
    meter = Meter(devices)
    if timings is None:
        say("measuring the machine")
        timings = Timings(meter.machine(), (), versions(), "")
    source = " ".join(dict.fromkeys([*timings.source.split(), *(args.shapes or ["default"])]))
    timings = replace(timings, source=source)
    machine = timings.machine
    say(machine_line(machine))
    cases = cases_of(grids, machine.memory_bytes, len(devices))
    longest = args.longest or LONGEST[jax.default_backend() == "cpu"]
    done = {key_of(row, row.phase) for row in timings.timed}
    asked = {key_of(case, phase) for case in cases for phase in PHASES}
    say(f"{len(asked)} rows are asked for; {path} has {len(asked & done)} of them")
    for rows in time_cases(cases, meter, machine, longest, done):
        new = {key_of(row, row.phase) for row in rows}
        kept = (row for row in timings.rows if key_of(row, row.phase) not in new)
        timings = replace(timings, rows=(*kept, *rows))
        write_timings(path, timings)
        for row in rows:
            say(row_line(row, machine))
    write_atomic(path.with_suffix(".png"), rendered(timings_picture(timings), "png"))
    shown = [row for row in timings.rows if key_of(row, row.phase) in asked]
    if args.json:
        print_json(to_json(replace(timings, rows=tuple(shown))))
    else:
        print_table(timings_table(replace(timings, rows=tuple(shown))))
        print(f"{path} and {path.with_suffix('.png').name}: {len(timings.timed)} rows")
    return 0


def _named(
    args: argparse.Namespace, rest: Sequence[str]
) -> tuple[list[ModelConfig], tuple[int, ...]]:
    """The models that are named, and contexts that an experiment asks about."""
    from gqa_scaling.study.sides import side

    models: dict[ModelConfig, None] = {}
    contexts: dict[int, None] = {}
    experiments = [text for text in args.shapes if "@" not in text and "," not in text]
    require(
        bool(experiments) or not rest,
        f"unexpected argument {rest[0] if rest else ''!r}: only an experiment has fields",
    )
    for text in args.shapes:
        if text in experiments:
            from gqa_scaling.experiment.load import load_experiment
            from gqa_scaling.files.runs import runs_root

            experiment = load_experiment(text, rest, runs_root(args.root))
            models |= dict.fromkeys(run.model for run in experiment.runs)
            contexts |= dict.fromkeys(experiment.question.contexts)
        else:
            named = side(text)
            if named.shape is None:
                raise UserError(f"{text!r} must be a whole model such as 24,8@L36d1536")
            models[ModelConfig(*named.shape, *named.heads[:2])] = None
    return list(models), tuple(contexts)


def _grids(
    args: argparse.Namespace, models: Sequence[ModelConfig], contexts: tuple[int, ...]
) -> list["Grid"]:
    """What is to be timed; where nothing is named, what suits the platform."""
    import jax

    from gqa_scaling.inference.cases import Grid, default_batches, default_grids
    from gqa_scaling.inference.decode import for_platform

    platform = jax.default_backend()
    defaults = default_grids(platform)
    if not (models or args.contexts or args.batches or args.caches):
        return defaults
    models = list(dict.fromkeys(map(for_platform, models or defaults[0].models)))
    return [
        Grid(
            tuple(model for model in models if model.dtype == dtype),
            tuple(args.contexts or contexts or CONTEXTS),
            tuple(args.batches or default_batches(platform)),
            tuple(args.caches or (dtype,)),
        )
        for dtype in dict.fromkeys(model.dtype for model in models)
    ]


def _devices(asked: int | None) -> list[Any]:
    """The devices to compute on."""
    import jax

    require(
        jax.process_count() == 1,
        f"bench-inference runs in one process, and this is one of {jax.process_count()}",
    )
    there = jax.devices()
    require(
        asked is None or 0 < asked <= len(there),
        f"--devices {asked} must be from 1 to {len(there)}, which is how many there are",
    )
    return there[:asked]


def _file(args: argparse.Namespace, devices: Sequence[Any]) -> Path:
    """Where the timings are kept: one file for a machine, unless another is named."""
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.inference.machine import device_name

    many = f" x{len(devices)}" if len(devices) > 1 else ""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name(devices[0]) + many).strip("-")
    default = runs_root(args.root) / "timings" / f"{name}.json"
    path = as_path(args.output) if args.output else default
    require(path.suffix == ".json", f"--output {path} must end in .json: a .png is put beside it")
    return path


def _begun(path: Path, devices: Sequence[Any]) -> "Timings | None":
    """What the file holds already; None where there is none.

    Raises UserError where it was measured on another machine or by other code.
    """
    from gqa_scaling.files.timings import read_timings
    from gqa_scaling.inference.machine import device_name, versions

    if not path.exists():
        return None
    known = read_timings(path)
    here = device_name(devices[0]), len(devices)
    there = known.machine.device, known.machine.devices
    for what, old, new in (("devices", there, here), ("code", dict(known.versions), versions())):
        require(
            old == new,
            f"{path} was timed on other {what} ({_listed(old)}) than these ({_listed(new)}): name "
            "another file with --output",
        )
    return known


def _listed(what: Any) -> str:
    pairs = what.items() if isinstance(what, dict) else [what[::-1]]
    return ", ".join(f"{a} {b}" for a, b in pairs)


VERBS: dict[str, Verb] = {
    "bench-inference": (_bench, "time prefill and decoding on this machine", _add_bench),
}
