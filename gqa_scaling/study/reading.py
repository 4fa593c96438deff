"""Where finished runs come from: our own run directories, somebody's CSV file, or the published ones.

A value far outside all that was ever trained stands in another unit or was misread, and one such
run would bend every curve: it is refused with its place, as is whatever contradicts itself.
"""

import csv
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from gqa_scaling.config import (
    LOSSES,
    MOST_CONTEXT,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_TOKENS,
    ModelConfig,
    RunConfig,
    UserError,
    between,
    require,
)
from gqa_scaling.context_sharding import ContextSharding
from gqa_scaling.experiment.ladder import MOST_PARAMETERS
from gqa_scaling.files.runs import RunDirectory, evaluation_in, run_directories
from gqa_scaling.files.storage import as_path, is_remote, together
from gqa_scaling.study.counting import count_of, formula, require_counts
from gqa_scaling.study.judged import judged_of
from gqa_scaling.study.results import COUNTS, PATTERN_COLUMNS, Results, check, listed, table
from gqa_scaling.units import count


class Column(NamedTuple):
    """What a column may hold, from `low` to `high` in `unit`, and what stands for an absent value.

    Numbers are above 0, or 0 too where `zero` says so, or of any sign where `low` is below 0.
    """

    kind: type
    default: Any = None
    low: float = 0
    high: float = math.inf
    unit: str = ""
    zero: bool = False


REQUIRED = ("n_heads", "n_kv_heads", "loss")
_COLUMNS = {
    "n_heads": Column(int, None, 1, MOST_HEADS, "heads"),
    "n_kv_heads": Column(int, None, 1, MOST_HEADS, "heads"),
    "loss": Column(float, None, *LOSSES, "nats per token"),
    "name": Column(str, ""),
    "head_dim": Column(int, 64, 1, 2**20),
    "n_layers": Column(int, 0, 1, MOST_LAYERS, "layers"),
    "d_model": Column(int, 0, 1, 2**31 - 1),
    "n_params": Column(float, math.nan, 1, MOST_PARAMETERS, "parameters"),
    "context_length": Column(int, 0, 1, MOST_CONTEXT, "tokens"),
    "tokens": Column(float, math.nan, 1, MOST_TOKENS, "tokens"),
    "tokens_per_param": Column(float, math.nan, 1e-6, 1e9, "tokens"),
    "seed": Column(int, 0, zero=True),
    "learning_rate": Column(float, math.nan),
    "epochs": Column(float, math.nan, zero=True),
    "evaluation": Column(str, ""),
    "vocab_size": Column(int, 0, 1, 2**31 - 1),
    "tokenizer": Column(str, ""),
    "corpus": Column(str, ""),
    "gained_by_rereading": Column(float, math.nan, -math.inf, math.inf, "nats per token"),
    "n_count": Column(str, ""),
}
_PATTERN = dict.fromkeys(PATTERN_COLUMNS, Column(int)) | {
    "pattern_dense_layers": Column(str),
    "pattern_sinks": Column(int, zero=True),
    "pattern_dense_kv_heads": Column(int, zero=True),
}


# ------------------------------------------------------------------------------- our own runs


def from_runs(
    root: Path | str, experiment: str, runs: Iterable[RunConfig], *, swept: bool = False
) -> Results:
    """Read what `runs/<experiment>` holds for these runs, as `from_results`."""
    runs = list(runs)
    directories = run_directories(root, experiment, runs)
    files = [str(each.result_file) for each in directories]
    results = together(RunDirectory.result, directories)
    found = zip(files, runs, results, strict=True)
    return from_results(experiment, str(as_path(root) / experiment), found, swept=swept)


def from_results(
    experiment: str,
    folder: str,
    found: Iterable[tuple[str, RunConfig, dict[str, Any] | None]],
    *,
    swept: bool = False,
) -> Results:
    """Each run judged by its own evaluation; `found` are file, config and result.json of runs.

    Runs without a result, or not yet judged by this evaluation, are listed in `missing`. Raises UserError for
    a loss that is not a number, runs that cannot be compared (`check`, which `swept` is for), and where none
    is finished in `folder`.
    """
    finished, rows, missing, above = [], [], [], []
    for file, run, whole in found:
        where = f"{file}: run {run.name}"
        judged = evaluation_in(whole, run.evaluation_digest)
        if not whole or not judged:
            missing.append(run.name)
            continue
        finished.append((run, whole))
        rows.append(_finished(run, whole["result"], judged, where))
        trained = whole["result"].get("train_loss")
        if trained is not None and rows[-1]["epochs"] <= 1:  # else it has read that text before
            above.append(rows[-1]["loss"] - trained)
    require(
        bool(rows),
        f"no finished runs under {folder}"
        + (f"; missing: {listed(missing)}" if missing else "; the experiment declares none"),
    )
    results = table(
        rows,
        source=f"{experiment} ({count(len(rows), 'run')})",
        count="n_exact",
        missing=tuple(missing),
        provenance=_provenance(experiment, finished) | {"above_training_loss": above},
        template=_template([run for run, _ in finished], experiment),
        mixed=_mixed([run for run, _ in finished]),
        positions={row["name"]: row["positions"] for row in rows if row["positions"]},
        judged={row["name"]: row["judged"] for row in rows},
    )
    return check(results, swept=swept)


def _finished(
    run: RunConfig, result: dict[str, Any], judged: dict[str, Any], where: str
) -> dict[str, Any]:
    """A finished run as a row, with its `positions` and what it was `judged` by, its evaluation."""
    model, data = run.model, result.get("data", {})
    shape = ("n_heads", "n_kv_heads", "head_dim", "n_layers", "d_model", "vocab_size", "pattern")
    positions = [_bounded("loss", x, "loss", where) for x in judged.get("loss_by_position") or ()]
    further = judged_of(judged)
    return {name: getattr(model, name) for name in shape} | {
        "name": run.name,
        "n_params": _bounded("n_exact", _value(result, "n_exact", where), "n_params", where),
        "context_length": run.context_length,
        "tokens": _bounded("tokens", _value(result, "tokens", where), "tokens", where),
        "loss": _bounded("loss", _value(judged, "loss", where), "loss", where),
        "seed": run.seed,
        "learning_rate": run.optimizer.learning_rate,
        "epochs": result.get("epochs") or math.nan,
        "evaluation": judged.get("hash", ""),
        "tokenizer": data.get("tokenizer_hash", ""),
        "corpus": data.get("corpus_hash") or data.get("store_hash", ""),
        "gained_by_rereading": further.gained_by_rereading,
        "positions": tuple(positions),
        "judged": further,
    }


def _provenance(
    experiment: str, finished: Sequence[tuple[RunConfig, dict[str, Any]]]
) -> dict[str, Any]:
    """What is behind these result files: versions, devices, seconds, skipped steps, how many runs each
    commit finished ("" where it was not noted), and when the first and the last of them began."""
    versions: dict[str, dict[str, None]] = {}
    commits: Counter[str] = Counter()
    began = []
    devices: dict[str | None, None] = {}
    seconds, skipped = 0.0, {}
    for run, whole in finished:
        for package, version in (whole["result"].get("versions") or {}).items():
            versions.setdefault(package, {})[str(version)] = None
        attempts = whole.get("attempts") or []
        for attempt in attempts:
            devices[attempt.get("layout", {}).get("device")] = None
        commits[attempts[-1].get("commit") or "" if attempts else ""] += 1
        began += [attempt["began"] for attempt in attempts if "began" in attempt]
        seconds += (whole.get("timing") or {}).get("training_seconds") or 0.0
        if steps := whole["result"].get("skipped_steps"):
            skipped[run.name] = steps
    return {
        "experiment": experiment,
        "versions": {package: " and ".join(each) for package, each in versions.items()},
        "devices": [device for device in devices if device],
        "training_seconds": seconds,
        "commits": dict(commits),
        "began": [min(began), max(began)] if began else [],
        "skipped_steps": skipped,
    }


def _template(runs: Sequence[RunConfig], experiment: str) -> ModelConfig:
    """The first model; UserError when others differ in what a built model's size follows from."""
    first, *rest = runs
    for run in rest:
        for field in ("tie_embeddings", "qk_norm"):
            one, other = (getattr(r.model, field) for r in (first, run))
            require(
                one == other,
                f"{experiment}: the runs mix architectures ({first.name}: {field}={one}, {run.name}: "
                f"{field}={other}); fit one architecture at a time",
            )
    return first.model


def _mixed(runs: Sequence[RunConfig]) -> str:
    """Two runs of which one alone has an FFN width of its own; "" where there are none."""
    widths = {run.model.d_ff is None: f"{run.name}: d_ff={run.model.d_ff}" for run in runs}
    return ", ".join(widths.values()) if len(widths) > 1 else ""


def _value(values: Any, key: str, where: str) -> Any:
    """values[key]; UserError where a damaged file has none."""
    require(
        isinstance(values, dict) and values.get(key) is not None,
        f"{where}: {key} is missing; the file is damaged: train that run again",
    )
    return values[key]


def _bounded(name: str, value: Any, column: str, where: str) -> float:
    """The value of a run; UserError where it is none that the column may hold."""
    c, remedy = _COLUMNS[column], "train that run again, or leave it out"
    try:
        between(name, value, c.low, c.high, f"{c.unit}; {remedy}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return float(value)


# ------------------------------------------------------------------------- somebody else's runs


def from_csv(path: Path | str, *, swept: bool = False) -> Results:
    """Runs from a CSV file with a header line, columns in any order, further ones ignored.

    Needed: n_heads, n_kv_heads, loss (nats), and n_params (without embeddings) or n_layers and
    d_model (with head_dim, 64 when absent). A run with a pattern names its pattern_block and
    pattern_local, what else its `ContextSharding` has, and its context_length. Lines that begin
    with # are comments. Raises UserError naming the file, the line, the column and the value.
    """
    file = as_path(path)
    named = not is_remote(file) or "/" in os.fspath(file).partition("://")[2].strip("/")
    require(named, f"{path}: names a bucket and no file in it")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file in UTF-8") from None
    return from_text(text, str(path), swept=swept)


def published() -> Results:
    """The 40 training runs of Chen et al. 2025, Figure 2: seven configurations, d = 64 L."""
    text = (resources.files("gqa_scaling.study") / "chen2025.csv").read_text(encoding="utf-8")
    return from_text(text, "Chen et al. 2025, Figure 2")


def from_text(text: str, source: str, *, swept: bool = False) -> Results:
    """Runs from the text of a CSV file, as `from_csv`; `source` names it in what is refused."""
    lines = [
        (f"{source} line {i}", line)
        for i, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    require(
        len(lines) > 1, f"{source}: holds no runs; a header line and one line per run are needed"
    )
    (first, names), *cells = [(where, _cells(line, where)) for where, line in lines]
    header = [name.strip() for name in names]
    absent = [name for name in REQUIRED if name not in header]
    values = [name for name in header if _is_number(name)]
    require(
        not (absent and values),
        f"{first}: holds the value {values[0] if values else ''} where the names of the columns "
        "belong; begin with a header such as n_heads,n_kv_heads,n_layers,d_model,loss",
    )
    found = ", ".join(header)
    twice = sorted({name for name in header if name and header.count(name) > 1})
    require(not twice, f"{source}: column {', '.join(twice)} appears twice")
    apart = (
        "; separate columns by commas, and write decimals with a point" if len(header) == 1 else ""
    )
    require(not absent, f"{source}: column {', '.join(absent)} is missing; found {found}{apart}")
    shaped = {"n_layers", "d_model"} <= set(header)
    require(
        shaped or "n_params" in header,
        f"{source}: give column n_params, or n_layers and d_model; found {found}",
    )
    needed = {*REQUIRED, *(("n_layers", "d_model") if shaped else ("n_params",))}
    rows = [_row(header, values, needed, where) for where, values in cells]
    require_counts(rows, [where for where, _ in cells])
    return check(table(rows, source=source, count=count_of(rows, source)), swept=swept)


def _cells(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as CSV ({error}); mend the line") from None


# As spreadsheets and programs write them; Python also reads 3_1 and other scripts' digits, which here
# are slips of the hand.
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.ASCII | re.I)


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _row(header: list[str], values: list[str], needed: set[str], where: str) -> dict[str, Any]:
    """One line as a row of all columns; `needed` are those that may not be empty."""
    require(
        len(values) == len(header), f"{where}: has {len(values)} values for {len(header)} columns"
    )
    given = {k: v.strip() for k, v in zip(header, values, strict=True) if v.strip()}
    row = {}
    for name, column in _COLUMNS.items():
        require(name in given or name not in needed, f"{where}: column {name} is empty")
        row[name] = _read(name, given[name], column, where) if name in given else column.default
    require(
        row["n_kv_heads"] <= row["n_heads"],
        f"{where}: column n_kv_heads={row['n_kv_heads']} must be at most n_heads={row['n_heads']}",
    )
    require(
        row["n_count"] in ("", *COUNTS),
        f"{where}: column n_count={row['n_count']!r} must be one of {', '.join(COUNTS)}",
    )
    row["pattern"] = _pattern(given, row, where)
    if not (row["n_layers"] and row["d_model"]):  # half a shape is none
        row["n_layers"] = row["d_model"] = 0
    if math.isnan(row["n_params"]):
        row["n_params"] = float(formula(row))
        require(
            row["n_params"] <= MOST_PARAMETERS,
            f"{where}: its shape has {row['n_params']:.3g} parameters and may have at most "
            f"{MOST_PARAMETERS:g}; mend the line, or leave it out",
        )
    if math.isnan(row["tokens"]):
        row["tokens"] = row["tokens_per_param"] * row["n_params"]
    if not row["name"]:
        shape, n = f"L{row['n_layers']}-d{row['d_model']}", f"N{row['n_params']:.4g}"
        size = shape if row["n_layers"] else n
        row["name"] = f"{size}-h{row['n_heads']}-kv{row['n_kv_heads']}"
        if row["pattern"]:
            row["name"] += f" {row['pattern'].label}"
    return row


def _read(name: str, text: str, column: Column, where: str) -> Any:
    if column.kind is str:
        return text
    value, integer = float(text) if _is_number(text) else math.nan, column.kind is int
    signed = column.low < 0
    good = math.isfinite(value) and (value > 0 or signed or (column.zero and value == 0))
    good = good and (not integer or (value < 2**53 and value == int(value)))
    kind, most = ("a whole number", " and below 2^53") if integer else ("a number", "")
    above = "" if signed else " above 0"
    require(good, f"{where}: column {name}={text!r} must be {kind}{above}{most}")
    require(
        column.low <= value <= column.high,
        f"{where}: column {name}={text!r} must lie between {column.low:g} and "
        f"{f'{column.high:g} {column.unit}'.strip()}; mend the line, or leave it out",
    )
    return column.kind(value)


def _pattern(given: dict[str, str], row: dict[str, Any], where: str) -> ContextSharding | None:
    """The pattern that a line of the file names, None where its columns are empty or absent."""
    fields = {
        PATTERN_COLUMNS[name]: _read(name, given[name], column, where)
        for name, column in _PATTERN.items()
        if name in given
    }
    if not fields:
        return None
    for name in ("pattern_block", "pattern_local", "n_layers", "d_model", "context_length"):
        require(name in given, f"{where}: a run with a pattern needs column {name}")
    try:
        pattern = ContextSharding(**fields)
        pattern.layers(row["n_layers"], row["n_kv_heads"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return pattern
