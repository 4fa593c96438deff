"""A table is defined once and shown everywhere: on a terminal, on the page, in TensorBoard.

Its columns hold the functions that write their cells; its items are the rows.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from gqa_scaling.narrow import Fitting
from gqa_scaling.study.choices import OBJECTIVES, Objective
from gqa_scaling.study.uncertainty import LEVEL
from gqa_scaling.units import byte_size, quantity


@dataclass(frozen=True)
class Column:
    """One column: its name, what it says of an item, and its unit.

    `terminal_only` columns say in short what a page has room for. A line break in the name is one on a terminal only. `page_only` columns are too wide for any
    terminal; `spare` ones are left out where a terminal is narrow, 1 before 2, and 0 never. Only
    columns that `fold` may break their cells over lines: lists and names do, numbers never.
    """

    name: str
    cell: Callable[[Any], str]
    unit: str = ""
    spare: int = 0
    page_only: bool = False
    terminal_only: bool = False
    fold: bool = False

    @property
    def heading(self) -> str:
        return f"{self.name}\n({self.unit})" if self.unit else self.name

    def least_width(self, items: Iterable[Any]) -> int:
        """Characters without which a cell or the heading would be cut."""
        texts = (self.heading, *map(self.cell, items))
        parts = (text.split() if self.fold else text.splitlines() for text in texts)
        return max(cell_len(part) for text in parts for part in text)


@dataclass(frozen=True)
class Table:
    """A title, a row for each item below the columns' headings, and notes below the rows.

    The first column names the rows. A table without items is its title and its notes. `about` tells
    a reader of the page what the table says; a terminal leaves it out.
    """

    title: str
    columns: Sequence[Column] = ()
    items: Sequence[Any] = ()
    notes: Sequence[str] = ()
    about: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """On a terminal, with the spare columns left out for which it is too narrow."""
        yield Text(self.title, style="bold")
        if self.items:
            columns, left_out = self._fitting(options.max_width)
            grid = Fitting(box=None, padding=(0, 1), pad_edge=False)
            for i, column in enumerate(columns):
                grid.add_column(
                    column.heading,
                    justify="right" if i else "left",
                    no_wrap=not column.fold,
                    overflow="fold" if column.fold else "ellipsis",
                )
            for item in self.items:
                grid.add_row(*(column.cell(item) for column in columns))
            yield grid
            if left_out:
                names = ", ".join(dict.fromkeys(left_out))
                yield Text(f"left out for want of width: {names}; --json has all", style="italic")
            if self.notes:
                yield ""
        yield from map(Text, self.notes)

    def _fitting(self, width: int) -> tuple[list[Column], list[str]]:
        """The columns to show at this width, and the names of those left out for want of it.

        Where too few can be left out all are shown, each row as a block (`Fitting`).
        """
        every = [column for column in self.columns if not column.page_only]
        shown = list(every)
        widths = {column: column.least_width(self.items) + 2 for column in shown}
        left_out = []
        for column in sorted((c for c in shown if c.spare), key=lambda c: c.spare):
            if sum(widths[c] for c in shown) - 2 <= width:
                break
            shown.remove(column)
            left_out.append(" ".join(column.name.split("\n")))
        if sum(widths[c] for c in shown) - 2 > width:
            return every, []
        return shown, left_out

    def html(self) -> str:
        """On the page: every column, units in the headings.

        The class says below which width, in pixels, a row is shown as a card (`card_styles`): every
        cell carries its heading for that.
        """

        def quiet(text: str) -> str:
            return f'<p class="quiet">{html.escape(text)}</p>'

        out = f"<p><b>{html.escape(self.title)}</b></p>" if self.title else ""
        out += quiet(self.about) if self.about else ""
        if self.items:
            head, *rows = self._rows()
            folded = [c.fold for c in self.columns if not c.terminal_only]
            kinds = [' class="words"' if fold else "" for fold in folded]
            headings = "".join(
                f"<th{kind}>{html.escape(cell)}</th>"
                for kind, cell in zip(kinds, head, strict=True)
            )

            def cell(text: str, i: int) -> str:
                words = ' class="words"' if folded[i] or len(text) > _WORDS else ""
                return f'<td{words} data-label="{html.escape(head[i])}">{html.escape(text)}</td>'

            lines = ("".join(cell(text, i) for i, text in enumerate(row)) for row in rows)
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            whole = f"<thead><tr>{headings}</tr></thead><tbody>{body}</tbody>"
            out += f'<table class="w{_page_width(head, rows, folded)}">{whole}</table>'
        return out + "".join(map(quiet, self.notes))

    def markdown(self) -> str:
        """For TensorBoard: every column, as a Markdown table."""
        parts = [f"**{self.title}**"] if self.title else []
        parts += [self.about] if self.about else []
        if self.items:
            head, *rows = (" | ".join(c.replace("|", "\\|") for c in row) for row in self._rows())
            line = " | ".join([":--", *["--:"] * head.count(" | ")])
            parts.append("\n".join([head, line, *rows]))
        return "\n\n".join([*parts, *self.notes])

    def _rows(self) -> list[list[str]]:
        """The headings, each on one line, then the cells of every row."""
        columns = [column for column in self.columns if not column.terminal_only]
        headings = [column.heading.replace("\n", " ") for column in columns]
        return [headings, *([column.cell(item) for column in columns] for item in self.items)]


def shown(tables: Iterable[Table], flags: Iterable[str] = (), sentence: str = "") -> Group:
    """On a terminal: a sentence, tables with an empty line between them, then what must be known."""
    parts: list[RenderableType] = [Text(sentence, style="bold")] if sentence else []
    for table in tables:
        parts += ["", table] if parts else [table]
    return Group(*parts, *(Text(f"! {flag}", style="yellow") for flag in flags))


# ------------------------------------------------------------------------- tables on the page

_WORDS = 34  # letters: a longer cell may break over lines on the page
_LETTER, _SPACE, _STEP, _WIDEST = 7.2, 18, 100, 3000  # pixels: a letter, around a cell, widths


def _page_width(head: Sequence[str], rows: Sequence[Sequence[str]], folded: Sequence[bool]) -> int:
    """The width in pixels that a table needs on the page, up to the next `_STEP`; -1 for never."""
    width = 0.0
    for i, heading in enumerate(head):
        words = max(map(len, heading.split()), default=0)
        cells = (len(row[i]) for row in rows)
        letters = max(20 if folded[i] or n > _WORDS else n for n in cells)
        width += _LETTER * max(words, letters) + _SPACE
    return min(math.ceil(width / _STEP) * _STEP, _WIDEST)


def card_styles() -> str:
    """The style sheet that shows rows as cards where the page is narrower than a table needs."""
    card = (
        "{t},{t} tbody{{display:block;width:100%}}{t} thead{{display:none}}"
        "{t} tr{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(9.5em,100%),1fr));"
        "gap:2px 14px;padding:.5em .2em;border-bottom:1px solid var(--rule)}}"
        "{t} td{{display:block;text-align:left;white-space:normal;border:0;padding:1px 0;"
        "overflow-wrap:anywhere;min-width:0}}"
        "{t} td:first-child{{grid-column:1/-1;font-weight:600}}"
        "{t} td:first-child:not([data-label^='run'])::before{{content:attr(data-label) ' ';"
        "font-weight:400;color:var(--quiet)}}"
        "{t} td:not(:first-child):not([data-label=''])::before{{content:attr(data-label);"
        "display:block;font-size:.85em;color:var(--quiet);font-weight:400}}"
    )
    widths = range(_STEP, _WIDEST + 1, _STEP)
    return "\n".join(
        f"@container (max-width:{w - 1}px){{{card.format(t=f'table.w{w}')}}}" for w in widths
    )


# ---------------------------------------------------------------------------- numbers in cells

INTERVAL = f"{LEVEL:.0%} interval"  # the heading of a column of intervals


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage; a dash when there is none."""
    return f"{100 * value:.{digits}f}%" if math.isfinite(value) else "-"


def cost_text(kind: Objective, value: float) -> str:
    """A cost of that kind, whose unit stands in the heading; bytes with their own."""
    return byte_size(value) if kind == "bytes" and math.isfinite(value) else quantity(value)


def cost_heading(kind: Objective) -> str:
    """What a cost is called, its unit on a line of its own on a terminal."""
    return OBJECTIVES[kind].replace(" per ", "\nper ")


def margin(value: float) -> str:
    """A share that somebody chose, as a percentage with the digits that it has."""
    return f"{100 * value:.6g}%"


def millinats(value: float) -> str:
    """Nats as millinats with one digit; a dash when there is none."""
    return f"{1e3 * value:z.1f}" if math.isfinite(value) else "-"


def span(ends: Iterable[float], form: str | Callable[[float], str] = ".3f") -> str:
    """An interval from its two ends, each written by a format or by a function."""
    write = form if callable(form) else f"{{:{form}}}".format
    return " to ".join(map(write, ends))
