"""The only file that knows how figures look: one colour for each norm, one width, SVG without text that needs a font,
but for words in other languages than English.

Figures are drawn 4.6 inches wide with letters of 9 to 10 points: that many pixels on a phone of 390, and 15 beside the
code on a wide screen. The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from html import escape
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from matplotlib.text import Text

from ..bench import figures

COLOURS = {
    "x": "#5B6472",
    "BatchNorm": "#E69F00",
    "WeightNorm": "#009E73",
    "LayerNorm": "#0072B2",
    "RMSNorm": "#D55E00",
    "pRMSNorm": "#CC79A7",
}
INK = "#1F2933"
WIDTH = 4.6
RC: Any = {
    **figures.RC,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "mathtext.fontset": "dejavusans",
    "svg.hashsalt": "rmsnorm",
}
_DRAWING = threading.Lock()  # rc_context is the process's, and each reader has a thread


def axes(height: float, rows: int = 1, cols: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of the tutorial's width, and its axes from the top left; ``options`` as for ``Figure.subplots``."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, cols, squeeze=False, **options).flat)


def bare(ax: Axes) -> Axes:
    """Axes without frame, grid and ticks."""
    ax.grid(visible=False)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def svg(draw: Callable[[Any], Figure], seen: Any, words: Mapping[str, str] = MappingProxyType({})) -> bytes:
    """The drawing of what was seen. ``words`` puts those of another language in the place of its own, as text: the
    reader's browser has the letters, and matplotlib's font has not."""
    out = io.BytesIO()
    with _DRAWING, matplotlib.rc_context(RC):
        figure = draw(seen)
        spoken = [text for text in figure.findobj(Text) if text.get_text() in words]
        for text in spoken:
            text.draw = partial(_as_text, text.draw)  # type: ignore[method-assign]
        figure.savefig(out, format="svg", metadata={"Date": None})
    image = out.getvalue().decode()
    for said in {text.get_text() for text in spoken}:
        image = image.replace(f">{said}</text>", f">{escape(words[said])}</text>")
    return image.replace("'DejaVu Sans'", "'DejaVu Sans', sans-serif").encode()


def _as_text(draw: Callable[[Any], None], renderer: Any) -> None:
    """Draws letters as such, not as paths."""
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(renderer)


@cache
def formula(tex: str) -> bytes:
    """A formula as SVG, in letters of 16 points."""
    out = io.BytesIO()
    with _DRAWING, matplotlib.rc_context({"svg.fonttype": "path", "mathtext.fontset": "cm", "svg.hashsalt": "rmsnorm"}):
        math_to_image(f"${tex}$", out, prop=FontProperties(size=16), format="svg", color=INK)
    return out.getvalue()


def address(image: bytes) -> str:
    """The image as an address that needs no file and no network."""
    return f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}"
