"""The verbs of finished runs as data: results, a table to read or files that stay when run directories
go; restore, which makes run directories of such files again."""

import argparse
from collections.abc import Sequence

from gqa_scaling.cli.shared import Verb, add_json, print_json, print_table
from gqa_scaling.cli.study import SOURCES
from gqa_scaling.config import require
from gqa_scaling.units import count


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=SOURCES)
    add_json(parser)
    parser.add_argument(
        "--output",
        metavar="FILE.csv",
        help="write the table there, as every verb of a study reads it; also what made each "
        "run and what was asked and forecast, beside it as FILE.jsonl, where that is known",
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out runs")


def _results(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.files.storage import as_path, write_atomic
    from gqa_scaling.study.records import beside, read_records, records, records_of
    from gqa_scaling.study.report.csv_files import HEADER, results_csv
    from gqa_scaling.study.report.forecasts import forecast_table
    from gqa_scaling.study.report.runs import made_by, runs_table
    from gqa_scaling.study.results import listed
    from gqa_scaling.study.scores import forecasts_of
    from gqa_scaling.study.source import read_source

    path = None if args.output is None else as_path(args.output)
    if path is not None:
        require(path.suffix == ".csv", f"--output {args.output} must end with .csv")
        require(
            as_path(args.source).resolve() != path.resolve(),
            f"--output {args.output} is what is read: name another file",
        )
        require(
            not path.exists() or path.read_text().startswith(HEADER),
            f"--output {args.output} is another file: name one that is not there yet",
        )
        require(
            path.exists() or not beside(path).exists(),
            f"--output {args.output}: {beside(path)} is another file: name one that is not there yet",
        )
    source = read_source(args.source, rest, args.root, args.without, swept=True)
    results, forecasts, written = source.results, forecasts_of(source), {}
    if path is not None:
        written[path] = results_csv(results)
        names = set(results.name.tolist())
        if source.root is not None and source.experiment is not None:
            runs = [run for run in source.experiment.runs if run.name in names]
            kept = records(source.root, source.experiment.name, source.question, runs)
            written[beside(path)] = kept
        elif source.kept is not None:
            written[beside(path)] = records_of(source.kept, names)
        if path.exists() and beside(path).exists():
            gone = [r.name for r in read_records(beside(path)).runs if r.name not in names]
            require(
                not gone,
                f"--output {args.output} keeps {count(len(gone), 'run')} that would be lost "
                f"({listed(gone, 4)}): put them back with `gqa-scaling restore {args.output}`, or name "
                "another file",
            )
    for file, text in written.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, text)
    if args.json:
        print_json(
            {
                "runs": results.rows(),
                "made": results.provenance,
                "forecasts": forecasts.to_dict()["runs"],
                "written": [str(file) for file in written],
            }
        )
        return 0
    if written:
        counted = count(len(results), "run")
        print(f"{counted}: {' and '.join(str(file) for file in written)}")
    else:
        print_table(runs_table(results), "")
        for name, value in made_by(results):
            print(f"{name}: {value}")
        if forecasts:
            print_table("", forecast_table(forecasts))
    return 0


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE.csv", help="what `results --output` has written")


def _restore(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from gqa_scaling.files.runs import runs_root
    from gqa_scaling.files.storage import as_path
    from gqa_scaling.study.records import beside, put_back
    from gqa_scaling.study.results import listed
    from gqa_scaling.study.source import read_source

    require(
        args.source.endswith(".csv") and beside(as_path(args.source)).exists(),
        f"{args.source} cannot be put back among the runs: that takes FILE.csv with FILE.jsonl beside it, "
        "as `gqa-scaling results EXPERIMENT --output FILE.csv` writes them",
    )
    kept = read_source(args.source, rest, args.root, swept=True).kept
    assert kept is not None
    root = runs_root(args.root)
    back, left = put_back(kept, root)
    forecasts = count(len(kept.forecasts), "sealed forecast")
    print(
        f"{root / kept.experiment}: {count(len(back), 'finished run')} put back, without parameters"
        + f", and {forecasts}" * bool(kept.forecasts)
    )
    if left:
        print(f"left as they are, having begun there: {listed(left, 4)}")
    return 0


VERBS: dict[str, Verb] = {
    "results": (_results, "finished runs as a table, or as files to keep", _add_results),
    "restore": (_restore, "put a kept study back among the runs, to go on from it", _add_restore),
}
