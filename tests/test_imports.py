"""Imports run downwards only (docs: how the package is laid out), also those inside functions."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "gqa_scaling"

# From the top down. A room may import the rooms below it.
FLOORS = (
    ("api",),
    ("cli",),
    ("doctor",),
    ("sweep",),
    ("training",),
    ("inference",),
    ("model", "data"),
    ("devices",),
    ("experiment",),
    ("files",),
    ("costs", "hardware"),
    ("config",),
    ("context_sharding", "text"),
    ("baselines",),
    ("fields", "narrow", "units", "versions"),
)
STUDY = {
    "baselines",
    "files",
    "experiment",
    "costs",
    "context_sharding",
    "text",
    "hardware",
    "config",
    "fields",
    "narrow",
    "units",
    "versions",
}
MAY_IMPORT_STUDY = {"api", "cli"}
EXPERIMENTS = {"experiment", "config", "context_sharding"}
ARRAYS_ON_DEVICES = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}

LEVEL = {room: depth for depth, rooms in enumerate(FLOORS) for room in rooms}


def imported(source: str) -> list[tuple[int, str]]:
    """(line, module) of every import anywhere in the text: in functions and under TYPE_CHECKING.

    `from gqa_scaling import costs` counts as gqa_scaling.costs.
    """
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            own = module == "gqa_scaling"
            names = [f"{module}.{alias.name}" for alias in node.names] if own else [module]
            out += [(node.lineno, name) for name in names]
    return out


def room_of(module: str) -> str | None:
    """costs for gqa_scaling.costs, study for gqa_scaling.study.fit, None for other packages."""
    parts = module.split(".")
    inside = parts[0] == "gqa_scaling" and parts[1:] not in ([], ["__version__"])
    return parts[1] if inside else None


def allowed(room: str, other: str) -> bool:
    if room == other:
        return True
    if room == "study":
        return other in STUDY
    if other == "study":
        return room in MAY_IMPORT_STUDY
    return LEVEL[room] < LEVEL[other]


def violations(room: str, source: str) -> list[str]:
    """What this text, as part of this room, imports against the direction."""
    out = []
    for line, module in imported(source):
        other = room_of(module)
        if module.startswith("."):
            out.append(f"line {line}: {module} is relative; write the whole name")
        elif module.split(".")[0] in ("experiments", "tests", "benchmarks"):
            out.append(f"line {line}: {module} is no part of the package")
        elif other is not None and other not in LEVEL and other != "study":
            out.append(f"line {line}: {module} has no place in FLOORS")
        elif other is not None and not allowed(room, other):
            out.append(f"line {line}: {room} may not import {module}")
        elif room == "study" and module.split(".")[0] in ARRAYS_ON_DEVICES:
            out.append(f"line {line}: study may not import {module}")
    return out


MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
ROOT_MODULES = {  # the version, and the call of cli.main in a process made ready for it
    "__init__": [],
    "__main__": ["gqa_scaling.devices.host_memory", "gqa_scaling.cli"],
}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_downwards(path):
    room = path.parts[0].removesuffix(".py")
    source = (PACKAGE / path).read_text(encoding="utf-8")
    if room in ROOT_MODULES:
        own = [m for _, m in imported(source) if room_of(m) or m.startswith(".")]
        assert own == ROOT_MODULES[room]
        return
    assert room in LEVEL or room == "study", (
        f"{path} has no place yet: put {room} on its floor in FLOORS here and in docs/"
    )
    assert violations(room, source) == []


def test_every_room_is_there():
    there = {p.parts[0].removesuffix(".py") for p in MODULES}
    assert there - set(ROOT_MODULES) >= LEVEL.keys() | {"study"}, "FLOORS names a room that is gone"


@pytest.mark.parametrize(
    "path", sorted((CHECKOUT / "experiments").glob("*.py")), ids=lambda p: p.name
)
def test_experiments_import_grids_and_configs_only(path):
    for line, module in imported(path.read_text(encoding="utf-8")):
        base = module.split(".")[0]
        fine = room_of(module) in EXPERIMENTS or base in sys.stdlib_module_names | {"experiments"}
        assert fine, f"line {line}: an experiment declares; it may not import {module}"


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "import gqa_scaling.costs"),
        ("config", "from gqa_scaling import costs"),
        ("costs", "from gqa_scaling.experiment.ladder import Size"),
        ("files", "def f():\n    from gqa_scaling.experiment.grid import unique"),
        (
            "training",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import gqa_scaling.sweep.run",
        ),
        ("model", "from gqa_scaling.data import TokenStore"),
        ("training", "from gqa_scaling.study.fit import fit"),
        ("sweep", "from gqa_scaling.cli import main"),
        ("study", "def f():\n    import jax.numpy as jnp"),
        ("study", "from gqa_scaling.model.transformer import create"),
        ("study", "from gqa_scaling.sweep.status import read_status"),
        ("experiment", "from . import grid"),
        ("experiment", "from gqa_scaling.nowhere import f"),
        ("experiment", "import experiments.smoke"),
    ],
)
def test_the_check_sees_a_violation(room, source):
    assert len(violations(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cli", "from gqa_scaling.study.fit import fit"),
        ("sweep", "from gqa_scaling import costs, training"),
        (
            "study",
            "import scipy\nfrom gqa_scaling.study.curves import f\nimport gqa_scaling.files.runs",
        ),
        ("data", "from gqa_scaling.data.store import TokenStore\nimport numpy"),
    ],
)
def test_the_check_lets_pass_what_runs_downwards(room, source):
    assert violations(room, source) == []


# ------------------------------------------------------------------- what an import brings in

LOADED = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
print(*sorted(set(sys.argv[1].split(",")) & set(sys.modules)))
"""


def brought_in(watched: set[str], modules: list[str]) -> list[str]:
    """Which of the `watched` packages a fresh Python has loaded after importing `modules`."""
    command = [sys.executable, "-c", LOADED, ",".join(sorted(watched)), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return done.stdout.split()


def test_declaring_planning_and_studying_load_no_jax():
    rooms = ["cli", "sweep.plan", "sweep.pods", "sweep.run", "sweep.status", "sweep.hlo", "data"]
    rooms += ["sweep.views", "sweep.watch"]
    rooms += ["experiment.load", "experiment.grid", "files.runs", "hardware", "costs", "config"]
    rooms += [f"study.{p.stem}" for p in sorted((PACKAGE / "study").glob("*.py"))]
    modules = [f"gqa_scaling.{room}".removesuffix(".__init__") for room in rooms]
    assert brought_in(ARRAYS_ON_DEVICES, modules) == []


def test_declaring_loads_no_arrays_at_all():
    modules = [
        f"gqa_scaling.{m}"
        for m in (
            "api",
            "cli",
            "experiment.load",
            "experiment.grid",
            "files.runs",
            "costs",
            "config",
        )
    ]
    heavy = ARRAYS_ON_DEVICES | {"numpy", "scipy", "matplotlib", "rich"}
    assert brought_in(heavy, modules) == []


def test_the_check_of_loaded_modules_sees_them():
    assert brought_in({"numpy", "scipy"}, ["numpy"]) == ["numpy"]
