"""The only file that draws sizes and limits: the gradient, eps, the types."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from shared import F64, OTHER, OURS, THIRD, directions, normal, ring, rms, rms_norm, sheet
from torch import Tensor

import rmsnorm
from rmsnorm.tutorial.ulp import gaps


def gradient() -> Figure:
    """dx at many places, for one h: along circles, of size 1/rms; and how eps levels both."""
    h = torch.tensor([1.0, 0.4], dtype=F64)
    figure, (field, size, angle) = sheet(1, 3, 3.4)
    for radius in (1.0, 2.0, 3.0):
        places = radius * directions(int(12 * radius))
        field.plot(*(radius * ring()).T, color="#DDDDDD", linewidth=0.8, zorder=1)
        field.quiver(*places.T, *_gradient(places, h, 0.0).T, color=OURS, angles="xy", scale=10, width=0.009)
    field.quiver(0, 0, *h, color="black", angles="xy", scale=10, width=0.012)
    field.text(-0.1, -0.6, "h", weight="bold")
    field.set_aspect("equal")
    field.set_xlim(-3.6, 3.6)
    field.set_ylim(-3.6, 3.6)
    field.set_xlabel("x₁")
    field.set_ylabel("x₂")
    field.set_title("dx, ε = 0: along circles")
    sizes = torch.logspace(-5, 2, 141, dtype=F64)
    row, h = normal(64, seed=3), normal(64, seed=4)
    x = sizes[:, None] * row / rms(row)
    for eps, style, colour in ((0.0, "-", OURS), (1e-6, "--", OTHER), (1e-2, ":", THIRD)):
        dx = _gradient(x, h, eps)
        size.plot(sizes, dx.norm(dim=-1), color=colour, linestyle=style, linewidth=1.8, label=f"ε = {eps:g}")
        angle.plot(sizes, F.cosine_similarity(x, dx, dim=-1).abs(), color=colour, linestyle=style, linewidth=1.8)
    size.set_yscale("log")
    size.set_title("|dx| ∝ 1 / rms(x)")
    size.legend(fontsize=8)
    angle.set_title("|cos(x, dx)|")
    for axes in (size, angle):
        axes.set_xscale("log")
        axes.set_xlabel("rms(x)")
    return figure


def _gradient(x: Tensor, h: Tensor, eps: float) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(rms_norm(leaf, eps), leaf, h.expand(x.shape))[0]


def eps() -> Figure:
    """The size of the output against that of the input, for eps inside and outside the root."""
    sizes = torch.logspace(-5, 0, 201, dtype=F64)
    x = sizes[:, None].expand(-1, 16)
    figure, axes = sheet(1, 1, 3.2)
    for inside, style, colour in ((1e-5, "-", OURS), (1e-6, "--", OURS)):
        label = f"inside: x / √(mean x² + {inside:g})"
        axes.plot(sizes, rms(rms_norm(x, inside)), color=colour, linestyle=style, linewidth=2, label=label)
        axes.plot(inside**0.5, 0.5**0.5, "o", color=colour, markersize=6)
    for outside, style, colour in ((1e-3, "-.", OTHER), (1e-6, ":", OTHER)):
        output = x / (rms(x)[:, None] + outside)
        label = f"outside: x / (rms + {outside:g})"
        axes.plot(sizes, rms(output), color=colour, linestyle=style, linewidth=2, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("rms(x)          ● rms(x) = √ε")
    axes.set_ylabel("rms(y)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _half(x: Tensor) -> Tensor:
    """Rounded to float16, in float64: torch's own float16 operators round otherwise on one CPU than on another."""
    return x.half().double()


def precision() -> Figure:
    """A norm that rounds each step to float16, and one in float32; the errors of the two orders of casts."""
    figure, (left, right) = sheet(1, 2, 3.4)
    sizes = torch.logspace(-5, 4.7, 400, dtype=F64).half()
    x = sizes[:, None].expand(-1, 64)
    mean_square = _half(_half(x.double().square()).mean(-1, keepdim=True))
    narrow = _half(x * _half(torch.rsqrt(_half(mean_square + 1e-6))))
    left.plot(sizes, rms(rms_norm(x, 1e-6).double()), color=OURS, linewidth=2.4, label="float32 inside")
    left.plot(sizes, rms(narrow), color=OTHER, linestyle="--", linewidth=1.6, label="float16 inside")
    left.axvline(256, color="black", linewidth=0.8)
    left.text(310, 0.45, "256² > 65504", fontsize=8)
    left.set_xscale("log")
    left.set_title("rms(y), x in float16, ε = 1e-6")
    left.set_xlabel("rms(x)")
    left.legend(fontsize=8, loc="lower center")
    x, weight = normal(64, 4096).bfloat16(), (1 + 0.3 * normal(4096, seed=1)).bfloat16()
    exact = rms_norm(x.double(), 1e-6, weight.double())
    edges = torch.linspace(-1.5, 1.5, 61)
    for mode, look in (("torch", {"color": OURS, "fill": True, "alpha": 0.4}), ("llama", {"color": OTHER})):
        output = rmsnorm.rms_norm(x, (4096,), weight, 1e-6, casting_mode=mode)
        error = ((output.double() - exact) / gaps(exact, torch.bfloat16)).flatten()
        density = torch.histc(error, 60, -1.5, 1.5) / error.numel() / 0.05
        right.stairs(density, edges, linewidth=1.8, label=mode, zorder=3, **look)
    right.set_title("error in ulp of bfloat16: density")
    right.set_xlabel("ulp")
    right.legend(fontsize=8, title="casting_mode")
    return figure
