"""The only file that takes pages apart: their headings, links and code, and what the code prints.

``python tests/pages.py PAGE…`` runs the Python blocks of each page as one program and writes what each block prints
into the ``text`` block that follows it. ``make explained`` does; ``test_docs.py`` fails where they differ. With
``--apart`` before the pages, each block is a program of its own, and the only rank of those that want ranks.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsnorm.bench.export import replace

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)|^\[\w+\]: (\S+)$", re.MULTILINE)
_MADE = re.compile(r"(<!-- [^\n]*made by [^\n]* -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Page:
    """A page in Markdown. ``blocks`` are its fenced blocks in order: language, content, where the content stands."""

    path: Path
    text: str = field(init=False)
    blocks: list[tuple[str, str, slice]] = field(init=False)

    def __post_init__(self) -> None:
        self.text = self.path.read_text()
        self.blocks = [(m[1], m[2], slice(*m.span(2))) for m in _FENCE.finditer(self.text)]

    def prose(self) -> str:
        """The text without fenced blocks and without what commands write."""
        return _FENCE.sub("", _MADE.sub(r"\1\2", self.text))

    def headings(self) -> list[tuple[int, str]]:
        """Level and words of each heading."""
        return [(len(m[1]), m[2]) for m in _HEADING.finditer(_FENCE.sub("", self.text))]

    def anchors(self) -> set[str]:
        """What ``#…`` may name, by GitHub's rule: lower case, no punctuation, hyphens for spaces."""
        return {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for _, words in self.headings()}

    def links(self) -> list[str]:
        """The targets of links and images."""
        return [m[1] or m[2] for m in _LINK.finditer(_FENCE.sub("", self.text))]

    def code(self) -> list[str]:
        """The Python blocks."""
        return [content for language, content, _ in self.blocks if language == "python"]

    def run(
        self, names: dict[str, Any] | None = None, apart: bool = False
    ) -> Iterator[tuple[str, str | None, slice | None]]:
        """Runs the Python blocks as one program that starts with these names, or each as its own; for each: what it
        prints, what the page shows below it, and where (None for a block with no ``text`` block behind it)."""
        given = {"__name__": "__page__", **(names or {})}
        names = dict(given)
        for (language, content, where), behind in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            if language != "python":
                continue
            line = self.text.count("\n", 0, where.start)
            printed = io.StringIO()
            names = dict(given) if apart else names
            with contextlib.redirect_stdout(printed):  # blank lines before it: tracebacks show the page's own line
                exec(compile("\n" * line + content, str(self.path), "exec"), names)
            shown = behind[1:] if behind is not None and behind[0] == "text" else (None, None)
            yield printed.getvalue(), *shown


def write(page: Page, apart: bool = False) -> None:
    """Puts what the code prints below it."""
    text = page.text
    for printed, _, where in reversed(list(page.run(apart=apart))):
        if where is not None:
            text = text[: where.start] + printed + text[where.stop :]
    replace(page.path, text)


if __name__ == "__main__":
    apart = sys.argv[1:2] == ["--apart"]
    if apart:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name in sys.argv[1 + apart :]:
        write(Page(Path(name)), apart)
