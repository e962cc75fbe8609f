"""The only file that shows what a norm costs: passes over memory, counted, and time on this machine, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmsnorm

from ..bench import cases, contenders, race
from ..bench.timing import human
from . import plots
from .panel import Choice, Number, Panel

NAMES = {
    "rmsnorm": plots.COLOURS["RMSNorm"],
    "rmsnorm.layer_norm": "#56B4E9",
    "F.layer_norm": plots.COLOURS["LayerNorm"],
    "F.rms_norm": "#CC79A7",
    "copy_": plots.COLOURS["x"],
}
"""Contenders of the bench, ours first, with their colours."""
SHAPES = {"1 × 4096": (1, 4096), "128 × 4096": (128, 4096), "1024 × 4096": (1024, 4096)}
SECONDS = 1.0
COUNTED = {"rmsnorm": rmsnorm.rms_norm, "F.layer_norm": F.layer_norm, "F.rms_norm": F.rms_norm}
"""Whose passes are counted."""


@dataclass(frozen=True)
class Cost:
    """By contender."""

    case: cases.Case
    seconds: dict[str, float]
    ratios: dict[str, float]
    """Time of rmsnorm ÷ time of the other, round by round."""
    passes: dict[str, float]
    """Bytes that the operators read and write ÷ those of one pass."""

    @property
    def numbers(self) -> dict[str, Number]:
        """The clock, the ratios and the passes."""
        return {
            "bytes": self.case.moved_bytes,
            "time": human(self.seconds["rmsnorm"]),
            "against.rms": self.ratios["F.rms_norm"],
            "against.layer": self.ratios["F.layer_norm"],
            "against.ours": self.ratios["rmsnorm.layer_norm"],
            "passes.torch": self.passes["F.rms_norm"],
            "passes.ours": self.passes["rmsnorm"],
        }


class Traffic(TorchDispatchMode):
    """Adds up what every operator reads and writes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor):
                self.bytes += t.nbytes
        return out


def passes(norm: Any, x: Tensor, w: Tensor) -> float:
    """1: everything is read once and written once."""
    with torch.no_grad(), Traffic() as traffic:  # type: ignore[no-untyped-call]
        norm(x, w.shape, w, eps=1e-6)
    return traffic.bytes / (2 * x.nbytes)


def measure(shape: str, dtype: str) -> Cost:
    """A race: a second in turns, outputs compared first."""
    case = cases.Case(*SHAPES[shape], dtype)
    entered = [contenders.BY_NAME[name] for name in NAMES]
    result = race.race(case, entered, SECONDS)
    lines = result.contenders.items()
    seconds = {name: line.median_s for name, line in lines}
    x = torch.ones(*SHAPES[shape], dtype=cases.DTYPES[dtype])
    count = {n: passes(f, x, x[0]) for n, f in COUNTED.items()}
    return Cost(case, seconds, result.ratios(), count)


def draw(seen: Cost) -> Figure:
    """Above, the median time of each contender; below, the passes over memory."""
    figure, (clock, traffic) = plots.axes(4.9, 2, 1, height_ratios=(1.5, 1))
    unit, scale = ("µs", 1e6) if max(seen.seconds.values()) < 1e-3 else ("ms", 1e3)
    for ax, values, title, form in (
        (clock, {n: s * scale for n, s in seen.seconds.items()}, f"time, {unit}", "{:.3g}"),
        (traffic, seen.passes, "passes over input and output", "{:.1f}"),
    ):
        ax.barh(list(values), list(values.values()), color=[NAMES[name] for name in values], height=0.64)
        for place, value in enumerate(values.values()):
            ax.text(value, place, " " + form.format(value), va="center", weight="bold")
        ax.set(xlim=(0, 1.2 * max(values.values())), title=title)
        ax.grid(visible=False, axis="y")
        ax.invert_yaxis()
    return figure


PANEL = Panel(
    name="cost",
    formula=(r"t\geq\dfrac{\mathrm{bytes\ in}+\mathrm{bytes\ out}}{\mathrm{bandwidth}}",),
    options=("much", "little", "none"),
    right="little",
    controls={"shape": Choice(tuple(SHAPES), "128 × 4096"), "dtype": Choice(("float32", "bfloat16"), "float32")},
    measure=measure,
    draw=draw,
    code=(Traffic, passes, measure),
    slow=True,
)
