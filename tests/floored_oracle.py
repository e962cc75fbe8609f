"""The only file that knows the truth under the second rule for eps, ``r = 1/sqrt(max(mean(x²), floor))``."""

from __future__ import annotations

import numpy as np
import torch
from oracle import Bounds, Truth, exact, gain, sample, ulp
from remembered import key, remembered

from rmsnorm.forms.floored import floored_rms_norm


def rows_around(floor: float, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of each size in turn: a few bits of a half type and a mean square suffice to tell 0.98 from 1.02."""
    info, root = torch.finfo(dtype), floor**0.5
    sizes = (0.0, root * 0.98, root * 1.02, info.smallest_normal / 4, 1e-30, 1.0, 1e4, info.max / 16, 1e-20)
    x = sample(rows, columns).clamp(-1e3, 1e3)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    x = x.clamp(-12, 12) if columns > 200 else x
    x = x * torch.tensor([sizes[i % len(sizes)] for i in range(rows)], dtype=torch.float64).view(-1, 1)
    return x.clamp(-info.max, info.max).to(dtype)


class FlooredTruth(Truth):
    def __init__(self, x: torch.Tensor, floor: float) -> None:
        wide = exact(x)
        self.dtype = x.dtype
        self.key = "FlooredTruth", key(x), key(floor)
        square = np.mean(wide * wide, axis=-1, keepdims=True)
        self.moves = square >= floor  # as clamp_min has it
        self.r = 1 / np.sqrt(np.maximum(square, wide.dtype.type(floor)))
        self.normalised = wide * self.r

    @remembered
    def backward(self, grad, weight, offset):
        """The bounds of the other rule, without its projection where the floor holds; beyond the largest number of the
        type the gradient is infinite, as 1e12 times anything is in fp16."""
        g, x_hat = exact(grad), self.normalised
        h = g if weight is None else g * gain(weight, self.dtype, offset)
        accumulation = torch.finfo(torch.float64 if self.dtype is torch.float64 else torch.float32)
        unit, step = accumulation.eps / 2, accumulation.smallest_normal * accumulation.eps
        mean = np.where(self.moves, np.mean(h * x_hat, axis=-1, keepdims=True), 0)
        spread = np.where(self.moves, np.mean(np.abs(h * x_hat), axis=-1, keepdims=True), 0)
        dx = self.r * (h - x_hat * mean)
        size = self.r * (np.abs(h) + np.abs(x_hat) * spread)
        margin = 0.501 * ulp(dx, self.dtype) + 16 * unit * size + self.r * step * (1 + np.abs(x_hat) + np.abs(mean))
        low, high, largest = dx - margin, dx + margin, torch.finfo(self.dtype).max
        dx_bounds = Bounds(np.where(low < -largest, -np.inf, low), np.where(high > largest, np.inf, high))
        if weight is None:
            return dx_bounds, None
        dw = np.sum(g * x_hat, axis=0)
        margin = 0.501 * ulp(dw, weight.dtype) + 16 * unit * np.sum(np.abs(g * x_hat), axis=0)
        return dx_bounds, Bounds(dw - margin, dw + margin)


def gradients(x, weight, grad, floor, **options):
    """[y, dx, dw]"""
    leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
    y = floored_rms_norm(leaves[0], x.shape[-1], *leaves[1:] or [None], floor, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]
