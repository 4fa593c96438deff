"""The verbs of questions that people ask of a study: which of two, what to run next, what is to be expected."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from gqa_scaling.cli.serving import add_costs, objective_of, serving_of
from gqa_scaling.cli.shared import Verb, finite, print_json, print_table, whole
from gqa_scaling.cli.study import (
    add_source,
    add_wide,
    asked_of,
    changes_of,
    estimates_of,
    options_of,
    source_of,
)
from gqa_scaling.config import between, require
from gqa_scaling.study.choices import is_experiment


def _add_compare(parser: argparse.ArgumentParser) -> None:
    add_source(parser, trained="--trained-at")
    add_wide(parser)
    add = parser.add_argument
    two = "heads such as 4,1, or a whole model such as 8,1@L24d1536"
    add("first", help=two)
    add("second", help="what it is compared with, likewise")
    add("--loss", "--losses", dest="losses", type=finite, nargs="+", help="target losses in nats")
    add(
        "--context",
        "--contexts",
        dest="contexts",
        type=whole,
        nargs="+",
        help="inference context lengths in tokens; that of training is --trained-at",
    )
    add_costs(parser)
    parser.set_defaults(baseline=None)


def _add_suggest(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add = parser.add_argument
    add("--budget-flops", type=float, default=float("inf"), help="training FLOPs")
    add("--most", type=int, default=8, help="how many runs at most (default: 8)")
    add("--losses", type=finite, nargs="+", help="target losses in nats")
    add("--contexts", type=whole, nargs="+", help="inference context lengths in tokens")
    add_costs(parser)
    parser.set_defaults(baseline=None)


def _add_forecast(parser: argparse.ArgumentParser) -> None:
    add_source(parser, "experiment: its finished runs, and the rest of its grid")
    parser.add_argument(
        "--runs",
        metavar="EXPERIMENT[:RUN,...]",
        help="the runs to forecast (default: those of the source that have not begun); fields after "
        "it, in quotes with it",
    )


def _compare(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study.ask import compare_two
    from gqa_scaling.study.report.compared import compared

    serving = serving_of(args)
    source, changes = source_of(args, rest), changes_of(args)
    how = options_of(args) | {"law": args.law}
    objective = objective_of(args)
    told = compare_two(source, args.first, args.second, changes, objective, serving, **how)
    if args.json:
        print_json(told.to_dict())
    else:
        print_table(compared(told))
    return 0


def _suggest(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study.commands import command_of
    from gqa_scaling.study.frontier import target_losses
    from gqa_scaling.study.proposals import Proposals, budget_assumed, for_a_fit, too_small
    from gqa_scaling.study.report.advice import first_step, fit_table, suggest_table
    from gqa_scaling.study.report.table import shown
    from gqa_scaling.study.suggest import Suggestion, suggest
    from gqa_scaling.study.tokens import spans_budgets

    between("--most", args.most, 1, 1e6, "runs")
    require(args.budget_flops > 0, f"--budget-flops={args.budget_flops} must be greater than 0")
    serving = serving_of(args)
    source = source_of(args, rest)
    results, question = source.results, asked_of(args, source.question)
    if args.context is not None:
        results = results.select(results.context_length == args.context)
        require(len(results) > 0, f"{args.source}: no runs at context length {args.context}")
    require(
        bool(results.n_layers.all()),
        f"{args.source}: suggest needs the layers and widths of the runs: columns n_layers, d_model",
    )
    require(
        not spans_budgets(results),
        f"{args.source}: suggest takes runs of one token budget for each size; leave the others "
        "out with --without",
    )
    options = [] if args.root is None else ["--root", args.root]
    small = too_small(results) if args.law in (None, "separate") else ""
    if small:
        steps = for_a_fit(Proposals(results, source.grid))
        found = tuple(Suggestion(step.kind, step.runs, step.flops) for step in steps)
        table = fit_table(found, f"{args.source}: {small}")
    else:
        losses = question.losses or target_losses(estimates_of(args, results).fit)
        question = replace(question, losses=tuple(losses))
        found = suggest(
            results,
            source.grid,
            question,
            budget_flops=args.budget_flops,
            most=args.most,
            objective=objective_of(args),
            serving=serving,
        )
        table = suggest_table(found, objective_of(args))
    # nothing is forecast where nothing can be fitted
    commands = [command_of(source, each.runs[0].run, options, forecast=not small) for each in found]
    flags = [flag for flag in (results.left_out, budget_assumed(results, source.grid)) if flag]
    if serving.clock:
        flags += serving.clock.caveats(question.contexts, serving.batch, int(results.head_dim[0]))
        if objective_of(args) in ("seconds", "dollars"):
            flags.append(
                "regret holds the error of the clock, which no run lowers: time more models"
            )
    if args.json:
        told = zip(found, commands, strict=True)
        rows = [
            each.to_dict() | ({"command": command} if command else {}) for each, command in told
        ]
        print_json({"too_small": small, "flags": flags, "suggestions": rows})
    else:
        print_table(shown([table], flags))
        print(first_step(found[0], commands[0], declared=found[0].runs[0].run in source.grid))
    return 0


def _forecast(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.experiment.load import named_runs
    from gqa_scaling.study.forecast import seal_forecast, to_seal
    from gqa_scaling.study.report.forecasts import prediction_table

    known = is_experiment(args.source)
    require(known, f"forecast needs the finished runs of an experiment, not {args.source}")
    source = source_of(args, rest)
    assert source.experiment is not None
    assert source.root is not None
    target, named = source.experiment, False
    if args.runs is not None:
        target, named = named_runs(args.runs, source.root)
    runs = list(target.runs) if named else to_seal(source.root, target.name, target.runs)
    require(
        bool(runs),
        f"all {len(target.runs)} runs of {target.name} have begun: a forecast is made before; name "
        "others with --runs",
    )
    earlier = len(runs) - len(to_seal(source.root, target.name, runs, again=False))
    sealed, predictions = seal_forecast(
        source, estimates_of(args, source.results), target.name, runs
    )
    if args.json:
        print_json(sealed.said | {"file": str(sealed.path)})
        return 0
    title = f"Forecasts for {target.name} from {source.results.source}"
    print_table(prediction_table(predictions, title))
    print(f"sealed: {sealed.path}")
    if earlier:
        print(f"{earlier} of {len(runs)} have an earlier forecast, which is the one that counts")
    return 0


VERBS: dict[str, Verb] = {
    "compare": (_compare, "which of two configurations or models is cheaper", _add_compare),
    "forecast": (_forecast, "seal what is expected of runs before they are trained", _add_forecast),
    "suggest": (_suggest, "which runs to train next to make the answer surest", _add_suggest),
}
