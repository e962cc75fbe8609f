"""The only file that turns one vector's dial: mean, std and rms as two sides and the hypotenuse of a triangle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Arc
from torch import Tensor

import rmsnorm

from . import plots
from .panel import Number, Panel, Slider

PATTERN = (-1.6, -0.5, 0.1, 0.7, 1.3)
"""Sums to zero, so that the shift is the mean."""


@dataclass(frozen=True)
class Dial:
    """A vector, its two norms, and the triangle of its statistics."""

    x: Tensor
    layer: Tensor
    rms_normed: Tensor
    mean: float
    std: float
    rms: float
    theta: float
    """Between the vector and (1, …, 1), in radians."""
    gap: float
    """The largest difference between the two sides of the identity."""

    @property
    def numbers(self) -> dict[str, Number]:
        """The statistics, the angle, and how far the identity is from holding."""
        return {
            "mean": self.mean,
            "std": self.std,
            "rms": self.rms,
            "theta": math.degrees(self.theta),
            "apart": float((self.layer - self.rms_normed).abs().max()),
            "gap": self.gap,
        }


def turn(shift: float, spread: float) -> Dial:
    """One vector, in float64, without eps."""
    pattern = torch.tensor(PATTERN, dtype=torch.float64)
    x = spread * pattern + shift
    mean = x.mean()
    std = x.std(correction=0)
    rms = x.square().mean().sqrt()  # rms² = mean² + std²
    theta = torch.atan2(std, mean)
    layer = rmsnorm.layer_norm(x, len(x), eps=0.0)
    rms_normed = rmsnorm.rms_norm(x, len(x), eps=0.0)
    mixed = theta.sin() * layer + theta.cos() * 1
    gap = (rms_normed - mixed).abs().max()
    sizes = [v.item() for v in (mean, std, rms, theta, gap)]
    return Dial(x, layer, rms_normed, *sizes)


def draw(seen: Dial) -> Figure:
    """Above, the vector and its two norms as bars; below, the triangle on the half circle."""
    figure, (bars, dial) = plots.axes(5.0, 2, 1, height_ratios=(1, 1.05))
    places = torch.arange(len(seen.x))
    for offset, (name, values) in enumerate({"x": seen.x, "LayerNorm": seen.layer, "RMSNorm": seen.rms_normed}.items()):
        heights = values.tolist()
        bars.bar(places + 0.27 * (offset - 1), heights, 0.25, label=name, color=plots.COLOURS[name])
    bars.axhline(0, color="#888888", lw=0.8)
    bars.set_ylim(-5, 7)
    bars.set_xticks(places.tolist(), [f"$x_{i + 1}$" for i in places.tolist()])
    bars.grid(visible=False, axis="x")
    bars.legend(loc="upper center", ncols=3)

    plots.bare(dial)
    cos, sin = math.cos(seen.theta), math.sin(seen.theta)
    dial.add_patch(Arc((0, 0), 2, 2, theta1=0, theta2=180, color="#B6BDC7", lw=1.2))
    dial.plot([0, cos], [0, 0], color=plots.COLOURS["x"], lw=3, solid_capstyle="round")
    dial.plot([cos, cos], [0, sin], color=plots.COLOURS["LayerNorm"], lw=3, solid_capstyle="round")
    dial.annotate("", (cos, sin), (0, 0), arrowprops={"arrowstyle": "-|>", "color": plots.COLOURS["RMSNorm"], "lw": 3})
    dial.add_patch(Arc((0, 0), 0.44, 0.44, theta1=0, theta2=math.degrees(seen.theta), color=plots.INK, lw=1))
    dial.text(0.16, 0.26, "θ", ha="left")
    dial.text(cos / 2, -0.06, f"mean/rms = cos θ = {cos:.2f}", ha="center", va="top", color=plots.COLOURS["x"])
    side = 1 if cos >= 0 else -1
    dial.text(
        cos + 0.05 * side,
        sin / 2,
        f"std/rms = sin θ\n= {sin:.2f}",
        ha="left" if side > 0 else "right",
        va="center",
        color=plots.COLOURS["LayerNorm"],
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # the half circle passes behind it
    )
    dial.set(xlim=(-1.75, 1.75), ylim=(-0.25, 1.08), xticks=[], yticks=[], aspect="equal")
    return figure


def quoted() -> dict[str, Number]:
    """The angle, in degrees, at mean 0."""
    return {"upright": turn(shift=0, spread=1).numbers["theta"]}


PANEL = Panel(
    name="dial",
    formula=(
        r"\mathrm{RMSNorm}(x)=\sin\theta\cdot\mathrm{LayerNorm}(x)+\cos\theta\cdot\mathbf{1}",
        r"\cos\theta=\dfrac{\mathrm{mean}}{\mathrm{rms}},\quad\sin\theta=\dfrac{\mathrm{std}}{\mathrm{rms}}",
    ),
    options=("never", "zero", "unit", "always"),
    right="zero",
    controls={
        "shift": Slider(tuple(i / 4 for i in range(-12, 13)), 1.0),
        "spread": Slider((0.25, 0.5, 1, 2), 1),
    },
    measure=turn,
    draw=draw,
    code=(turn,),
    quoted=quoted,
)
