"""The only file that shows which numbers share a ruler: one token of a batch changes, and the outputs that move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

import rmsnorm

from . import plots
from .panel import Number, Panel, Slider

SENTENCES, TOKENS, FEATURES = 3, 4, 6
EPS = 1e-5


def batch_norm(x: Tensor) -> Tensor:
    """As in training: one ruler per feature."""
    flat = x.reshape(-1, x.shape[-1])
    y = F.batch_norm(flat, None, None, training=True, eps=EPS)
    return y.view_as(x)


def layer_norm(x: Tensor) -> Tensor:
    """One ruler per token; also takes the mean away."""
    return rmsnorm.layer_norm(x, x.shape[-1], eps=EPS)


def rms_norm(x: Tensor) -> Tensor:
    """One ruler per token; only divides."""
    return rmsnorm.rms_norm(x, x.shape[-1], eps=EPS)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "BatchNorm": batch_norm,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
}


@dataclass(frozen=True)
class Moved:
    """By how much each output moved."""

    sentence: int
    token: int
    by: dict[str, Tensor]
    """By norm: |difference|, [sentences, tokens, features]."""

    @property
    def numbers(self) -> dict[str, Number]:
        """How many numbers moved outside the token that was changed, and how many of them in its past."""
        counts: dict[str, Number] = {}
        for name, moved in self.by.items():
            elsewhere = moved.clone()
            elsewhere[self.sentence, self.token] = 0
            counts[f"elsewhere.{name}"] = int((elsewhere > 0).sum())
        past = self.by["BatchNorm"][self.sentence, : self.token]
        counts["past"] = int((past > 0).sum())
        return counts


def change_one_token(change: float, token: int) -> Moved:
    """Changes one token and compares the outputs."""
    noise = torch.Generator().manual_seed(0)
    size = (SENTENCES, TOKENS, FEATURES)
    x = torch.randn(size, generator=noise)
    step = torch.randn(FEATURES, generator=noise)
    sentence, place = divmod(int(token) - 1, TOKENS)
    changed = x.clone()
    changed[sentence, place] += change * step
    moved = {}
    for name, norm in NORMS.items():
        moved[name] = (norm(changed) - norm(x)).abs()
    return Moved(sentence, place, moved)


def draw(seen: Moved) -> Figure:
    """A grid for each norm: tokens down, features across, darker where the output moved more."""
    figure, axes = plots.axes(4.1, 1, len(seen.by), sharey=True)
    row = seen.sentence * TOKENS + seen.token
    top = max(1e-6, *(float(moved.max()) for moved in seen.by.values()))
    for ax, (name, moved) in zip(axes, seen.by.items(), strict=True):
        plots.bare(ax)
        grid = moved.reshape(-1, FEATURES)
        ax.pcolormesh(grid.sqrt().numpy(), cmap="Greys", vmin=0, vmax=1.15 * top**0.5, edgecolors="#D5DAE1", lw=0.6)
        for y in range(TOKENS, SENTENCES * TOKENS, TOKENS):
            ax.axhline(y, color="white", lw=5)
        outline: dict[str, Any] = {"fill": False, "ec": plots.COLOURS[name], "lw": 2.6, "clip_on": False}
        if name == "BatchNorm":
            for column in range(FEATURES):
                ax.add_patch(Rectangle((column + 0.1, 0), 0.8, SENTENCES * TOKENS, **{**outline, "lw": 1.6}))
        else:
            ax.add_patch(Rectangle((0, row), FEATURES, 1, **outline))
        ax.set_title(name, color=plots.COLOURS[name])
        ax.set_xticks([])
        ax.set_xlabel("features")
    labels = [f"{s + 1}·{t + 1}" for s in range(SENTENCES) for t in range(TOKENS)]
    labels[row] = f"► {labels[row]}"
    axes[0].set_yticks([y + 0.5 for y in range(len(labels))], labels)
    axes[0].set_ylabel("sentence · token")
    axes[0].invert_yaxis()
    return figure


def quoted() -> dict[str, Number]:
    """What moves elsewhere in BatchNorm, as the controls start."""
    return {"moved": change_one_token(**PANEL.start()).numbers["elsewhere.BatchNorm"]}


PANEL = Panel(
    name="ruler",
    formula=(
        r"\mathrm{BatchNorm}:\ \dfrac{x_{btc}-\mu_c}{\sigma_c}",
        r"\mathrm{LayerNorm}:\ \dfrac{x_{btc}-\mu_{bt}}{\sigma_{bt}}",
        r"\mathrm{RMSNorm}:\ \dfrac{x_{btc}}{\mathrm{rms}_{bt}}",
    ),
    options=("batch", "layer", "rms", "all"),
    right="batch",
    controls={
        "change": Slider((0, 0.25, 0.5, 1, 2, 4, 8), 2),
        "token": Slider(tuple(range(1, SENTENCES * TOKENS + 1)), 7),
    },
    measure=change_one_token,
    draw=draw,
    code=(batch_norm, layer_norm, rms_norm, change_one_token),
    quoted=quoted,
)
