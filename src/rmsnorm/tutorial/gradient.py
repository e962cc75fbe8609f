"""The only file that shows the gradient: across the input, as large as 1/rms, and what eps does to both."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

import rmsnorm

from . import plots
from .panel import Number, Panel, Slider

SIZES = tuple(10.0 ** (i / 2) for i in range(-8, 5))
EPSILONS = (0, 1e-8, 1e-5, 1e-3, 0.1, 1.0)
DIRECTION, INCOMING = (0.9, 0.35), (0.3, 0.95)
"""In two dimensions, so that the picture is the whole truth."""


@dataclass(frozen=True)
class Gradient:
    """At the chosen size, and at every size."""

    x: Tensor
    incoming: Tensor
    dx: Tensor
    eps: float
    rms: float
    cosine: float
    """Between dx and x, measured."""
    predicted: float
    """The same from the formula: (x·dx) = r (x·h) · eps / (mean(x²) + eps)."""
    lengths: Tensor
    """|dx| by size: [sizes]."""

    @property
    def numbers(self) -> dict[str, Number]:
        """Sizes and the angle."""
        length = float(self.dx.norm())
        return {
            "rms": self.rms,
            "length": length,
            "product": length * self.rms,
            "cosine": self.cosine,
            "predicted": self.predicted,
        }


def gradient_at(x: Tensor, h: Tensor, eps: float) -> Tensor:
    """dx for an incoming gradient h, by our backward."""
    leaf = x.clone().requires_grad_()
    y = rmsnorm.rms_norm(leaf, len(x), eps=eps)
    (dx,) = torch.autograd.grad(y, leaf, h)
    return dx


def differentiate(size: float, eps: float) -> Gradient:
    """One vector of the chosen rms, and the same at all sizes."""
    direction = torch.tensor(DIRECTION).double()
    direction /= direction.square().mean().sqrt()
    h = torch.tensor(INCOMING).double()
    x = size * direction
    dx = gradient_at(x, h, eps)
    cosine = (x @ dx) / (x.norm() * dx.norm())

    ms = x.square().mean()
    r = 1 / (ms + eps).sqrt()
    along = r * (x @ h) * eps / (ms + eps)
    predicted = along / (x.norm() * dx.norm())
    every = [gradient_at(s * direction, h, eps) for s in SIZES]
    lengths = torch.stack(every).norm(dim=-1)
    angles = cosine.item(), predicted.item()
    return Gradient(x, h, dx, eps, size, *angles, lengths)


def draw(seen: Gradient) -> Figure:
    """Above, input, incoming gradient and dx as arrows of one length; below, |dx| against the size of the input."""
    figure, (plane, curve) = plots.axes(6.2, 2, 1, height_ratios=(1.25, 1))
    plots.bare(plane)
    angle = torch.linspace(0, 2 * math.pi, 200)
    plane.plot(angle.cos().numpy(), angle.sin().numpy(), color="#C4CBD4", lw=1.2)
    along = seen.x / seen.x.norm()
    arrows = {
        "x": ((0, 0), along, plots.COLOURS["x"]),
        "incoming": (along.tolist(), 0.8 * seen.incoming / seen.incoming.norm(), "#9AA3AF"),
        "dx": (along.tolist(), 0.8 * seen.dx / seen.dx.norm(), plots.COLOURS["RMSNorm"]),
    }
    for name, (start, step, colour) in arrows.items():
        end = (start[0] + float(step[0]), start[1] + float(step[1]))
        plane.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.6, "shrinkA": 0})
        side = "left" if name == "x" else "right" if name == "dx" else "center"
        plane.text(end[0] + 0.06 * (name == "x"), end[1] + 0.08, name, color=colour, weight="bold", ha=side)
    plane.set(xlim=(-1.5, 1.7), ylim=(-1.1, 1.45), xticks=[], yticks=[], aspect="equal")

    ideal = [seen.lengths[-1].item() * SIZES[-1] / s for s in SIZES]
    curve.plot(SIZES, ideal, color="#888888", lw=1, ls=":", label="1/rms")
    curve.plot(SIZES, seen.lengths.numpy(), color=plots.COLOURS["RMSNorm"], lw=2.6, label="measured")
    curve.plot([seen.rms], [seen.dx.norm().item()], "o", ms=9, color=plots.COLOURS["RMSNorm"], mec="white", mew=1.5)
    curve.set(xscale="log", yscale="log", ylim=(3e-3, 3e4), xlabel="rms of the input", ylabel="length of dx")
    curve.legend(loc="upper right")
    return figure


def quoted() -> dict[str, Number]:
    """The angle between dx and h, in degrees, where eps is largest and x small."""
    seen = differentiate(size=0.1, eps=EPSILONS[-1])
    cosine = torch.cosine_similarity(seen.dx, seen.incoming, dim=0)
    return {"size": seen.rms, "eps": seen.eps, "degrees": math.degrees(cosine.acos().item())}


PANEL = Panel(
    name="gradient",
    formula=(
        r"r=\dfrac{1}{\sqrt{\mathrm{rms}^2+\epsilon}},\quad \hat{x}=r\,x",
        r"dx=r\,\left(h-\hat{x}\cdot\dfrac{1}{n}\sum_j h_j\hat{x}_j\right)",
    ),
    options=("larger", "same", "smaller", "square"),
    right="smaller",
    controls={"size": Slider(SIZES, 1.0), "eps": Slider(EPSILONS, 1e-5)},
    measure=differentiate,
    draw=draw,
    code=(gradient_at, differentiate),
    quoted=quoted,
)
