"""The only file that knows marimo's widgets: the prediction, the controls and the button of a panel, and its blocks.

The prediction and the button are elements of their own beside the dictionary of controls: of two changes that reach a
dictionary in one message, marimo keeps the last.
"""

from __future__ import annotations

from typing import Any

import marimo as mo

from ..models import loading
from . import blocks, plots
from .chapters import PANELS
from .panel import Choice, Control, Panel, Sentence, Slider
from .texts import LANGUAGES, Texts, drawn, load


def language(start: str) -> Any:
    """The switch between the languages."""
    return mo.ui.radio({name: code for code, name in LANGUAGES.items()}, value=LANGUAGES[start], inline=True)


def head(switch: Any) -> Any:
    """The top of the page, with the switch."""
    text = load(switch.value)
    return mo.Html(f'<div class="rn"><div class="rn-switch">{switch}</div>{blocks.head(text, text["page.live"])}</div>')


def guess(name: str, code: str) -> Any:
    """The answers to choose from; none is chosen."""
    panel, text = PANELS[name], load(code)
    return mo.ui.radio({text[f"{name}.option.{option}"]: option for option in panel.options}, value=None)


def dials(name: str, code: str) -> Any:
    """The controls of a panel, in one dictionary."""
    panel, text = PANELS[name], load(code)
    return mo.ui.dictionary({key: _dial(panel, key, control, text) for key, control in panel.controls.items()})


def _dial(panel: Panel, key: str, control: Control, text: Texts) -> Any:
    if isinstance(control, Slider):
        label = text[f"{panel.name}.control.{key}"]
        return mo.ui.slider(steps=control.stops, value=control.start, label=label, full_width=True)
    if isinstance(control, Choice):
        options = {blocks.option(panel, key, option, text): option for option in control.options}
        return mo.ui.radio(options, value=blocks.option(panel, key, control.start, text), inline=True)
    return mo.ui.text_area(value=text[f"{panel.name}.{key}.start"], rows=3, max_length=1000, full_width=True)


def button(name: str, code: str) -> Any:
    """What starts a panel that takes seconds; its value is how often it was pressed."""
    return mo.ui.button(value=0, on_click=lambda count: count + 1, label=load(code)[f"{name}.run"])


def ask(name: str, code: str, guess: Any, dials: Any, button: Any = None) -> Any:
    """The first block of a panel: principle, formula, question, controls."""
    panel, text = PANELS[name], load(code)
    parts = []
    for key, control in panel.controls.items():
        named = "" if isinstance(control, Slider) else text[f"{name}.control.{key}"]  # sliders carry their own label
        parts.append(blocks.dial(named, mo.as_html(dials.elements[key]).text, wide=isinstance(control, Sentence)))
    if button is not None:
        parts.append(blocks.dial("", mo.as_html(button).text, wide=True))
    return mo.Html(
        f'<section class="rn" lang="{code}">{blocks.opening(panel, text)}'
        f"{blocks.question(panel, text, mo.as_html(guess).text)}{blocks.controls(text, parts)}</section>"
    )


def show(name: str, code: str, dials: Any, button: Any = None) -> Any:
    """The second block: what is measured with the controls as they stand, and the code beside it."""
    panel, text = PANELS[name], load(code)
    if button is None or button.value:
        with mo.status.spinner(title=text["page.busy"], remove_on_exit=True):
            try:
                result = panel.measure(**dials.value)
                left = blocks.seen(panel, text, dials.value, result, plots.svg(panel.draw, result, drawn(text)))
            except loading.Unusable as reason:
                left = blocks.prose(str(reason))
    else:
        left = blocks.prose(text[f"{name}.idle"])
    return mo.Html(f'<section class="rn" lang="{code}">{blocks.beside(left, blocks.code(panel, text))}</section>')


def answer(name: str, code: str, guess: Any) -> Any:
    """The third block: the answer, once it was predicted."""
    body = blocks.answer(PANELS[name], load(code), guess.value)
    return mo.Html(f'<section class="rn" lang="{code}">{body}</section>')
