"""The only file that writes the layer line by line: in ten lines, with the usual mistake, and as it is here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rmsnorm

from ..bench import memory
from . import plots
from .panel import Choice, Number, Panel, Slider
from .ulp import errors

EPS = 1e-5
ROWS, COLS = 64, 512
SIZES = (0.01, 0.1, 1, 10, 100, 300, 1000)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BY_HAND = (0.1, 0.1, 0.2, 0.3)
"""The tutorial's own example."""
LOST = 1000
"""Ulps: a zero where float16 has a number is off by 1024 to 2048."""


def ten_lines(x: Tensor, weight: Tensor) -> Tensor:
    """As in LLaMA: type_as rounds, then the weight again."""
    h = x.float()
    mean = h.pow(2).mean(-1, keepdim=True)
    h = h * torch.rsqrt(mean + EPS)
    return h.type_as(x) * weight


def without_float(x: Tensor, weight: Tensor) -> Tensor:
    """The usual mistake: squares and mean in x's type."""
    mean = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + EPS) * weight


def ours(x: Tensor, weight: Tensor) -> Tensor:
    """Sums in float64 or float32, and rounds once."""
    return rmsnorm.rms_norm(x, weight.shape, weight, EPS)


VERSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no .float()": without_float,
    ".float().type_as": ten_lines,
    "rmsnorm": ours,
}
COLOURS = dict(zip(VERSIONS, ("#8A94A3", plots.COLOURS["LayerNorm"], plots.COLOURS["RMSNorm"]), strict=True))


@dataclass(frozen=True)
class Versions:
    """What the versions of the layer did with the same input."""

    worst: dict[str, float]
    """The largest error of any output in ulps; above LOST where a row is lost, infinite where one isn't even finite."""
    kept: dict[str, float]
    """Bytes kept for backward ÷ bytes of the input."""
    promoted: str
    """The dtype that the ten lines return when their weight was left in float32."""
    same_as_llama: float
    """The share of outputs for which casting_mode="llama" has the bits of the ten lines."""
    steps: dict[str, tuple[float, ...]]

    @property
    def numbers(self) -> dict[str, Number]:
        """The steps by hand, then the comparison."""
        names = ("worst.mistake", "worst.ten", "worst.ours")
        worst = dict(zip(names, self.worst.values(), strict=True))
        return {**self.steps, **worst, "llama": f"{self.same_as_llama:.2%}", "promoted": self.promoted}


def compare(size: float, dtype: str) -> Versions:
    """The three versions on noise of this size."""
    noise = torch.Generator().manual_seed(0)
    x = size * torch.randn(ROWS, COLS, generator=noise)
    w = 1 + 0.2 * torch.randn(COLS, generator=noise)
    x, w = x.to(DTYPES[dtype]), w.to(DTYPES[dtype])
    ms = x.double().square().mean(-1, keepdim=True)
    exact = x.double() / (ms + EPS).sqrt() * w.double()
    worst, kept = {}, {}
    for name, f in VERSIONS.items():
        worst[name] = errors(f(x, w), exact).max().item()
        kept[name] = kept_bytes(f, x, w)
    y = rmsnorm.rms_norm(x, COLS, w, EPS, casting_mode="llama")
    same = (y == ten_lines(x, w)).double().mean().item()
    promoted = name_of(ten_lines(x, w.float()).dtype)
    return Versions(worst, kept, promoted, same, by_hand())


def by_hand() -> dict[str, tuple[float, ...]]:
    """The formula on four numbers, one line at a time."""
    x = torch.tensor(BY_HAND)
    square = x.pow(2)
    mean = square.mean()
    r = torch.rsqrt(mean)
    y = rmsnorm.RMSNorm(4, eps=0.0)(x).detach()
    lines = {"x": x, "square": square, "mean": mean, "r": r, "y": y}
    return {name: tuple(v.flatten().tolist()) for name, v in lines.items()}


def kept_bytes(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    """What autograd keeps, each storage once, beside the weight; in units of the input's bytes."""
    leaf, gain = x.clone().requires_grad_(), weight.clone().requires_grad_()
    kept = memory.kept(lambda: f(leaf, gain), [gain])
    return sum(size for size, _ in kept) / x.untyped_storage().nbytes()


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def draw(seen: Versions) -> Figure:
    """Above, the worst error of each version; below, what each keeps for backward."""
    figure, (above, below) = plots.axes(4.4, 2, 1)
    names, colours = list(seen.worst), list(COLOURS.values())
    shown = [1e6 if error > LOST else error for error in seen.worst.values()]
    above.barh(names, shown, color=colours, height=0.6)
    for place, error in enumerate(seen.worst.values()):
        lost = error > LOST
        above.text(
            min(max(shown[place], 0.1), 2e4) * 1.15,
            place,
            "lost" if lost else f"{error:.3g}",
            va="center",
            color="white" if lost else plots.INK,
            weight="bold",
            ha="right" if lost else "left",
        )
    above.axvline(0.5, color=plots.INK, lw=1, ls=":")
    above.set(xscale="log", xlim=(0.1, 1e5), title="worst error, ulps (dotted: 0.5)")
    below.barh(names, list(seen.kept.values()), color=colours, height=0.6)
    for place, share in enumerate(seen.kept.values()):
        below.text(share + 0.1, place, f"{share:.2f}", va="center", weight="bold")
    below.set(xlim=(0, 9.5), title="kept for backward ÷ input")
    for ax in (above, below):
        ax.grid(visible=False, axis="y")
        ax.invert_yaxis()
    return figure


def quoted() -> dict[str, Number]:
    """The ten lines' error as the controls start, and the first size at which float16 loses rows."""
    ten = compare(**PANEL.start()).numbers["worst.ten"]
    overflow = next(size for size in SIZES if compare(size, "float16").worst["no .float()"] > LOST)
    return {"outputs": ROWS * COLS, "ten": ten, "overflow": overflow}


PANEL = Panel(
    name="layer",
    formula=(r"y_i=\dfrac{x_i}{\sqrt{\dfrac{1}{n}\sum_j x_j^2+\epsilon}}\;w_i",),
    options=("none", "mistake", "ten", "both"),
    right="both",
    controls={
        "size": Slider(SIZES, 1),
        "dtype": Choice(tuple(DTYPES), "bfloat16"),
    },
    measure=compare,
    draw=draw,
    code=(without_float, ten_lines, ours, compare),
    quoted=quoted,
)
