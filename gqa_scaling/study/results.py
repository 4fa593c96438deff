"""Finished runs as one table of plain columns: ours, somebody else's CSV, or the published ones.

Whatever cannot be compared is refused here, so that a fit never mixes two evaluations, corpora,
vocabularies or ways to count parameters.
"""

import csv
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from gqa_scaling.config import (
    LOSSES,
    MAX_EPOCHS,
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
from gqa_scaling.context_sharding import ContextSharding, density
from gqa_scaling.costs import n_formula
from gqa_scaling.experiment.ladder import MOST_PARAMETERS, PUBLISHED_LADDER
from gqa_scaling.files.runs import run_directory
from gqa_scaling.files.storage import as_path, is_remote

Count = Literal["n_exact", "n_formula", "n_given"]
COUNTS: tuple[Count, ...] = ("n_exact", "n_formula", "n_given")
# A configuration: (n_heads, n_kv_heads) and, where heads do not see all keys, their pattern.
Heads: TypeAlias = tuple[int, int] | tuple[int, int, ContextSharding]


def heads_of(n_heads: int, n_kv_heads: int, pattern: ContextSharding | None) -> Heads:
    """A configuration; without a pattern it is the plain pair."""
    pair = int(n_heads), int(n_kv_heads)
    return pair if pattern is None else (*pair, pattern)


def pattern_of(heads: Heads) -> ContextSharding | None:
    """What the heads of a configuration see, None for all keys."""
    return heads[2] if len(heads) > 2 else None


def pair(heads: Heads) -> str:
    """A configuration as it is printed: (8,1), or (8,1) b64 w16 s8 with a pattern."""
    pattern = pattern_of(heads)
    return f"({heads[0]},{heads[1]})" + (f" {pattern.label}" if pattern else "")


def heads_columns(heads: Heads) -> dict[str, Any]:
    """A configuration as columns: n_heads, n_kv_heads and, where it has one, its pattern's label."""
    pattern = pattern_of(heads)
    columns = {"n_heads": heads[0], "n_kv_heads": heads[1]}
    return columns | ({"pattern": pattern.label} if pattern else {})


def pairs(many: Iterable[Heads]) -> str:
    """Configurations in a row."""
    many = list(many)
    return (", " if any(map(pattern_of, many)) else " ").join(map(pair, many))


@dataclass(frozen=True)
class Results:
    """One row per finished run; every column has the same length.

    `n_params` are non-embedding parameters counted as `count` says: n_exact (the built model),
    n_formula (8 L d^2 + 2 L d d_h (n_h + n_kv)) or n_given (the file's own). `loss` is in nats,
    `tokens` are training tokens (NaN when unknown), 0 stands for unknown layers and sizes, "" for
    unknown hashes. `pattern` holds the `ContextSharding` of each run, None for dense ones.
    `missing` names runs that were asked for and have no result; `template` is the
    model of one of our runs, whose architecture all of them share; `positions` holds, by name, the
    losses in nats of equal parts of the context, where a run's evaluation has told them apart.
    """

    source: str
    count: Count
    name: np.ndarray
    n_heads: np.ndarray
    n_kv_heads: np.ndarray
    head_dim: np.ndarray
    n_layers: np.ndarray
    d_model: np.ndarray
    n_params: np.ndarray
    context_length: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    seed: np.ndarray
    learning_rate: np.ndarray
    epochs: np.ndarray
    evaluation: np.ndarray
    vocab_size: np.ndarray
    tokenizer: np.ndarray
    corpus: np.ndarray
    pattern: np.ndarray
    missing: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    template: ModelConfig | None = None
    positions: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def heads(self) -> list[Heads]:
        """The configuration of every run."""
        return list(map(heads_of, self.n_heads, self.n_kv_heads, self.pattern))

    @property
    def density(self) -> np.ndarray:
        """Share of the causal query-key pairs that each run computed in training; 1 when dense."""
        return np.array(
            [
                _density(*run)
                for run in zip(
                    self.pattern, self.n_layers, self.n_kv_heads, self.context_length, strict=True
                )
            ]
        )

    @property
    def ladder(self) -> tuple[tuple[int, int], ...]:
        """The runs' own sizes (L, d); the published ladder when the data has no shapes."""
        sizes = set(zip(self.n_layers.tolist(), self.d_model.tolist(), strict=True)) - {(0, 0)}
        return tuple(sorted(sizes, key=lambda s: s[0] * s[1] ** 2)) or PUBLISHED_LADDER

    def select(self, keep: np.ndarray) -> "Results":
        """The rows where `keep` is true."""
        return dataclasses.replace(self, **{k: getattr(self, k)[keep] for k in COLUMNS})

    def rows(self) -> list[dict[str, Any]]:
        """Every run as a dictionary of plain values, NaN as None.

        Patterns are columns of their own, absent where all runs are dense.
        """
        columns = {k: getattr(self, k).tolist() for k in COLUMNS if k != "pattern"}
        if any(self.pattern):
            for name, field in PATTERN_COLUMNS.items():
                columns[name] = [getattr(p, field) if p else None for p in self.pattern]
        return [
            {k: None if v[i] != v[i] else v[i] for k, v in columns.items()}
            for i in range(len(self))
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "count": self.count,
            "missing": list(self.missing),
            "provenance": self.provenance,
            "runs": self.rows(),
        }


COLUMNS = tuple(f.name for f in dataclasses.fields(Results) if f.type is np.ndarray)
_INTEGERS = ("n_heads", "n_kv_heads", "head_dim", "n_layers", "d_model", "context_length", "seed")
_TEXTS = ("name", "evaluation", "tokenizer", "corpus", "n_count", "pattern_dense_layers")
PATTERN_COLUMNS = {f"pattern_{f.name}": f.name for f in dataclasses.fields(ContextSharding)}


@functools.cache
def _density(
    pattern: ContextSharding | None, n_layers: int, n_kv_heads: int, context: int
) -> float:
    if pattern is None:
        return 1.0
    return density(pattern.layers(int(n_layers), int(n_kv_heads)), int(context))


def _table(rows: Sequence[dict[str, Any]], **rest: Any) -> Results:
    def column(name: str) -> np.ndarray:
        kind = int if name in (*_INTEGERS, "vocab_size") else float
        kind = object if name in (*_TEXTS, "pattern") else kind
        return np.array([row.get(name) if name == "pattern" else row[name] for row in rows], kind)

    return Results(**{name: column(name) for name in COLUMNS}, **rest)


# ------------------------------------------------------------------------------- our own runs


def from_runs(root: Path | str, experiment: str, runs: Iterable[RunConfig]) -> Results:
    """Read what `runs/<experiment>` holds for these runs, each judged by its own evaluation.

    Runs without a result, or not yet judged by this evaluation, are listed in `missing`.
    Raises UserError for a damaged file, a loss that is not a number, or runs that cannot be
    compared.
    """
    rows, missing, devices, seconds = [], [], [], 0.0
    versions: dict[str, list[str]] = {}
    models: dict[str, ModelConfig] = {}
    skipped: dict[str, int] = {}
    positions: dict[str, tuple[float, ...]] = {}
    for run in runs:
        directory = run_directory(root, experiment, run)
        whole = directory.result()
        where = f"{directory.result_file}: run {run.name}"
        result = _key(whole, "result", where) if whole is not None else {"evaluations": {}}
        judged = _key(result, "evaluations", where).get(run.evaluation_digest)
        if not judged:
            missing.append(run.name)
            continue
        model = models[run.name] = run.model
        if judged.get("loss_by_position"):
            positions[run.name] = tuple(_loss(x, where) for x in judged["loss_by_position"])
        if result.get("skipped_steps"):
            skipped[run.name] = result["skipped_steps"]
        data = result.get("data", {})
        rows.append(
            {
                "name": run.name,
                "n_heads": model.n_heads,
                "n_kv_heads": model.n_kv_heads,
                "head_dim": model.head_dim,
                "n_layers": model.n_layers,
                "d_model": model.d_model,
                "n_params": _within(
                    "n_exact",
                    _key(result, "n_exact", where),
                    1,
                    MOST_PARAMETERS,
                    "parameters",
                    where,
                ),
                "context_length": run.context_length,
                "tokens": _within(
                    "tokens", _key(result, "tokens", where), 1, MOST_TOKENS, "tokens", where
                ),
                "loss": _loss(_key(judged, "loss", where), where),
                "seed": run.seed,
                "learning_rate": run.optimizer.learning_rate,
                "epochs": result.get("epochs") or math.nan,
                "evaluation": judged.get("hash", ""),
                "vocab_size": model.vocab_size,
                "tokenizer": data.get("tokenizer_hash", ""),
                "corpus": data.get("corpus_hash") or data.get("store_hash", ""),
                "pattern": model.pattern,
            }
        )
        for package, version in (result.get("versions") or {}).items():
            if str(version) not in versions.setdefault(package, []):
                versions[package].append(str(version))
        seconds += (whole.get("timing") or {}).get("training_seconds") or 0.0
        for attempt in whole.get("attempts") or []:
            device = attempt.get("layout", {}).get("device")
            if device and device not in devices:
                devices.append(device)
    require(
        bool(rows),
        f"no finished runs under {as_path(root) / experiment}"
        + (f"; missing: {_list(missing)}" if missing else "; the experiment declares none"),
    )
    provenance = {
        "experiment": experiment,
        "versions": {k: " and ".join(v) for k, v in versions.items()},
        "devices": devices,
        "training_seconds": seconds,
        "skipped_steps": skipped,
    }
    table = _table(
        rows,
        source=f"{experiment} ({len(rows)} runs)",
        count="n_exact",
        missing=tuple(missing),
        provenance=provenance,
        template=_template(models, experiment),
        positions=positions,
    )
    return check(table)


def _template(models: dict[str, ModelConfig], experiment: str) -> ModelConfig:
    """The first model; UserError when others differ in what a built model's size follows from."""
    first, *rest = models
    for name in rest:
        for field in ("tie_embeddings", "qk_norm", "d_ff"):
            one, other = (getattr(models[n], field) for n in (first, name))
            same = (one is None) == (other is None) if field == "d_ff" else one == other
            require(
                same,
                f"{experiment}: the runs mix architectures ({first}: {field}={one}, {name}: "
                f"{field}={other}); fit one architecture at a time",
            )
    return models[first]


def _key(values: Any, key: str, where: str) -> Any:
    """values[key]; UserError where a damaged file has none."""
    require(
        isinstance(values, dict) and values.get(key) is not None,
        f"{where}: {key} is missing; the file is damaged: train that run again",
    )
    return values[key]


def _within(name: str, value: Any, low: float, high: float, unit: str, where: str) -> float:
    remedy = "train that run again, or leave it out"
    try:
        between(name, value, low, high, f"{unit}; {remedy}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return float(value)


def _loss(value: Any, where: str) -> float:
    return _within("loss", value, *LOSSES, "nats per token", where)


def _list(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ------------------------------------------------------------------------- somebody else's runs

_OPTIONAL: dict[str, Any] = {
    "name": None,
    "head_dim": 64,
    "n_layers": 0,
    "d_model": 0,
    "n_params": math.nan,
    "context_length": 0,
    "tokens": math.nan,
    "tokens_per_param": math.nan,
    "seed": 0,
    "learning_rate": math.nan,
    "epochs": math.nan,
    "evaluation": "",
    "vocab_size": 0,
    "tokenizer": "",
    "corpus": "",
    "n_count": "",
}
_REQUIRED = ("n_heads", "n_kv_heads", "loss")


def from_csv(path: Path | str) -> Results:
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
    return _from_text(text, str(path))


def published() -> Results:
    """The 40 training runs of Chen et al. 2025, Figure 2: seven configurations, d = 64 L."""
    text = (resources.files("gqa_scaling.study") / "chen2025.csv").read_text(encoding="utf-8")
    return _from_text(text, "Chen et al. 2025, Figure 2")


def _from_text(text: str, source: str) -> Results:
    lines = enumerate(text.splitlines(), 1)
    lines = [(i, line) for i, line in lines if line.strip() and not line.lstrip().startswith("#")]
    require(
        len(lines) > 1, f"{source}: holds no runs; a header line and one line per run are needed"
    )
    cells = [(i, _cells(line, f"{source} line {i}")) for i, line in lines]
    header = [cell.strip() for cell in cells[0][1]]
    absent = [name for name in _REQUIRED if name not in header]
    values = [cell for cell in header if _is_number(cell)]
    require(
        not (absent and values),
        f"{source} line {cells[0][0]}: holds the value {values[0] if values else ''} where the names of "
        "the columns belong; begin with a header such as n_heads,n_kv_heads,n_layers,d_model,loss",
    )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    require(not twice, f"{source}: column {', '.join(twice)} appears twice")
    require(
        not absent, f"{source}: column {', '.join(absent)} is missing; found {', '.join(header)}"
    )
    shaped = "n_layers" in header and "d_model" in header
    require(
        shaped or "n_params" in header,
        f"{source}: give column n_params, or n_layers and d_model; found {', '.join(header)}",
    )
    places = [f"{source} line {i}" for i, _ in cells[1:]]
    rows = [
        _row(header, values, where, shaped)
        for (_, values), where in zip(cells[1:], places, strict=True)
    ]
    _check_counts(rows, places)
    return check(_table(rows, source=source, count=_count(rows, source)))


def _cells(line: str, where: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as error:
        raise UserError(f"{where}: cannot be read as CSV ({error}); mend the line") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_counts(rows: Sequence[dict[str, Any]], places: Sequence[str]) -> None:
    """Raise UserError where n_params contradicts the shape in the same line.

    N = 8 L d^2 + 2 L d d_h (n_h + n_kv) holds for an FFN of 8d/3; other sizes, norms and rounding are
    as good. So a count is believed where it is that formula's, within a quarter, or exactly that of
    a model built here with any d_ff, or where another model of the file is as far from the formula.
    Always N is more than the attention's own parameters, and at most what an FFN of 16 d makes. Where
    column n_count says how N is counted, that alone is checked: n_given may be any count above the
    attention's.
    """
    ratios: dict[tuple, float] = {}
    for row in rows:
        if row["n_layers"]:
            ratios.setdefault(_shape(row), row["n_params"] / _formula(row))
    for row, where in zip(rows, places, strict=True):
        if not row["n_layers"]:
            continue
        n, formula, cubic = row["n_params"], _formula(row), row["n_layers"] * row["d_model"] ** 2
        attention = formula - 8 * cubic
        if row["n_count"] == "n_formula":
            good = abs(n / formula - 1) < 1e-3
        elif row["n_count"] == "n_exact":
            good = _can_be_built(row)
        else:
            others = [ratio for shape, ratio in ratios.items() if shape != _shape(row)]
            alike = any(max(n / formula / r, r * formula / n) < 1.25 for r in (1.0, *others))
            plain = n <= attention + 3 * 16 * cubic and (alike or _can_be_built(row))
            good = n > attention and (plain or row["n_count"] == "n_given")
        require(
            good,
            f"{where}: n_params={n:,.0f} contradicts n_layers={row['n_layers']}, "
            f"d_model={row['d_model']} and ({row['n_heads']},{row['n_kv_heads']}) heads of size "
            f"{row['head_dim']}, which make {formula:,.0f} parameters without embeddings: correct one "
            "of them, leave n_params out, or give column n_count=n_given where N is counted otherwise",
        )


def _shape(row: dict[str, Any]) -> tuple[int, ...]:
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim")
    return tuple(row[name] for name in names)


def _can_be_built(row: dict[str, Any]) -> bool:
    """Whether a model of this shape, with some d_ff, with or without QK norms, has exactly N."""
    layers, d = row["n_layers"], row["d_model"]
    rest = row["n_params"] - (_formula(row) - 8 * layers * d**2) - (2 * layers + 1) * d
    return any(
        left > 0 and left % (3 * layers * d) == 0
        for left in (rest, rest - 2 * layers * row["head_dim"])
    )


def _count(rows: Sequence[dict[str, Any]], source: str) -> Count:
    """How the file counts N: as its n_count column says, else told from the shapes."""
    said = sorted({row["n_count"] for row in rows})
    require(len(said) == 1, f"{source}: the runs mix counts of N ({', '.join(said)}); use one")
    if said[0]:
        return said[0]
    formula = all(
        row["n_layers"] and abs(row["n_params"] / _formula(row) - 1) < 1e-3 for row in rows
    )
    return "n_formula" if formula else "n_given"


def _formula(row: dict[str, Any]) -> float:
    return n_formula(
        row["n_layers"], row["d_model"], row["n_heads"], row["n_kv_heads"], row["head_dim"]
    )


def _row(header: list[str], values: list[str], where: str, shaped: bool) -> dict[str, Any]:
    require(
        len(values) == len(header),
        f"{where}: has {len(values)} values for {len(header)} columns",
    )
    row = {k: v.strip() for k, v in zip(header, values, strict=True)}
    out = dict(_OPTIONAL)
    needed = {*_REQUIRED, *(("n_layers", "d_model") if shaped else ("n_params",))}
    for name in (*_REQUIRED, *_OPTIONAL):
        text = row.get(name, "")
        if not text:
            require(name not in needed, f"{where}: column {name} is empty")
            continue
        out[name] = text if name in _TEXTS else _number(name, text, where)
    require(
        out["n_heads"] % out["n_kv_heads"] == 0,
        f"{where}: column n_kv_heads={out['n_kv_heads']} must divide n_heads={out['n_heads']}",
    )
    require(
        out["n_count"] in ("", *COUNTS),
        f"{where}: column n_count={out['n_count']!r} must be one of {', '.join(COUNTS)}",
    )
    out["pattern"] = _pattern(row, out, where)
    if not (out["n_layers"] and out["d_model"]):  # half a shape is none
        out["n_layers"] = out["d_model"] = 0
    if math.isnan(out["n_params"]):
        out["n_params"] = float(_formula(out))
        require(
            out["n_params"] <= MOST_PARAMETERS,
            f"{where}: its shape has {out['n_params']:.3g} parameters and may have at most "
            f"{MOST_PARAMETERS:g}; mend the line, or leave it out",
        )
    if math.isnan(out["tokens"]):
        out["tokens"] = out["tokens_per_param"] * out["n_params"]
    if out["name"] is None:
        shape, n = f"L{out['n_layers']}-d{out['d_model']}", f"N{out['n_params']:.4g}"
        size = shape if out["n_layers"] else n
        out["name"] = f"{size}-h{out['n_heads']}-kv{out['n_kv_heads']}"
        if out["pattern"]:
            out["name"] += f" {out['pattern'].label}"
    return out


def _pattern(row: dict[str, str], run: dict[str, Any], where: str) -> ContextSharding | None:
    """The pattern that a line of the file names, None where its columns are empty or absent."""
    given = {name: row[name] for name in PATTERN_COLUMNS if row.get(name)}
    if not given:
        return None
    for name in ("pattern_block", "pattern_local", "n_layers", "d_model", "context_length"):
        require(bool(row.get(name)), f"{where}: a run with a pattern needs column {name}")
    fields = {
        PATTERN_COLUMNS[name]: text if name in _TEXTS else _number(name, text, where)
        for name, text in given.items()
    }
    try:
        pattern = ContextSharding(**fields)
        pattern.layers(run["n_layers"], run["n_kv_heads"])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return pattern


def _number(name: str, text: str, where: str) -> float | int:
    integer = name in (*_INTEGERS, "vocab_size", *PATTERN_COLUMNS)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    may_be_0 = ("seed", "epochs", "pattern_sinks", "pattern_dense_kv_heads")
    good = math.isfinite(value) and (value > 0 or (name in may_be_0 and value == 0))
    good = good and (not integer or (value < 2**53 and value == int(value)))
    kind, most = ("a whole number", " and below 2^53") if integer else ("a number", "")
    require(good, f"{where}: column {name}={text!r} must be {kind} above 0{most}")
    low, high, unit = _RANGES.get(name, (0, math.inf, ""))
    require(
        low <= value <= high,
        f"{where}: column {name}={text!r} must lie between {low:g} and {high:g}{unit}; mend the line, "
        "or leave it out",
    )
    return int(value) if integer else value


# What a column may hold, and in which unit: far outside all that was ever trained. A value that is
# not between stands in another unit or was misread, and one such run would bend every curve.
_RANGES = {
    "loss": (*LOSSES, " nats per token"),
    "n_params": (1, MOST_PARAMETERS, " parameters"),
    "n_layers": (1, MOST_LAYERS, " layers"),
    "n_heads": (1, MOST_HEADS, " heads"),
    "n_kv_heads": (1, MOST_HEADS, " heads"),
    "head_dim": (1, 2**20, ""),
    "d_model": (1, 2**31 - 1, ""),
    "context_length": (1, MOST_CONTEXT, " tokens"),
    "tokens": (1, MOST_TOKENS, " tokens"),
    "tokens_per_param": (1e-6, 1e9, " tokens"),
    "vocab_size": (1, 2**31 - 1, ""),
}


# ------------------------------------------------------------------------------------ refusals


def check(results: Results) -> Results:
    """The same results, or UserError with the reason and the remedy if they cannot be compared."""
    r = results
    for column, what, remedy in (
        ("evaluation", "evaluation sets", "judge every run on the same targets"),
        ("vocab_size", "vocabulary sizes", "fit one vocabulary at a time"),
        ("tokenizer", "tokenizers", "fit one tokenizer at a time"),
        ("corpus", "corpora", "fit one corpus at a time"),
    ):
        values = getattr(r, column)
        kinds = list(dict.fromkeys(values.tolist()))
        if len(kinds) > 1:
            first, other = (r.name[np.flatnonzero(values == kind)[0]] for kind in kinds[:2])
            raise UserError(
                f"{r.source}: the runs mix {len(kinds)} {what} ({first}: {kinds[0] or 'none'}, "
                f"{other}: {kinds[1] or 'none'}); {remedy}"
            )
    seen: dict[tuple, int] = {}
    for i, heads in enumerate(r.heads):
        key = (*heads, r.head_dim[i], r.n_layers[i], r.d_model[i], r.n_params[i])
        key += (r.context_length[i], r.seed[i], str(r.tokens[i]))
        j = seen.setdefault(key, i)
        if i == j:
            continue
        require(
            r.loss[i] != r.loss[j],
            f"{r.source}: {r.name[i]} appears twice with loss {r.loss[i]}; remove one of them",
        )
        raise UserError(
            f"{r.source}: {r.name[j]} and {r.name[i]} have the same shape, seed and tokens but "
            f"losses {r.loss[j]} and {r.loss[i]}; remove one, or give replicates their own seed"
        )
    return results


def flags(results: Results) -> tuple[str, ...]:
    """What a reader must know of these runs before believing a fit."""
    out = []
    repeated = results.name[np.nan_to_num(results.epochs) > MAX_EPOCHS]
    if len(repeated):
        out.append(
            f"{len(repeated)} runs saw their corpus more than {MAX_EPOCHS:g} times "
            f"({_list(repeated.tolist(), 3)}): repeated text teaches less"
        )
    skipped = results.provenance.get("skipped_steps", {})
    if skipped:
        out.append(
            f"{len(skipped)} runs skipped {sum(skipped.values())} training steps "
            f"({_list(list(skipped), 3)}): their losses may not follow the others'"
        )
    if results.missing:
        out.append(f"{len(results.missing)} runs are not finished: {_list(results.missing)}")
    if results.count == "n_given":
        out.append(
            "N is the file's own count: it need not equal the parameters of a model built here"
        )
    return tuple(out)
