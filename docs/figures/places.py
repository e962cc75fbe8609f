"""The only file that draws where outputs lie: the ruler, the geometry, the dial."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from shared import F64, GREY, OTHER, OURS, THIRD, WIDTH, batch_norm, layer_norm, normal, ring, rms, rms_norm, sheet
from torch import Tensor

NORMS = {"BatchNorm": (batch_norm, THIRD), "LayerNorm": (layer_norm, OTHER), "RMSNorm": (rms_norm, OURS)}


def ruler() -> Figure:
    """Which inputs an output reads (by autograd), and which outputs one changed number moves."""
    x, place = normal(3, 4, 6), (1, 2, 3)
    changed = x.clone()
    changed[place] += 1.0
    figure, axes = sheet(2, 3, 5.0)
    for (name, (norm, tint)), (reads, moves) in zip(NORMS.items(), axes.T, strict=True):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(norm(leaf)[place], leaf)
        _block(reads, gradient.abs() > 1e-9, tint, place)
        _block(moves, (norm(changed) - norm(x)).abs() > 1e-9, tint, place)
        reads.set_title(f"{name}: x that y = ■ reads")
        moves.set_title(f"{name}: y that x = ■ moves")
        moves.set_xlabel("6 features")
    for line in axes:
        line[0].set_ylabel("3 sentences of 4 tokens")
    return figure


def _block(axes: Axes, marked: Tensor, tint: str, place: tuple[int, int, int]) -> None:
    """Sentences below one another, a line for each token; what is marked, in colour."""
    sentences, tokens, features = marked.shape
    height = tokens + 0.5
    for s, t, f in torch.cartesian_prod(*map(torch.arange, marked.shape)).tolist():
        colour = tint if marked[s, t, f] else "#EAEAEA"
        axes.add_patch(Rectangle((f, s * height + t), 0.95, 0.88, color=colour, linewidth=0))
    s, t, f = place
    axes.add_patch(Rectangle((f + 0.36, s * height + t + 0.2), 0.23, 0.48, color="black", linewidth=0))
    axes.set_xlim(0, features)
    axes.set_ylim(sentences * height - 0.5, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def geometry() -> Figure:
    """The circle and the two points for n = 2, the sphere and the circle for n = 3, and what gain and eps do."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    flat, bent = figure.add_subplot(1, 3, 1), figure.add_subplot(1, 3, 3)
    for axes in (flat, bent):
        axes.plot(*rms_norm(ring()).T, color="#BBBBBB", linewidth=1, zorder=1)
        axes.set_aspect("equal")
        axes.set_xlim(-3, 3)
        axes.set_ylim(-4.6, 2.8)
        axes.set_xticks([-2, 0, 2])
        axes.set_yticks([-2, 0, 2])
    x = 1.3 * normal(14, 2, seed=7).clamp(-2, 2)
    y = rms_norm(x)
    flat.plot([-2.2, 2.2], [2.2, -2.2], color=OTHER, linewidth=0.9, linestyle=(0, (4, 3)))
    flat.text(1.75, -1.6, "⊥ 1", color=OTHER)
    for ends in torch.stack([x, y], 1):
        flat.plot(*ends.T, color="#BBBBBB", linewidth=0.8, zorder=1)
    flat.plot(*x.T, "o", color=GREY, markersize=3.5, label="x")
    flat.plot(*y.T, "o", color=OURS, markersize=5, label="RMSNorm(x)")
    flat.plot(*layer_norm(x).T, "D", color=OTHER, markersize=7, linestyle="none", label="LayerNorm(x)")
    flat.set_title("n = 2: radius √2")
    _sphere(figure.add_subplot(1, 3, 2, projection="3d"))
    weight = torch.tensor([1.8, 0.6], dtype=F64)
    bent.plot(*rms_norm(ring(), weight=weight).T, color=OURS, linewidth=1.8, label="w = (1.8, 0.6)")
    for eps, style, colour in ((0.25, "--", OTHER), (1.0, ":", THIRD)):
        small = rms_norm(0.5 * rms_norm(ring()), eps)
        bent.plot(*small.T, color=colour, linestyle=style, linewidth=1.8, label=f"rms(x) = 0.5, ε = {eps:g}")
    bent.set_title("w: ellipse; ε: inside")
    for axes in (flat, bent):
        axes.legend(loc="lower center", fontsize=8)
    return figure


def _sphere(axes: Axes) -> None:
    x = normal(300, 3, seed=2)
    axes.scatter(*rms_norm(x).T, color=OURS, s=6, alpha=0.6)
    axes.scatter(*layer_norm(x).T, color=OTHER, s=8, marker="D", depthshade=False)
    axes.quiver(0, 0, 0, 1.4, 1.4, 1.4, color="black", linewidth=1.2, arrow_length_ratio=0.12)
    axes.text(1.55, 1.55, 1.55, "1", weight="bold")
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_ticks([-1, 0, 1])
    axes.set_box_aspect((1, 1, 1))
    axes.view_init(elev=14, azim=-38)
    axes.set_title("n = 3: radius √3", y=1.02)


def dial() -> Figure:
    """Four numbers of mean 0, plus a constant: what both norms put out, and the two sides of the triangle."""
    centred = torch.tensor([-3.0, -1.0, 0.5, 3.5], dtype=F64)
    shift = torch.linspace(-12, 12, 241, dtype=F64)
    x = centred + shift[:, None]
    ours, others = rms_norm(x), layer_norm(x)
    sin = x.std(-1, correction=0) / rms(x)
    cos = x.mean(-1) / rms(x)
    assert torch.allclose(ours, sin[:, None] * others + cos[:, None], rtol=0, atol=1e-14)
    figure, (left, right) = sheet(1, 2, 3.4)
    for number in range(x.shape[1]):
        one = {} if number else {"label": "RMSNorm(x + c)"}
        two = {} if number else {"label": "LayerNorm(x + c)"}
        left.plot(shift, ours[:, number], color=OURS, linewidth=1.8, **one)
        left.plot(shift, others[:, number], color=OTHER, linewidth=1.2, linestyle="--", **two)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_ylim(-2.4, 2)
    left.set_title("the four outputs")
    right.plot(shift, sin, color=OTHER, linestyle="--", linewidth=1.8, label="sin θ = std / rms")
    right.plot(shift, cos, color=THIRD, linewidth=1.8, label="cos θ = mean / rms")
    right.axvline(0, color="black", linewidth=0.8)
    right.set_title("RMSNorm = sin θ · LayerNorm + cos θ · 1")
    for axes in (left, right):
        axes.set_xlabel("c = mean of x + c")
        axes.legend(fontsize=8, loc="lower right")
    return figure
