"""The only file that fits tables to the width of a terminal: columns are left out, numbers and units are never cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WIDE = 10_000
"""Columns of a screen on which every table has room: to ask a table how much it would take."""
HINT = "widen the terminal, or use --json"
"""How to see what was left out."""
NARROWEST = 12
"""What is left to a column of words that may wrap, unless it has a ``min_width``."""


@dataclass(frozen=True)
class Fitted:
    """A table that leaves out columns, one after the other, until it fits, and says which. One column at most may wrap:
    of two, rich makes both narrow, whatever their ``min_width``."""

    make: Callable[[Collection[str]], Table]
    """Makes the table without the columns of these titles."""
    order: Sequence[str]
    """What may be left out, the first first; several titles of one entry, separated by ``|``, go together."""
    hint: str = HINT
    """Said below what was left out, on a line of its own."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        gone: list[str] = []
        for entry in ("", *self.order):
            gone += filter(None, entry.split("|"))
            table = self.make(gone)
            if _needed(table, console, options) <= options.max_width:
                break
        yield table
        if gone:
            plain = (name.partition(" (")[0].replace("\n", " ").strip() for name in gone)  # without units
            names = ", ".join(dict.fromkeys(plain))
            yield Text(f"no room for: {names}", style="dim italic")
            yield Text(self.hint, style="dim italic")


def add_numbers(table: Table, titles: Sequence[str], gone: Collection[str]) -> None:
    """Adds the columns of numbers that are not left out."""
    for title in kept(titles, titles, gone):
        table.add_column(title, justify="right", no_wrap=True)


def kept(titles: Sequence[str], cells: Sequence[str], gone: Collection[str]) -> list[str]:
    """The cells below the titles that are not left out."""
    return [cell for title, cell in zip(titles, cells, strict=True) if title not in gone]


def _needed(table: Table, console: Console, options: ConsoleOptions) -> int:
    """The width at which nothing is cut: columns that wrap at their narrowest, the others at their widest."""
    wrapping = [(column, column.max_width) for column in table.columns if not column.no_wrap]
    try:
        for column, _ in wrapping:
            column.max_width = column.min_width or NARROWEST
        return Measurement.get(console, options.update(width=WIDE), table).maximum
    finally:
        for column, width in wrapping:
            column.max_width = width
