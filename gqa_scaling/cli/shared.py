"""What several verbs take and print."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

Verb = tuple[  # what it does, what it is for, its arguments
    Callable[[argparse.Namespace, Sequence[str]], int],
    str,
    Callable[[argparse.ArgumentParser], None],
]


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def print_table(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    for part in parts:
        console.print(part, markup=not isinstance(part, str))  # a note may hold brackets
