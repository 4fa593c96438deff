"""A study that is kept: beside its CSV file the record of everything that made it.

    studies/linux.csv     a row for each finished run, as every verb of a study reads it
    studies/linux.jsonl   the question and the sealed forecasts, then of each run the whole result.json
                          and its curves: the training loss, and what reading again gained on the way

Where the second file lies beside the first, the study is what it was among its run directories: its
question, losses by position, other evaluations, training curves, versions and forecasts.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gqa_scaling.config import Question, RunConfig, UserError, require
from gqa_scaling.fields import JsonShape
from gqa_scaling.files.forecasts import FOLDER, Sealed, read_forecasts, unsealed
from gqa_scaling.files.runs import (
    RESULT,
    RunDirectory,
    parse_json,
    require_schema,
    run_directories,
)
from gqa_scaling.files.storage import as_path, make_folder, together, write_json
from gqa_scaling.study.results import Results
from gqa_scaling.study.training_curves import (
    CURVE_SHAPES,
    CURVES,
    Curve,
    curves_told,
    tell_curves,
    training_curves,
)

SCHEMA = 1
_STUDY: JsonShape = {"schema": int, "experiment": str, "question": dict, "forecasts": {"*": dict}}
_RUN: JsonShape = RESULT | CURVE_SHAPES


@dataclass(frozen=True)
class Records:
    """What is kept of an experiment in `path`: `results` are the result.json of its finished runs, in the
    order of their declaration, `runs` their configs; `curves` are their training losses by name, and
    `rereading` what reading again gained them on the way."""

    path: Path
    experiment: str
    question: Question
    forecasts: tuple[Sealed, ...]
    runs: tuple[RunConfig, ...]
    results: tuple[dict[str, Any], ...]
    curves: dict[str, Curve]
    rereading: dict[str, Curve]

    def result(self, digest: str) -> dict[str, Any] | None:
        """The result.json of the run with this digest; None where it is not kept."""
        return next((r for r in self.results if r["result"].get("digest") == digest), None)


def records(root: Path, experiment: str, question: Question, runs: Sequence[RunConfig]) -> str:
    """The text of the file: a line for the study, and one for each of these finished runs."""
    directories = run_directories(root, experiment, runs)
    lines = together(lambda each: _run(*each), list(zip(directories, runs, strict=True)))
    return _text(experiment, question, read_forecasts(root, experiment), lines)


def records_of(kept: Records, names: Collection[str]) -> str:
    """The text of the file again, for the runs with these names."""
    pairs = zip(kept.runs, kept.results, strict=True)
    lines = [
        result | tell_curves(kept.curves[run.name], kept.rereading[run.name])
        for run, result in pairs
        if run.name in names
    ]
    return _text(kept.experiment, kept.question, kept.forecasts, lines)


def _text(
    experiment: str, question: Question, sealed: Sequence[Sealed], lines: Sequence[dict[str, Any]]
) -> str:
    study = {
        "schema": SCHEMA,
        "experiment": experiment,
        "question": question.to_dict(),
        "forecasts": {each.path.name: each.said for each in sealed if not each.altered},
    }
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in (study, *lines))


def _run(directory: RunDirectory, run: RunConfig) -> dict[str, Any]:
    result = directory.result()
    require(result is not None, f"{directory.result_file} went away as it was read: try again")
    return (result or {}) | tell_curves(*training_curves(directory, run.batch_tokens))


def beside(csv_file: Path) -> Path:
    """Where the record of a CSV file of runs lies."""
    return csv_file.with_suffix(".jsonl")


def read_records(path: Path) -> Records:
    """The study in this file. Raises UserError where a line of it is damaged, named by its number."""
    first, *lines = path.read_bytes().splitlines() or [b""]
    study, wrong = parse_json(first, _STUDY)
    _require_whole(path, 1, wrong)
    require_schema(path, study, SCHEMA)
    name = study["experiment"]
    plain = name not in ("", ".", "..") and not set(name) & set("/\\")
    _require_whole(path, 1, "" if plain else f"experiment={name!r} does not name a folder")
    with _naming(path, 1):
        question = Question.from_dict(study["question"])
    runs, results = [], []
    curves: dict[str, dict[str, Curve]] = {name: {} for name in CURVES}
    for number, line in enumerate(lines, 2):
        result, wrong = parse_json(line, _RUN)
        _require_whole(path, number, wrong)
        with _naming(path, number):
            runs.append(RunConfig.from_dict(result["result"].get("config")))
        for (name, of), curve in zip(CURVES.items(), curves_told(result), strict=True):
            alike = len(curve[0]) == len(curve[1])
            _require_whole(path, number, "" if alike else f"{name} has not as many {of} as places")
            curves[name][runs[-1].name] = curve
        results.append({key: value for key, value in result.items() if key not in CURVES})
    forecasts = [unsealed(path / name, said) for name, said in study["forecasts"].items()]
    return Records(
        path,
        study["experiment"],
        question,
        tuple(forecasts),
        tuple(runs),
        tuple(results),
        *curves.values(),
    )


def put_back(kept: Records, root: Path) -> tuple[list[str], list[str]]:
    """Make run directories of what is kept, below `root`, and its sealed forecasts: the names of the runs
    put back, and of those left as they are, which have begun there.

    A run that is put back has its result and its curves; its parameters are not kept. Raises UserError,
    before anything is written, where this version would call a run by another digest.
    """
    for run, result in zip(kept.runs, kept.results, strict=True):
        digest = result["result"].get("digest")
        require(
            digest == run.digest,
            f"{kept.path}: {run.name} was kept with digest {digest}, and this version calls it "
            f"{run.digest}: put it back with the version that kept it",
        )
    folder = as_path(root) / kept.experiment / FOLDER
    for sealed in kept.forecasts:
        if not sealed.altered and not (folder / sealed.path.name).exists():
            make_folder(folder)
            write_json(folder / sealed.path.name, sealed.said)
    directories = run_directories(root, kept.experiment, kept.runs)
    back, left = list[str](), list[str]()
    for directory, run, result in zip(directories, kept.runs, kept.results, strict=True):
        curves = tell_curves(kept.curves[run.name], kept.rereading[run.name])
        (back if directory.put_back(run, result, curves) else left).append(run.name)
    return back, left


def _require_whole(path: Path, number: int, wrong: str) -> None:
    require(
        not wrong,
        f"{path} line {number} is damaged ({wrong}); write it again with `gqa-scaling results`, or move it "
        "away to read the CSV file alone",
    )


@contextlib.contextmanager
def _naming(path: Path, number: int) -> Iterator[None]:
    """Have what a config refuses told with the line that it stands in."""
    wrong = ""
    try:
        yield
    except UserError as error:
        wrong = str(error)
    _require_whole(path, number, wrong)


def require_equal(kept: Results, rows: Results, path: Path) -> None:
    """Raise UserError where a CSV file and the record beside it are not of the same runs."""
    names = [set(each.name.tolist()) for each in (kept, rows)]
    other = sorted(names[0] ^ names[1])
    if not other:
        loss = dict(zip(kept.name.tolist(), kept.loss.tolist(), strict=True))
        pairs = zip(rows.name.tolist(), rows.loss.tolist(), strict=True)
        other = [name for name, each in pairs if each != loss[name]]
    require(
        not other and len(kept) == len(rows),
        f"{path} is not the record of {path.with_suffix('.csv').name}: they differ in "
        f"{other[0] if other else 'the number of runs'}; write both again with `gqa-scaling results`, or "
        "move it away to read the CSV file alone",
    )
