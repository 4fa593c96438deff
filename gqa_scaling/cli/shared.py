"""What several verbs take and print."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from gqa_scaling.config import UserError, require

if TYPE_CHECKING:
    from gqa_scaling.config import RunConfig
    from gqa_scaling.files.runs import RunDirectory

Verb = tuple[  # what it does, what it is for, its arguments
    Callable[[argparse.Namespace, Sequence[str]], int],
    str,
    Callable[[argparse.ArgumentParser], None],
]


class Version(argparse.Action):
    """Says the versions, which are looked up only then, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from gqa_scaling.versions import said

        print(said())
        parser.exit()


def named_run(source: str, rest: Sequence[str], root: str | None) -> "RunDirectory":
    """The directory of the run that `source` names as in `find_run`; it must have been started."""
    run, directory = find_run(source, rest, root)
    spec = source.rpartition(":")[0]
    require(
        directory.config_file.exists(),
        f"{run.name} has not been started: there is no {directory.path}; train it with `gqa-scaling run "
        f"{spec} --only {run.name}`",
    )
    return directory


def find_run(
    source: str, rest: Sequence[str], root: str | None
) -> "tuple[RunConfig, RunDirectory]":
    """The run that `source` names: its directory, here or in a bucket, or EXPERIMENT:NAME, begun or not.

    `rest` are overrides of an experiment's fields. Raises `UserError` where it names no run.
    """
    from gqa_scaling.experiment.load import load_experiment
    from gqa_scaling.files.runs import RunDirectory, run_directory, runs_root
    from gqa_scaling.files.storage import as_path, is_remote

    path = as_path(source)
    if is_remote(path) or path.is_dir():
        require(not rest, f"{path} is a directory: {' '.join(rest[:1])} changes runs of a grid")
        if (path / "config.json").exists():
            found = RunDirectory(path)
            return found.config(), found
        inside = sorted(file.parent.name for file in path.glob("*/config.json"))
        some = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        hint = f"it holds {len(inside)}: name one of {some}" if inside else "it has no config.json"
        raise UserError(f"{path} is no run: {hint}")
    spec, colon, name = source.rpartition(":")
    require(
        bool(spec and colon and name),
        f"{source!r} names no run: give its directory, or EXPERIMENT:NAME, such as "
        "experiments.smoke:L2-d24-h4-kv4",
    )
    folder = runs_root(root)
    experiment = load_experiment(spec, rest, folder)
    run = next((run for run in experiment.runs if run.name == name), None)
    if run is None:
        from gqa_scaling.fields import did_you_mean

        names = [each.name for each in experiment.runs]
        hint = did_you_mean(name, names) or f"; it has {', '.join(names[:3])}, ..."
        raise UserError(f"{spec} has no run named {name!r}{hint}")
    return run, run_directory(folder, experiment.name, run)


def add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="module or file, such as experiments.smoke")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def finite(text: str) -> float:
    """The number that an option is given, for argparse; neither NaN nor infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


finite.__name__ = "float"  # argparse names it where the text is no number at all


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_error(error: object, program: str = "gqa-scaling") -> None:
    """One line on stderr, whatever the error quotes: a newline, or a terminal's control sequence.

    Where stderr too lies on a full disk, the exit code has to do.
    """
    said = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    with contextlib.suppress(OSError):
        print(f"{program}: {said}", file=sys.stderr)


def print_table(*parts: Any) -> None:
    """Tables and lines as they are: what a name or a note has in brackets is no markup."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 140
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)
