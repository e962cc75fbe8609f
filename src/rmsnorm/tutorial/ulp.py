"""The only file that measures errors in ulps: the distance to the truth, in gaps between neighbouring numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaps(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a type around the exact values (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1  # |exact| is in [2^exponent, 2^(exponent+1))
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def errors(rounded: Tensor, exact: Tensor) -> Tensor:
    """|rounded − exact| in ulps of the rounded type; infinite where a result isn't finite though the truth is.

    Args:
        rounded: a float16, bfloat16 or float32 tensor.
        exact: the same in float64.
    """
    distance = (rounded.double() - exact).abs() / gaps(exact, rounded.dtype)
    return torch.where(rounded.isfinite() | ~exact.isfinite(), distance, math.inf)
