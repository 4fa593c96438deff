"""The verbs of a study: finished runs to a decision; its page is in `report`, questions in `questions`."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from gqa_scaling.baselines import LLAMA3, written_heads
from gqa_scaling.cli.serving import add_costs, objective_of, serving_of
from gqa_scaling.cli.shared import Verb, add_json, finite, print_json, print_table, whole
from gqa_scaling.config import Question, UserError, between, require
from gqa_scaling.study.choices import PUBLISHED, Law

if TYPE_CHECKING:
    from gqa_scaling.study.candidates import Which
    from gqa_scaling.study.equal_training import EqualTraining
    from gqa_scaling.study.estimates import Estimates
    from gqa_scaling.study.results import Results
    from gqa_scaling.study.source import Source
    from gqa_scaling.study.study import Study

SOURCES = f"""experiment; CSV file with columns n_heads, n_kv_heads, loss and n_params or n_layers,
d_model (docs/using.md); or {PUBLISHED}, the published points, shipped here"""


def add_source(
    parser: argparse.ArgumentParser, what: str = SOURCES, trained: str = "--context"
) -> None:
    """What every verb takes; `trained` is the option that names the training context length."""
    add = parser.add_argument
    add("source", help=what)
    add_json(parser)
    add(
        "--law",
        choices=get_args(Law),
        help="a curve for each head configuration, or a joint law across them (default: separate; where "
        "heads that were not trained are ranked, the joint law that predicts them best)",
    )
    add("--refits", type=int, default=1000, help="bootstrap refits (default: 1000)")
    add(trained, dest="context", type=int, help="fit the runs of this training context length")
    add(
        "--without",
        nargs="+",
        default=[],
        metavar="NAME",
        help="leave out runs, by a pattern of their names, or configurations such as 8,1; not-copying: runs "
        "that have not learned to copy from their context",
    )


def add_wide(parser: argparse.ArgumentParser) -> None:
    """What verbs take that read runs of several contexts or token budgets."""
    parser.add_argument(
        "--flat-from",
        type=int,
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
    add_source(parser)
    add_wide(parser)
    parser.add_argument("--compare", action="store_true", help="laws by their left-out errors")
    parser.add_argument("--heads", action="store_true", help="loss against query heads at fixed N")


def add_question(parser: argparse.ArgumentParser) -> None:
    """What the verbs take that answer a whole question."""
    add_source(parser)
    add_wide(parser)
    add = parser.add_argument
    add("--losses", type=finite, nargs="+", help="target losses in nats")
    add("--contexts", type=whole, nargs="+", help="inference context lengths in tokens")
    add(
        "--candidates",
        nargs="+",
        metavar="n_h,n_kv",
        help="configurations to rank: all (the published 21), measured (those trained), or heads such "
        "as 4,1 8,2 (default: powers of two up to the most that were trained)",
    )
    add(
        "--baseline",
        help="what savings are stated against: heads at every size, 8,8; the published family, llama3; "
        "one model, 24,8@L36d1536, whose predicted loss is then the target unless --losses are named",
    )
    add_costs(parser)
    add(
        "--train-context",
        type=int,
        help="training context length of the training FLOPs that are aligned (default: the runs')",
    )
    add(
        "--baseline-run",
        metavar="N,D",
        help="parameters and training tokens of the baseline whose training FLOPs all get, such as "
        "1.2e9,24e9 (default: from --losses, else its largest size)",
    )


def _add_frontier(parser: argparse.ArgumentParser) -> None:
    add_question(parser)
    parser.add_argument(
        "--align",
        choices=("training",),
        help="training: every configuration gets the baseline's training FLOPs; needs runs with "
        "several token budgets for a size",
    )
    parser.add_argument("--ranking", action="store_true", help="rank every configuration")
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="the answer with lambda, alpha, beta, batch and bytes changed, one at a time",
    )


def source_of(args: argparse.Namespace, rest: Sequence[str]) -> "Source":
    """The finished runs that the command line names."""
    from gqa_scaling.study.source import read_source

    return read_source(args.source, rest, args.root, args.without)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """How the runs are to be estimated, as `estimate` has it."""
    names = ("refits", "flat_from", "at_tokens")
    known = {name: getattr(args, name, None) for name in names}
    given = {name: value for name, value in known.items() if value is not None}
    return given | {"context_length": args.context}


def estimates_of(args: argparse.Namespace, results: "Results") -> "Estimates":
    """The laws that these runs allow, by default with a curve for each configuration."""
    from gqa_scaling.study.estimates import estimate

    return estimate(results, law=args.law or "separate", **options_of(args))


def _which(args: argparse.Namespace) -> "Which | list[tuple[int, int]] | None":
    """What --candidates names."""
    from gqa_scaling.study.candidates import WHICH

    words = args.candidates or []
    named = next((which for which in WHICH if words == [which]), None)
    return named or [_heads("--candidates", word) for word in words] or None


def _heads(flag: str, text: str, more: str = "") -> tuple[int, int]:
    """n_heads,n_kv_heads as it is typed."""
    heads = written_heads(text)
    if heads is None:
        raise UserError(f"{flag} {text!r} must be n_heads,n_kv_heads such as 8,8{more}")
    return heads


def asked_of(args: argparse.Namespace, question: Question) -> Question:
    """The question with what the command line changes."""
    from gqa_scaling.study.ask import asked

    return asked(question, **changes_of(args))


def changes_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the question that the command line names, None for the others."""
    baseline: Any = args.baseline
    if baseline is not None and baseline != LLAMA3 and "@" not in baseline:
        baseline = _heads("--baseline", baseline, f", {LLAMA3}, or one model such as 24,8@L36d1536")
    if args.indifference is not None:
        between("--indifference", args.indifference, 0, 100, "percent")
    return {
        "losses": tuple(args.losses) if args.losses else None,
        "contexts": tuple(args.contexts) if args.contexts else None,
        "baseline": baseline,
        "convention": args.convention,
        "weight": args.weight,
        "memory_power": args.memory_power,
        "compute_power": args.compute_power,
        "indifference": None if args.indifference is None else args.indifference / 100,
    }


def answer_of(args: argparse.Namespace, source: "Source") -> "Study":
    """The whole study but for equal training FLOPs."""
    from gqa_scaling.study.ask import answer

    serving = serving_of(args)
    question = asked_of(args, source.question)  # refused before anything is estimated
    return answer(
        source,
        question,
        objective_of(args),
        serving,
        which=_which(args),
        law=args.law,
        ending=[] if args.root is None else ["--root", args.root],
        **options_of(args),
    )


def aligned_of(
    args: argparse.Namespace, results: "Results", question: Question, found: "Estimates"
) -> "EqualTraining":
    """The answers at equal training FLOPs; UserError where the runs have no token law."""
    from gqa_scaling.study.equal_training import equal_training

    length = ", or name one length with --context" if found.context else ""
    if found.tokens is None:
        raise UserError(
            f"{args.source}: equal training FLOPs need a token law, and that runs of one context "
            "length with several token budgets for a size; train some sizes on other budgets"
            + length
        )
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
        objective=objective_of(args),
        serving=serving_of(args),
    )


def _fit(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study.compare import compare
    from gqa_scaling.study.heads import head_laws
    from gqa_scaling.study.report import estimates
    from gqa_scaling.study.report.table import shown

    results = source_of(args, rest).results
    found = estimates_of(args, results)
    scores = compare(results, context_length=args.context) if args.compare else ()
    heads = head_laws(found.fit) if args.heads else ()
    if args.json:
        told = {"compare": [s.to_dict() for s in scores], "heads": [h.to_dict() for h in heads]}
        more = {name: rows for name, rows in told.items() if rows}
        print_json(found.fit.to_dict() | found.to_dict() | more)
        return 0
    tables = [*estimates.law_tables(found), estimates.residual_table(found.fit)]
    tables += [estimates.compare_table(scores)] if args.compare else []
    tables += [estimates.heads_table(heads)] if args.heads else []
    print_table(shown(tables, found.fit.flags))
    return 0


def _frontier(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.align:
        return _frontier_aligned(args, rest)
    from gqa_scaling.study.report.answers import frontier_answer, ranking_table
    from gqa_scaling.study.report.assumptions import sensitivity_table
    from gqa_scaling.study.report.sentences import training
    from gqa_scaling.study.report.tradeoffs import sparsity_table

    unused = [f for f in ("train_context", "baseline_run") if getattr(args, f) is not None]
    require(
        not unused,
        f"--{unused[0].replace('_', '-') if unused else ''} belongs to --align training; add that",
    )
    serving_of(args)  # what cannot be is said before anything is read
    study = answer_of(args, source_of(args, rest))
    answer, sparse = study.frontier, study.sparsity
    hangs = study.sensitivity if args.sensitivity else None
    if args.json:
        more = {"sparsity": sparse, "sensitivity": hangs}
        print_json(answer.to_dict() | {k: v.to_dict() for k, v in more.items() if v})
        return 0
    tables = [ranking_table(each, answer) for each in answer.answers] if args.ranking else []
    tables += [sensitivity_table(hangs)] if hangs else []
    tables += [sparsity_table(sparse, objective_of(args))] if sparse else []
    print_table(frontier_answer(answer, tables))
    print(training(answer))
    return 0


def _frontier_aligned(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study.report.tradeoffs import aligned_answer

    serving_of(args)  # what cannot be is said before anything is estimated
    source = source_of(args, rest)
    question = asked_of(args, source.question)
    aligned = aligned_of(args, source.results, question, estimates_of(args, source.results))
    if args.json:
        print_json(aligned.to_dict())
    else:
        print_table(aligned_answer(aligned))
    return 0


VERBS: dict[str, Verb] = {
    "fit": (_fit, "fit the loss laws to finished runs", _add_fit),
    "frontier": (_frontier, "the cheapest configuration for a loss and a context", _add_frontier),
}
