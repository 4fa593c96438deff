"""Finished runs as one table of plain columns, wherever they come from (`reading`).

What cannot be compared is refused here, so that a fit never mixes two evaluations, corpora,
vocabularies or ways to count parameters.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from gqa_scaling.config import MAX_EPOCHS, ModelConfig, UserError, require
from gqa_scaling.context_sharding import ContextSharding, density
from gqa_scaling.experiment.ladder import PUBLISHED_LADDER
from gqa_scaling.units import count

Count = Literal["n_exact", "n_formula", "n_given"]
COUNTS: tuple[Count, ...] = get_args(Count)
Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Objects: TypeAlias = NDArray[np.object_]
# A configuration: (n_heads, n_kv_heads) and, where heads do not see all keys, their pattern.
Heads: TypeAlias = tuple[int, int] | tuple[int, int, ContextSharding]


# What a run is told apart by: its heads, layers, width, training context and seed.
Shape: TypeAlias = tuple[Heads, int, int, int, int]


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
    many = list(many)
    return (", " if any(map(pattern_of, many)) else " ").join(map(pair, many))


@dataclass(frozen=True)
class Results:
    """One row per finished run; every column has the same length.

    `n_params` are non-embedding parameters counted as `count` says: n_exact (the built model),
    n_formula (8 L d^2 + 2 L d d_h (n_h + n_kv)) or n_given (the file's own). `loss` is in nats,
    `tokens` are training tokens (NaN when unknown), 0 stands for unknown layers and sizes, "" for
    unknown hashes. `pattern` holds the `ContextSharding` of each run, None for dense ones.
    `gained_by_rereading` is the loss on held-out text minus that on the same text right after it, in
    nats per token (NaN when unknown).
    `missing` names runs that were asked for and have no result; `template` is the model of one of our
    runs, whose architecture all of them share; `positions` holds, by name, the losses in nats of equal
    parts of the context, where a run's evaluation has told them apart, and `judged` what else it was
    judged by (a `judged.Judged`); `left_out` says which runs were left out on request, and `also_run`
    has their shapes; `mixed` names runs whose FFN widths follow different rules, so that no law in N
    holds for all.
    """

    source: str
    count: Count
    name: Objects
    n_heads: Integers
    n_kv_heads: Integers
    head_dim: Integers
    n_layers: Integers
    d_model: Integers
    n_params: Floats
    context_length: Integers
    tokens: Floats
    loss: Floats
    seed: Integers
    learning_rate: Floats
    epochs: Floats
    evaluation: Objects
    vocab_size: Integers
    tokenizer: Objects
    corpus: Objects
    pattern: Objects
    gained_by_rereading: Floats
    missing: tuple[str, ...] = ()
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    template: ModelConfig | None = None
    positions: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    left_out: str = ""
    also_run: tuple[Shape, ...] = ()
    mixed: str = ""
    judged: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.loss)

    @functools.cached_property
    def heads(self) -> list[Heads]:
        return list(map(heads_of, self.n_heads, self.n_kv_heads, self.pattern))

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What each run is told apart by."""
        columns = (self.n_layers, self.d_model, self.context_length, self.seed)
        return tuple(zip(self.heads, *(column.tolist() for column in columns), strict=True))

    @property
    def density(self) -> np.ndarray:
        """Share of the causal query-key pairs that each run computed in training; 1 when dense."""
        columns = self.pattern, self.n_layers, self.n_kv_heads, self.context_length
        return np.array([_density(*run) for run in zip(*columns, strict=True)])

    @property
    def copying(self) -> np.ndarray:
        """Of each dense run whether it has learned to copy from its context, 1 or 0; NaN where that is
        not known, and with a pattern, by which heads may not reach what they would copy."""
        told = np.isfinite(self.gained_by_rereading) & np.array([p is None for p in self.pattern])
        return np.where(told, self.gained_by_rereading >= COPIES, np.nan)

    @property
    def ladder(self) -> tuple[tuple[int, int], ...]:
        """The runs' own sizes (L, d); the published ladder when the data has no shapes."""
        sizes = set(zip(self.n_layers.tolist(), self.d_model.tolist(), strict=True)) - {(0, 0)}
        return tuple(sorted(sizes, key=lambda s: s[0] * s[1] ** 2)) or PUBLISHED_LADDER

    def select(self, keep: np.ndarray) -> "Results":
        return dataclasses.replace(self, **{k: getattr(self, k)[keep] for k in COLUMNS})

    def only(self, column: str, mixed: str) -> int:
        """The value that a column has in all runs; UserError with `mixed`, where {} stands for the
        values, when they differ."""
        values = sorted(set(getattr(self, column).tolist()))
        require(len(values) == 1, f"{self.source}: {mixed.format(', '.join(map(str, values)))}")
        return values[0]

    def rows(self) -> list[dict[str, Any]]:
        """Every run as a dictionary of plain values, NaN as None."""
        columns = {k: getattr(self, k).tolist() for k in COLUMNS if k != "pattern"}
        if any(self.pattern):
            for name, field in PATTERN_COLUMNS.items():
                columns[name] = [getattr(p, field) if p else None for p in self.pattern]
        return [
            {k: None if v[i] != v[i] else v[i] for k, v in columns.items()}
            for i in range(len(self))
        ]


COPIES = 0.3  # nats that a second reading gains a model which has learned to copy from its context
OTHER_TEXT = 0.1  # nats between held-out and training losses that text of one kind hardly shows
NOT_COPYING = "not-copying"  # names the dense runs that it is known to gain less
KINDS = {Integers: int, Floats: float, Objects: object}
COLUMNS = {f.name: KINDS[f.type] for f in dataclasses.fields(Results) if f.type in KINDS}
OPTIONAL = ("pattern", "gained_by_rereading")
PATTERN_COLUMNS = {f"pattern_{f.name}": f.name for f in dataclasses.fields(ContextSharding)}


@functools.cache
def _density(
    pattern: ContextSharding | None, n_layers: int, n_kv_heads: int, context: int
) -> float:
    if pattern is None:
        return 1.0
    return density(pattern.layers(int(n_layers), int(n_kv_heads)), int(context))


def table(rows: Sequence[dict[str, Any]], source: str, count: Count, **rest: Any) -> Results:
    """The table of these rows, each with a value for every column but those that are optional.

    `rest` are the fields of `Results` that are no columns.
    """
    columns: dict[str, Any] = {
        name: np.array([row.get(name) if name in OPTIONAL else row[name] for row in rows], kind)
        for name, kind in COLUMNS.items()
    }
    return Results(source=source, count=count, **columns, **rest)


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in a row, those beyond `most` as a number."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ------------------------------------------------------------------------------------ refusals


def check(results: Results, *, swept: bool = False) -> Results:
    """The same results, or UserError with the reason and the remedy if they cannot be compared.

    `swept` runs may differ in their learning rate alone: they are shown, and no law is fitted to them.
    """
    r = results
    for column, what, remedy in (
        (
            "evaluation",
            "evaluation sets",
            "judge all of them anew by one: another evaluation.tokens, and the longest of their contexts as "
            "evaluation.longest_context; `run` does so without training them again",
        ),
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
        key += (str(r.learning_rate[i]),) if swept else ()
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
    out = [results.left_out] if results.left_out else []
    repeated = results.name[np.nan_to_num(results.epochs) > MAX_EPOCHS]
    if len(repeated):
        out.append(
            f"{count(len(repeated), 'run')} saw their corpus more than {MAX_EPOCHS:g} times "
            f"({listed(repeated.tolist(), 3)}): repeated text teaches less"
        )
    skipped = results.provenance.get("skipped_steps", {})
    if skipped:
        out.append(
            f"{count(len(skipped), 'run')} skipped {sum(skipped.values())} training steps "
            f"({listed(list(skipped), 3)}): their losses may not follow the others'"
        )
    above = results.provenance.get("above_training_loss", ())
    if len(above) and abs(middle := float(np.median(above))) > OTHER_TEXT:
        out.append(
            f"held-out losses lie {abs(middle):.2f} nats {'above' if middle > 0 else 'below'} training losses on "
            f"text that was new to the run (median of {count(len(above), 'run')}): the held-out text is of "
            "another kind, or of too few documents (evaluation.tokens); on other text sizes and heads may "
            "compare otherwise"
        )
    from gqa_scaling.study.shape_axes import shape_axes  # which reads results

    sizes = {point.n_params for point in shape_axes(results)}
    if sizes:
        out.append(
            f"{len(sizes)} sizes were trained in several shapes: a law in N alone takes for noise what "
            "head size, FFN ratio and aspect change (their table says what)"
        )
    copying, others = (int(np.sum(results.copying == each)) for each in (1, 0))
    if copying and others:
        out.append(
            f"{copying} of {count(copying + others, 'run')} learned to copy from their context, the others did not "
            f"(to read a text again gains them {COPIES:g} nats a token, or less): no one curve holds for both; "
            f"train them for longer, or leave them out with --without {NOT_COPYING}"
        )
    if results.missing:
        out.append(f"{count(len(results.missing), 'run')} not finished: {listed(results.missing)}")
    if results.count == "n_given":
        out.append(
            "N is the file's own count: it need not equal the parameters of a model built here"
        )
    return tuple(out)
