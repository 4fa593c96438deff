"""The targets, by name."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from gqa_scaling.config import UserError
from launch import local


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Launch on a target; exit code 2 for what the user can mend, else the target's own."""
    parser = _Parser(prog="python -m launch", description="Run on a target.")
    targets = parser.add_subparsers(dest="target", metavar="TARGET", required=True)
    local.add(targets.add_parser("local", help=local.ABOUT, description=local.ABOUT))
    try:
        args = parser.parse_args(argv)
        return args.launch(args)
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
