"""The only file with what all figures share: colours, the norms, rows to put through them, a sheet to draw on.

Colours are Okabe and Ito's, which stay apart for colour-blind readers, and lines differ in style too. Labels are signs
and short words, so that the pages in both languages share the files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import rmsnorm
from rmsnorm.bench.figures import WIDTH

OURS, OTHER, THIRD, GREY = "#D55E00", "#0072B2", "#009E73", "#777777"
F64 = torch.float64


def rms_norm(x: Tensor, eps: float = 0.0, weight: Tensor | None = None) -> Tensor:
    return rmsnorm.rms_norm(x, x.shape[-1:], weight, eps)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=0.0)


def batch_norm(x: Tensor) -> Tensor:
    """As in training: a feature over all tokens of all sentences."""
    return F.batch_norm(x.flatten(0, -2), None, None, training=True, eps=1e-12).view(x.shape)


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """numpy's numbers, the same bits on every CPU; torch's differ where it has vector code for a logarithm."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def directions(count: int) -> Tensor:
    """Points around the unit circle, [count, 2]."""
    angle = torch.arange(count, dtype=F64) * (2 * torch.pi / count)
    return torch.stack([angle.cos(), angle.sin()], -1)


def ring(count: int = 240) -> Tensor:
    """The unit circle as a closed line."""
    around = directions(count)
    return torch.cat([around, around[:1]])


def sheet(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of the width of a page, and its panels."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
