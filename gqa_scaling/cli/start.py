"""The verbs to begin with: a starter experiment, and completion in the shell."""

import argparse
import shlex
from collections.abc import Sequence

from gqa_scaling.cli.shared import Verb, nothing_left

SHELLS = ("bash", "zsh", "fish")


def _add_new(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="what to call it; or the path of a .py file, to have it there")
    parser.add_argument(
        "--corpus",
        help="your text: a folder of files, or a .jsonl or .parquet file (default: stdlib)",
    )


def _add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="that the script is for")


def _new(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.start import start

    nothing_left(rest)
    if args.corpus is not None:
        from gqa_scaling.config import DataConfig
        from gqa_scaling.data.corpus import open_corpus

        open_corpus(DataConfig(corpus=args.corpus))  # refused before a file is written
    path, spec = start(args.name, args.corpus)
    print(f"{path}: 12 small runs, minutes on two cores; change its SIZES, HEADS and DATA. Then")
    named = shlex.quote(spec)
    for command in (
        f"plan {named}",
        f"prepare {named}",
        f"run {named} --workers 2",
        f"report {named}",
    ):
        print(f"  gqa-scaling {command}")
    return 0


def _completion(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.cli.completion import script

    nothing_left(rest)
    print(script(args.shell))
    return 0


VERBS: dict[str, Verb] = {
    "new": (_new, "write a starter experiment to change", _add_new),
    "completion": (
        _completion,
        "print a script that completes commands in your shell",
        _add_completion,
    ),
}
