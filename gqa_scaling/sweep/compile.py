"""Compiles the train step of one run for TPU chips that are not there, in a process of its own.

    python -m gqa_scaling.sweep.compile < {"run": ..., "topology": "v5e:16x16", "parent": pid} > {...}

prints what it needs, as JSON. The compiler is the real one, from the libtpu package, on a CPU host.
It may abort the process, it holds a lock file and reads the environment before anything else: so
`pods` starts this and tells what came of it. Compiling takes minutes; it ends when the parent does.
"""

import collections
import json
import math
import re
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from gqa_scaling.config import RunConfig, UserError
from gqa_scaling.devices.mesh import axis_size
from gqa_scaling.devices.processes import end_with
from gqa_scaling.hardware import Slice, slice_of
from gqa_scaling.model.attention.blockwise import mean_tiles
from gqa_scaling.sweep.hlo import Array, Collective, Program
from gqa_scaling.training.step import abstract_step

_SIZE = r"([\d.]+[KMGT]?)"
OUT_OF_MEMORY = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
TOO_MANY_TEMPORARIES = re.compile(rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
ASSIGNED = re.compile(r"^Total bytes: (\d+)", re.MULTILINE)  # of the first memory space, the HBM
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def chips(place: Slice) -> list[jax.Device]:
    """The devices of the slices, good for compiling only."""
    options: dict[str, Any] = {"num_slices": place.slices} if place.slices > 1 else {}
    if math.prod(place.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    one = replace(place, slices=1).name
    found = topologies.get_topology_desc(one, platform="tpu", **options)
    return list(found.devices)


def compile_step(run: RunConfig, devices: list[jax.Device] | None = None) -> dict[str, Any]:
    """Compile the very step that the run takes, and read from it the fields of `pods.Compiled`.

    Bytes are per device. Where the compiler finds that the memory does not suffice, the dict
    holds just `mesh`, `needed` and `allowed`. Raises UserError when the run cannot be laid out.
    """
    step, arguments, mesh = abstract_step(run, devices)
    found: dict[str, Any] = {"mesh": dict(mesh.shape)}
    began = time.time()
    with jax.set_mesh(mesh):
        turns = mean_tiles(run.context_length // axis_size("context"))
        with tempfile.TemporaryDirectory() as folder:
            try:
                compiled = step.lower(*arguments).compile({"xla_dump_to": folder})
            except jax.errors.JaxRuntimeError as error:
                needs = shortage(str(error))
                if needs is None:
                    raise
                return found | {"needed": needs[0], "allowed": needs[1]}
            held = assigned(Path(folder))
    found["seconds"] = time.time() - began
    memory = compiled.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    program = Program(compiled.as_text(), turns)
    state = jax.tree.leaves(arguments[0])
    return found | {
        "needed": held + memory.generated_code_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        # The analysis counts up to 0.6 GiB more than this. The compiler refuses a program by what it
        # assigned and the code, and by nothing else.
        "temporaries": held - memory.argument_size_in_bytes - fresh,
        "code": memory.generated_code_size_in_bytes,
        "donated": memory.alias_size_in_bytes / memory.output_size_in_bytes,
        # of a pattern only the data know which branches run, and how often their loops turn
        "flops": None if run.model.pattern and not program.exact else program.flops,
        "mean_turns": None if program.exact else turns,
        "kernels": program.kernels,
        "collectives": summary(program),
        "gathered": [
            f"{c.kind} {c.array.dtype}{list(c.array.dims)} {c.source}"
            for c in whole_parameters(program, state, run.parallel.tensor)
        ],
    }


def assigned(folder: Path) -> int:
    """Bytes of device memory that the compiler assigned to arguments, results and temporaries, by
    the report it wrote into the folder. Memory on the chip itself (VMEM) is not among them."""
    reports = [path.read_text() for path in folder.glob("*memory-usage-report.txt")]
    found = [ASSIGNED.search(text) for text in reports]
    sizes = [int(match[1]) for match in found if match is not None]
    if not sizes:
        raise RuntimeError("the compiler wrote no report of the memory that it assigned")
    return max(sizes)


def shortage(said: str) -> tuple[int, int] | None:
    """Bytes (needed, allowed) of an out-of-memory message, None when it is another one.

    What a message calls temporaries has the arguments in it.
    """
    found = OUT_OF_MEMORY.search(said) or TOO_MANY_TEMPORARIES.search(said)
    return None if found is None else (_bytes(found[1]), _bytes(found[2]))


def _bytes(size: str) -> int:
    return round(float(size.rstrip("KMGT")) * UNITS[size[-1] if size[-1] in UNITS else ""])


def summary(program: Program) -> list[dict[str, Any]]:
    """Collectives that are alike, together; those that move most first."""
    alike: dict[tuple[str, Array, int, bool], list[Collective]] = collections.defaultdict(list)
    for each in program.collectives:
        alike[each.kind, each.array, each.devices, each.overlaps].append(each)
    rows = [
        {
            "kind": kind,
            "array": f"{array.dtype}{list(array.dims)}",
            "devices": devices,
            "times": sum(c.turns for c in group),
            "bytes": sum(c.turns * c.received for c in group),
            "overlaps": overlaps,
            "meanwhile": sum(c.turns * c.meanwhile for c in group),
        }
        for (kind, array, devices, overlaps), group in alike.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])


def whole_parameters(program: Program, state: list[Any], tensor: int) -> list[Collective]:
    """Collectives whose result is all layers of a matrix at once, but for the tensor axis.

    State that is split by layers' own axes must be joined one layer at a time.
    """
    stacks = [x for x in state if x.ndim >= 3 and not x.sharding.is_fully_replicated]
    sizes = {x.size // part for x in stacks for part in (1, tensor)}
    layers = {x.shape[0] for x in stacks}
    return [
        c
        for c in program.collectives
        if c.kind in ("all-gather", "all-reduce")
        and any(a.size in sizes and layers & set(a.dims) for a in c.arrays)
    ]


def main() -> int:
    request = json.load(sys.stdin)
    end_with(request["parent"])
    run, place = RunConfig.from_dict(request["run"]), slice_of(request["topology"])
    try:
        found = compile_step(run, chips(place))
    except UserError as error:
        found = {"refused": str(error)}
    found["compiler"] = f"libtpu {metadata.version('libtpu')}"
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
