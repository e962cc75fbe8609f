"""The truth of the gated norm, written from the formula alone, in float64 (numpy.longdouble for float64 inputs).

    a = g / (1 + exp(-g)) or 1 / (1 + exp(-g))      x̂ = x·a or x, divided by its rms      y = x̂·(offset + weight) [·a]

Nothing here imports rmsnorm. Roundings in between make intervals: what is near the middle of two numbers may become
either, and every later step is done to both ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oracle import Bounds, exact, gain, ulp
from remembered import remembered
from torch import Tensor

# How far the arithmetic between two roundings may be off, relative: 16 units of fp32, for half types 0.004 ulp.
SLACK = 2.0**-20


@dataclass(frozen=True)
class Form:
    """The options of one call."""

    silu: bool = True
    norm_before_gate: bool = True
    group_size: int | None = None
    offset: float = 0.0
    mode: str = "torch"
    eps: float = 1e-5

    def options(self) -> dict[str, object]:
        return {
            "activation": "silu" if self.silu else "sigmoid",
            "norm_before_gate": self.norm_before_gate,
            "group_size": self.group_size,
            "offset": self.offset,
            "casting_mode": self.mode,
            "eps": self.eps,
        }

    def activation(self, gate: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            sigmoid = 1 / (1 + np.exp(-gate))
            return gate * sigmoid if self.silu else sigmoid

    def normalised(self, x: np.ndarray, a: np.ndarray) -> np.ndarray:
        z = x if self.norm_before_gate else x * a
        groups = z.reshape(*z.shape[:-1], -1, self.group_size or z.shape[-1])
        mean = np.mean(groups * groups, axis=-1, keepdims=True)
        return (groups / np.sqrt(mean + groups.dtype.type(self.eps))).reshape(z.shape)

    @remembered
    def bounds(self, x: Tensor, gate: Tensor, weight: Tensor | None, ulps: float) -> Bounds:
        """Where the output may be: within ``ulps`` of the truth, where nothing is rounded on the way."""
        wide = exact(x)
        a = self.activation(exact(gate).astype(wide.dtype))
        value = self.normalised(wide, a)
        factor = None if weight is None else gain(weight, x.dtype, self.offset)
        if self.mode == "torch" or x.dtype in (torch.float32, torch.float64):
            value = value if factor is None else value * factor
            value = value * a if self.norm_before_gate else value
            margin = ulps * ulp(value, x.dtype)
            return Bounds(value - margin, value + margin)
        ends = rounded([value, value], x.dtype)
        if weight is not None:
            ends = rounded([end * factor for end in ends], torch.promote_types(x.dtype, weight.dtype))
        if self.norm_before_gate:
            ends = rounded([end * a for end in ends], x.dtype)
        return Bounds(np.minimum(*ends), np.maximum(*ends))


def rounded(ends: list[np.ndarray], dtype: torch.dtype) -> list[np.ndarray]:
    """The ends, moved apart by the slack and rounded to the type."""
    low, high = np.minimum(*ends), np.maximum(*ends)
    moved = (low - SLACK * np.abs(low), high + SLACK * np.abs(high))
    return [torch.from_numpy(end).to(dtype).double().numpy() for end in moved]


def formula(form: Form, x: Tensor, gate: Tensor, weight: Tensor | None) -> Tensor:
    """The same in torch's differentiable operators, without roundings; for derivatives."""
    a = gate * torch.sigmoid(gate) if form.silu else torch.sigmoid(gate)
    z = x if form.norm_before_gate else x * a
    groups = z.unflatten(-1, (-1, form.group_size or z.shape[-1]))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + form.eps)).flatten(-2)
    y = y if weight is None else y * (weight + form.offset)
    return y * a if form.norm_before_gate else y
