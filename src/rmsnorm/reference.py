"""The only file that defines the maths: RMS normalisation and its derivative, in plain torch, on any device.

    r = 1 / sqrt(mean(x²) + eps)        over the last ``dims`` dimensions, in the accumulation type
    y = x · r · (offset + weight)

In these functions and in the operators a negative eps is the other rule, ``r = 1 / sqrt(max(mean(x²), -eps))``: the
floor of ``F.normalize``. Where it holds, r is a constant.

Everything else in this package computes the same function faster. These functions are the default kernel of
every operator (see ``_ops.py``), the oracle that tests compare against, and the page to read first.
They are ordinary differentiable torch code, so second derivatives are taken through them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Asked once: torch.export writes such a question into its graph, where it returns no tensor.
_PROMOTED = {(a, b): torch.promote_types(a, b) for a in _FLOATING for b in _FLOATING}
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics and gains are computed: float32 for half types, otherwise the type itself."""
    return _WIDER.get(dtype, dtype)


def promoted(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The type of a product of two."""
    return _PROMOTED.get((a, b)) or torch.promote_types(a, b)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a trace in a graph where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def result_dtype(input: Tensor, weight: Tensor | None, round_first: bool) -> torch.dtype:
    """The type of the output: the input's; rounding first (Llama) multiplies under type promotion instead."""
    if weight is None or not round_first:
        return input.dtype
    return promoted(input.dtype, weight.dtype)


def spans(weight: Tensor, input: Tensor, dims: int) -> bool:
    """Whether the weight has the sizes of the last dimensions of the input: the ``dims`` normalised ones, or more."""
    return weight.dim() >= dims and weight.shape == input.shape[input.dim() - weight.dim() :]


def is_torchs(input: Tensor, weight: Tensor | None, dims: int, offset: float, round_first: bool) -> bool:
    """Whether this is what ``torch.nn.functional.rms_norm`` means by the same tensors, without a warning of its own."""
    if input.dtype not in _FLOATING:
        return False
    alike = weight is None or (weight.dtype is input.dtype and weight.dim() == dims)
    return alike and (weight is None or not (offset or round_first))


def empty_rstd(input: Tensor, dims: int) -> Tensor:
    """Room for one number per row, in the shape that ``rms_norm`` returns."""
    shape = (*input.shape[: input.dim() - dims], *[1] * dims)
    return input.new_empty(shape, dtype=accumulation_dtype(input.dtype))


def nothing(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for an output that isn't there, of the kind that the others are of."""
    if input.is_nested:  # whose new tensors are nested, or none
        return torch.empty(0, dtype=dtype or input.dtype, device=input.device)
    return input.new_empty(0, dtype=dtype)


def _last(dims: int) -> tuple[int, ...]:
    return tuple(range(-dims, 0))


def gain(weight: Tensor, input: Tensor, offset: float) -> Tensor:
    """``offset + weight``, formed in the wider of the accumulation type and the weight's."""
    wide = cast(weight, promoted(accumulation_dtype(input.dtype), weight.dtype))
    return wide + offset if offset else wide


def mean_here(terms: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The mean over ``dims``, which stay as sizes of 1."""
    return terms.mean(dims, keepdim=True)


def plus(eps: float) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """``mean_here`` and ``eps``, which may then be negative and no floor: the ``mean`` to give with an eps of 0."""
    return lambda terms, dims: mean_here(terms, dims) + eps


def _rstd(square: Tensor, eps: float) -> Tensor:
    """1/rms from the mean square, without a sign."""
    if eps < 0:  # a floor below the normal numbers would be 0 or nearly, and a row of zeros no longer one of zeros
        return torch.rsqrt(square.clamp_min(max(-eps, torch.finfo(square.dtype).tiny)))
    return torch.rsqrt(square + eps)


def rms_norm(
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    mean: Callable[[Tensor, tuple[int, ...]], Tensor] = mean_here,
) -> tuple[Tensor, Tensor]:
    """Returns ``(output, rstd)``; ``rstd`` has the shape of ``input`` with the last ``dims`` sizes set to 1. It is
    negative where the floor holds: that is how the kernels' backward knows.

    ``mean`` takes the mean of the squares: over several ranks, where a row lies on several (``ranks.py``).
    """
    wide = cast(input, accumulation_dtype(input.dtype))
    square = mean(wide.square(), _last(dims))
    rstd = cast(_rstd(square, eps), wide.dtype)
    output = apply_gain(wide * rstd, input, weight, offset, round_first).contiguous()
    return output, torch.where(square < -eps, -rstd, rstd) if eps < 0 else rstd


def apply_gain(normalised: Tensor, input: Tensor, weight: Tensor | None, offset: float, round_first: bool) -> Tensor:
    """``x · r``, in the accumulation type, times the gain, rounded as the casting mode says."""
    output = normalised
    if weight is not None:
        if round_first:
            output = cast(output, input.dtype)
        output = output * gain(weight, input, offset)
    return cast(output, result_dtype(input, weight, round_first))


def sum_to_weight(product: Tensor, weight: Tensor) -> Tensor:
    """``product``, of the input's shape, summed over the dimensions that the weight lacks, in the weight's type."""
    leading = tuple(range(product.dim() - weight.dim()))
    return (product.sum(leading) if leading else product).to(weight.dtype)


def _constants(wide: Tensor, dims: int, eps: float) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``(r, mean)``: every mean of a product in the derivatives is there because r moves with x, and is 0 where the
    floor holds."""
    square = mean_here(wide.square(), _last(dims))
    floored = square < -eps if eps < 0 else None

    def mean(product: Tensor) -> Tensor:
        taken = mean_here(product, _last(dims))
        return taken if floored is None else taken.masked_fill(floored, 0.0)

    return _rstd(square, eps), mean


def rms_norm_backward(
    grad: Tensor, input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the input and of the weight, for real types.

    With ``x̂ = x·r`` and ``h = grad·(offset + weight)``:

        dx = r · (h - x̂ · mean(h · x̂))          dw = Σ grad · x̂

    summed over the dimensions that the weight lacks (arXiv 1910.07467, eq. 8-10, with eps kept). Where the floor holds,
    ``dx = r · h``. Roundings inside the forward count as the identity, so the two casting modes share these formulas.
    """
    wide = input.to(promoted(accumulation_dtype(input.dtype), accumulation_dtype(grad.dtype)))
    rstd, mean = _constants(wide, dims, eps)
    normalised = wide * rstd
    grad = grad.to(wide.dtype)
    scaled = grad if weight is None else grad * gain(weight, input, offset)
    dx = rstd * (scaled - normalised * mean(scaled * normalised))
    if weight is None:
        return dx.to(input.dtype), None
    return dx.to(input.dtype), sum_to_weight(grad * normalised, weight)


def rms_norm_backward_tangent(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    dims: int,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor | None]:
    """The directional derivative of :func:`rms_norm_backward` along ``tangents`` of grad, input and weight.

    With ``m = mean(h · x̂)`` and a dot for tangents:

        ẋ̂ = r · (ẋ - x̂ · mean(x̂ · ẋ))      ṙ = -r² · mean(x̂ · ẋ)      ḣ = ġ · (offset + weight) + grad · ẇ
        ḋx = ṙ · (h - x̂ · m) + r · (ḣ - ẋ̂ · m - x̂ · ṁ)               ḋw = Σ_rows ġ · x̂ + grad · ẋ̂
    """
    wide = input.to(promoted(accumulation_dtype(input.dtype), accumulation_dtype(grad.dtype)))
    zero = torch.zeros((), dtype=wide.dtype, device=wide.device)
    grad_t, input_t, weight_t = (zero if t is None else t.to(wide.dtype) for t in tangents)
    rstd, mean = _constants(wide, dims, eps)
    normalised = wide * rstd
    along = mean(normalised * input_t)
    normalised_t = rstd * (input_t - normalised * along)
    grad = grad.to(wide.dtype)
    factor = 1.0 if weight is None else gain(weight, input, offset)
    scaled, scaled_t = grad * factor, grad_t * factor + grad * weight_t
    m = mean(scaled * normalised)
    m_t = mean(scaled_t * normalised + scaled * normalised_t)
    rstd_t = -rstd.square() * along
    dx_t = rstd_t * (scaled - normalised * m) + rstd * (scaled_t - normalised_t * m - normalised * m_t)
    if weight is None:
        return dx_t.to(input.dtype), None
    return dx_t.to(input.dtype), sum_to_weight(grad_t * normalised + grad * normalised_t, weight)
