"""The only file that shows what 16 bits do to the norm: squares that overflow, and two places to round."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rmsnorm

from . import plots
from .panel import Choice, Number, Panel, Slider
from .ulp import errors

COLS, ROWS = 1024, 64
EPS = 1e-6
SIZES = (1e-4, 1e-3, 0.01, 0.1, 1, 4, 16, 64, 128, 255, 256, 1000, 10000)
SUMS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OUTPUTS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COLOURS = {"float16": "#CC79A7", "bfloat16": "#0072B2", "float32": "#009E73"}


@dataclass(frozen=True)
class Rounded:
    """Mean squares in three types, and outputs in two rounding orders."""

    size: float
    sums: dict[str, list[float]]
    """Relative error of the mean square by type, for each of SIZES: infinite after an overflow."""
    square: float
    """size² in float16."""
    errors: dict[str, Tensor]
    """By rounding order: of each output, in ulps."""
    differ: float
    """The share of outputs whose bits depend on the order."""

    @property
    def numbers(self) -> dict[str, Number]:
        """The square, the mean square's error here, and the two orders."""
        place = SIZES.index(self.size)
        return {
            "square": self.square,
            **{f"sum.{name}": sums[place] for name, sums in self.sums.items()},
            "worst.torch": self.errors["torch"].max().item(),
            "worst.llama": self.errors["llama"].max().item(),
            "differ": f"{self.differ:.1%}",
        }


def sum_error(size: float, dtype: torch.dtype) -> float:
    """The mean of 1024 squares, all steps in one type."""
    noise = torch.Generator().manual_seed(0)
    x = size * (1 + torch.rand(COLS, generator=noise)) / 2
    x = x.to(dtype)
    total = torch.zeros((), dtype=dtype)
    for square in x * x:
        total = total + square
    mean = (total / COLS).double()
    exact = x.double().square().mean()
    return ((mean - exact).abs() / exact).item()


def round_twice(size: float, dtype: str) -> Rounded:
    """Both orders of rounding on the same rows."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLS, generator=noise)
    w = 1 + 0.2 * torch.randn(COLS, generator=noise)
    x, w = x.to(OUTPUTS[dtype]), w.to(OUTPUTS[dtype])
    ms = x.double().square().mean(-1, keepdim=True)
    exact = x.double() / (ms + EPS).sqrt() * w.double()
    y, ulps = {}, {}
    for order in ("torch", "llama"):
        y[order] = rmsnorm.rms_norm(x, COLS, w, EPS, casting_mode=order)
        ulps[order] = errors(y[order], exact)
    differ = (y["torch"] != y["llama"]).double().mean().item()
    square = torch.tensor(size).half().square().item()
    return Rounded(size, _sums(), square, ulps, differ)


_SUMS: dict[str, list[float]] = {}


def _sums() -> dict[str, list[float]]:
    """Of every size and type; 40,000 additions one by one, so once."""
    if not _SUMS:
        _SUMS.update({name: [sum_error(size, dtype) for size in SIZES] for name, dtype in SUMS.items()})
    return _SUMS


def draw(seen: Rounded) -> Figure:
    """Above, the error of the mean square against the size of the numbers; below, how the outputs' errors spread."""
    figure, (sums, spread) = plots.axes(5.6, 2, 1)
    top = 30.0
    for name, values in seen.sums.items():
        shown = [min(max(v, 1e-9), top) if not math.isnan(v) else top for v in values]
        sums.plot(SIZES, shown, marker="o", ms=4, color=COLOURS[name], lw=2, label=name)
    sums.text(SIZES[-1], top * 1.6, "infinite", ha="right", va="bottom", color=COLOURS["float16"])
    sums.axvline(seen.size, color=plots.INK, lw=1)
    sums.set(xscale="log", yscale="log", ylim=(1e-9, 1000), xlabel="size of the numbers", ylabel="error of mean(x²)")
    sums.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=3, columnspacing=1.2)
    edges = [i / 20 for i in range(33)]
    looks = {
        "torch": (plots.COLOURS["RMSNorm"], "rounded once"),
        "llama": (plots.COLOURS["LayerNorm"], "rounded, then × w"),
    }
    for order, (colour, label) in looks.items():
        found = seen.errors[order].flatten().numpy()
        spread.hist(found, edges, histtype="stepfilled", alpha=0.3, color=colour)
        spread.hist(found, edges, histtype="step", color=colour, lw=2, label=label)
    spread.set(xlabel="error of the output in ulps", ylabel="outputs", yticks=[], xlim=(0, 1.6))
    spread.legend(loc="upper right")
    return figure


def quoted() -> dict[str, Number]:
    """Where float16's squares and sums end, bfloat16's digits, and what the two orders do as the controls start."""
    half, bfloat16 = torch.finfo(torch.float16), torch.finfo(torch.bfloat16)
    whole = torch.arange(1000)
    first = int(whole[whole.half().square().isinf()].min())
    start = round_twice(**PANEL.start())
    little = int(next(size for size, error in zip(SIZES, start.sums["float16"], strict=True) if math.isinf(error)))
    return {
        "largest": int(half.max),
        "bits": 1 - round(math.log2(bfloat16.eps)),
        "count": COLS,
        "outputs": COLS * ROWS,
        "last": first - 1,
        "fits": (first - 1) ** 2,
        "rounded": int(torch.tensor(first - 1).half().square()),
        "first": first,
        "square": first**2,
        "little": little,
        "total": COLS * little**2,
        "off": f"{start.sums['bfloat16'][SIZES.index(first)]:.0%}",
        "llama": start.errors["llama"].max().item(),
        "differ": f"{start.differ:.0%}",
    }


PANEL = Panel(
    name="precision",
    formula=(
        r"\dfrac{1}{n}\sum_j x_j^2",
        r"\mathrm{round}(\hat{x}\,w)\ \neq\ \mathrm{round}(\mathrm{round}(\hat{x})\,w)",
    ),
    options=("65504", "1000", "256", "16"),
    right="256",
    controls={"size": Slider(SIZES, 16), "dtype": Choice(tuple(OUTPUTS), "bfloat16")},
    measure=round_twice,
    draw=draw,
    code=(sum_error, round_twice),
    quoted=quoted,
)
