"""The only file that makes HTML of a panel: its words, its formula, its plot, its numbers, its code.

The notebook and the static pages are put together from these blocks; style.css dresses both. Ids and classes begin with
``rn-``, because the notebook's page has classes of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from html import escape
from typing import Any

import markdown
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from . import plots
from .chapters import CHAPTERS, PANELS
from .panel import Number, Panel, Seen, Sentence
from .texts import Texts

_CHINESE, _STOPS = r"[\u3000-\u9fff\uff00-\uffef]", r"[\u2014\u201c\u201d\u3001\u3002\uff00-\uff1f]"
_BREAK = re.compile(rf"(?<={_CHINESE})\n(?={_CHINESE})|(?<={_STOPS})\n|\n(?={_STOPS})")
"""A line break inside Chinese, or beside its punctuation, which browsers would show as a space."""
_QUOTED = re.compile(r"\{([\w.]+)\}")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def prose(text: str) -> str:
    """Markdown to HTML."""
    return f'<div class="rn-prose">{markdown.markdown(_BREAK.sub("", text))}</div>'


def line(text: str) -> str:
    """Markdown of one line, without a paragraph around it."""
    return markdown.markdown(_BREAK.sub("", text)).removeprefix("<p>").removesuffix("</p>")


def said(panel: Panel, text: Texts, key: str) -> str:
    """One of the panel's texts; where it quotes a number, that number is computed, once."""
    words = text[f"{panel.name}.{key}"]
    return _QUOTED.sub(lambda name: number(_quoted(panel.name)[name[1]], text), words)


@cache
def _quoted(panel: str) -> Mapping[str, Number]:
    return PANELS[panel].quoted()


def head(text: Texts, note: str) -> str:
    """The title of the page, what it is, a note about where its numbers are from, and where its panels are."""
    links = [
        f'<li><a href="#rn-{panel.name}">{escape(text[f"{panel.name}.title"])}</a></li>'
        for panel in PANELS.values()
    ]  # fmt: skip
    return (
        f'<header class="rn-head" lang="{text.language}"><h1>{escape(text["page.title"])}</h1>'
        f"{prose(text['page.lead'])}{prose(note)}<nav><ol>{''.join(links)}</ol></nav></header>"
    )


def opening(panel: Panel, text: Texts) -> str:
    """What stands before the question: the chapter if the panel opens one, the title, the principle, the formula."""
    number = list(PANELS).index(panel.name) + 1
    chapter = next((name for name, panels in CHAPTERS.items() if panels[0] is panel), None)
    over = f'<p class="rn-chapter">{escape(text[f"chapters.{chapter}"])}</p>' if chapter else ""
    formulas = "".join(f'<img src="{plots.address(plots.formula(tex))}" alt="{escape(tex)}">' for tex in panel.formula)
    return (
        f'{over}<h2 id="rn-{panel.name}"><span class="rn-count">{number}</span>'
        f"{escape(text[f'{panel.name}.title'])}</h2>{prose(said(panel, text, 'lead'))}"
        f'<p class="rn-formula">{formulas}</p>'
    )


def question(panel: Panel, text: Texts, options: str) -> str:
    """The question, with the ``options`` to choose from as HTML."""
    return (
        f'<div class="rn-question" role="group"><p class="rn-label">{escape(text["page.predict"])}</p>'
        f"{prose(said(panel, text, 'question'))}{options}</div>"
    )


def controls(text: Texts, parts: Iterable[str]) -> str:
    """All controls of a panel."""
    return f'<div class="rn-controls"><p class="rn-label">{escape(text["page.turn"])}</p>{"".join(parts)}</div>'


def dial(name: str, widget: str, wide: bool) -> str:
    """A control, under its name unless it shows that itself."""
    named = f'<p class="rn-name">{escape(name)}</p>' if name else ""
    label = f' aria-label="{escape(name)}"' if name else ""
    return f'<div role="group"{label}{" class=rn-wide" * wide}>{named}{widget}</div>'


def answer(panel: Panel, text: Texts, predicted: str | None) -> str:
    """The answer, or, before the reader has predicted, where to do that."""
    if predicted is None:
        return f'<div class="rn-answer rn-locked">{prose(text["page.locked"])}</div>'
    right = predicted == panel.right
    verdict = text["page.right"] if right else text["page.wrong"]
    option = text[f"{panel.name}.option.{panel.right}"]
    return (
        f'<div class="rn-answer {"rn-right" if right else "rn-wrong"}"><p class="rn-label">'
        f"{'✓' if right else '✗'} {escape(verdict)} {line(option)}</p>{prose(said(panel, text, 'answer'))}</div>"
    )


def seen(panel: Panel, text: Texts, values: Mapping[str, Any], result: Seen, image: bytes) -> str:
    """Plot and numbers, for these values of the controls; a frame of the static page."""
    return settings(panel, text, values) + figure(panel, text, image) + numbers(panel, text, result)


def settings(panel: Panel, text: Texts, values: Mapping[str, Any]) -> str:
    """Where the controls stand, in readable numbers."""
    shown = (
        f"{escape(text[f'{panel.name}.control.{key}'])} <b>{escape(option(panel, key, values[key], text))}</b>"
        for key, control in panel.controls.items()
        if not isinstance(control, Sentence)
    )
    return f'<p class="rn-settings">{"".join(f"<span>{one}</span>" for one in shown)}</p>'


def option(panel: Panel, key: str, value: Number, text: Texts) -> str:
    """A value of a control for readers: a number, a proper name, or what the texts call it."""
    return text.get(f"{panel.name}.{key}.{value}", None) or number(value, text)


def beside(left: str, right: str) -> str:
    """Two columns on a wide screen, one below the other on a narrow one."""
    return f'<div class="rn-beside"><div>{left}</div><div>{right}</div></div>'


def figure(panel: Panel, text: Texts, image: bytes) -> str:
    """A drawing with its caption, which says in words what is drawn."""
    caption = said(panel, text, "caption")
    return (
        f'<figure class="rn-figure"><img src="{plots.address(image)}" alt="{escape(caption)}">'
        f"<figcaption>{line(caption)}</figcaption></figure>"
    )


def numbers(panel: Panel, text: Texts, result: Seen) -> str:
    """The numbers by name; each value carries its exact self in an attribute."""
    rows = (
        f'<div><dt>{line(text[f"{panel.name}.number.{name}"])}</dt><dd data-number="{panel.name}.{name}" '
        f'data-value="{escape(str(value))}">{escape(number(value, text))}</dd></div>'
        for name, value in result.numbers.items()
    )
    return f'<dl class="rn-numbers">{"".join(rows)}</dl>'


def code(panel: Panel, text: Texts) -> str:
    """The functions that computed what is shown."""
    painted = highlight(panel.source(), PythonLexer(), HtmlFormatter(nowrap=True))
    return (
        f'<div class="rn-code"><p class="rn-label">{escape(text["page.code"])}</p>'
        f'<pre tabindex="0"><code>{painted}</code></pre></div>'
    )


def number(value: Number, text: Mapping[str, str]) -> str:
    """A value for readers: four digits, powers of ten as such, yes and no in their language."""
    if isinstance(value, tuple):
        return "  ".join(number(one, text) for one in value)
    if isinstance(value, bool):
        return text["page.yes"] if value else text["page.no"]
    if isinstance(value, str | int):
        return value if isinstance(value, str) else f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    mantissa, _, exponent = f"{value:.4g}".replace("-", "−", value < 0).partition("e")
    return f"{mantissa}\u00a0×\u00a010{str(int(exponent)).translate(_SUPERSCRIPTS)}" if exponent else mantissa


def page(text: Texts, style: str, body: Iterable[str], script: str) -> str:
    """A page of its own: style and script inside, nothing fetched."""
    return (
        f'<!doctype html>\n<html lang="{text.language}"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(text['page.title'])}</title>\n<style>{style}</style></head>\n"
        f'<body class="rn-static"><main>\n{"".join(body)}\n</main><script>{script}</script></body></html>\n'
    )
