"""The verb `report`: the page of a study, and the index of a folder of pages."""

import argparse
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gqa_scaling.cli import study
from gqa_scaling.cli.serving import serving_of
from gqa_scaling.cli.shared import Verb, print_json, print_table
from gqa_scaling.config import Question, UserError, require
from gqa_scaling.files.storage import as_path

if TYPE_CHECKING:
    from gqa_scaling.study.report.carried import Again


def _add_report(parser: argparse.ArgumentParser) -> None:
    study.add_question(parser)
    add = parser.add_argument
    add(
        "--output",
        help="the page (default: runs/NAME/report.html, or NAME-report/report.html beside a CSV)",
    )
    add("--figures", choices=("svg", "pdf"), help="static figures as well, in figures/ beside it")
    add("--data", action="store_true", help="the data as well, as CSV and JSON beside the page")
    add(
        "--tensorboard",
        action="store_true",
        help="the figures and tables in study/, for TensorBoard",
    )


def _report(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.study.histories import histories
    from gqa_scaling.study.judged import to_dict
    from gqa_scaling.study.report.answers import frontier_answer
    from gqa_scaling.study.report.estimates import wide_law_tables
    from gqa_scaling.study.report.files import require_own, require_page, settled
    from gqa_scaling.study.report.forecasts import forecast_table
    from gqa_scaling.study.report.judged import judged_tables
    from gqa_scaling.study.report.sentences import training
    from gqa_scaling.study.report.shape_axes import shape_tables
    from gqa_scaling.study.report.table import shown
    from gqa_scaling.study.report.tradeoffs import aligned_answer
    from gqa_scaling.study.report.write import Beside, write_judged, write_report

    if as_path(args.source).is_dir():
        return _index(args, rest)
    path = _default_page(args) if args.output is None else as_path(args.output)
    beside = Beside(args.figures, args.data, args.tensorboard)
    names = beside.names(_pictures() if beside.figures else ())
    if args.output is not None:
        require_page(args.output, path, names)
    path = settled(path)
    require_own(path.parent, (path.name, *names), as_path(args.source))
    serving_of(args)  # what cannot be is said before anything is read
    source = study.source_of(args, rest)
    study.asked_of(args, source.question)
    try:
        whole = study.answer_of(args, source)
    except UserError as error:  # too few runs for a law may still be worth reading
        judged = [*shape_tables(source.results), *judged_tables(source.results)]
        if not judged:
            raise
        write_judged(path, source.results, source.question, str(error), args.command, beside)
        if args.json:
            print_json({"report": str(path), "judged": to_dict(source.results)})
            return 0
        print_table(shown(judged, [f"no law is fitted: {error}"]))
        print(f"report: {path}")
        return 0
    found, answer = whole.estimates, whole.frontier
    if found.tokens or args.train_context is not None or args.baseline_run is not None:
        aligned = study.aligned_of(args, whole.results, answer.question, found)
        whole = replace(whole, aligned=aligned)
    root = [] if args.root is None else ["--root", args.root]
    one = shlex.join(["gqa-scaling", "run", args.source, *rest, *root, "--only"])
    whole = replace(whole, histories=histories(source, one))
    again = again_of(args, rest, source.question)
    write_report(path, whole, args.command, again, beside)
    if args.json:
        told = {"report": str(path), "frontier": answer.to_dict()}
        print_json(told | whole.estimated())
        return 0
    for table in wide_law_tables(found):
        print_table(table, "")
    print_table(*([aligned_answer(whole.aligned), ""] if whole.aligned else []))
    further = [*shape_tables(whole.results), *judged_tables(whole.results)]
    print_table(frontier_answer(answer, further))
    print(training(answer))
    if whole.forecasts:
        print_table("", forecast_table(whole.forecasts))
    print(f"report: {path}")
    return 0


def _pictures() -> Iterable[str]:
    from gqa_scaling.study.report.pictures import PICTURES

    return PICTURES


def again_of(args: argparse.Namespace, rest: Sequence[str], question: Question) -> "Again":
    """The command that prints an answer from the same curves, less what the page can move."""
    from gqa_scaling.study.report.carried import Again

    cost = [] if args.cost is None else ["--cost", args.cost]
    if args.output_tokens is not None:
        cost += ["--output-tokens", str(args.output_tokens)]
    candidates = tuple(args.candidates or ())
    return Again(_command(args, rest), question, candidates, shlex.join(cost))


def _command(args: argparse.Namespace, rest: Sequence[str]) -> str:
    words = ["gqa-scaling", "frontier", args.source, *rest]
    for name in ("law", "context", "flat_from", "at_tokens", "root"):
        value = getattr(args, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += [] if args.refits == 1000 else ["--refits", str(args.refits)]
    return shlex.join([*words, *(["--without", *args.without] if args.without else [])])


def _index(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """The page of a folder whose studies have pages of their own."""
    from gqa_scaling.study.report.files import require_own, require_page, settled
    from gqa_scaling.study.report.index import write_index

    require(not rest, f"unexpected argument {rest[0] if rest else ''!r}: {args.source} is a folder")
    folder = as_path(args.source)
    path = folder / "index.html" if args.output is None else as_path(args.output)
    if args.output is not None:
        require_page(args.output, path, ())
    path = settled(path)
    require_own(path.parent, [path.name])
    found = write_index(path, folder)
    if args.json:
        print_json({"index": str(path), "reports": found})
    else:
        print(f"index of {len(found)} reports: {path}")
    return 0


def _default_page(args: argparse.Namespace) -> Path:
    """Where the page goes that no --output names: with the runs, or in a folder of the CSV file's."""
    from gqa_scaling.experiment.load import folder_of
    from gqa_scaling.files.runs import runs_root

    path = as_path(args.source)
    if path.suffix == ".csv":
        return path.with_name(f"{path.stem}-report") / "report.html"
    return runs_root(args.root) / folder_of(args.source) / "report.html"


VERBS: dict[str, Verb] = {
    "report": (_report, "write the study as one HTML page", _add_report),
}
