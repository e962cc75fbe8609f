"""The only file that shows what eps is for: rows that are small or zero, and the two places where eps can stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rmsnorm

from . import plots
from .panel import Number, Panel, Slider

COLS = 256
SIZES = tuple(10.0**i for i in range(-8, 3))
EPSILONS = (0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-3, 0.1)


@dataclass(frozen=True)
class Small:
    """What comes out of rows of each size."""

    size: float
    eps: float
    inside: Tensor
    """The output's rms by size of the input, eps inside the root: [sizes]."""
    outside: Tensor
    """The same with eps added to the root."""
    here: float
    zero_row: float
    """What every output of a zero row is."""
    zero_gradient: float
    """The rms of its gradient ÷ the rms of the gradient that comes in."""
    eps_in_half: float
    """eps, rounded to float16."""

    @property
    def numbers(self) -> dict[str, Number]:
        """At the chosen size, and for the row of zeros."""
        return {
            "here": self.here,
            "zero": self.zero_row,
            "gradient": self.zero_gradient,
            "half": self.eps_in_half,
        }


def rms(x: Tensor) -> Tensor:
    """Over the last dimension."""
    return x.square().mean(-1).sqrt()


def shrink(size: float, eps: float) -> Small:
    """Rows of every size, one of this size, one of zeros."""
    noise = torch.Generator().manual_seed(0)
    row = torch.randn(COLS, generator=noise).double()
    row /= rms(row)
    x = torch.tensor(SIZES).double()[:, None] * row
    inside = rms(rmsnorm.rms_norm(x, COLS, eps=eps))
    outside = rms(x / (rms(x)[:, None] + eps))
    here = rms(rmsnorm.rms_norm(size * row, COLS, eps=eps))

    zeros = torch.zeros(COLS, requires_grad=True)
    y = rmsnorm.rms_norm(zeros, COLS, eps=eps)
    y.backward(row.float())
    assert zeros.grad is not None
    gradient = rms(zeros.grad) / rms(row)
    half = torch.tensor(eps).half()
    numbers = [v.item() for v in (here, y[0], gradient, half)]
    return Small(size, eps, inside, outside, *numbers)


def draw(seen: Small) -> Figure:
    """The output's rms against the input's: 1 where the norm works, a slope of one where eps takes over."""
    figure, (ax,) = plots.axes(3.7)
    ax.axhline(1, color="#888888", lw=1, ls=":")
    ax.plot(SIZES, seen.outside.numpy(), color=plots.COLOURS["x"], lw=1.6, ls="--", label="x / (rms + ε)")
    ax.plot(SIZES, seen.inside.numpy(), color=plots.COLOURS["RMSNorm"], lw=2.6, label="x / √(rms² + ε)")
    if seen.eps:
        ax.axvline(seen.eps**0.5, color=plots.COLOURS["RMSNorm"], lw=1, ls=":")
        ax.text(seen.eps**0.5, 2.2e-6, " √ε", color=plots.COLOURS["RMSNorm"])
    ax.plot([seen.size], [seen.here], "o", ms=9, color=plots.COLOURS["RMSNorm"], mec="white", mew=1.5)
    ax.set(xscale="log", yscale="log", ylim=(1e-6, 10), xlabel="rms of the input", ylabel="rms of the output")
    ax.legend(loc="lower right")
    return figure


def quoted() -> dict[str, Number]:
    """At the eps that the control starts with; and what float16 makes of a smaller one."""
    eps, tiny = PANEL.start()["eps"], 1e-8
    half = torch.finfo(torch.float16)
    knee = shrink(eps**0.5, eps)
    return {
        "eps": eps,
        "knee": knee.size,
        "left": knee.here,
        "gradient": knee.zero_gradient,
        "smallest": half.smallest_normal * half.eps,
        "tiny": tiny,
        "half": shrink(knee.size, tiny).eps_in_half,
    }


PANEL = Panel(
    name="zero",
    formula=(
        r"y=\dfrac{x}{\sqrt{\mathrm{rms}^2+\epsilon}}",
        r"(\ \neq\ \ \dfrac{x}{\mathrm{rms}+\epsilon}\ )",
    ),
    options=("zero", "one", "nan", "error"),
    right="nan",
    controls={"eps": Slider(EPSILONS, 1e-5), "size": Slider(SIZES, 1e-3)},
    measure=shrink,
    draw=draw,
    code=(rms, shrink),
    quoted=quoted,
)
