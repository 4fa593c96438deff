"""The verbs. Nothing heavy is imported until a verb needs it."""

import argparse
import contextlib
import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Container, Sequence
from typing import NoReturn

from gqa_scaling.cli import (
    bench,
    calibrate,
    doctor,
    exchange,
    experiment,
    inference,
    judge,
    questions,
    report,
    results,
    runs,
    start,
    study,
)
from gqa_scaling.cli.completion import verb_parsers
from gqa_scaling.cli.hints import refuse_near_misses
from gqa_scaling.cli.shared import Verb, Version, print_error
from gqa_scaling.config import UserError, require
from gqa_scaling.fields import did_you_mean
from gqa_scaling.files.failures import StorageError, failure
from gqa_scaling.files.runs import runs_root
from gqa_scaling.files.storage import NO_PLACE

VERBS: dict[str, Verb] = {
    **start.VERBS,
    **experiment.VERBS,
    **study.VERBS,
    **report.VERBS,
    **results.VERBS,
    **questions.VERBS,
    **inference.VERBS,
    **bench.VERBS,
    **calibrate.VERBS,
    **judge.VERBS,
    **exchange.VERBS,
    **runs.VERBS,
    **doctor.VERBS,
}
OVERRIDES = """\
Any field of a run can be changed for the whole grid, after the other arguments:
  --model.n-layers 4 --optimizer.learning-rate 3e-4 --tokens 1000000 --parallel.remat full
The fields are those of RunConfig in gqa_scaling/config.py: model, data, optimizer, evaluation,
parallel and checkpoint, each with its own, and context_length, batch_tokens, tokens,
tokens_per_param, seed, start_from, max_nonfinite_steps, max_spike_steps, profile.
"""


class _Parser(argparse.ArgumentParser):
    """Leaves it to the caller to say what is wrong, in one line, and to exit with 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_arguments(parser: argparse.ArgumentParser, verb: str) -> None:
    """All that a verb takes but the overrides of fields."""
    VERBS[verb][2](parser)
    parser.add_argument("--root", help="folder of the runs (default: $GQA_SCALING_RUNS or runs)")


def parser_of(verbs: Container[str]) -> argparse.ArgumentParser:
    """A parser of the command, with the arguments of these verbs; the others are named."""
    parser = _Parser(
        prog="gqa-scaling",
        description="Find the grouped-query transformer that reaches a loss at a context length "
        "for the least cost.",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="which code is at work here")
    choices = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, parser_class=_Parser
    )
    for name, (_, about, _) in VERBS.items():
        verb = choices.add_parser(
            name,
            help=about,
            description=about,
            epilog=OVERRIDES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in verbs:
            add_arguments(verb, name)
    return parser


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What was asked, and what is left: the overrides of fields."""
    verb = next((each for each in arguments if not each.startswith("-")), None)
    parser = parser_of(() if verb is None else (verb,))
    if verb is not None and verb not in VERBS:
        raise UserError(
            f"unknown verb {verb!r}{did_you_mean(verb, VERBS)}; see {parser.prog} --help"
        )
    args, rest = parser.parse_known_args(arguments)
    if rest and args.verb != "harness":  # whose rest is for lm-eval
        refuse_near_misses(verb_parsers(parser)[args.verb], arguments, rest)
    args.command = shlex.join([parser.prog, *arguments])
    if args.root is not None:
        named = bool(args.root) and "\0" not in args.root
        require(named, f"--root {args.root!r} must name a folder")
        runs_root(args.root)  # refused for every verb, before any work
    return args, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 a run failed, 2 something the user can mend, 74 a
    bucket is away, 75 preempted and saved, 130 interrupted."""
    if sys.stdout is None:  # it was closed before the command began
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
    except Exception:
        if not _joined():
            raise
        code = 1
        with contextlib.suppress(OSError):
            traceback.print_exc()
    if code not in (0, 75) and _joined():
        from gqa_scaling.devices.processes import leave

        leave(code)
    return code


def _joined() -> bool:
    """Whether this process belongs to a job, be it the only one in it: from then on threads may
    wait for peers, for a server or for a disk, and an end by way of the interpreter for them."""
    processes = sys.modules.get("gqa_scaling.devices.processes")
    return processes is not None and processes.joined()


def _one_of_several() -> bool:
    return _joined() and sys.modules["gqa_scaling.devices.processes"].several()


def _drop_output() -> None:
    """Have the interpreter not fail at its end on what stdout holds and nobody can take."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(arguments: list[str]) -> int:
    try:
        args, rest = _parse(arguments)
        code = VERBS[args.verb][0](args, rest)
        sys.stdout.flush()
        return code
    except UserError as error:
        print_error(error)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        if _one_of_several():  # a supervisor is gone in the middle of a job
            raise
        _drop_output()
        return 0
    except Exception as error:
        away = failure(error)
        if away is not None:
            print_error(away)
            try:
                sys.stdout.flush()
            except OSError:
                _drop_output()
            # to its peers this process is lost, and so it ends as they do
            lost = _one_of_several() and away.exit_code == StorageError.exit_code
            return 128 + signal.SIGABRT if lost else away.exit_code
        # as jax says that an array found no place; buckets say it of their quota
        if type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error):
            what = str(error).partition("RESOURCE_EXHAUSTED: ")[2].partition("\n")[0]
            print_error(
                f"the devices' memory is full ({what[:160]}): ask for less, such as a shorter context "
                "or fewer sequences at once, or use more devices"
            )
            return 2
        if not isinstance(error, OSError):
            raise
        if error.errno == errno.ENOENT or error.errno not in (*NO_PLACE, errno.EISDIR):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print_error(f"cannot use the disk{where}: {error.strerror}")
        return 2
    except KeyboardInterrupt:
        print_error("interrupted; the same command continues")
        return 130
