"""The only file that reads the texts: en.md and zh.md, one section per panel, one paragraph or more per key.

`# ruler` opens a panel, `## question` one of its texts; the key is then ``ruler.question``. Both files have the same
keys, and the order of the panels is the order of chapters.py.
"""

from __future__ import annotations

import locale
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files

LANGUAGES = {"en": "English", "zh": "中文"}
"""By code: the name that its readers give it."""
_HEADING = re.compile(r"^(#{1,2}) (.+)$", re.MULTILINE)


class Texts(Mapping[str, str]):
    """What the tutorial says in one language, by key."""

    def __init__(self, language: str, entries: Mapping[str, str]) -> None:
        self.language = language
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> str:
        try:
            return self._entries[key]
        except KeyError:
            raise KeyError(f"{self.language}.md has no text for {key!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def parse(markdown: str) -> dict[str, str]:
    """The texts of a file by key.

    Raises:
        ValueError: a text without a panel, a key that is there twice, or a text that is empty.
    """
    entries: dict[str, str] = {}
    section = ""
    pieces = _HEADING.split(markdown)[1:]
    for level, name, body in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        if level == "#":
            section = name.strip()
            continue
        key = f"{section}.{name.strip()}"
        if not section or key in entries or not body.strip():
            raise ValueError(f"{key}: a text needs a panel, a name of its own, and words")
        entries[key] = body.strip()
    return entries


@cache
def load(language: str) -> Texts:
    """The texts in one of LANGUAGES."""
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; choose one of {', '.join(LANGUAGES)}")
    return Texts(language, parse((files(__package__) / f"{language}.md").read_text(encoding="utf-8")))


def drawn(text: Texts) -> dict[str, str]:
    """What the figures say in this language, by the English words that they are drawn with."""
    if text.language == "en":
        return {}
    return {words: text[key] for key, words in load("en").items() if key.startswith("plot.")}


def of_locale() -> str:
    """The language of the reader's locale, or else English."""
    found = [os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if name in os.environ]
    name = next(filter(None, found), "") or locale.getlocale()[0] or ""
    return next((code for code in LANGUAGES if name.lower().startswith(code)), "en")
