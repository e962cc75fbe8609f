"""The only file that shows what a norm costs: passes over memory, counted, and time on this machine, measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rmsnorm

from ..bench import cases, console, contenders, race
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
COLS = 4096
SECONDS = 1.0
COUNTED = {"rmsnorm": rmsnorm.rms_norm, "F.layer_norm": F.layer_norm, "F.rms_norm": F.rms_norm}
"""Whose passes are counted."""


def last_cache() -> int:
    """Bytes of the largest cache that a core of this machine has; 16 MiB where the system doesn't say."""
    sizes = [file.read_text().strip() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) << {"K": 10, "M": 20, "G": 30}[size[-1]] for size in sizes if size[-1:] in {*"KMG"}]
    return max(known, default=16 << 20)


def rows_for(cache: int) -> tuple[int, int]:
    """Rows whose input and output fill half of such a cache in float32, at most 128; and rows that are twice as large
    as it in bfloat16, at most 32768, a GiB."""
    fit, leave, row = 128, 256, 2 * COLS * 4
    while fit > 2 and fit * row > cache // 2:
        fit //= 2
    while leave < 32768 and leave * row // 2 < 2 * cache:
        leave *= 2
    return fit, leave


CACHE = last_cache()
FITS, LEAVES = rows_for(CACHE)
SHAPES = {f"{rows} × {COLS}": (rows, COLS) for rows in (1, FITS, LEAVES)}


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
            "caches": self.case.moved_bytes / CACHE,
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


def quoted() -> dict[str, Number]:
    """What the machine's largest cache holds, and what the rows, in float32, are of it."""
    part, over = (2 * rows * COLS * 4 / CACHE for rows in (FITS, LEAVES))
    return {"rows": FITS, "many": LEAVES, "cache": console.mebibytes(CACHE), "part": f"{part:.0%}", "over": over}


PANEL = Panel(
    name="cost",
    formula=(r"t\geq\dfrac{\mathrm{bytes\ in}+\mathrm{bytes\ out}}{\mathrm{bandwidth}}",),
    options=("much", "little", "none"),
    right="little",
    controls={"shape": Choice(tuple(SHAPES), tuple(SHAPES)[1]), "dtype": Choice(("float32", "bfloat16"), "float32")},
    measure=measure,
    draw=draw,
    code=(Traffic, passes, measure),
    quoted=quoted,
    slow=True,
)
