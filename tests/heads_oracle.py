"""The truth of heads that are turned, written from the formula alone, in float64 (numpy.longdouble for float64).

    y = x / sqrt(mean(x²) + eps) · (offset + weight), or x       z[j] = y[j]·cos[j] ∓ y[partner]·sin[j]

Nothing here imports rmsnorm. Each rounding is done to both ends of an interval: y to its type, both products and their
sum to the promoted type of y and the cosines, what comes out to the type of y.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from oracle import HALVES, Bounds, Truth, exact
from remembered import remembered
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """The options of one call."""

    offset: float = 0.0
    mode: str = "torch"
    interleaved: bool = False
    eps: float = 1e-5

    def options(self) -> dict[str, object]:
        return {
            "offset": self.offset,
            "casting_mode": self.mode,
            "interleaved": self.interleaved,
            "eps": self.eps,
        }

    def partners(self, turned: int) -> tuple[np.ndarray, np.ndarray]:
        """For each column that is turned, the other one of its pair, and the sign with which it comes."""
        j = np.arange(turned)
        first = j % 2 == 0 if self.interleaved else j < turned // 2
        away = 1 if self.interleaved else turned // 2
        return np.where(first, j + away, j - away), np.where(first, -1.0, 1.0)

    @remembered
    def bounds(self, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, ulps: float | None) -> Bounds:
        """Where the output may be; ``ulps`` are those of the norm, None where there is none."""
        dtype, kind = x.dtype, torch.promote_types(x.dtype, cos.dtype)
        if ulps is None:
            low = high = exact(x)
        else:
            flat = Truth(x.reshape(-1, x.shape[-1]), self.eps).forward(weight, self.offset, self.mode, ulps)
            low, high = (rounded(end, dtype).reshape(x.shape) for end in (flat.low, flat.high))
        turned = cos.shape[-1]
        partner, sign = self.partners(turned)
        c, s = (exact(angle)[..., None, :, :].astype(low.dtype) for angle in (cos, sin))
        one = products(low[..., :turned], high[..., :turned], c, kind)
        two = products(low[..., partner], high[..., partner], sign * s, kind)
        sums = apart(*(a + b for a, b in zip(one, two, strict=True)))
        ends = [rounded(rounded(end, kind), dtype) for end in sums]
        whole = [np.concatenate((e, rest[..., turned:]), -1) for e, rest in zip(ends, (low, high), strict=True)]
        return Bounds(*whole)


def products(low: np.ndarray, high: np.ndarray, factor: np.ndarray, kind: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    ends = [low * factor, high * factor]
    low, high = (rounded(end, kind) for end in apart(np.minimum(*ends), np.maximum(*ends)))
    return low, high


def apart(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longdouble rounds products and sums of float64, once more than the formula: 2^-64 each."""
    if low.dtype == np.float64:
        return low, high
    return low - np.abs(low) * 2.0**-62, high + np.abs(high) * 2.0**-62


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """To the type; halves by way of fp32, in which sums and products of theirs are what torch's are."""
    narrow = torch.from_numpy(np.array(values, np.float64))  # a copy: what is remembered can't be written to
    narrow = narrow.float().to(dtype) if dtype in HALVES else narrow.to(dtype)
    return narrow.double().numpy().astype(values.dtype)


def formula(form: Form, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, normed: bool = True) -> Tensor:
    """The same in torch's differentiable operators, without roundings; for derivatives."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + form.eps) if normed else x
    y = y if weight is None else y * (weight + form.offset)
    turned = cos.shape[-1]
    partner, sign = (torch.from_numpy(a) for a in form.partners(turned))
    z = y[..., :turned] * cos.unsqueeze(-3) + y[..., partner] * (sign * sin).unsqueeze(-3)
    return torch.cat((z, y[..., turned:]), -1)
