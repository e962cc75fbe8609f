"""The only file that reads the texts: en.md and zh.md, one section per panel, one paragraph or more per key.

`# ruler` opens a panel; a line that begins `question: ` opens one of its texts, which goes on until the next one; the
key is then ``ruler.question``. Both files have the same keys in the same order.
"""

from __future__ import annotations

import locale
import os
import re
from functools import cache
from importlib.resources import files

LANGUAGES = {"en": "English", "zh": "中文"}
"""By code: the name that its readers give it."""
_SECTION = re.compile(r"# ([a-z]+)")
_ENTRY = re.compile(r"([a-z][\w.-]*): ?(.*)")


def parse(source: str) -> dict[str, str]:
    """The texts of a file by key.

    Raises:
        ValueError: a text without a panel, a key that is there twice, or a text that is empty.
    """
    entries: dict[str, str] = {}
    section = key = ""
    for line in source.splitlines():
        if opened := _SECTION.fullmatch(line):
            section, key = opened[1], ""
        elif found := _ENTRY.fullmatch(line):
            key = f"{section}.{found[1]}"
            if not section or key in entries:
                raise ValueError(f"{key}: a text needs a panel, and a name of its own")
            entries[key] = found[2]
        elif key:
            entries[key] += f"\n{line.strip()}"
        elif line.strip():
            raise ValueError(f"{line!r}: a text needs a panel, and a name of its own")
    entries = {key: text.strip() for key, text in entries.items()}
    if empty := [key for key, text in entries.items() if not text]:
        raise ValueError(f"{', '.join(empty)}: no words")
    return entries


@cache
def load(language: str) -> dict[str, str]:
    """The texts in one of LANGUAGES."""
    return parse(files(__package__).joinpath(f"{language}.md").read_text("utf-8"))


def of_locale() -> str:
    """The language of the reader's locale, or else English."""
    found = [os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if name in os.environ]
    name = next(filter(None, found), "") or locale.getlocale()[0] or ""
    return next((code for code in LANGUAGES if name.lower().startswith(code)), "en")
