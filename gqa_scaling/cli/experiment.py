"""The verbs of an experiment: what it costs, carrying it out, where it stands."""

import argparse
import os
import shlex
import sys
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gqa_scaling.cli.shared import (
    Verb,
    add_experiment,
    add_json,
    finite,
    nothing_left,
    print_error,
    print_json,
    print_table,
    say,
    show,
)
from gqa_scaling.config import UserError, require
from gqa_scaling.files.storage import as_path, is_remote

if TYPE_CHECKING:
    from pathlib import Path

    from gqa_scaling.config import RunConfig
    from gqa_scaling.experiment.load import Experiment
    from gqa_scaling.hardware import Hardware
    from gqa_scaling.study.scores import Forecasts

EMPTY_SHARE = "this share has no runs"
COMPILED = """compile each train step for v5e:16x16 (or v5e-256), v5p:4x4x8, 2xv6e:16x16, ... on this
machine (docs/pods.md)"""


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        action="append",
        help="only runs whose name holds this text or matches this glob; several with commas, or again",
    )
    parser.add_argument(
        "--shard",
        metavar="i/n",
        help="only every n-th run, from the i-th (0/n is the first); budgets that share steps count as one",
    )


def _add_view(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    add_json(parser)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("--workers", type=int, help="threads that tokenise (default: all cores)")
    parser.add_argument("--rebuild", action="store_true", help="replace a store that is there")


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="linux-6.1: source of the Linux kernel, 139 MB, GPL-2.0")
    parser.add_argument("--from", dest="file", help="the package, where it lies here already")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_experiment(parser)
    _add_view(parser)
    add(
        "--hardware",
        help="cpu, v5e, v5p, v6e, a100, h100, h200, or a slice: v5e-64, v5e:8x8, 8xH100, ... "
        "(default: detected)",
    )
    add("--devices", type=int, help="how many of them (default: those detected, or 1)")
    add("--mfu", type=finite, help="share of the peak FLOP/s that is reached")
    add("--price", type=finite, help="dollars a device-hour")
    add(
        "--compile",
        metavar="SLICE",
        help=COMPILED,
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_experiment(parser)
    _add_selection(parser)
    add("--retry-failed", action="store_true", help="try failed runs again")
    add("--workers", type=int, default=1, help="processes that share the grid")
    add("--quiet", action="store_true", help="show no progress")
    add(
        "--forecast",
        metavar="SOURCE",
        help="first seal what the finished runs of this experiment (fields after it, in quotes with "
        "it) say of those that have not begun and have no forecast",
    )
    # Said by --workers to its processes: their cores and the pid of their parent.
    add("--cores", help=argparse.SUPPRESS)
    add("--parent", type=int, help=argparse.SUPPRESS)


def _add_status(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    _add_view(parser)
    parser.add_argument(
        "--watch", action="store_true", help="show it until every run is done or failed"
    )


def _add_learning_rates(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    add_json(parser)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="experiment, such as experiments.smoke, or the directory of a run or of runs"
    )
    _add_view(parser)


def _experiment(args: argparse.Namespace, rest: Sequence[str]) -> "Experiment":
    from gqa_scaling.experiment.load import load_experiment
    from gqa_scaling.files.runs import runs_root

    # without --root the folder is looked for only where learning rates come from a sweep in it
    root = None if args.root is None else runs_root(args.root)
    experiment = load_experiment(args.experiment, rest, root)
    return experiment.select(only(args), getattr(args, "shard", None))


def only(args: argparse.Namespace) -> str | None:
    """The patterns of all --only that were given, separated by commas."""
    given = getattr(args, "only", None)
    return None if given is None else ",".join(given)


def _prepare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.data.build import prepare
    from gqa_scaling.data.store import stores_of

    require(args.workers is None or args.workers > 0, f"--workers {args.workers} must be above 0")
    experiment = _experiment(args, rest)
    for data in stores_of(experiment.runs).values():
        store = prepare(data, workers=args.workers, rebuild=args.rebuild)
        share = store.heldout_tokens / (store.heldout_tokens + store.train_tokens)
        if share < data.heldout_fraction / 3:
            print(
                f"warning: {share:.2%} of the tokens are held out instead of "
                f"{data.heldout_fraction:.2%}, for want of documents: split the text into more, or "
                "prepare again with --data.heldout-fraction 0.2 --rebuild",
                file=sys.stderr,
            )
        print(
            f"{store.path}: {store.train_tokens:,} training and {store.heldout_tokens:,} held-out "
            f"tokens, vocabulary {store.vocab_size:,}, hash {store.hash[:12]}"
        )
    return 0


def _fetch(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.data.fetch import ARCHIVES, fetch

    nothing_left(rest)
    kept = fetch(args.corpus, as_path(args.file) if args.file is not None else None)
    print(f"{kept}: {kept.stat().st_size / 1e6:,.0f} MB, licence {ARCHIVES[args.corpus].licence}")
    return 0


def _hardware(args: argparse.Namespace) -> tuple["Hardware", int]:
    """The accelerator to plan for, and how many; those that jax sees where none is named."""
    from gqa_scaling.hardware import HARDWARE, detected, hardware_of

    if args.hardware is not None:
        row, own = hardware_of(args.hardware)
        require(
            own is None or args.devices in (None, own),
            f"--hardware {args.hardware} has {own} devices: leave out --devices {args.devices}",
        )
        return row, own or (1 if args.devices is None else args.devices)
    import jax

    from gqa_scaling.devices.processes import require_platform

    require_platform()
    kind, devices = jax.devices()[0].device_kind, jax.device_count()
    found = detected(kind, devices)
    if found is None:
        raise UserError(
            f"unknown device {kind!r}; name one with --hardware ({', '.join(HARDWARE)})"
        )
    return found, devices if args.devices is None else args.devices


def _plan(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.data.store import open_store, stores_of
    from gqa_scaling.hardware import changed, hardware, slice_of
    from gqa_scaling.sweep import pods, views
    from gqa_scaling.sweep.plan import make_plan

    experiment = _experiment(args, rest)
    stores = stores_of(experiment.runs)
    prepared = {p: open_store(d).train_tokens for p, d in stores.items() if as_path(p).exists()}
    place = None if args.compile is None else slice_of(args.compile)
    if place is None:
        row, devices = _hardware(args)
    else:
        require(
            args.hardware is None and args.devices is None,
            f"--compile {args.compile} names the hardware and the devices: leave out --hardware and "
            "--devices",
        )
        pods.check(experiment, place)
        row, devices = hardware(place.kind), place.chips
    row, standing = changed(row, args.mfu, args.price), _standing(args, experiment)
    plan = make_plan(experiment, row, devices, prepared, *standing)
    if not args.json:
        print_table(views.plan_table(plan), *views.plan_summary(plan))
        sys.stdout.flush()  # compiling takes minutes
    found = None if place is None else pods.compile_experiment(experiment, place, say)
    if args.json:
        compiled = {} if found is None else {"compiled": [each.to_dict() for each in found]}
        print_json(plan.to_dict() | compiled)
    elif place is not None and found is not None:
        runs = {run.name: run for run in experiment.runs}
        print_table(views.compiled_table(found, place), *views.compiled_summary(found, runs))
    return 0


def _standing(
    args: argparse.Namespace, experiment: "Experiment"
) -> "tuple[set[RunConfig], dict[str, int]]":
    """The runs that have a result and, by the digests of the others, the latest step whose state is kept
    for them; none where there is no folder for them."""
    from gqa_scaling.files.runs import run_directories, runs_root
    from gqa_scaling.files.storage import together

    try:
        root = runs_root(args.root)
    except UserError:  # a file is in its place
        return set(), {}
    directories = run_directories(root, experiment.name, experiment.runs)
    done = together(lambda directory: directory.result_file.exists(), directories)
    finished = {run for run, is_done in zip(experiment.runs, done, strict=True) if is_done}
    found, kept = experiment.trunks, {}
    for run in experiment.runs:
        if run not in finished and run.digest in found:
            states = found[run.digest].states(run, root / experiment.name)
            kept[run.digest] = states[0][0] if states else 0
    return finished, kept


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from contextlib import nullcontext

    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.sweep import display, workers
    from gqa_scaling.sweep import run as sweep

    require(args.workers > 0, f"--workers {args.workers} must be greater than 0")
    worker = args.cores is not None
    job = os.environ.get("JAX_NUM_PROCESSES", "1")
    require(
        args.workers == 1 or job == "1",
        f"--workers {args.workers} makes independent processes, but JAX_NUM_PROCESSES={job} asks for "
        "one job of several: choose one of the two",
    )
    if worker:
        workers.be_worker(args.cores, args.parent)
    experiment, root = _experiment(args, rest), runs_root(args.root)
    left, leads = len(sweep.pending(experiment, root)), True
    if left and args.workers == 1:
        from gqa_scaling.devices import processes

        processes.join(alone=worker)
        if worker:
            workers.check_worker()
        if not processes.agree(
            zlib.crc32(" ".join(r.digest for r in experiment.runs).encode()) >> 1
        ):
            # one was started again, alone, or they were started with other arguments
            print("gqa-scaling: the processes of this job are at different runs", file=sys.stderr)
            processes.leave(processes.EXIT_PREEMPTED)
        left, leads = processes.leaders(left), processes.is_leader()
    if not left:
        if leads:
            sweep.tidy(experiment, root)
            done = f"all {len(experiment.runs)} runs are finished in {root / experiment.name}"
            print(f"{experiment.name}: {done if experiment.runs else EMPTY_SHARE}")
        return 0
    if args.retry_failed and leads:
        sweep.forget_failures(experiment, root)
    if args.forecast is not None and leads:
        _seal_forecast(args, experiment, root)
    shown = leads and not args.quiet
    with display.live_display(experiment, root) if shown else nullcontext():
        if args.workers > 1:
            sweep.check(experiment, root)
            code = workers.run_workers(_worker_command(args, rest), args.workers, left)
        else:
            from gqa_scaling.devices import processes

            try:
                code = sweep.run_sweep(experiment, root).exit_code
            except processes.Preempted as stop:
                print(f"gqa-scaling: {stop}; the same command continues", file=sys.stderr)
                return processes.EXIT_PREEMPTED
            except processes.RunFailed as failed:
                traceback.print_exception(failed.__cause__)
                return processes.EXIT_RUN_FAILED
    if worker or not leads:
        return code
    code = max(code, display.report_end(experiment, root))
    if code == 0:
        print(
            f"{experiment.name}: finished; next: gqa-scaling report {shlex.quote(args.experiment)}"
        )
    return code


def _seal_forecast(args: argparse.Namespace, experiment: "Experiment", root: "Path") -> None:
    """Seal a forecast of the runs that have not begun and have none yet, and show it."""
    from gqa_scaling.experiment.load import words_of
    from gqa_scaling.study.estimates import estimate
    from gqa_scaling.study.forecast import seal_forecast, to_seal
    from gqa_scaling.study.report.forecasts import prediction_table
    from gqa_scaling.study.source import read_source

    runs = to_seal(root, experiment.name, experiment.runs, again=False)
    if not runs:
        return
    name, *overrides = words_of(args.forecast)
    source = read_source(name, overrides, args.root)
    found = estimate(source.results)
    sealed, predictions = seal_forecast(source, found, experiment.name, runs)
    if not args.quiet:
        print_table(prediction_table(predictions, f"Sealed in {sealed.path}"))


def _worker_command(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "gqa_scaling", "run", args.experiment, "--quiet"]
    told = {"only": only(args), "shard": args.shard, "root": args.root}
    command += [f"--{flag}={value}" for flag, value in told.items() if value is not None]
    return command + list(rest)


def _status(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.follow_ups import find_follow_ups
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.sweep.status import read_status
    from gqa_scaling.sweep.views import status_dict, status_table

    experiment, root = _experiment(args, rest), runs_root(args.root)
    if args.watch:
        return _watch(args, experiment, root)
    rows = read_status(root, experiment)
    selected = args.only is not None or args.shard is not None or len(experiment.runs) == 1
    more = () if selected else tuple(find_follow_ups(root, experiment.name, experiment.runs))
    others = read_status(root, replace(experiment, runs=more))
    forecasts = _scored(experiment, root)
    if args.json:
        whole = status_dict(experiment.name, rows)
        whole |= {"beside": status_dict(experiment.name, others)["runs"]}
        print_json(whole | ({"forecasts": forecasts.to_dict()} if forecasts else {}))
    else:
        if rows:
            print_table(status_table(experiment.name, rows))
        else:
            print(f"{experiment.name}: {EMPTY_SHARE}")
        if others:
            print_table(status_table(f"{experiment.name}, beside its grid", others))
        if forecasts:
            from gqa_scaling.study.report.forecasts import forecast_table

            print_table(forecast_table(forecasts))
    damaged = [row.failure for row in (*rows, *others) if row.state == "damaged"]
    damaged += forecasts.altered if forecasts else ()
    for failure in damaged:
        print_error(failure)
    return 1 if damaged else 0


def _scored(experiment: "Experiment", root: "Path") -> "Forecasts | None":
    """The forecasts of the experiment's runs; None where there are none, and nothing is imported."""
    from gqa_scaling.files.forecasts import FOLDER

    if not (root / experiment.name / FOLDER).exists():
        return None
    from gqa_scaling.study.scores import score_forecasts

    return score_forecasts(root, experiment.name)


def _watch(args: argparse.Namespace, experiment: "Experiment", root: "Path") -> int:
    from rich.console import Console

    from gqa_scaling.sweep.watch import watch

    require(not args.json, "--watch is for people and --json for programs: choose one of the two")
    console = Console(highlight=False, markup=False, emoji=False)
    require(console.is_terminal, "--watch needs a terminal; without one, status prints it once")
    return 1 if any(row.failure for row in watch(root, experiment, console)) else 0


def _checkpoints(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import load_experiment
    from gqa_scaling.files.runs import run_directory, runs_in, runs_root
    from gqa_scaling.sweep.status import read_checkpoints
    from gqa_scaling.sweep.views import checkpoints_dict, checkpoints_table

    path = as_path(args.source)
    if path.is_dir() or is_remote(path):
        selected = rest or args.only or args.shard
        require(not selected, f"{path} is a directory: --only, --shard and fields select of a grid")
        directories = runs_in(path)
    else:
        root = runs_root(args.root)
        experiment = load_experiment(args.source, rest, root).select(only(args), args.shard)
        directories = [run_directory(root, experiment.name, r) for r in experiment.runs]
    runs = read_checkpoints(directories)
    show(args, checkpoints_dict(runs), checkpoints_table(runs))
    return 1 if any(run.damaged for run in runs) else 0


def _learning_rates(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.learning_rates import learning_rate_choices
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.sweep.views import learning_rates_dict, learning_rates_table

    experiment = _experiment(args, rest)
    name, runs = experiment.name, experiment.runs
    choices = learning_rate_choices(name, runs, runs_root(args.root))
    show(args, learning_rates_dict(choices), learning_rates_table(name, choices, runs))
    return 0


VERBS: dict[str, Verb] = {
    "fetch": (_fetch, "bring a corpus that anybody can have", _add_fetch),
    "prepare": (_prepare, "turn the experiment's corpus into tokens", _add_prepare),
    "plan": (_plan, "say what the experiment will cost, before any spend", _add_plan),
    "run": (_run, "train what is not finished yet", _add_run),
    "status": (_status, "say where the experiment stands, from its files", _add_status),
    "checkpoints": (
        _checkpoints,
        "verify what is kept of each run; exit code 1 when something is damaged",
        _add_checkpoints,
    ),
    "learning-rates": (
        _learning_rates,
        "the best learning rate of each size in a sweep",
        _add_learning_rates,
    ),
}
