"""A table on a terminal that is too narrow for it: each row as a block of lines, so that no cell is cut."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

_LONGEST = 24  # characters of a word that are not broken where a cell may break over lines
_GAP = 2  # between a heading's value and the next heading


class Fitting(Table):
    """A table of rich that is drawn where every number, and every word of a cell that may break, has
    room. Elsewhere its rows are told one below the other, each with its headings."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [(column, *_widths(column)) for column in self.columns]
        room = options.max_width - self._extra_width
        room -= sum(self._get_padding_width(i) for i in range(len(columns)))
        spare = room - sum(least for _, _, least in columns)
        if spare >= 0:
            for column, whole, least in columns:
                column.width = least + min(whole - least, spare)
                spare -= column.width - least
                column.no_wrap = not _breaks(column)
                column.overflow = "fold"
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), style="bold")
        yield from self._blocks(options.max_width)
        if self.caption:
            yield Text(str(self.caption))

    def _blocks(self, width: int) -> Iterator[Text]:
        """A row: its first cell, then headings and cells, as many on a line as have room."""
        names = (_plain(column.header) for column in self.columns)
        headings = [" ".join(name.split()) for name in names]
        first, *rest = headings
        for name, *cells in zip(*(column.cells for column in self.columns), strict=True):
            if not _plain(name):  # goes on with the row above, under headings that are not its own
                yield from _lines([_text(cell) for cell in cells if _plain(cell)], width)
                continue
            heading = "" if first in ("run", "") else f"{first} "
            yield Text.assemble((heading, "dim"), (_plain(name), "bold"))
            pairs = [
                Text.assemble((f"{heading} " if heading else "", "dim"), _text(cell))
                for heading, cell in zip(rest, cells, strict=True)
                if _plain(cell)
            ]
            yield from _lines(pairs, width)


def _lines(pairs: Sequence[Text], width: int) -> Iterator[Text]:
    line = Text("  ")
    for pair in pairs:
        if len(line.plain) > _GAP and cell_len(line.plain) + cell_len(pair.plain) > width:
            line.rstrip()
            yield line
            line = Text("  ")
        line = line + pair + Text(" " * _GAP)
    line.rstrip()
    if line.plain:
        yield line


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def _breaks(column: Column) -> bool:
    """Whether its cells may break over lines."""
    return not column.no_wrap and (column.overflow == "fold" or column.justify == "left")


def _widths(column: Column) -> tuple[int, int]:
    """Characters that a column has, and those that it needs at least."""
    texts = [_plain(cell) for cell in (column.header, *column.cells)]
    whole = max((cell_len(line) for text in texts for line in text.splitlines()), default=0)
    if not _breaks(column):
        return whole, whole
    words = (min(cell_len(word), _LONGEST) for text in texts for word in text.split())
    return whole, max(words, default=0)
