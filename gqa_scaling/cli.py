"""The verbs. Nothing heavy is imported until a verb needs it."""

import argparse
import errno
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gqa_scaling.config import Question, UserError, nearest, require

if TYPE_CHECKING:
    from gqa_scaling.experiment import Experiment
    from gqa_scaling.hardware import Hardware
    from gqa_scaling.study.aligned import Aligned
    from gqa_scaling.study.estimates import Estimates
    from gqa_scaling.study.frontier import Frontier, Serving
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
        if name not in (*STUDY_VERBS, "checkpoints"):
            verb.add_argument("experiment", help="module or file, such as experiments.smoke")
        add(verb)
        verb.add_argument("--root", help="folder of the runs (default: $GQA_SCALING_RUNS or runs)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 a run failed, 2 something the user can mend, 75 preempted
    and saved, 130 interrupted."""
    try:
        code = _main(argv)
    except Exception:
        if not _one_of_several():
            raise
        traceback.print_exc()
        code = 1
    if code not in (0, 75) and _one_of_several():
        from gqa_scaling.processes import leave

        leave(code)
    return code


def _one_of_several() -> bool:
    processes = sys.modules.get("gqa_scaling.processes")
    return processes is not None and processes.several()


def _main(argv: Sequence[str] | None) -> int:
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
    parser.add_argument(
        "--compile",
        metavar="TOPOLOGY",
        help="compile each train step for v5e:16x16, v5p:4x4x8, 2xv6e:16x16, ... on this machine "
        "(docs/pods.md)",
    )


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
    if args.compile is not None:
        return _compile(args, experiment, prepared)
    plan = make_plan(experiment, *_detect(args), prepared)
    if args.json:
        _print_json(plan.to_dict())
    else:
        _print_table(plan_table(plan), *plan_summary(plan))
    return 0


def _compile(args: argparse.Namespace, experiment: "Experiment", prepared: dict[str, int]) -> int:
    from gqa_scaling import hardware, pods
    from gqa_scaling.plan import make_plan, plan_summary, plan_table

    require(
        args.hardware is None and args.devices is None,
        f"--compile {args.compile} names the hardware and the devices: leave out --hardware and "
        "--devices",
    )
    place = hardware.topology(args.compile)
    pods.check(experiment, place)
    row = hardware.changed(hardware.hardware(place.kind), args.mfu, args.price)
    plan = make_plan(experiment, row, place.chips, prepared)
    if not args.json:
        _print_table(plan_table(plan), *plan_summary(plan))
        sys.stdout.flush()  # compiling takes minutes

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = pods.compile_experiment(experiment, place, say)
    if args.json:
        _print_json({**plan.to_dict(), "compiled": [each.to_dict() for each in found]})
        return 0
    runs = {run.name: run for run in experiment.runs}
    _print_table(pods.compiled_table(found, place), *pods.compiled_summary(found, runs))
    return 0


def _run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from contextlib import nullcontext

    from gqa_scaling import sweep
    from gqa_scaling.runs import runs_root

    require(args.workers > 0, f"--workers {args.workers} must be greater than 0")
    worker = args.cores is not None
    if worker:
        sweep.be_worker(args.cores, args.parent)
    experiment, root = _experiment(args, rest), runs_root()
    left = sweep.pending(experiment, root)
    if not left:
        print(
            f"{experiment.name}: all {len(experiment.runs)} runs are finished in {root / experiment.name}"
        )
        return 0
    if args.retry_failed:
        sweep.forget_failures(experiment, root)
    if args.workers > 1:
        with nullcontext() if args.quiet else sweep.live_display(experiment, root):
            sweep.check(experiment, root)
            command = _worker_command(args, rest)
            code = sweep.run_workers(command, args.workers, len(left))
    else:
        from gqa_scaling import processes

        processes.join(alone=worker)
        if worker:
            sweep.check_worker()
        shown = not args.quiet and processes.is_leader()
        with sweep.live_display(experiment, root) if shown else nullcontext():
            try:
                code = sweep.run_sweep(experiment, root).exit_code
            except processes.Preempted as stop:
                print(f"gqa-scaling: {stop}; the same command continues", file=sys.stderr)
                return processes.EXIT_PREEMPTED
        if worker or not processes.is_leader():
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
    from gqa_scaling.grid import beside
    from gqa_scaling.runs import runs_root
    from gqa_scaling.status import read_status, status_dict, status_table

    experiment, root = _experiment(args, rest), runs_root()
    rows = read_status(root, experiment)
    selected = args.only is not None or args.shard is not None or len(experiment.runs) == 1
    more = () if selected else tuple(beside(root, experiment.name, experiment.runs))
    others = read_status(root, replace(experiment, runs=more))
    if args.json:
        whole = status_dict(experiment.name, rows)
        _print_json(whole | {"beside": status_dict(experiment.name, others)["runs"]})
        return 0
    _print_table(status_table(experiment.name, rows))
    if others:
        _print_table(status_table(f"{experiment.name}, beside its grid", others))
    return 0


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="experiment, such as experiments.smoke, or the directory of a run or of runs"
    )
    _add_selection(parser)
    _add_json(parser)


def _checkpoints(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment import load_experiment
    from gqa_scaling.runs import RunDirectory, run_directory, runs_root
    from gqa_scaling.status import checkpoints_dict, checkpoints_table, read_checkpoints

    path = Path(args.source)
    if path.is_dir():
        selected = rest or args.only or args.shard
        require(not selected, f"{path} is a directory: --only, --shard and fields select of a grid")
        found = [path] if (path / "config.json").exists() else path.glob("*/")
        directories = [RunDirectory(p) for p in sorted(found) if (p / "config.json").exists()]
        require(bool(directories), f"{path} is neither a run nor a folder of runs: no config.json")
    else:
        experiment = load_experiment(args.source, rest).select(args.only, args.shard)
        directories = [run_directory(runs_root(), experiment.name, r) for r in experiment.runs]
    runs = read_checkpoints(directories)
    if args.json:
        _print_json(checkpoints_dict(runs))
    else:
        _print_table(checkpoints_table(runs))
    return 1 if any(run.damaged for run in runs) else 0


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


def _add_wide(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flat-from",
        type=int,
        default=8192,
        help="training context length from which differences between configurations are tested "
        "to be flat, where runs span several (default: 8192)",
    )
    parser.add_argument(
        "--at-tokens",
        type=float,
        help="training tokens at which a token law's curves are shown (default: the runs' "
        "geometric mean)",
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    _add_wide(parser)
    parser.add_argument("--compare", action="store_true", help="laws by their left-out errors")
    parser.add_argument("--heads", action="store_true", help="loss against query heads at fixed N")


def _add_suggest(parser: argparse.ArgumentParser) -> None:
    _add_source(parser, "experiment: its finished runs and the rest of its grid")
    parser.add_argument("--budget-flops", type=float, default=float("inf"), help="training FLOPs")
    parser.add_argument("--most", type=int, default=8, help="how many runs at most (default: 8)")
    parser.set_defaults(flat_from=8192, at_tokens=None)


def _add_question(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    _add_wide(parser)
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
    parser.add_argument(
        "--train-context",
        type=int,
        help="training context length of the training FLOPs that are aligned (default: the runs')",
    )
    parser.add_argument(
        "--baseline-run",
        metavar="N,D",
        help="parameters and training tokens of the baseline whose training FLOPs all get, such as "
        "1.2e9,24e9 (default: from --losses, else its largest size)",
    )


def _add_frontier(parser: argparse.ArgumentParser) -> None:
    _add_question(parser)
    parser.add_argument(
        "--align",
        choices=("training",),
        help="training: every configuration gets the baseline's training FLOPs; needs runs with "
        "several token budgets for a size",
    )
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


def _is_experiment(source: str) -> bool:
    return source != PUBLISHED and not source.endswith(".csv")


def _estimates_of(args: argparse.Namespace, results: "Results") -> "Estimates":
    from gqa_scaling.study.estimates import estimate

    require(args.refits > 0, f"--refits {args.refits} must be greater than 0")
    return estimate(
        results,
        context_length=args.context,
        law=args.law,
        bootstrap=args.bootstrap,
        robust=args.robust,
        refits=args.refits,
        flat_from=args.flat_from,
        at_tokens=args.at_tokens,
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


def _serving(args: argparse.Namespace) -> "Serving":
    from gqa_scaling.hardware import GIB, changed, hardware
    from gqa_scaling.study.frontier import Serving

    return Serving(
        batch=args.batch,
        weight_bytes=args.weight_bytes,
        cache_bytes=args.cache_bytes,
        hardware=changed(hardware(args.hardware), price=args.price) if args.hardware else None,
        limit_bytes=float("inf") if args.fit_gib is None else args.fit_gib * GIB,
        kv_multiple=args.kv_multiple,
    )


def _answer(
    args: argparse.Namespace, rest: Sequence[str]
) -> tuple["Results", Question, "Estimates", "Frontier"]:
    from gqa_scaling.study.frontier import frontier

    results, question = _source(args, rest)
    question, found = _asked(args, question), _estimates_of(args, results)
    answer = frontier(found.fit, results, question, args.objective, _serving(args))
    if _is_experiment(args.source):
        answer = _with_training(args, rest, results, found, answer)
    return results, question, found, answer


def _aligned(
    args: argparse.Namespace, results: "Results", question: Question, found: "Estimates"
) -> "Aligned":
    """The answers at equal training FLOPs; UserError where the runs have no token law."""
    from gqa_scaling.study.aligned import aligned

    require(
        found.tokens is not None,
        f"{args.source}: equal training FLOPs need a token law, and that runs of one context "
        "length with several token budgets for a size; train some sizes on other budgets"
        + (", or name one length with --context" if found.context else ""),
    )
    assert found.tokens is not None
    run = None
    if args.baseline_run is not None:
        try:
            n, tokens = map(float, args.baseline_run.split(","))
        except ValueError:
            raise UserError(
                f"--baseline-run {args.baseline_run!r} must be N,D such as 1.2e9,24e9"
            ) from None
        run = n, tokens
    return aligned(
        found.tokens,
        results,
        question,
        train_context=args.train_context,
        baseline_run=run,
        objective=args.objective,
        serving=_serving(args),
    )


def _with_training(
    args: argparse.Namespace,
    rest: Sequence[str],
    results: "Results",
    found: "Estimates",
    answer: "Frontier",
) -> "Frontier":
    """The answer with the command that trains each model, and the runs that can check it."""
    from gqa_scaling.experiment import load_experiment, overrides_to
    from gqa_scaling.grid import beside, run_of
    from gqa_scaling.runs import run_directory, runs_root
    from gqa_scaling.study.frontier import check_runs
    from gqa_scaling.study.results import from_runs

    experiment, root = load_experiment(args.source, rest), runs_root()
    context = found.fit.context_length or int(results.context_length.max())
    tokens = round(found.tokens.at_tokens) if found.tokens else None
    runs = [run for run in experiment.runs if run.context_length == context]
    seen = {run.digest: run.name for run in runs if run.name in results.name}
    place = [] if args.root is None else ["--root", args.root]
    told = []
    for each in answer.answers:
        if each.model is not None:
            run = run_of(runs, each.model.config, tokens)
            command = ["run", args.source, *rest, *overrides_to(experiment.runs, run), *place]
            model = replace(each.model, command=_shell(command), trained=seen.get(run.digest, ""))
            each = replace(each, model=model)
        told.append(each)
    checks = []
    for run in beside(root, experiment.name, runs):
        whole = run_directory(root, experiment.name, run).result()
        if (
            tokens in (None, run.tokens)
            and whole is not None
            and run.evaluation_digest in whole["result"]["evaluations"]
        ):
            one = from_runs(root, experiment.name, [run])
            if all(getattr(one, k)[0] == getattr(results, k)[0] for k in ("evaluation", "corpus")):
                checks += check_runs(found.fit, one)
    return replace(answer, answers=tuple(told), checks=tuple(checks))


def _shell(arguments: Sequence[str], width: int = 78) -> str:
    """The command in lines that a shell takes as one, none broken inside an argument."""
    lines, flags = ["gqa-scaling"], " ".join(map(shlex.quote, arguments)).replace(" --", "\0--")
    for i, part in enumerate(flags.split("\0")):
        if i and len(lines[-1]) + 1 + len(part) > width:
            lines.append(f"   {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)


def _fit(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study import tables
    from gqa_scaling.study.compare import compare
    from gqa_scaling.study.heads import head_laws
    from gqa_scaling.study.sheets import flag_lines, law_sheets, rich_sheet

    results, _ = _source(args, rest)
    found = _estimates_of(args, results)
    fitted, sheets = found.fit, law_sheets(found)
    scores = compare(results, context_length=args.context) if args.compare else ()
    heads = head_laws(fitted) if args.heads else ()
    if args.json:
        more = {"compare": scores, "heads": heads}
        lists = {k: [x.to_dict() for x in v] for k, v in more.items() if v}
        _print_json({**fitted.to_dict(), **found.to_dict(), **lists})
        return 0
    if found.tokens:
        _print_table(*(part for s in sheets for part in (rich_sheet(s), "")))
        _print_table(*flag_lines(fitted.flags))
    else:
        _print_table(tables.fit_table(fitted))
        _print_table(*(part for s in sheets for part in ("", rich_sheet(s))))
    _print_table("", tables.residual_table(fitted))
    _print_table(*([tables.compare_table(scores)] if scores else []))
    _print_table(*([tables.heads_table(heads)] if heads else []))
    return 0


def _suggest(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment import load_experiment
    from gqa_scaling.study.context import spans_contexts
    from gqa_scaling.study.frontier import target_losses
    from gqa_scaling.study.suggest import suggest
    from gqa_scaling.study.tables import suggest_table
    from gqa_scaling.study.tokens import spans_budgets

    require(
        _is_experiment(args.source), f"suggest needs the grid of an experiment, not {args.source}"
    )
    results, question = _source(args, rest)
    if args.context is not None:
        results = results.select(results.context_length == args.context)
    require(
        not spans_contexts(results) and not spans_budgets(results),
        f"{args.source}: suggest takes finished runs of one context length and one token budget "
        "for each size; name one length with --context, or select runs with --only",
    )
    losses = question.losses or target_losses(_estimates_of(args, results).fit)
    grid = list(load_experiment(args.source, rest).runs)
    question = replace(question, losses=tuple(losses))
    found = suggest(results, grid, question, budget_flops=args.budget_flops, most=args.most)
    if args.json:
        _print_json([each.to_dict() for each in found])
    else:
        _print_table(suggest_table(found))
    return 0


def _frontier(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.align:
        results, question = _source(args, rest)
        found, question = _estimates_of(args, results), _asked(args, question)
        aligned = _aligned(args, results, question, found)
        if args.json:
            _print_json(aligned.to_dict())
        else:
            from gqa_scaling.study.sheets import aligned_tables

            _print_table(aligned_tables(aligned))
        return 0
    unused = [f for f in ("train_context", "baseline_run") if getattr(args, f) is not None]
    require(
        not unused,
        f"--{unused[0].replace('_', '-') if unused else ''} belongs to --align training; add that",
    )
    _, _, _, answer = _answer(args, rest)
    if args.json:
        _print_json(answer.to_dict())
    else:
        from gqa_scaling.study.tables import frontier_tables, ranking_table, training

        rankings = [ranking_table(each, answer) for each in answer.answers]
        _print_table(frontier_tables(answer), *(rankings if args.ranking else []))
        print(training(answer))
    return 0


def _report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.runs import runs_root
    from gqa_scaling.study.report import write_report
    from gqa_scaling.study.sheets import aligned_sheets, aligned_tables, law_sheets, rich_sheet
    from gqa_scaling.study.tables import frontier_tables, training

    results, question, found, answer = _answer(args, rest)
    asked = args.train_context is not None or args.baseline_run is not None
    aligned = _aligned(args, results, question, found) if found.tokens or asked else None
    source = Path(args.source)
    if source.suffix == ".csv":
        folder = source.with_name(f"{source.stem}-report")
    else:
        folder = runs_root() / (
            source.stem if source.suffix == ".py" else args.source.split(".")[-1]
        )
    path = Path(args.output) if args.output else folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheets = [*law_sheets(found), *(aligned_sheets(aligned) if aligned else [])]
    more = found.to_dict() | ({"aligned": aligned.to_dict()} if aligned else {})
    write_report(path, results, found.fit, answer, command=args.command, sheets=sheets, beside=more)
    if args.json:
        _print_json({"report": str(path), "frontier": answer.to_dict(), **more})
    else:
        for sheet in law_sheets(found):
            _print_table(rich_sheet(sheet), "")
        _print_table(*([aligned_tables(aligned), ""] if aligned else []))
        _print_table(frontier_tables(answer))
        print(training(answer))
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
    "checkpoints": (
        _checkpoints,
        "verify what is kept of each run; exit code 1 when something is damaged",
        _add_checkpoints,
    ),
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
