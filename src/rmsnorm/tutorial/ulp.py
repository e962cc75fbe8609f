"""The only file that measures errors in ulps: the distance to the truth, in gaps between neighbouring numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DIGITS = {torch.float16: (11, -14), torch.bfloat16: (8, -126), torch.float32: (24, -126)}
"""By type: the bits of the significand, and the exponent of the smallest normal number."""


def gaps(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a type around the exact values (float64)."""
    digits, smallest = _DIGITS[dtype]
    exponent = torch.frexp(exact).exponent - 1  # |exact| is in [2^exponent, 2^(exponent+1))
    exponent = torch.where(exact == 0, smallest, exponent.clamp(min=smallest))
    return torch.ldexp(torch.ones_like(exact), exponent - digits + 1)


def errors(rounded: Tensor, exact: Tensor) -> Tensor:
    """|rounded − exact| in ulps of the rounded type; infinite where a result isn't finite though the truth is.

    Args:
        rounded: a float16, bfloat16 or float32 tensor.
        exact: the same in float64.
    """
    distance = (rounded.double() - exact).abs() / gaps(exact, rounded.dtype)
    return torch.where(rounded.isfinite() | ~exact.isfinite(), distance, math.inf)
