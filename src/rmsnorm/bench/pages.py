"""The only file that writes what commands make of measurements into pages: blocks between two comments, and tables.

Blocks stand between ``<!-- NAME: made by `make figure` -->`` and ``<!-- end -->``; nobody edits them by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from . import export


def replace_block(page: Path, label: str, content: str) -> None:
    """Puts content between the comment with this label and the next ``<!-- end -->``.

    Raises:
        ValueError: the page has no such block.
    """
    begin, end = f"<!-- {label} -->\n", "<!-- end -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no block from {begin.strip()} to {end.strip()}")
    export.replace(page, before + begin + content.rstrip() + "\n" + end + after)


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown; the first column to the left, numbers to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
