"""Tables on terminals of every width."""

import io
from collections import Counter

import pytest
from rich.console import Console
from rich.text import Text

from gqa_scaling.narrow import Fitting

RUNS = ("L12-d1024-h16-kv4", "of two words", "L2", "one-of-more-than-24-letters-in-one-word")


def lists(**look) -> Fitting:
    """As the answers of a study: names and lists that fold between numbers."""
    table = Fitting(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("run", no_wrap=True, overflow="ellipsis")
    table.add_column("tied with", justify="right", overflow="fold")
    table.add_column("regret after\n(values)", justify="right", no_wrap=True, overflow="ellipsis")
    for run in RUNS:
        table.add_row(run, "(4,1), (8,1), (16,2); = (16,1)", "0.654%")
    return table


def plan() -> Fitting:
    table = Fitting(title="plan", caption="what it is", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("run", "pattern", "tokens", "memory", "time"):
        left = name in ("run", "pattern")
        table.add_column(
            name, justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    for run in RUNS:
        table.add_row(run, "b64 w128 s8 k1 +dense", "2.62M", Text("12.5 GiB", "red"), "11 min 7 s")
    return table


def changes() -> Fitting:
    table = Fitting(title="the same field in two experiments")
    for name in ("field", "one", "other"):
        table.add_column(name)
    for run in RUNS:
        table.add_row(run, "a value, of several words and then 12345.678", "0.000123")
    return table


def words(table: Fitting) -> Counter[str]:
    cells = (cell for column in table.columns for cell in column.cells)
    return Counter(word for cell in cells for word in str(cell).split() if len(word) <= 24)


@pytest.mark.parametrize("made", [lists, plan, changes])
def test_no_cell_is_cut_at_any_width(made):
    for width in range(40, 141):
        console = Console(file=io.StringIO(), width=width)
        table = made()
        console.print(table)
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        shown = Counter(text.replace("│", " ").split())
        assert not words(table) - shown, width


def test_a_table_is_drawn_again_at_another_width():
    table = plan()
    narrow, wide, again = (Console(file=io.StringIO(), width=w) for w in (80, 140, 80))
    for console in (narrow, wide, again):
        console.print(table)
    assert narrow.file.getvalue() == again.file.getvalue() != wide.file.getvalue()
