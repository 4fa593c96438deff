"""What several verbs take and print."""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gqa_scaling.config import require

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


def add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="module or file, such as experiments.smoke")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def finite(text: str) -> float:
    """The number that an option is given, for argparse; neither NaN nor infinite."""
    _one(text)
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number")
    return value


def whole(text: str) -> int:
    """The whole number that an option is given, for argparse."""
    _one(text)
    return int(text)


finite.__name__ = "float"  # argparse names it where the text is no number at all
whole.__name__ = "int"


def _one(text: str) -> None:
    """Refuse several numbers in one text: options that take several take them one by one."""
    if "," in text:
        raise argparse.ArgumentTypeError(
            f"{text} is more than one number: those that take several have spaces between them, "
            f"{' '.join(filter(None, text.split(',')))}"
        )


def nothing_left(rest: Sequence[str]) -> None:
    """Raise UserError for the first argument that a verb does not know."""
    require(not rest, f"unexpected argument {rest[0] if rest else ''!r}")


def say(line: str) -> None:
    """A line of progress, on stderr at once."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def show(args: argparse.Namespace, for_programs: Any, *for_people: Any) -> None:
    """JSON where --json asks for it, else tables and lines."""
    if args.json:
        print_json(for_programs)
    else:
        print_table(*for_people)


def print_error(error: object, program: str = "gqa-scaling") -> None:
    """One line on stderr, whatever the error quotes: a newline, or a terminal's control sequence.

    Where stderr too lies on a full disk, the exit code has to do.
    """
    said = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
    with contextlib.suppress(OSError):
        print(f"{program}: {said}", file=sys.stderr)


def print_table(*parts: Any) -> None:
    """Tables and lines as they are: what a name or a note has in brackets is no markup.

    Where nobody reads on, such as behind `head`, BrokenPipeError is raised, as `print` does.
    """
    from rich.console import Console

    class Told(Console):
        def on_broken_pipe(self) -> NoReturn:  # which would exit with 1
            raise

    width = None if sys.stdout.isatty() else 140
    console = Told(width=width, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part)
