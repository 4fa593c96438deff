"""The verbs of a study: finished runs to a decision."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gqa_scaling.cli.shared import Verb, add_json, finite, print_json, print_table
from gqa_scaling.config import Question, UserError, between, require
from gqa_scaling.files.storage import as_path

if TYPE_CHECKING:
    from gqa_scaling.study.equal_training import EqualTraining
    from gqa_scaling.study.estimates import Estimates
    from gqa_scaling.study.frontier import Frontier
    from gqa_scaling.study.results import Results
    from gqa_scaling.study.serving import Serving

PUBLISHED = "chen2025"


SOURCES = f"""experiment; CSV file with columns n_heads, n_kv_heads, loss and n_params or n_layers,
d_model (docs/using.md); or {PUBLISHED}, the published points, shipped here"""


def _add_source(parser: argparse.ArgumentParser, what: str = SOURCES) -> None:
    parser.add_argument("source", help=what)
    add_json(parser)
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
        type=finite,
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
    parser.add_argument("--losses", type=finite, nargs="+", help="target losses in nats")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="inference context lengths in tokens"
    )
    parser.add_argument(
        "--baseline", metavar="n_h,n_kv", help="heads that savings are stated against"
    )
    parser.add_argument("--convention", choices=("per_token", "per_sequence"), help="of FLOPs")
    parser.add_argument("--lambda", dest="weight", type=finite, help="weight of memory in Z")
    parser.add_argument("--alpha", dest="memory_power", type=finite, help="power of memory in Z")
    parser.add_argument("--beta", dest="compute_power", type=finite, help="power of FLOPs in Z")
    parser.add_argument(
        "--objective",
        choices=("z", "memory", "flops", "bytes", "seconds", "dollars"),
        default="z",
        help="what is to be least; seconds and dollars need --hardware",
    )
    parser.add_argument("--hardware", help="serve on this: v5e, v5p, v6e, a100, h100, h200")
    parser.add_argument("--price", type=finite, help="dollars a device-hour there")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    parser.add_argument(
        "--weight-bytes", type=finite, default=2, help="bytes a weight (default: 2)"
    )
    parser.add_argument("--cache-bytes", type=finite, default=2, help="bytes a cached value")
    parser.add_argument("--fit-gib", type=finite, help="only models whose weights and cache fit")
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
    from gqa_scaling.experiment.load import load_experiment
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.study.sources import from_csv, from_runs, published

    if args.source == PUBLISHED or args.source.endswith(".csv"):
        require(
            not rest,
            f"unexpected argument {rest[0] if rest else ''!r}: {args.source} has no fields",
        )
    if args.source == PUBLISHED:
        return published(), PUBLISHED_QUESTION
    if args.source.endswith(".csv"):
        return from_csv(args.source), Question()
    root = runs_root(args.root)
    experiment = load_experiment(args.source, rest, root)
    results = from_runs(root, experiment.name, experiment.runs)
    return results, experiment.question


def _is_experiment(source: str) -> bool:
    return source != PUBLISHED and not source.endswith(".csv")


def _estimates_of(args: argparse.Namespace, results: "Results") -> "Estimates":
    from gqa_scaling.study.estimates import estimate

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
        valid = len(heads) == 2 and all(h.strip().isdecimal() and len(h) < 10 for h in heads)
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
    """How the models are to be served; UserError where that or the objective cannot be."""
    from gqa_scaling.hardware import GIB, changed, hardware
    from gqa_scaling.study.serving import Serving, require_costs

    if args.fit_gib is not None:
        between("--fit-gib", args.fit_gib, 1e-6, 1e12, "GiB")
    serving = Serving(
        batch=args.batch,
        weight_bytes=args.weight_bytes,
        cache_bytes=args.cache_bytes,
        hardware=changed(hardware(args.hardware), price=args.price) if args.hardware else None,
        limit_bytes=float("inf") if args.fit_gib is None else args.fit_gib * GIB,
        kv_multiple=args.kv_multiple,
    )
    require_costs(args.objective, serving)
    return serving


def _answer(
    args: argparse.Namespace, rest: Sequence[str]
) -> tuple["Results", Question, "Estimates", "Frontier"]:
    from gqa_scaling.study.frontier import frontier

    serving = _serving(args)
    results, question = _source(args, rest)
    question = _asked(args, question)
    found = _estimates_of(args, results)
    answer = frontier(found.fit, results, question, args.objective, serving)
    if _is_experiment(args.source):
        answer = _with_training(args, rest, results, found, answer)
    return results, question, found, answer


def _aligned(
    args: argparse.Namespace, results: "Results", question: Question, found: "Estimates"
) -> "EqualTraining":
    """The answers at equal training FLOPs; UserError where the runs have no token law."""
    from gqa_scaling.study.equal_training import equal_training

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
    return equal_training(
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
    from gqa_scaling.experiment.follow_ups import find_follow_ups, follow_up
    from gqa_scaling.experiment.load import load_experiment
    from gqa_scaling.experiment.overrides import overrides_to
    from gqa_scaling.files.runs import run_directory, runs_root
    from gqa_scaling.study.build import check_runs
    from gqa_scaling.study.sources import from_runs

    root = runs_root(args.root)
    experiment = load_experiment(args.source, rest, root)
    context = found.fit.context_length or int(results.context_length.max())
    tokens = round(found.tokens.at_tokens) if found.tokens else None
    runs = [run for run in experiment.runs if run.context_length == context]
    seen = {run.digest: run.name for run in runs if run.name in results.name}
    place = [] if args.root is None else ["--root", args.root]
    told = []
    for each in answer.answers:
        if each.model is not None:
            run = follow_up(runs, each.model.config, tokens)
            command = ["run", args.source, *rest, *overrides_to(experiment.runs, run), *place]
            model = replace(each.model, command=_shell(command), trained=seen.get(run.digest, ""))
            each = replace(each, model=model)
        told.append(each)
    checks = []
    for run in find_follow_ups(root, experiment.name, runs):
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
        print_json({**fitted.to_dict(), **found.to_dict(), **lists})
        return 0
    if found.tokens:
        print_table(*(part for s in sheets for part in (rich_sheet(s), "")))
        print_table(*flag_lines(fitted.flags))
    else:
        print_table(tables.fit_table(fitted))
        print_table(*(part for s in sheets for part in ("", rich_sheet(s))))
    print_table("", tables.residual_table(fitted))
    print_table(*([tables.compare_table(scores)] if scores else []))
    print_table(*([tables.heads_table(heads)] if heads else []))
    return 0


def _suggest(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import load_experiment
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.study.context import spans_contexts
    from gqa_scaling.study.frontier import target_losses
    from gqa_scaling.study.suggest import suggest
    from gqa_scaling.study.tables import suggest_table
    from gqa_scaling.study.tokens import spans_budgets

    require(
        _is_experiment(args.source), f"suggest needs the grid of an experiment, not {args.source}"
    )
    between("--most", args.most, 1, 1e6, "runs")
    require(args.budget_flops > 0, f"--budget-flops={args.budget_flops} must be greater than 0")
    results, question = _source(args, rest)
    if args.context is not None:
        results = results.select(results.context_length == args.context)
    require(
        not spans_contexts(results) and not spans_budgets(results),
        f"{args.source}: suggest takes finished runs of one context length and one token budget "
        "for each size; name one length with --context, or select runs with --only",
    )
    losses = question.losses or target_losses(_estimates_of(args, results).fit)
    grid = list(load_experiment(args.source, rest, runs_root(args.root)).runs)
    question = replace(question, losses=tuple(losses))
    found = suggest(results, grid, question, budget_flops=args.budget_flops, most=args.most)
    if args.json:
        print_json([each.to_dict() for each in found])
    else:
        print_table(suggest_table(found))
    return 0


def _frontier(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.align:
        _serving(args)  # what cannot be is said before anything is estimated
        results, question = _source(args, rest)
        question = _asked(args, question)
        found = _estimates_of(args, results)
        aligned = _aligned(args, results, question, found)
        if args.json:
            print_json(aligned.to_dict())
        else:
            from gqa_scaling.study.sheets import aligned_tables

            print_table(aligned_tables(aligned))
        return 0
    unused = [f for f in ("train_context", "baseline_run") if getattr(args, f) is not None]
    require(
        not unused,
        f"--{unused[0].replace('_', '-') if unused else ''} belongs to --align training; add that",
    )
    from gqa_scaling.study.sheets import rich_sheet, sparsity_sheet
    from gqa_scaling.study.sparsity import sparsity
    from gqa_scaling.study.tables import frontier_tables, ranking_table, training

    results, _, found, answer = _answer(args, rest)
    sparse = sparsity(found.fit, results, answer)
    if args.json:
        print_json(answer.to_dict() | ({"sparsity": sparse.to_dict()} if sparse else {}))
    else:
        rankings = [ranking_table(each, answer) for each in answer.answers]
        print_table(frontier_tables(answer), *(rankings if args.ranking else []))
        if sparse:
            print_table("", rich_sheet(sparsity_sheet(sparse, args.objective)), "")
        print(training(answer))
    return 0


def _report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.study.outputs import require_own, require_page, settled
    from gqa_scaling.study.report import BESIDE, write_report
    from gqa_scaling.study.sheets import aligned_sheets, aligned_tables, law_sheets, rich_sheet
    from gqa_scaling.study.tables import frontier_tables, training

    source = as_path(args.source)
    if source.suffix == ".csv":
        folder = source.with_name(f"{source.stem}-report")
    else:
        folder = runs_root(args.root) / (
            source.stem if source.suffix == ".py" else args.source.split(".")[-1]
        )
    path = folder / "report.html"
    if args.output is not None:
        path = as_path(args.output)
        require_page(args.output, path, BESIDE)
    path = settled(path)
    require_own(path.parent, (path.name, *BESIDE), source)
    results, question, found, answer = _answer(args, rest)
    asked = args.train_context is not None or args.baseline_run is not None
    aligned = _aligned(args, results, question, found) if found.tokens or asked else None
    sheets = [*law_sheets(found), *(aligned_sheets(aligned) if aligned else [])]
    more = found.to_dict() | ({"aligned": aligned.to_dict()} if aligned else {})
    write_report(path, results, found.fit, answer, command=args.command, sheets=sheets, beside=more)
    if args.json:
        print_json({"report": str(path), "frontier": answer.to_dict(), **more})
    else:
        for sheet in law_sheets(found):
            print_table(rich_sheet(sheet), "")
        print_table(*([aligned_tables(aligned), ""] if aligned else []))
        print_table(frontier_tables(answer))
        print(training(answer))
        print(f"report: {path}")
    return 0


VERBS: dict[str, Verb] = {
    "fit": (_fit, "fit the loss laws to finished runs", _add_fit),
    "frontier": (_frontier, "the cheapest configuration for a loss and a context", _add_frontier),
    "suggest": (_suggest, "which runs to train next to make the answer surest", _add_suggest),
    "report": (_report, "write the study as one HTML page", _add_report),
}
