"""The verbs of runs as they are: one in full, two beside each other, and the room that they take."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gqa_scaling.cli.shared import Verb, add_json, nothing_left, print_json, print_table, show
from gqa_scaling.config import require

if TYPE_CHECKING:
    from pathlib import Path

    from gqa_scaling.hardware import Hardware

A_SIDE = "run directory, folder of runs, or EXPERIMENT[:NAME,...], in quotes with fields after it"


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="EXPERIMENT:NAME, or the directory of a run")
    parser.add_argument(
        "--hardware",
        help="where a run that has not begun would run: v5e-64, 8xH100, ... (default: cpu)",
    )
    add_json(parser)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", help=A_SIDE)
    parser.add_argument("second", help="what it is compared with, likewise")
    add_json(parser)


def _add_clean(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "experiments",
        nargs="*",
        metavar="EXPERIMENT",
        help="experiment whose unfinished runs go that it declares no more; in quotes with fields that "
        "declare others",
    )
    add(
        "--what",
        nargs="+",
        metavar="KIND",
        help="of checkpoints, digests, compiled, tokens, leftovers (default: all)",
    )
    add("--yes", action="store_true", help="remove without asking")
    add_json(parser)


def _show(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import find_run
    from gqa_scaling.sweep.details import details
    from gqa_scaling.sweep.run_views import config_table, details_lines

    run, directory = find_run(args.run, rest, args.root)
    row, devices = _named_hardware(args.hardware)
    found = details(run, directory, row, devices)
    show(args, found.to_dict(), *details_lines(found), config_table(found))
    return 0


def _named_hardware(name: str | None) -> tuple["Hardware | None", int]:
    from gqa_scaling.hardware import hardware_of

    if name is None:
        return None, 1
    row, devices = hardware_of(name)
    return row, devices or 1


def _diff(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.sweep.differences import compare_sides, read_side
    from gqa_scaling.sweep.run_views import difference_parts

    require(
        not rest,
        f"unexpected argument {rest[0] if rest else ''!r}: fields go in quotes with their experiment, such "
        "as 'experiments.smoke --tokens 409600'",
    )
    found = compare_sides(read_side(args.first, args.root), read_side(args.second, args.root))
    show(args, found.to_dict(), *difference_parts(found))
    return 0


def _disk(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from dataclasses import asdict

    from gqa_scaling.sweep.run_views import space_table
    from gqa_scaling.sweep.space import survey

    root = _root(args, rest)
    found = survey(root)
    total = sum(each.bytes for each in found)
    told = {"root": str(root), "bytes": total, "places": [asdict(each) for each in found]}
    show(args, told, space_table(str(root), found, time.time()))
    return 0


def _clean(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.fields import did_you_mean
    from gqa_scaling.sweep.run_views import removal_table
    from gqa_scaling.sweep.space import KINDS, removal_dict, removals, remove
    from gqa_scaling.units import byte_size, count

    for kind in args.what or ():
        known = ", ".join(KINDS)
        require(kind in KINDS, f"--what {kind}{did_you_mean(kind, KINDS)} must be of {known}")
    declared, branched = _declared(args)
    root = _root(args, rest)
    found, notes = removals(root, declared, args.what or KINDS, branched)
    if not args.json:
        for note in notes:
            print(note)
        if not found:
            print("nothing can go")
            return 0
        print_table(removal_table(found))
        print(f"{byte_size(sum(each.bytes for each in found))} can go; no result is touched")
        sys.stdout.flush()
    if args.json and not args.yes:
        print_json(removal_dict(found, notes, ()))
        return 0
    if not args.yes:
        require(sys.stdin.isatty(), "no terminal to ask at: --yes removes what is listed")
        answer = input(
            f"Remove {'this folder' if len(found) == 1 else f'these {len(found)} folders'}? [y/N] "
        )
        require(answer.strip().lower() in ("y", "yes"), "nothing was removed")
    gone, freed = [], 0
    for each, done in remove(root, found):
        if done:
            gone.append(each.path)
            freed += each.bytes
        else:
            print(f"{each.path} stays: its run is at work, or has changed", file=sys.stderr)
    if args.json:
        print_json(removal_dict(found, notes, gone))
    else:
        print(f"removed {count(len(gone), 'folder')}, {byte_size(freed)}")
    return 0


def _declared(args: argparse.Namespace) -> tuple[dict[str, set[str]], set[str]]:
    """By name of the experiments that are named, the digests of all that they declare, and of runs that
    were trained as theirs; and those of runs whose states others of them still begin with."""
    from gqa_scaling.experiment.follow_ups import find_follow_ups
    from gqa_scaling.experiment.load import named_runs
    from gqa_scaling.files.runs import runs_root

    root = runs_root(args.root)
    declared: dict[str, set[str]] = {}
    branched: set[str] = set()
    for text in args.experiments:
        experiment, _ = named_runs(text, root)
        also = find_follow_ups(root, experiment.name, experiment.runs)
        known = declared.setdefault(experiment.name, set())
        known |= {run.digest for run in (*experiment.runs, *also)}
        for digest, trunk in experiment.trunks.items():
            if not trunk.finished(root / experiment.name):
                branched.add(digest)
    return declared, branched


def _root(args: argparse.Namespace, rest: Sequence[str]) -> "Path":
    """The folder of the runs, which must be there; no fields belong to these verbs."""
    from gqa_scaling.files.runs import runs_root

    nothing_left(rest)
    root = runs_root(args.root)
    require(root.exists(), f"there is no folder {root}: name that of the runs with --root")
    return root


VERBS: dict[str, Verb] = {
    "show": (_show, "say in full what a run is, before and after it is trained", _add_show),
    "diff": (_diff, "two runs or two experiments side by side", _add_diff),
    "disk": (_disk, "say what lies under the folder of the runs and in the caches", add_json),
    "clean": (_clean, "remove what nobody needs any more, and never a result", _add_clean),
}
