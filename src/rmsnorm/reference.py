"""The only file that defines the maths: RMS normalisation and its derivative, in plain torch, on any device.

    r = 1 / sqrt(mean(x²) + eps)        over the last ``dims`` dimensions, in the accumulation type
    y = x · r · (offset + weight)

Everything else in this package computes the same function faster. These functions are the default kernel of
every operator (see ``_ops.py``), the oracle that tests compare against, and the page to read first.
They are ordinary differentiable torch code, so second derivatives are taken through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics and gains are computed: float32 for half types, otherwise the type itself."""
    return _WIDER.get(dtype, dtype)


def result_dtype(input: Tensor, weight: Tensor | None, round_first: bool) -> torch.dtype:
    """The type of the output: the input's; rounding first (Llama) multiplies under type promotion instead."""
    if weight is None or not round_first:
        return input.dtype
    return torch.promote_types(input.dtype, weight.dtype)


def _last(dims: int) -> tuple[int, ...]:
    return tuple(range(-dims, 0))


def _gain(weight: Tensor, input: Tensor, offset: float) -> Tensor:
    wide = weight.to(torch.promote_types(accumulation_dtype(input.dtype), weight.dtype))
    return wide + offset if offset else wide


def rms_norm(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    """Returns ``(output, rstd)``; ``rstd`` has the shape of ``input`` with the last ``dims`` sizes set to 1."""
    wide = input.to(accumulation_dtype(input.dtype))
    rstd = torch.rsqrt(wide.square().mean(_last(dims), keepdim=True) + eps)
    output = wide * rstd
    if weight is not None:
        if round_first:
            output = output.to(input.dtype)
        output = output * _gain(weight, input, offset)
    return output.to(result_dtype(input, weight, round_first)).contiguous(), rstd


def rms_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the input and of the weight, for real types.

    With ``x̂ = x·r`` and ``h = grad·(offset + weight)``:

        dx = r · (h - x̂ · mean(h · x̂))          dw = Σ_rows grad · x̂

    (arXiv 1910.07467, eq. 8-10, with eps kept.) Roundings inside the forward count as the identity, so the two
    casting modes share these formulas.
    """
    wide = input.to(torch.promote_types(accumulation_dtype(input.dtype), accumulation_dtype(grad.dtype)))
    rstd = torch.rsqrt(wide.square().mean(_last(dims), keepdim=True) + eps)
    normalised = wide * rstd
    grad = grad.to(wide.dtype)
    scaled = grad if weight is None else grad * _gain(weight, input, offset)
    dx = rstd * (scaled - normalised * (scaled * normalised).mean(_last(dims), keepdim=True))
    if weight is None:
        return dx.to(input.dtype), None
    leading = tuple(range(input.dim() - dims))
    dw = (grad * normalised).sum(leading) if leading else grad * normalised
    return dx.to(input.dtype), dw.to(weight.dtype)
