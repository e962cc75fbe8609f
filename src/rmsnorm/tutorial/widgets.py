"""The only file that knows marimo's widgets: controls of a panel, and its two blocks in the notebook."""

from __future__ import annotations

from typing import Any

import marimo as mo

from . import blocks
from .chapters import PANELS
from .panel import Choice, Control, Slider
from .texts import LANGUAGES, Texts, load

PREDICTION, RUN = "prediction", "run"


def language(start: str) -> Any:
    """The switch between the languages."""
    return mo.ui.radio({name: code for code, name in LANGUAGES.items()}, value=LANGUAGES[start], inline=True)


def head(switch: Any) -> Any:
    """The top of the page, with the switch."""
    return mo.Html(f'<div class="rn rn-switch">{switch}</div><div class="rn">{blocks.head(load(switch.value))}</div>')


def controls(name: str, code: str) -> Any:
    """The widgets of a panel, in one dictionary that the notebook gives a name: the prediction, then the controls."""
    panel, text = PANELS[name], load(code)
    options = {text[f"{name}.option.{option}"]: option for option in panel.options}
    widgets = {PREDICTION: mo.ui.radio(options, value=None)}
    for key, control in panel.controls.items():
        widgets[key] = _widget(control, f"{name}.{key}", text)
    if panel.slow:
        widgets[RUN] = mo.ui.button(value=0, on_click=lambda count: count + 1, label=text[f"{name}.run"])
    return mo.ui.dictionary(widgets)


def _widget(control: Control, key: str, text: Texts) -> Any:
    label = text[f"{key.partition('.')[0]}.control.{key.partition('.')[2]}"]
    if isinstance(control, Slider):
        return mo.ui.slider(steps=control.stops, value=control.start, label=label, show_value=True, full_width=True)
    if isinstance(control, Choice):
        options = {text.get(f"{key}.{option}", option): option for option in control.options}
        start = next(shown for shown, option in options.items() if option == control.start)
        return mo.ui.radio(options, value=start, inline=True, label=label)
    return mo.ui.text_area(value=text[f"{key}.start"], rows=2, max_length=1000, label=label, full_width=True)


def ask(name: str, widgets: Any, code: str) -> Any:
    """The first block of a panel: principle, formula, question, controls."""
    panel, text = PANELS[name], load(code)
    dials = "".join(f"<div>{widget}</div>" for key, widget in widgets.elements.items() if key != PREDICTION)
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
            body = blocks.seen(panel, text, panel.measure(**values))
    else:
        body = blocks.beside(blocks.prose(text[f"{name}.idle"]), blocks.code(panel, text))
    return mo.Html(f'<section class="rn" lang="{code}">{body}{blocks.answer(panel, text, predicted)}</section>')


