"""The only file that puts the lesson together: one HTML page for each language that needs nothing but itself.

The words, headings and questions are in the page before any script runs, so that it is read at once. The script is
every module in ``MODULES``, each in a function of its own, because a page that is opened from a disk may not import
others.
"""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

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
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;"
"""What a page may ask for: nothing. A browser holds it to that."""
MODULES = ("numbers", "plot", "widgets", "model", *PANELS, "page")
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (const|class|function\*?|async function) (\w+)", re.MULTILINE)
_CHINESE, _STOPS = r"[\u3000-\u9fff\uff00-\uffef]", r"[\u2014\u201c\u201d\u3001\u3002\uff00-\uff1f]"
_BREAK = re.compile(rf"(?<={_CHINESE})\n(?={_CHINESE})|(?<={_STOPS})\n(?![\n-])|(?<!\n)\n(?={_STOPS})")
"""A line break inside Chinese, or beside its punctuation, which browsers would show as a space."""
_TERM = re.compile(r"\{\{(\w+)\|([^}]+)\}\}")
_HOME = re.compile(r'<a href="home:([^"]+)">(.*?)</a>')
_QUOTE = re.compile(r"\{([\w.]+)\}")
_FORMULA = re.compile(r"(\$\$?)([^$]+)\1([.,:;)\u3001\u3002\uff00-\uff1f]?)")


def read(name: str) -> str:
    """A file of this folder."""
    return files(__package__).joinpath(name).read_text("utf-8")


@cache
def bundle(*names: str) -> str:
    """The modules as one script, in this order: what each exports is in a constant ``$name``."""
    parts = []
    for name in names:
        source = read(f"{name}.js")
        exported = ", ".join(found[2] for found in _EXPORT.finditer(source))
        body = _EXPORT.sub(r"\1 \2", _IMPORT.sub(r"const \1 = $\2;", source))
        if "import " in re.sub(r"//.*|/\*.*?\*/", "", body):
            raise ValueError(f"{name}.js: an import must be one line, of names from a file of this folder")
        parts.append(f"const ${name} = (() => {{\n{body}return {{ {exported} }};\n}})();\n")
    return "".join(parts)


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
    other = next(code for code in LANGUAGES if code != language)
    links = "".join(f'<li><a href="#{name}">{escape(text[f"chapters.{name}"])}</a></li>' for name in CHAPTERS)
    body = "".join(_chapter(name, panels, text) for name, panels in CHAPTERS.items())
    code = "".join(f'<code data-line="{i}"><span>{line}</span></code>' for i, line in enumerate(_layer()))
    inside = {
        "texts": {key: _BREAK.sub("", words) for key, words in text.items()},
        "measured": measured,
        "study": json.loads(read("study.json")),
        "corpus": read("corpus.txt"),
    }
    data = "".join(
        f'<script type="application/json" id="data-{name}">{_json(value)}</script>' for name, value in inside.items()
    )
    words = "".join(
        f'<dt>{escape(text[f"term.{term}"])}</dt><dd id="term-{term}">{line(text[f"term.{term}.means"])}</dd>'
        for term in terms(text)
    )
    return f"""<!doctype html>
<html lang="{"zh-Hans" if language == "zh" else language}"{" data-live" * live}><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY} connect-src {"'self'" if live else "'none'"}">
<title>{escape(text["page.title"])}</title><link rel="icon" href="data:,">
<style>{read("style.css")}</style></head>
<body><header><nav aria-label="{escape(text["page.language"])}">
<a href="{other}.html" lang="{other}" hreflang="{other}">{LANGUAGES[other]}</a></nav>
<h1>{escape(text["page.title"])}</h1>{prose(text["page.lead"])}
<nav aria-label="{escape(text["page.contents"])}"><ol>{links}</ol></nav></header>
<main>{body}
<section id="end" class="chapter" aria-labelledby="end-title"><h2 id="end-title">{escape(text["page.end"])}</h2>
<p id="score" role="status"></p>
<table id="sheet" hidden><caption class="unseen">{escape(text["page.end"])}</caption><tbody></tbody></table>
<details id="short"><summary>{escape(text["page.short"])}</summary>{prose(text["page.summary"])}</details>
{_linked(prose(text["page.way"]), home)}</section>
<section id="glossary" class="chapter" aria-labelledby="glossary-title">
<h2 id="glossary-title">{escape(text["page.glossary"])}</h2>
<dl>{words}</dl>
</section></main><footer id="facts"></footer><template id="ten-lines">{code}</template>
{data}<script type="module">{bundle(*MODULES)}</script></body></html>
"""


def _json(value: Any) -> str:
    """For a script element, which ends at the first `</script`."""
    return json.dumps(value, ensure_ascii=False).replace("<", r"\u003c")


def terms(text: dict[str, str]) -> list[str]:
    """The words that the glossary explains."""
    return [key.split(".")[1] for key in text if key.startswith("term.") and key.count(".") == 1]


def _chapter(name: str, panels: tuple[str, ...], text: dict[str, str]) -> str:
    inner = "".join(_panel(panel, text) for panel in panels)
    title = escape(text[f"chapters.{name}"])
    opened = f'<section class="chapter" id="{name}" aria-labelledby="{name}-title">'
    return f'{opened}<h2 id="{name}-title">{title}</h2>{inner}</section>'


def options(panel: str, text: dict[str, str]) -> list[str]:
    """What a reader may guess."""
    start = f"{panel}.option."
    return [key.removeprefix(start) for key in text if key.startswith(start)]


def _panel(panel: str, text: dict[str, str]) -> str:
    """What stands before the guess; the figure and the answer are covered, and come from the script."""
    guesses = "".join(
        f'<label><input type="radio" name="guess-{panel}" value="{option}"> '
        f"{line(text[f'{panel}.option.{option}'])}</label>"
        for option in options(panel, text)
    )
    return (
        f'<article class="panel" id="{panel}" aria-labelledby="{panel}-title"><h3 id="{panel}-title">'
        f"{escape(text[f'{panel}.title'])}</h3>{prose(text[f'{panel}.lead'])}"
        f'<form class="question"><fieldset><legend>{line(text[f"{panel}.question"])}</legend>{guesses}</fieldset>'
        f'<button type="button">{escape(text["page.show"])}</button></form>'
        f'<div class="answer" role="status"></div><details class="bench" hidden></details>'
        f"<template>{prose(text[f'{panel}.answer'])}</template></article>"
    )


def prose(words: str) -> str:
    """Markdown to HTML; `{{ruler|rulers}}` is a word of the glossary, `{moved}` a number that the page computes,
    `$x / √n$` a formula, and `$$x / √n$$` one on a line of its own."""
    return _marked(MarkdownIt("commonmark").enable("table").render(_BREAK.sub("", words)))


def line(words: str) -> str:
    """Markdown of one line, without a paragraph around it."""
    return _marked(MarkdownIt("commonmark").renderInline(_BREAK.sub("", words)))


def _marked(html: str) -> str:
    html = _TERM.sub(r'<a class="term" href="#term-\1" aria-describedby="term-\1">\2</a>', html)
    html = _FORMULA.sub(lambda found: f'<span class="kept">{mathml(found[2], found[1] == "$$")}{found[3]}</span>', html)
    return _QUOTE.sub(r'<b data-quote="\1"></b>', html)


def _linked(html: str, home: str) -> str:
    """Links to files of the repository, which nobody but a caller knows the address of."""
    goal = f'<a href="{escape(home.rstrip("/"))}/blob/main/\\1">\\2</a>' if home else r"\2 (<code>\1</code>)"
    return _HOME.sub(goal, html)


def _layer() -> list[str]:
    """The ten lines, one by one, without their types, painted."""
    source = "class " + read("ten_lines.py").partition("\nclass ")[2].strip()
    plain = re.sub(r": (?:int|Tensor)\b|: float(?= =)| -> \w+", "", source).replace(" = 1e-6)", "=1e-6)")
    painted = highlight(plain, PythonLexer(), HtmlFormatter(nowrap=True))
    return [row for row in painted.splitlines() if row.strip()]
