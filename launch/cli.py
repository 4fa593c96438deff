"""The targets, by name."""

import argparse
import sys
from collections.abc import Sequence

from gqa_scaling.config import UserError
from launch import local


def main(argv: Sequence[str] | None = None) -> int:
    """Launch on a target; exit code 2 for what the user can mend, else the target's own."""
    parser = argparse.ArgumentParser(prog="python -m launch", description="Run on a target.")
    targets = parser.add_subparsers(dest="target", metavar="TARGET", required=True)
    local.add(targets.add_parser("local", help=local.ABOUT, description=local.ABOUT))
    args = parser.parse_args(argv)
    try:
        return args.launch(args)
    except UserError as error:
        print(f"launch: {error}", file=sys.stderr)
        return 2
