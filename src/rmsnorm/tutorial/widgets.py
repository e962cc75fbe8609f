"""The only file that knows marimo's widgets: controls of a panel, and its two blocks in the notebook."""

from __future__ import annotations

from typing import Any

import marimo as mo

from ..models import loading
from . import blocks
from .chapters import PANELS
from .panel import Choice, Control, Panel, Sentence, Slider
from .texts import LANGUAGES, Texts, load

PREDICTION, RUN = "prediction", "run"


def language(start: str) -> Any:
    """The switch between the languages."""
    return mo.ui.radio({name: code for code, name in LANGUAGES.items()}, value=LANGUAGES[start], inline=True)


def head(switch: Any) -> Any:
    """The top of the page, with the switch."""
    text = load(switch.value)
    return mo.Html(
        f'<div class="rn rn-switch">{switch}</div><div class="rn">{blocks.head(text)}{blocks.prose(text["page.live"])}</div>'
    )


def controls(name: str, code: str) -> Any:
    """The widgets of a panel, in one dictionary that the notebook gives a name: the prediction, then the controls."""
    panel, text = PANELS[name], load(code)
    options = {text[f"{name}.option.{option}"]: option for option in panel.options}
    widgets = {PREDICTION: mo.ui.radio(options, value=None)}
    for key, control in panel.controls.items():
        widgets[key] = _widget(panel, key, control, text)
    if panel.slow:
        widgets[RUN] = mo.ui.button(value=0, on_click=lambda count: count + 1, label=text[f"{name}.run"])
    return mo.ui.dictionary(widgets)


def _widget(panel: Panel, key: str, control: Control, text: Texts) -> Any:
    if isinstance(control, Slider):
        label = text[f"{panel.name}.control.{key}"]
        return mo.ui.slider(steps=control.stops, value=control.start, label=label, full_width=True)
    if isinstance(control, Choice):
        options = {blocks.option(panel, key, option, text): option for option in control.options}
        return mo.ui.radio(options, value=blocks.option(panel, key, control.start, text), inline=True)
    return mo.ui.text_area(value=text[f"{panel.name}.{key}.start"], rows=2, max_length=1000, full_width=True)


def ask(name: str, widgets: Any, code: str) -> Any:
    """The first block of a panel: principle, formula, question, controls."""
    panel, text = PANELS[name], load(code)
    dials = ""
    for key, widget in widgets.elements.items():
        if key != PREDICTION:
            control = panel.controls.get(key)
            named = "" if control is None or isinstance(control, Slider) else text[f"{name}.control.{key}"]
            dials += blocks.dial(named, mo.as_html(widget).text, wide=isinstance(control, Sentence))
    return mo.Html(
        f'<section class="rn" lang="{code}">{blocks.opening(panel, text)}'
        f"{blocks.question(panel, text, mo.as_html(widgets.elements[PREDICTION]).text)}"
        f'<div class="rn-controls"><p class="rn-label">{text["page.turn"]}</p>{dials}</div></section>'
    )


def show(name: str, widgets: Any, code: str) -> Any:
    """The second block: what was measured with the controls as they stand, and the answer once it was predicted."""
    panel, text = PANELS[name], load(code)
    values = dict(widgets.value)
    predicted, pressed = values.pop(PREDICTION), values.pop(RUN, 1)
    if pressed:
        with mo.status.spinner(title=text["page.busy"], remove_on_exit=True):
            try:
                left = blocks.seen(panel, text, values, panel.measure(**values))
            except loading.Unusable as reason:
                left = blocks.prose(str(reason))
    else:
        left = blocks.prose(text[f"{name}.idle"])
    body = blocks.beside(left, blocks.code(panel, text))
    return mo.Html(f'<section class="rn" lang="{code}">{body}{blocks.answer(panel, text, predicted)}</section>')
