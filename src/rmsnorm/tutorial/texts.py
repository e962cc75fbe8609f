"""The only file that reads the texts: en.ini and zh.ini, one section per panel, one paragraph or more per key.

``question: `` below ``[ruler]`` is the text ``ruler.question``. Both files have the same keys in the same order.
"""

from __future__ import annotations

import configparser
import locale
import os
from functools import cache
from importlib.resources import files

LANGUAGES = {"en": "English", "zh": "中文"}
"""By code: the name that its readers give it."""


def parse(source: str) -> dict[str, str]:
    """The texts of a file by key.

    Raises:
        configparser.Error: a text without a panel, or a key that is there twice.
        ValueError: a text that is empty.
    """
    parser = configparser.ConfigParser(delimiters=":", comment_prefixes=(), interpolation=None)
    parser.read_string(source)
    entries = {f"{panel}.{key}": parser[panel][key].strip() for panel in parser.sections() for key in parser[panel]}
    if empty := [key for key, text in entries.items() if not text]:
        raise ValueError(f"{', '.join(empty)}: no words")
    return entries


@cache
def load(language: str) -> dict[str, str]:
    """The texts in one of LANGUAGES."""
    return parse(files(__package__).joinpath(f"{language}.ini").read_text("utf-8"))


def of_locale() -> str:
    """The language of the reader's locale, or else English."""
    found = [os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if name in os.environ]
    name = next(filter(None, found), locale.getlocale()[0]) or ""
    return next((code for code in LANGUAGES if name.lower().startswith(code)), "en")
