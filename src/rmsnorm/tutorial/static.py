"""The only file that makes the static pages: each panel at some stops of its first control, kept as frames.

A page needs nothing but itself: style, script and figures are inside. `marimo export html` would fetch its script from
a CDN, and its controls would be dead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from importlib.resources import files
from typing import Any

from ..bench import console
from ..models import loading
from . import blocks, plots
from .chapters import PANELS
from .panel import Choice, Panel, Seen, Sentence, Slider
from .texts import LANGUAGES, Texts, drawn, load

MOST_FRAMES = 7
"""Per panel; a frame is 50 to 120 KB."""

Frame = tuple[dict[str, Any], Seen | str]
"""The controls' values, and what was seen, which both languages share, or why nothing was."""


def pages(progress: Callable[[str], None] = lambda title: None) -> dict[str, str]:
    """The pages by file name: en.html, zh.html.

    Args:
        progress: hears the title of each panel before it is measured.
    """
    recorded: dict[str, list[Frame]] = {}
    made = {}
    for language in LANGUAGES:
        text = load(language)
        for panel in PANELS.values():
            spoken = any(isinstance(control, Sentence) for control in panel.controls.values())
            if panel.name not in recorded or spoken:  # what is said in it differs between the languages
                progress(text[f"{panel.name}.title"])
                recorded[panel.name] = list(frames(panel, text))
        made[f"{language}.html"] = _page(text, recorded)
    return made


def stops(panel: Panel) -> list[Any]:
    """The values of the first control that the page can show: all of a choice, some of a slider with its start."""
    control = next(iter(panel.controls.values()))
    if isinstance(control, Choice):
        return list(control.options)
    assert isinstance(control, Slider)
    every = -(-len(control.stops) // MOST_FRAMES)
    start = control.stops.index(control.start)
    return list(control.stops[start % every :: every])


def frames(panel: Panel, text: Texts) -> Iterator[Frame]:
    """The panel at each stop, the other controls as they start."""
    first = next(iter(panel.controls))
    said = {key: text[f"{panel.name}.{key}.start"] for key, c in panel.controls.items() if isinstance(c, Sentence)}
    for stop in stops(panel):
        values = {**panel.start(), **said, first: stop}
        try:
            result = panel.measure(**values)
        except loading.Unusable as reason:
            yield values, str(reason)
        else:
            yield values, result


def _page(text: Texts, recorded: dict[str, list[Frame]]) -> str:
    others = (
        f'<a href="{code}.html" lang="{code}" hreflang="{code}">{name}</a>'
        for code, name in LANGUAGES.items()
        if code != text.language
    )
    here = console.machine()
    facts = f"{here['cpu']}, torch {here['torch']}, rmsnorm {here['rmsnorm']}, {here['date'][:10]}"
    body = [
        f'<div class="rn" lang="{text.language}"><p class="rn-switch">{"".join(others)}</p>',
        f"{blocks.head(text, text['page.recorded'])}",
        f'<p class="rn-facts">{escape(facts)}</p></div>',
        *(_section(panel, text, recorded[panel.name]) for panel in PANELS.values()),
    ]
    style, script = (files(__package__).joinpath(name).read_text("utf-8") for name in ("style.css", "page.js"))
    return blocks.page(text, style, body, script)


def _section(panel: Panel, text: Texts, recorded: list[Frame]) -> str:
    first, start = next(iter(panel.start().items()))
    shown = [blocks.option(panel, first, values[first], text) for values, _ in recorded]
    begin = next(place for place, (values, _) in enumerate(recorded) if values[first] == start)
    kept = "".join(
        f'<div class="rn-frame" data-shown="{escape(shown[place])}"{" hidden" * (place != begin)}>'
        f"{blocks.prose(seen) if isinstance(seen, str) else _seen(panel, text, values, seen)}</div>"
        for place, (values, seen) in enumerate(recorded)
    )
    guesses = "".join(
        f'<label><input type="radio" class="rn-guess" name="rn-guess-{panel.name}" '
        f'value="{"right" if option == panel.right else "wrong"}"> '
        f"{blocks.line(text[f'{panel.name}.option.{option}'])}</label>"
        for option in panel.options
    )
    wrong = next(option for option in panel.options if option != panel.right)
    verdicts = "".join(
        f'<div class="rn-verdict" data-when="{when}"{" hidden" * bool(when)}>{blocks.answer(panel, text, option)}</div>'
        for when, option in (("", None), ("right", panel.right), ("wrong", wrong))
    )
    name = text[f"{panel.name}.control.{first}"]
    return (
        f'<section class="rn rn-panel" lang="{text.language}">{blocks.opening(panel, text)}'
        f"{blocks.question(panel, text, f'<div class=rn-guesses>{guesses}</div>')}"
        f"{blocks.controls(text, [blocks.dial(name, _dial(panel, first, name, shown, begin), wide=False)])}"
        f"{blocks.beside(kept, blocks.code(panel, text))}{verdicts}</section>"
    )


def _seen(panel: Panel, text: Texts, values: dict[str, Any], result: Seen) -> str:
    return blocks.seen(panel, text, values, result, plots.svg(panel.draw, result, drawn(text)))


def _dial(panel: Panel, key: str, name: str, shown: list[str], begin: int) -> str:
    """The first control as the browser's own."""
    if isinstance(panel.controls[key], Slider):
        return (
            f'<input type="range" class="rn-dial" min="0" max="{len(shown) - 1}" step="1" value="{begin}" '
            f'aria-label="{escape(name)}" aria-valuetext="{escape(shown[begin])}">'
        )
    return "".join(
        f'<label><input type="radio" class="rn-dial" name="rn-{panel.name}-{key}" value="{place}"'
        f"{' checked' * (place == begin)}> {escape(option)}</label> "
        for place, option in enumerate(shown)
    )
