"""The tables of what models were judged by beside their loss."""

import math
from collections.abc import Callable, Sequence

from gqa_scaling.study.judged import Row, judged_rows
from gqa_scaling.study.report.table import Column, Table, percent
from gqa_scaling.study.results import Results, pair


def judged_tables(results: Results) -> list[Table]:
    """Losses by context, then needles; none where no run was judged by either."""
    rows = judged_rows(results)
    contexts = sorted({c for row in rows for c in row.judged.losses})
    lengths = sorted({n for row in rows for n in row.judged.accuracy})
    return [
        *([_contexts_table(rows, contexts)] if contexts else []),
        *([_needles_table(rows, lengths)] if lengths else []),
    ]


def _named() -> list[Column]:
    return [
        Column("run", lambda row: row.name),
        Column("heads, KV", lambda row: pair(row.heads), spare=1),
        Column("trained at", lambda row: f"{row.context_length:,}", "tokens", spare=2),
    ]


def _contexts_table(rows: Sequence[Row], contexts: Sequence[int]) -> Table:
    def at(context: int) -> Callable[[Row], str]:
        return lambda row: _known(row.judged.losses.get(context, math.nan))

    return Table(
        "Loss by context: the same held-out targets with less text before them",
        [
            *_named(),
            Column("loss", lambda row: _known(row.loss), "nats"),
            Column("bits\nper byte", lambda row: _known(row.judged.bits_per_byte), spare=3),
            *(Column(f"at {context:,}", at(context), "nats") for context in contexts),
        ],
        [row for row in rows if row.judged.losses],
        about="Loss in nats per token. The text is cut into pieces of each length; a token sees only "
        "what stands before it in its piece.",
    )


def _known(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _needles_table(rows: Sequence[Row], lengths: Sequence[int]) -> Table:
    def at(length: int) -> Callable[[Row], str]:
        return lambda row: percent(row.judged.found(length), 0)

    return Table(
        "Needles found, by the length of the text",
        [
            *_named(),
            Column("form", lambda row: row.judged.form, spare=3),
            *(Column(f"{length:,}", at(length), "tokens") for length in lengths),
        ],
        [row for row in rows if row.judged.accuracy],
        about="Share of prompts whose whole answer is the model's greedy choice, a mean over the "
        "depths of the needle in the text.",
    )


def tables_of_run(row: Row) -> list[Table]:
    """Of one run: its losses by context, and needles by their depth as well."""

    def at(length: int) -> Column:
        return Column(f"{length:,}", lambda i: percent(row.judged.accuracy[length][i], 0), "tokens")

    contexts = sorted(row.judged.losses)
    table = Table(
        f"Needles found ({row.judged.form}), by depth in the text and by its length",
        [
            Column("depth", lambda i: percent(row.judged.depths[i], 0)),
            *map(at, sorted(row.judged.accuracy)),
        ],
        range(len(row.judged.depths)),
    )
    return [
        *([_contexts_table([row], contexts)] if contexts else []),
        *([table] if row.judged.accuracy else []),
    ]
