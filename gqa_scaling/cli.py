"""The verbs. Nothing heavy is imported until a verb needs it."""

import argparse
import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gqa_scaling.config import Question, UserError, nearest, require

if TYPE_CHECKING:
    from gqa_scaling.experiment import Experiment
    from gqa_scaling.hardware import Hardware
    from gqa_scaling.study.fit import Fit
    from gqa_scaling.study.frontier import Frontier
    from gqa_scaling.study.results import Results

OVERRIDES = """\
Any field of a run can be changed for the whole grid, after the other arguments:
  --model.n-layers 4 --optimizer.learning-rate 3e-4 --tokens 1000000 --parallel.remat full
The fields are those of RunConfig in gqa_scaling/config.py: model, data, optimizer, evaluation,
parallel and checkpoint, each with its own, and context_length, batch_tokens, tokens,
tokens_per_param, seed.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument VERB: invalid choice"):
            given = message.split("invalid choice: ")[1].split("'")[1]
            message = f"unknown verb {given!r}{nearest(given, VERBS)}; see {self.prog} --help"
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gqa-scaling",
        description="Find the grouped-query transformer that reaches a loss at a context length "
        "for the least cost.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, (_, about, add) in VERBS.items():
        raw = argparse.RawDescriptionHelpFormatter
        verb = verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog=OVERRIDES,
            formatter_class=raw,
            allow_abbrev=False,
        )
        if name not in STUDY_VERBS:
            verb.add_argument("experiment", help="module or file, such as experiments.smoke")
        add(verb)
        verb.add_argument("--root", help="folder of the runs (default: $GQA_SCALING_RUNS or runs)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 a run failed, 2 something the user can mend."""
    try:
        args, rest = _parser().parse_known_args(argv)
        args.command = shlex.join(["gqa-scaling", *(sys.argv[1:] if argv is None else argv)])
        if args.root is not None:
            os.environ["GQA_SCALING_RUNS"] = args.root
        return VERBS[args.verb][0](args, rest)
    except UserError as error:
        print(f"gqa-scaling: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        disk = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
        if error.errno not in (*disk, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"gqa-scaling: cannot use the disk{where}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gqa-scaling: interrupted; the same command continues", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------ experiment


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    _add_json(parser)
    parser.add_argument(
        "--hardware", help="cpu, v5e, v5p, v6e, a100, h100, h200 (default: detected)"
    )
    parser.add_argument(
        "--devices", type=int, help="how many of them (default: those detected, or 1)"
    )
    parser.add_argument("--mfu", type=float, help="share of the peak FLOP/s that is reached")
    parser.add_argument("--price", type=float, help="dollars a device-hour")


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    _add_json(parser)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only",
        metavar="PATTERN",
        help="only runs whose name holds this text or matches this glob",
    )
    parser.add_argument(
        "--shard", metavar="i/n", help="only every n-th run, from the i-th (0/n is the first)"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument("--retry-failed", action="store_true", help="try failed runs again")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the grid")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    # said by --workers to its processes: their cores and the pid of their parent
    parser.add_argument("--cores", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="processes that tokenise (default: all cores)")
    parser.add_argument("--rebuild", action="store_true", help="replace a store that is there")


def _experiment(args: argparse.Namespace, rest: Sequence[str]) -> "Experiment":
    from gqa_scaling.experiment import load_experiment

    experiment = load_experiment(args.experiment, rest)
    return experiment.select(getattr(args, "only", None), getattr(args, "shard", None))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _print_table(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)
    for part in parts:
        console.print(part, markup=not isinstance(part, str))  # a note may hold brackets


def _prepare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.data import prepare

    require(args.workers is None or args.workers > 0, f"--workers {args.workers} must be above 0")
    experiment = _experiment(args, rest)
    for data in {run.data.store_path: run.data for run in experiment.runs}.values():
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


def _detect(args: argparse.Namespace) -> tuple["Hardware", int]:
    from gqa_scaling import hardware

    if args.hardware is not None:
        found, devices = hardware.hardware(args.hardware), 1
    else:
        import jax

        kind, devices = jax.devices()[0].device_kind, jax.device_count()
        row = hardware.detected(kind, devices)
        known = ", ".join(hardware.HARDWARE)
        require(row is not None, f"unknown device {kind!r}; name one with --hardware ({known})")
        assert row is not None
        found = row
    return hardware.changed(found, args.mfu, args.price), (
        devices if args.devices is None else args.devices
    )


def _plan(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.data import open_store
    from gqa_scaling.plan import make_plan, plan_summary, plan_table

    experiment = _experiment(args, rest)
    stores = {run.data.store_path: run.data for run in experiment.runs}
    prepared = {p: open_store(d).train_tokens for p, d in stores.items() if Path(p).exists()}
    plan = make_plan(experiment, *_detect(args), prepared)
    if args.json:
        _print_json(plan.to_dict())
    else:
        _print_table(plan_table(plan), *plan_summary(plan))
    return 0


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from contextlib import nullcontext

    from gqa_scaling import sweep
    from gqa_scaling.runs import runs_root

    require(args.workers > 0, f"--workers {args.workers} must be greater than 0")
    if args.cores is not None:
        sweep.be_worker(args.cores, args.parent)
        sweep.check_worker()
    experiment, root = _experiment(args, rest), runs_root()
    left = sweep.pending(experiment, root)
    if not left:
        print(
            f"{experiment.name}: all {len(experiment.runs)} runs are finished in {root / experiment.name}"
        )
        return 0
    if args.retry_failed:
        sweep.forget_failures(experiment, root)
    with nullcontext() if args.quiet else sweep.live_display(experiment, root):
        if args.workers > 1:
            sweep.check(experiment, root)
            command = _worker_command(args, rest)
            code = sweep.run_workers(command, args.workers, len(left))
        else:
            code = sweep.run_sweep(experiment, root).exit_code
    if args.cores is not None:
        return code
    code = max(code, sweep.report_end(experiment, root))
    if code == 0:
        print(f"{experiment.name}: finished; next: gqa-scaling report {args.experiment}")
    return code


def _worker_command(args: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "gqa_scaling", "run", args.experiment, "--quiet"]
    selection = {"only": args.only, "shard": args.shard}
    command += [f"--{flag}={value}" for flag, value in selection.items() if value is not None]
    return command + list(rest)


def _status(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.runs import runs_root
    from gqa_scaling.status import read_status, status_dict, status_table

    experiment = _experiment(args, rest)
    rows = read_status(runs_root(), experiment)
    if args.json:
        _print_json(status_dict(experiment.name, rows))
    else:
        _print_table(status_table(experiment.name, rows))
    return 0


def _learning_rates(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.status import learning_rate_table

    experiment = _experiment(args, rest)
    choices, table = learning_rate_table(experiment)
    if args.json:
        _print_json(choices)
    else:
        _print_table(table)
    return 0


# ----------------------------------------------------------------------------------- study


PUBLISHED = "chen2025"


SOURCES = f"""experiment; CSV file with columns n_heads, n_kv_heads, loss and n_params or n_layers,
d_model (docs/using.md); or {PUBLISHED}, the published points, shipped here"""


def _add_source(parser: argparse.ArgumentParser, what: str = SOURCES) -> None:
    parser.add_argument("source", help=what)
    _add_json(parser)
    parser.add_argument(
        "--law",
        choices=("separate", "product", "sum", "pooled"),
        default="separate",
        help="a curve for each head configuration (default), or a joint law across them",
    )
    parser.add_argument(
        "--bootstrap",
        choices=("shared", "residual", "pairs"),
        default="shared",
        help="how refits are drawn; shared also draws errors common to all models of one size",
    )
    parser.add_argument("--robust", action="store_true", help="give spoiled runs less weight")
    parser.add_argument("--refits", type=int, default=1000, help="bootstrap refits (default: 1000)")
    parser.add_argument("--context", type=int, help="fit the runs of this training context length")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--compare", action="store_true", help="laws by their left-out errors")
    parser.add_argument("--heads", action="store_true", help="loss against query heads at fixed N")


def _add_suggest(parser: argparse.ArgumentParser) -> None:
    _add_source(parser, "experiment: its finished runs and the rest of its grid")
    parser.add_argument("--budget-flops", type=float, default=float("inf"), help="training FLOPs")
    parser.add_argument("--most", type=int, default=8, help="how many runs at most (default: 8)")


def _add_question(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument("--losses", type=float, nargs="+", help="target losses in nats")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="inference context lengths in tokens"
    )
    parser.add_argument(
        "--baseline", metavar="n_h,n_kv", help="heads that savings are stated against"
    )
    parser.add_argument("--convention", choices=("per_token", "per_sequence"), help="of FLOPs")
    parser.add_argument("--lambda", dest="weight", type=float, help="weight of memory in Z")
    parser.add_argument("--alpha", dest="memory_power", type=float, help="power of memory in Z")
    parser.add_argument("--beta", dest="compute_power", type=float, help="power of FLOPs in Z")
    parser.add_argument(
        "--objective",
        choices=("z", "memory", "flops", "bytes", "seconds", "dollars"),
        default="z",
        help="what is to be least; seconds and dollars need --hardware",
    )
    parser.add_argument("--hardware", help="serve on this: v5e, v5p, v6e, a100, h100, h200")
    parser.add_argument("--price", type=float, help="dollars a device-hour there")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    parser.add_argument("--weight-bytes", type=float, default=2, help="bytes a weight (default: 2)")
    parser.add_argument("--cache-bytes", type=float, default=2, help="bytes a cached value")
    parser.add_argument("--fit-gib", type=float, help="only models whose weights and cache fit")
    parser.add_argument("--kv-multiple", type=int, default=1, help="n_kv must be a multiple")


def _add_frontier(parser: argparse.ArgumentParser) -> None:
    _add_question(parser)
    parser.add_argument("--ranking", action="store_true", help="rank every configuration")


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_question(parser)
    parser.add_argument(
        "--output", help="the page (default: runs/NAME/report.html, or NAME-report/ beside a CSV)"
    )


def _source(args: argparse.Namespace, rest: Sequence[str]) -> tuple["Results", Question]:
    """The source's finished runs and the question it comes with."""
    from gqa_scaling.experiment import load_experiment
    from gqa_scaling.runs import runs_root
    from gqa_scaling.study.results import from_csv, from_runs, published

    if args.source == PUBLISHED or args.source.endswith(".csv"):
        require(
            not rest,
            f"unexpected argument {rest[0] if rest else ''!r}: {args.source} has no fields",
        )
    if args.source == PUBLISHED:
        return published(), PUBLISHED_QUESTION
    if args.source.endswith(".csv"):
        return from_csv(Path(args.source)), Question()
    experiment = load_experiment(args.source, rest)
    results = from_runs(runs_root(), experiment.name, experiment.runs)
    return results, experiment.question


def _fit_of(args: argparse.Namespace, results: "Results") -> "Fit":
    from gqa_scaling.study.fit import fit

    require(args.refits > 0, f"--refits {args.refits} must be greater than 0")
    return fit(
        results,
        context_length=args.context,
        law=args.law,
        bootstrap=args.bootstrap,
        robust=args.robust,
        refits=args.refits,
    )


PUBLISHED_QUESTION = Question(
    contexts=(8192, 32768, 131072),
    losses=(3.0, 2.9, 2.8, 2.7, 2.6),
    baseline=(8, 8),
    convention="per_sequence",
)


def _asked(args: argparse.Namespace, question: Question) -> Question:
    """The question with what the command line changes."""
    baseline = None
    if args.baseline is not None:
        heads = args.baseline.split(",")
        valid = len(heads) == 2 and all(h.strip().isdecimal() for h in heads)
        require(valid, f"--baseline {args.baseline!r} must be n_heads,n_kv_heads such as 8,8")
        baseline = (int(heads[0]), int(heads[1]))
    changes = {
        "losses": tuple(args.losses) if args.losses else None,
        "contexts": tuple(args.contexts) if args.contexts else None,
        "baseline": baseline,
        "convention": args.convention,
        "weight": args.weight,
        "memory_power": args.memory_power,
        "compute_power": args.compute_power,
    }
    return replace(question, **{k: v for k, v in changes.items() if v is not None})


def _answer(args: argparse.Namespace, rest: Sequence[str]) -> tuple["Results", "Fit", "Frontier"]:
    from gqa_scaling.hardware import GIB, changed, hardware
    from gqa_scaling.study.frontier import Serving, frontier

    results, question = _source(args, rest)
    fitted = _fit_of(args, results)
    serving = Serving(
        batch=args.batch,
        weight_bytes=args.weight_bytes,
        cache_bytes=args.cache_bytes,
        hardware=changed(hardware(args.hardware), price=args.price) if args.hardware else None,
        limit_bytes=float("inf") if args.fit_gib is None else args.fit_gib * GIB,
        kv_multiple=args.kv_multiple,
    )
    answer = frontier(fitted, results, _asked(args, question), args.objective, serving)
    return results, fitted, answer


def _fit(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study import tables
    from gqa_scaling.study.compare import compare
    from gqa_scaling.study.heads import head_laws

    results, _ = _source(args, rest)
    fitted = _fit_of(args, results)
    scores = compare(results, context_length=args.context) if args.compare else ()
    heads = head_laws(fitted) if args.heads else ()
    if args.json:
        more = {"compare": scores, "heads": heads}
        lists = {k: [x.to_dict() for x in v] for k, v in more.items() if v}
        _print_json({**fitted.to_dict(), **lists})
        return 0
    _print_table(tables.fit_table(fitted), tables.residual_table(fitted))
    _print_table(*([tables.compare_table(scores)] if scores else []))
    _print_table(*([tables.heads_table(heads)] if heads else []))
    return 0


def _suggest(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment import load_experiment
    from gqa_scaling.study.frontier import target_losses
    from gqa_scaling.study.suggest import suggest
    from gqa_scaling.study.tables import suggest_table

    is_experiment = args.source != PUBLISHED and not args.source.endswith(".csv")
    require(is_experiment, f"suggest needs the grid of an experiment, not {args.source}")
    results, question = _source(args, rest)
    if args.context is not None:
        results = results.select(results.context_length == args.context)
    losses = question.losses or target_losses(_fit_of(args, results))
    grid = list(load_experiment(args.source, rest).runs)
    question = replace(question, losses=tuple(losses))
    found = suggest(results, grid, question, budget_flops=args.budget_flops, most=args.most)
    if args.json:
        _print_json([each.to_dict() for each in found])
    else:
        _print_table(suggest_table(found))
    return 0


def _frontier(args: argparse.Namespace, rest: Sequence[str]) -> int:
    _, _, answer = _answer(args, rest)
    if args.json:
        _print_json(answer.to_dict())
    else:
        from gqa_scaling.study.tables import frontier_tables, ranking_table

        rankings = [ranking_table(each, answer) for each in answer.answers]
        _print_table(frontier_tables(answer), *(rankings if args.ranking else []))
    return 0


def _report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.runs import runs_root
    from gqa_scaling.study.report import write_report
    from gqa_scaling.study.tables import frontier_tables

    results, fitted, answer = _answer(args, rest)
    source = Path(args.source)
    if source.suffix == ".csv":
        folder = source.with_name(f"{source.stem}-report")
    else:
        folder = runs_root() / (
            source.stem if source.suffix == ".py" else args.source.split(".")[-1]
        )
    path = Path(args.output) if args.output else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(path, results, fitted, answer, command=args.command)
    if args.json:
        _print_json({"report": str(path), "frontier": answer.to_dict()})
    else:
        _print_table(frontier_tables(answer))
        print(f"report: {path}")
    return 0


Verb = tuple[
    Callable[[argparse.Namespace, Sequence[str]], int],
    str,
    Callable[[argparse.ArgumentParser], None],
]
VERBS: dict[str, Verb] = {
    "prepare": (_prepare, "turn the experiment's corpus into tokens", _add_prepare),
    "plan": (_plan, "say what the experiment will cost, before any spend", _add_plan),
    "run": (_run, "train what is not finished yet", _add_run),
    "status": (_status, "say where the experiment stands, from its files", _add_status),
    "learning-rates": (
        _learning_rates,
        "the best learning rate of each size in a sweep",
        _add_json,
    ),
    "fit": (_fit, "fit the loss laws to finished runs", _add_fit),
    "frontier": (_frontier, "the cheapest configuration for a loss and a context", _add_frontier),
    "suggest": (_suggest, "which runs to train next to make the answer surest", _add_suggest),
    "report": (_report, "write the study as one HTML page", _add_report),
}
STUDY_VERBS = ("fit", "frontier", "suggest", "report")
