"""Computes what can be asked for beyond the plain norm by its formula in numpy, forward and backward, with bounds."""

from __future__ import annotations

from math import ceil

import numpy as np
import torch
from oracle import EPS, HALVES, Bounds, exact, gain, gains, sample, ulp
from torch import Tensor

COLUMNS = (0, 1, 3, 127, 129, 576, 1027, 5137)
PARTS = (1.0, 0.5, 0.0625)
WIDE = torch.float32


def rows(count: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight, bias."""
    x, residual = sample(count, columns, dtype), (sample(count, columns, seed=2) * 1.37).to(dtype)
    return x, residual, gains(columns, dtype=dtype), gains(columns, dtype=dtype, seed=3)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def counted(columns: int, partial: float) -> int:
    return ceil(columns * partial - 1e-9)


class Formula:
    """``x̂ = x·r`` of rows in float64 or longdouble, with what each option means; ``k`` columns count."""

    def __init__(self, x: np.ndarray, k: int, eps: float = EPS, mean: bool = True, floor: float = 0.0) -> None:
        squares = np.sum(x[:, :k] ** 2, axis=-1, keepdims=True)
        self.n = k if mean else 1
        with np.errstate(divide="ignore", invalid="ignore"):
            self.r = 1 / np.sqrt(np.maximum(squares / self.n, floor) + eps)
        self.floored, self.k = squares / self.n < floor, k
        self.x_hat = x * self.r

    def forward(self, w: Tensor | None, b: Tensor | None, offset: float, out: torch.dtype, ulps: float) -> Bounds:
        """Within ``ulps`` of y; a bias can cancel, so what came before it adds an error of its own size."""
        product = self.x_hat if w is None else self.x_hat * gain(w, out, offset)
        y = product if b is None else product + exact(b)
        margin = ulps * ulp(y, out)
        if b is not None:
            eps = 20 * 2.0**-23 if out in HALVES else ulps * np.finfo(np.float32 if out is WIDE else np.float64).eps
            margin = margin + eps * np.abs(product)
        return Bounds(y - margin, y + margin)

    def backward(self, g: np.ndarray, w: Tensor | None, offset: float, gr: np.ndarray | float = 0.0) -> tuple:
        """dx, the size of its terms, dw and db."""
        h = g if w is None else g * (exact(w) + offset)
        total = np.where(self.floored, 0.0, (np.sum(h * self.x_hat, -1, keepdims=True) + gr * self.r) / self.n)
        inside = np.arange(h.shape[1]) < self.k
        dx = self.r * (h - inside * self.x_hat * total)
        size = (np.sum(np.abs(h * self.x_hat), -1, keepdims=True) + np.abs(gr) * self.r) / self.n
        size = self.r * (np.abs(h) + np.abs(self.x_hat) * size)
        return dx, size, np.sum(g * self.x_hat, 0), np.sum(g, 0)


def near(got: Tensor, value: np.ndarray, size: np.ndarray, units: float, what: object, low: torch.dtype) -> None:
    """Rounded once, from arithmetic of fp32 (fp64 for fp64) in which terms of that size were added."""
    unit = torch.finfo(torch.float64 if got.dtype is torch.float64 else torch.float32).eps / 2
    value = np.asarray(value, dtype=exact(got).dtype)
    margin = 0.501 * ulp(value, low) + units * unit * size + torch.finfo(low).smallest_normal * 2.0**-20
    Bounds(value - margin, value + margin).check(got, what)
