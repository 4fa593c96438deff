"""The command line: what is said and asked before anything is submitted, and to whom it goes."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gqa_scaling.cli.shared import Version, print_error, print_json, print_table, say
from gqa_scaling.config import RunConfig, UserError, require
from gqa_scaling.data import open_store
from gqa_scaling.experiment.load import Experiment, load_experiment
from gqa_scaling.files.claims import clock, held_until
from gqa_scaling.files.failures import failure
from gqa_scaling.files.runs import RunDirectory, parent_directory, run_directory, runs_root
from gqa_scaling.files.storage import is_remote
from gqa_scaling.hardware import Slice, changed, hardware
from gqa_scaling.sweep.plan import check_epochs
from gqa_scaling.sweep.run import forget_failures, pending
from gqa_scaling.sweep.views import Cell, compiled_summary, compiled_table, table
from gqa_scaling.units import count, duration, quantity
from launch import local, skypilot, slurm, tpu_vm, xpk
from launch.compiled import compile_chosen
from launch.jobs import Job, by_slice, group
from launch.submission import Study, missing_code
from launch.targets import PRICES, Target, startable

ENGINES = {module.ENGINE.name: module.ENGINE for module in (skypilot, xpk, slurm, tpu_vm)}
USAGE = """\
Overrides of the runs' fields come last, as for gqa-scaling run, and go with every job:
  python -m launch skypilot v5e-64 experiments.head_ladder --bucket gs://mine \\
    --data.store gs://mine/data/slimpajama --parallel.remat full --dry-run
"""
OPTIONS: dict[str, dict[str, Any]] = {  # each engine names those that it reads
    "on-demand": {"action": "store_true", "help": "no spot machines"},
    "infra": {"help": "cloud[/region[/zone]] (default: gcp for TPUs, any cloud for GPUs)"},
    "project": {"help": "the Google Cloud project"},
    "zone": {"help": "where the TPUs or the cluster are, such as us-west4-a"},
    "cluster": {"help": "the GKE cluster, as made by xpk cluster create"},
    "image": {"help": "a container that holds this checkout and its environment"},
    "partition": {"help": "as in sbatch (default: the cluster's own)"},
    "account": {"help": "as in sbatch"},
    "sbatch": {
        "action": "append",
        "metavar": "OPTION=VALUE",
        "help": "any other option of sbatch, such as qos=high; may be repeated",
    },
    "setup": {
        "action": "append",
        "metavar": "COMMAND",
        "help": "shell command that prepares a machine, instead of the usual; may be repeated",
    },
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m launch", description="Run an experiment on a target.")
    parser.add_argument("--version", action=Version, nargs=0, help="which code is at work here")
    targets = parser.add_subparsers(dest="target", metavar="TARGET", required=True)
    local.add(targets.add_parser("local", help=local.ABOUT, description=local.ABOUT))
    for name, engine in ENGINES.items():
        one = targets.add_parser(
            name,
            help=engine.about,
            description=engine.about,
            epilog=USAGE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        _add_common(one)
        for option in engine.options:
            one.add_argument(f"--{option}", **OPTIONS[option])
        one.set_defaults(launch=launch)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "slice", help="the largest a run may have: v5e-16, v6e-64, v5p-128, 8xH100, 16xH200, ..."
    )
    parser.add_argument("experiment", help="module or file, such as experiments.head_ladder")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be submitted, without looking into the bucket",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ask the TPU compiler, on this machine, whether the runs nearest to each slice's memory, "
        "and one of each size, fit there; submits nothing",
    )
    parser.add_argument("--yes", action="store_true", help="submit without asking")
    parser.add_argument(
        "--json", action="store_true", help="print what --dry-run shows as JSON; submits nothing"
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="only runs of such names; several with commas",
    )
    parser.add_argument("--retry-failed", action="store_true", help="try failed runs again")
    parser.add_argument("--bucket", default="", help="gs:// or s3://; runs are kept in its runs/")
    parser.add_argument(
        "--hours",
        type=float,
        default=24.0,
        help="a run gets the smallest slice that does it in so many hours (default: 24)",
    )
    parser.add_argument("--mfu", type=float, help="share of the peak FLOP/s that is reached")
    parser.add_argument("--price", type=float, help="dollars a chip-hour")


def main(argv: Sequence[str] | None = None) -> int:
    """Launch on a target; exit code 2 for what the user can mend, else the target's own."""
    try:
        parser = _parser()
        args, overrides = parser.parse_known_args(argv)
        args.overrides = overrides
        if args.target == "local" and overrides:  # those of its run are in args.run
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        return args.launch(args)
    except UserError as error:
        print_error(error, "launch")
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        away = failure(error)
        if away is None:
            raise
        print_error(away, "launch")
    return 2


def launch(args: argparse.Namespace) -> int:
    """Match what is not finished to slices, say what it costs, ask, and submit it."""
    args.dry_run |= args.json or args.compile
    target = _target(args)
    ENGINES[args.target].require_fields(target)
    root = _root(target)
    with tempfile.TemporaryDirectory() as empty:
        unseen = args.dry_run and is_remote(root)  # a bucket needs credentials
        return _launch(args, target, root, runs_root(empty if unseen else root))


def _target(args: argparse.Namespace) -> Target:
    largest = startable(args.slice)
    able = [name for name, engine in ENGINES.items() if engine.has(largest)]
    require(
        args.target in able,
        f"{args.target} is for {'GPUs' if largest.is_tpu else 'TPUs'}; take "
        f"{', '.join(able[:-1])} or {able[-1]} for {largest.vendor_name}",
    )
    own = ("project", "zone", "infra", "cluster", "image", "partition", "account")
    return Target(
        engine=args.target,
        largest=largest,
        hardware=changed(hardware(largest.kind), args.mfu, args.price),
        spot=not getattr(args, "on_demand", True),
        bucket=args.bucket.rstrip("/"),
        setup=tuple(getattr(args, "setup", None) or ()),
        sbatch=tuple(getattr(args, "sbatch", None) or ()),
        hours=args.hours,
        **{name: getattr(args, name, None) or "" for name in own},
    )


def _root(target: Target) -> str:
    """The folder of the runs as every host is told it."""
    root = f"{target.bucket}/runs" if target.bucket else os.environ.get("GQA_SCALING_RUNS", "")
    return root if is_remote(root) else os.path.abspath(runs_root())  # no bucket is opened here


def _launch(args: argparse.Namespace, target: Target, root: str, states: Path) -> int:
    """Launch runs that are kept in `root`, as far as `states` does not have them finished."""
    engine = ENGINES[args.target]
    experiment = load_experiment(args.experiment, args.overrides, states).select(
        ",".join(args.only) if args.only else None
    )
    study = Study(args.experiment, experiment.name, tuple(args.overrides), root)
    if not engine.shares_files:
        _require_to_travel(experiment, study, target)
    left, counts, claims_end = _left_to_launch(experiment, states, args.retry_failed)
    said = _counts_said(counts, claims_end)
    if args.dry_run and is_remote(root):
        said += f" (--dry-run does not look into {root}: it assumes that nothing is finished there)"
    missing = missing_code() if engine.sends_code else ""
    notes = [missing] if missing else []
    offered = engine.offered(target.largest)
    named = target.largest.vendor_name
    require(bool(offered), f"{args.target} starts no {named}: name a larger slice")
    jobs = group(study.name, left.runs, offered, target.hardware, target.hours, experiment.trunks)
    if not args.json:
        _print_plan(jobs, target, study, [said, *(f"WARNING: {note}" for note in notes)])
    found = compile_chosen(left, jobs, study.folder / "compiled", say) if args.compile else {}
    if args.json:
        compiled = [one.to_dict() for alike in found.values() for one in alike]
        plan = _plan_dict(jobs, target, study, counts, notes)
        print_json(plan | ({"compiled": compiled} if args.compile else {}))
        return 0
    if args.compile:
        runs = {run.name: run for run in left.runs}
        for place, alike in found.items():
            print_table(compiled_table(alike, place), *compiled_summary(alike, runs))
        return 0
    if not jobs:
        return 0
    if args.dry_run:
        print("\n".join(step.text() for step in engine.render(jobs, target, study)))
        return 0
    engine.check(target)
    require(not missing, missing)
    _require_tokens(left)
    _confirm(jobs, args.yes)
    if args.retry_failed:
        forget_failures(left, states)
    engine.submit(jobs, target, study)
    print("\n".join(["", *engine.after(jobs, target, study)]))
    where = shlex.join(["env", f"GQA_SCALING_RUNS={study.root}"])
    print(
        f"status:   {where} {shlex.join(['gqa-scaling', 'status', study.spec, *study.overrides])}"
    )
    return 0


def _require_to_travel(experiment: Experiment, study: Study, target: Target) -> None:
    """Refuse what fresh machines cannot see: they get this folder and the bucket."""
    place = study.source
    inside = not place.is_absolute() and ".." not in place.parts
    require(inside, f"{study.spec} must lie in this folder: it is what machines get")
    stores = {run.data.store_path for run in experiment.runs}
    here = sorted(store for store in stores if not is_remote(store))
    if here:
        option = f"--data.store {target.bucket}/{here[0]}"
        raise UserError(
            f"the machines cannot read tokens at {here[0]}: gqa-scaling prepare them into the bucket "
            f"with {option}, and launch with the same"
        )


def _left_to_launch(
    experiment: Experiment, root: Path, retry: bool
) -> tuple[Experiment, dict[str, int], float | None]:
    """The runs to submit; how many there are of what: all runs, those to launch, and by state those
    that are left out; and when the last claim on a running one ends, as a lost machine gives none back."""
    left = pending(experiment, root)
    directories = {run: run_directory(root, experiment.name, run) for run in left}
    states = {run: _launch_state(run, each) for run, each in directories.items()}
    skipped = ("running", "waiting") if retry else ("running", "failed", "waiting")
    chosen = tuple(run for run in left if states[run] not in skipped)
    counts = {"runs": len(experiment.runs), "to launch": len(chosen)}
    counts["finished"] = len(experiment.runs) - len(left)
    counts |= {state: sum(states[run] == state for run in left) for state in skipped}
    running = [each.claim_file for run, each in directories.items() if states[run] == "running"]
    ends = [end for end in map(held_until, running) if end is not None]
    return replace(experiment, runs=chosen), counts, max(ends, default=None)


def _launch_state(run: RunConfig, directory: RunDirectory) -> str:
    """The run's state, or that it waits: its job would end at once, or keep a machine that is paid for
    waiting, before the run that it starts from has its result."""
    state, parent = directory.state(), parent_directory(directory, run)
    unready = parent is not None and not parent.result_file.exists()
    return "waiting" if unready and state not in ("done", "running") else state


def _counts_said(counts: dict[str, int], claims_end: float | None) -> str:
    lost = f"claims of lost machines end by {clock(claims_end)}" if claims_end else ""
    said = [
        f"{count(counts['runs'], 'run')}: {counts['to launch']} to launch",
        f"{counts['finished']} finished",
    ]
    remedies = {
        "running": f" ({lost}: launch again then)" if lost else "",
        "failed": " (again with --retry-failed)",
        "waiting": " for a parent (launch again when it is finished)",
    }
    for state, remedy in remedies.items():
        n = counts.get(state, 0)
        said += [f"{n} {state}{remedy}"] if n else []
    return ", ".join(said)


def _require_tokens(experiment: Experiment) -> None:
    """Refuse tokens that are not prepared, before a machine is paid for to say so."""
    stores = {run.data.store_path: run.data for run in experiment.runs}
    tokens = {path: open_store(data).train_tokens for path, data in stores.items()}
    for run in experiment.runs:
        check_epochs(run, tokens[run.data.store_path])


def _plan_dict(
    jobs: list[Job], target: Target, study: Study, counts: dict[str, int], notes: list[str]
) -> dict[str, Any]:
    """What would be paid for and what would be submitted, for programs; seconds, and dollars as listed."""
    price = target.hardware.price
    hours = sum(job.chip_hours for job in jobs)
    rows = [
        {
            "name": job.name,
            "slice": job.slice.vendor_name,
            "chips": job.slice.chips,
            "runs": [run.name for run in job.runs],
            "seconds": job.seconds,
            "chip_hours": job.chip_hours,
            "dollars": job.chip_hours * price,
        }
        for job in jobs
    ]
    steps = ENGINES[target.engine].render(jobs, target, study) if jobs else []
    return {
        "experiment": study.name,
        "target": target.engine,
        "root": study.root,
        "spot": target.spot,
        "counts": {name.replace(" ", "_"): n for name, n in counts.items()},
        "totals": {"jobs": len(jobs), "chip_hours": hours, "dollars": hours * price},
        "price": price,
        "mfu": target.hardware.mfu,
        "notes": notes,
        "jobs": rows,
        "steps": [
            {"command": list(s.command), "files": {str(k): v for k, v in s.files.items()}}
            for s in steps
        ],
    }


def _print_plan(jobs: list[Job], target: Target, study: Study, said: list[str]) -> None:
    """What will be paid for; on stderr, so that what would be submitted stands alone."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    row, lines = target.hardware, list(said)
    if jobs:
        console.print(_plan_table(jobs, target, study))
        hours = sum(job.chip_hours for job in jobs)
        spot = "; spot costs less" if target.spot else ""
        listed = row.price == hardware(row.name).price
        source = f"{PRICES}{spot}; --price" if listed else "--price"
        lines += [
            f"{count(len(jobs), 'job')}, {quantity(hours)} chip-hours, ${hours * row.price:,.2f} at "
            f"${row.price:g} a chip-hour ({source})",
            f"times assume {row.mfu:.0%} of {row.peak_flops / 1e12:.3g} TFLOP/s (--mfu) and "
            f"{duration(row.start_seconds)} to start a run; machines also cost while they are set up",
        ]
    for line in lines:
        console.print(line, markup=False)


def _plan_table(jobs: list[Job], target: Target, study: Study) -> Table:
    """A row for each size of slice."""

    def hours(members: list[Job]) -> float:
        return sum(job.chip_hours for job in members)

    columns: dict[str, Cell[tuple[Slice, list[Job]]]] = {
        "slice": lambda row: row[0].vendor_name,
        "chips": lambda row: str(row[0].chips),
        "jobs": lambda row: str(len(row[1])),
        "runs": lambda row: str(sum(len(job.runs) for job in row[1])),
        "longest job": lambda row: duration(max(job.seconds for job in row[1])),
        "chip-hours": lambda row: quantity(hours(row[1])),
        "dollars": lambda row: f"{hours(row[1]) * target.hardware.price:,.2f}",
    }
    title = f"{study.name} on {target.engine}{', spot' if target.spot else ''}"
    rows = sorted(by_slice(jobs).items(), key=lambda found: found[0].chips)
    return table(
        columns, rows, columns, words={"slice"}, title=Text(title), box=SIMPLE_HEAD, pad_edge=False
    )


def _confirm(jobs: list[Job], yes: bool) -> None:
    """Ask a person; raise UserError unless the answer is yes."""
    if yes:
        return
    require(sys.stdin.isatty(), "no terminal to ask at: look at --dry-run, then give --yes")
    answer = input(f"Submit {count(len(jobs), 'job')}? [y/N] ")
    require(answer.strip().lower() in ("y", "yes"), "nothing was submitted")
