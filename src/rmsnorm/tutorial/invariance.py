"""The only file with the board of invariances: what five norms ignore, each cell of the paper's Table 1 measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

import rmsnorm

from . import plots
from .panel import Number, Panel, Slider

CASES, INPUTS, NEURONS = 16, 24, 32
SMALLEST_EPS = 1e-30
"""In place of 0, which torch's BatchNorm refuses; vanishes beside these numbers."""
HOLDS_BELOW = 1e-3
"""Relative: between what eps = 1e-5 does to an invariance that holds, and the least that breaks one."""

Norm = Callable[[Tensor, Tensor, float], Tensor]


def batch_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Per neuron, over the data, as in training."""
    eps = max(eps, SMALLEST_EPS)
    return F.batch_norm(x @ w.T, None, None, training=True, eps=eps)


def weight_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Divides each neuron's weights by their length."""
    return x @ F.normalize(w, eps=eps).T


def layer_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Per case, over the neurons; the mean goes first."""
    return rmsnorm.layer_norm(x @ w.T, len(w), eps=eps)


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """Per case, over the neurons."""
    return rmsnorm.rms_norm(x @ w.T, len(w), eps=eps)


def p_rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """The rms of the first quarter stands for all."""
    a = x @ w.T
    part = a[:, : len(w) // 4].square().mean(-1, True)
    return a * torch.rsqrt(part + eps)


NORMS: dict[str, Norm] = {
    "BatchNorm": batch_norm,
    "WeightNorm": weight_norm,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
    "pRMSNorm": p_rms_norm,
}
CHANGES: dict[str, str] = {
    "scale_weights": r"$\delta\,W$",
    "shift_weights": r"$W+\mathbf{1}\kappa^{\!\top}$",
    "scale_neuron": r"$\delta\,w_1$",
    "scale_data": r"$\delta\,X$",
    "shift_data": r"$X+\delta$",
    "scale_case": r"$\delta\,x_1$",
}
"""By name: the row's label in the figure."""


@dataclass(frozen=True)
class Board:
    """How far the outputs moved, relative to their size."""

    moved: dict[str, dict[str, float]]
    """By change, then by norm."""

    @property
    def numbers(self) -> dict[str, Number]:
        """RMSNorm's column."""
        return {name: row["RMSNorm"] for name, row in self.moved.items()}

    def holds(self, change: str, norm: str) -> bool:
        """Whether the norm ignores the change."""
        return self.moved[change][norm] < HOLDS_BELOW


def board(factor: float, eps: float) -> Board:
    """Changes W or X, and compares norm(X Wᵀ)."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(CASES, INPUTS, generator=noise).double()
    w = torch.randn(NEURONS, INPUTS, generator=noise).double()
    kappa = factor * torch.randn(INPUTS, generator=noise).double()
    neuron, case = torch.ones(NEURONS, 1), torch.ones(CASES, 1)
    neuron[0] = case[0] = factor
    changed = {
        "scale_weights": (x, factor * w),
        "shift_weights": (x, w + kappa),
        "scale_neuron": (x, neuron * w),
        "scale_data": (factor * x, w),
        "shift_data": (x + factor, w),
        "scale_case": (case * x, w),
    }
    moved: dict[str, dict[str, float]] = {}
    for change, (x2, w2) in changed.items():
        moved[change] = {}
        for name, norm in NORMS.items():
            y, y2 = norm(x, w, eps), norm(x2, w2, eps)
            away = (y2 - y).abs().max() / y.abs().max()
            moved[change][name] = away.item()
    return Board(moved)


def draw(seen: Board) -> Figure:
    """A lamp for each norm and change, with the power of ten by which the outputs moved."""
    figure, (ax,) = plots.axes(3.9)
    plots.bare(ax)
    lamps = LinearSegmentedColormap.from_list("lamps", ["#CFE8DC", "#F6D3BF"])
    holds = [[0.0 if seen.holds(change, norm) else 1.0 for norm in NORMS] for change in CHANGES]
    ax.pcolormesh(holds, cmap=lamps, vmin=0, vmax=1, edgecolors="white", lw=4)
    for y, (change, row) in enumerate(seen.moved.items()):
        for x, (norm, away) in enumerate(row.items()):
            same = seen.holds(change, norm)
            ink = "#0B5D3B" if same else "#9A3B00"
            ax.text(x + 0.5, y + 0.42, "✓" if same else "✗", ha="center", va="center", color=ink, size=13)
            power = "0" if away == 0 else f"$10^{{{math.floor(math.log10(away))}}}$"
            ax.text(x + 0.5, y + 0.78, power, ha="center", va="center", color=ink, size=8)
    ax.set_yticks([y + 0.5 for y in range(len(CHANGES))], list(CHANGES.values()), size=11)
    ax.set_xticks([x + 0.5 for x in range(len(NORMS))], [n.replace("Norm", "\nNorm") for n in NORMS])
    ax.xaxis.tick_top()
    for label, name in zip(ax.get_xticklabels(), NORMS, strict=True):
        label.set(color=plots.COLOURS[name], weight="bold")
    ax.tick_params(length=0)
    ax.invert_yaxis()
    return figure


def quoted() -> dict[str, Number]:
    """Where the line between both signs is."""
    return {"threshold": HOLDS_BELOW}


PANEL = Panel(
    name="invariance",
    formula=(r"\mathrm{rms}(\alpha x)=\alpha\,\mathrm{rms}(x)", r"a=Wx,\qquad y=\mathrm{norm}(a)"),
    options=("shift_weights", "scale_data", "scale_case", "scale_weights"),
    right="shift_weights",
    controls={"factor": Slider((0.1, 0.5, 3, 10, 100), 3), "eps": Slider((0, 1e-8, 1e-5, 1e-2, 1), 0)},
    measure=board,
    draw=draw,
    code=(batch_norm, weight_norm, layer_norm, rms_norm, p_rms_norm, board),
    quoted=quoted,
)
