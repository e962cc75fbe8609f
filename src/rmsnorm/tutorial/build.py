"""The only file that puts the lesson together: one HTML page for each language that needs nothing but itself.

The words, headings and questions are in the page before any script runs, so that it is read at once. The modules are
data addresses in an import map, because a page that is opened from a disk may not import files.
"""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from .formulas import mathml
from .texts import LANGUAGES, load

CHAPTERS: dict[str, tuple[str, ...]] = {
    "principle": ("ruler",),
    "formula": ("layer", "eps"),
    "geometry": ("sphere", "invariance", "gradient"),
    "implementation": ("passes", "precision"),
    "llama": ("network", "depth", "study", "train"),
}
"""The tutorial's own outline, and the panels of each part: a panel is the module of that name."""
PANELS = tuple(panel for panels in CHAPTERS.values() for panel in panels)
MODULES = ("numbers", "plot", "widgets", "model", *PANELS, "page")
_TERM = re.compile(r"\{\{(\w+)\|([^}]+)\}\}")
"""`{{ruler|rulers}}` is a word of the glossary."""
_HOME = re.compile(r'<a href="home:([^"]+)">(.*?)</a>')
_QUOTE = re.compile(r"\{([\w.]+)\}")
_FORMULA = re.compile(r"(\$\$?)([^$]+)\1([.,:;)\u3001\u3002\uff00-\uff1f]?)")


@cache
def read(name: str) -> str:
    """A file of this folder."""
    return files(__package__).joinpath(name).read_text("utf-8")


def imports() -> dict[str, dict[str, str]]:
    """An import map of all modules."""
    plain = {name: re.sub(r'(?<= from ")\./(\w+)\.js(?=";)', r"\1", read(f"{name}.js")) for name in MODULES}
    return {"imports": {name: f"data:text/javascript,{quote(source)}" for name, source in plain.items()}}


def script(value: Any) -> str:
    """JSON for a script element, which ends at the first `</script`."""
    return json.dumps(value, ensure_ascii=False).replace("<", r"\u003c")


def pages(measured: dict[str, Any], live: bool = False, home: str = "") -> dict[str, str]:
    """The pages by file name: en.html, zh.html.

    Args:
        measured: what `measured.py` has of this machine, or of another; see there.
        live: whether a server answers the page's own questions.
        home: the address of the repository, for links to its files; without it they are named only.
    """
    return {f"{language}.html": page(language, measured, live, home) for language in LANGUAGES}


def page(language: str, measured: dict[str, Any], live: bool = False, home: str = "") -> str:
    """One page, whole."""
    text = load(language)
    data = {"texts": text, "measured": measured, "study": json.loads(read("study.json")), "corpus": read("corpus.txt")}
    goal = rf'<a href="{escape(home.rstrip("/"))}/blob/main/\1">\2</a>' if home else r"\2 (<code>\1</code>)"

    def term(found: re.Match[str]) -> str:
        tip = f'<span class="tip" aria-hidden="true">{line(text[f"term.{found[1]}.means"])}</span>'
        return f'<a class="term" href="#term-{found[1]}" aria-describedby="term-{found[1]}">{found[2]}{tip}</a>'

    def prose(words: str) -> str:
        return _HOME.sub(goal, _TERM.sub(term, _marked(MarkdownIt("commonmark").render(words))))

    def line(words: str) -> str:
        return _TERM.sub(term, _marked(MarkdownIt("commonmark").renderInline(words)))

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": prose, "line": line, "script": script}
    return environment.from_string(read("page.html")).render(
        language=language,
        languages=LANGUAGES,
        live=live,
        text=text,
        chapters=CHAPTERS,
        code=_layer(),
        data=data,
        imports=imports(),
        read=read,
    )


def _marked(html: str) -> str:
    """`{moved}` is a number that the page computes, `$x / √n$` a formula, `$$x / √n$$` one on a line of its own."""
    html = _FORMULA.sub(lambda found: f'<span class="kept">{mathml(found[2], found[1] == "$$")}{found[3]}</span>', html)
    return _QUOTE.sub(r'<b data-quote="\1"></b>', html)


def _layer() -> list[str]:
    """The ten lines, one by one, without their types, painted."""
    source = "class " + read("ten_lines.py").partition("\nclass ")[2].strip()
    plain = re.sub(r": (int|Tensor)\b| -> \w+", "", source.replace(": float = ", "="))
    painted = highlight(plain, PythonLexer(), HtmlFormatter(nowrap=True))
    return [row for row in painted.splitlines() if row.strip()]
