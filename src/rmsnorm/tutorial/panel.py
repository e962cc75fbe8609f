"""The only file that knows what a panel is: a question, controls, a measurement, a drawing, and the code that ran.

A panel holds no prose. What it says is in en.md and zh.md under its name, with ``{name}`` where it says a number that
``quoted`` computes; what it shows is computed by ``measure`` from the values of its controls, and the code beside the
plot is the source of the functions that computed it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from matplotlib.figure import Figure

_REMARK = re.compile(r"  # (type: ignore|noqa|fmt:).*")

Number = float | int | bool | str | tuple[float, ...]
"""What is shown as a number: also yes or no, a dtype's name, a row of values."""


class Seen(Protocol):
    """What a measurement returns."""

    @property
    def numbers(self) -> Mapping[str, Number]:
        """The numbers beside the plot, by the names that the texts have for them."""


@dataclass(frozen=True)
class Slider:
    """A row of stops. Its value is a number."""

    stops: tuple[float, ...]
    start: float

    def __post_init__(self) -> None:
        if self.start not in self.stops:
            raise ValueError(f"a slider starts at one of its stops {self.stops}, not at {self.start}")


@dataclass(frozen=True)
class Choice:
    """A few names. Its value is one of them."""

    options: tuple[str, ...]
    start: str

    def __post_init__(self) -> None:
        if self.start not in self.options:
            raise ValueError(f"a choice starts at one of its options {self.options}, not at {self.start!r}")


@dataclass(frozen=True)
class Sentence:
    """The reader's own words. Its value is a string; the texts hold the first one."""


Control = Slider | Choice | Sentence


@dataclass(frozen=True)
class Panel:
    """One idea of the tutorial."""

    name: str
    formula: tuple[str, ...]
    """One or more, in matplotlib's TeX."""
    options: tuple[str, ...]
    """The answers that the reader can predict."""
    right: str
    controls: Mapping[str, Control]
    """The first one is what the static page can still move."""
    measure: Callable[..., Seen]
    """Takes the values of the controls by name."""
    draw: Callable[[Any], Figure]
    """Takes what ``measure`` returned. Its words are English, and each is in the texts under ``plot``."""
    code: tuple[Callable[..., Any], ...]
    """Shown beside the plot."""
    quoted: Callable[[], Mapping[str, Number]] = field(default=dict, kw_only=True)
    """The numbers that the panel's texts say, whatever the controls are at; takes a second at most."""
    slow: bool = field(default=False, kw_only=True)
    """Takes seconds, so that the reader starts it."""

    def __post_init__(self) -> None:
        if self.right not in self.options:
            raise ValueError(f"{self.name}: the right answer {self.right!r} is not one of {self.options}")

    def source(self) -> str:
        """The code beside the plot, without the remarks that are for linters."""
        text = "\n\n".join(inspect.getsource(function).strip() for function in self.code)
        return _REMARK.sub("", text)

    def start(self) -> dict[str, Any]:
        """The values that the controls begin with, but for sentences."""
        return {name: control.start for name, control in self.controls.items() if not isinstance(control, Sentence)}
