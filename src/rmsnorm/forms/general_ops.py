"""The only file that defines the norm in general: what a call may ask for beyond the plain norm, in plain torch, and
operators with it as default kernel.

    s = x, or x + residual        S = Σ s² over the first ``counted`` elements of a row; below 0, over all
    r = 1 / sqrt(S / N + eps)     N = their number, or 1 for an L2 norm; eps < 0 is a floor, as in ``reference.py``
    y = s · r · (offset + weight) + bias

Kept for backward: what is normalised (the sum, as it is returned) and r, which is an output.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import _form, reference

_Results = tuple[Tensor, ...]
_HALF = (torch.bfloat16, torch.float16)


def size(input: Tensor, dims: int) -> int:
    """The number of elements of a row."""
    return prod(input.shape[input.dim() - dims :])


def _sum(terms: Tensor, dims: int) -> Tensor:
    last = tuple(range(-dims, 0))
    if terms.is_nested:  # of a jagged tensor torch has no derivative of the sum (2.13), but one of the mean
        return terms.mean(last, keepdim=True) * size(terms, dims)
    return terms.sum(last, keepdim=True)


def _counted(terms: Tensor, dims: int, counted: int) -> Tensor:
    """``terms``, with zeros where a column doesn't count."""
    if counted < 0:
        return terms
    places = torch.arange(size(terms, dims), device=terms.device).view(terms.shape[terms.dim() - dims :])
    return terms.masked_fill(places >= counted, 0.0)  # torch.where takes no jagged tensor beside a dense one


def _number(terms: Tensor, dims: int, counted: int) -> int:
    return size(terms, dims) if counted < 0 else counted


def _factor(wide: Tensor, dims: int, eps: float, counted: int, mean: bool) -> tuple[Tensor, Tensor | None]:
    """r, without a sign, and where it is the floor's."""
    square = _sum(_counted(wide.square(), dims, counted), dims)
    if mean:
        square = square / _number(wide, dims, counted)
    return reference._rstd(square, eps), square < -eps if eps < 0 else None


def _normalise(
    wide: Tensor,
    low: torch.dtype,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    counted: int,
    mean: bool,
    store: bool,
    out: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``(output, rstd)`` of what is computed in a wide type, and is of the type ``low``."""
    rstd, floored = _factor(wide, dims, eps, counted, mean)
    kept = rstd if floored is None else torch.where(floored, -rstd, rstd)
    if not store:
        return reference.nothing(wide, low), kept
    y = wide * rstd
    if round_first:
        y = reference.cast(y, low)
    if weight is not None:
        y = y * reference.gain(weight, wide, offset)
    if bias is not None:
        y = y + reference.cast(bias, reference.promoted(wide.dtype, bias.dtype))
    return reference.cast(y, _output(low, weight, round_first, out)).contiguous(), kept


def _output(low: torch.dtype, weight: Tensor | None, round_first: bool, out: torch.dtype | None) -> torch.dtype:
    return out or (reference.promoted(low, weight.dtype) if weight is not None and round_first else low)


def _define(input: Tensor, *arguments: Any, normalise: Any = None) -> _Results:
    return _normalise(reference.cast(input, reference.accumulation_dtype(input.dtype)), input.dtype, *arguments)


def _define_added(
    input: Tensor, residual: Tensor, weight: Any, bias: Any, *options: Any, normalise: Any = None
) -> _Results:
    *plain, counted, round_sum, out = options
    low = reference.promoted(input.dtype, residual.dtype)
    wide = reference.accumulation_dtype(low)
    if round_sum:
        sum = (input + residual).contiguous()
        unrounded = reference.cast(sum, wide)
    else:
        unrounded = reference.cast(input, wide) + reference.cast(residual, wide)
        sum = reference.cast(unrounded, low).contiguous()
    output, rstd = _normalise(unrounded, low, weight, bias, *(*plain, counted, True, True, out))
    # No two outputs of an operator are one tensor, nor one of its arguments.
    return output, sum, rstd


def backward(
    grad: Tensor | None,
    grad_sum: Tensor | None,
    grad_rstd: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    counted: int,
    mean: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of what is normalised, of the weight and of the bias; roundings count as the identity.

    With ``x̂ = x·r`` and ``h = grad·(offset + weight)``:

        dx = r · (h - x̂ · (Σ h·x̂ + grad_rstd·r) / N) + grad_sum        dw = Σ grad·x̂        db = Σ grad

    without the second term in columns that don't count, and where the floor holds.
    """
    types = [t.dtype for t in (grad, grad_rstd) if t is not None]
    dtype = reference.accumulation_dtype(x.dtype)
    for other in types:
        dtype = reference.promoted(dtype, reference.accumulation_dtype(other))
    wide = x.to(dtype)
    arrives = grad is not None
    grad = torch.zeros_like(wide) if grad is None else grad.to(dtype)
    rstd, floored = _factor(wide, dims, eps, counted, mean)
    normalised = wide * rstd
    scaled = grad if weight is None else grad * reference.gain(weight, wide, offset)
    # What doesn't arrive isn't zeros: 0 · x̂ of an infinity is NaN, and so would be the row.
    total = _sum(scaled * normalised if arrives else scaled, dims)
    if grad_rstd is not None:
        total = total + grad_rstd.to(dtype) * rstd
    if floored is not None:
        total = total.masked_fill(floored, 0.0)
    dx = rstd * (scaled - _counted(normalised * (total / (_number(wide, dims, counted) if mean else 1)), dims, counted))
    if grad_sum is not None:
        dx = dx + grad_sum.to(dtype)
    dw = None if weight is None else reference.sum_to_weight(grad * normalised, weight)
    return dx.to(x.dtype), dw, None if bias is None else reference.sum_to_weight(grad, bias)


def _like(
    input: Tensor,
    weight: Tensor | None,
    bias: Any,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    counted: int,
    mean: bool,
    store: bool,
    out: torch.dtype | None,
) -> _Results:
    dtype = _output(input.dtype, weight, round_first, out)
    output = _form.like(input, dtype) if store else input.new_empty(0)
    return output, reference.empty_rstd(input, dims)


def _like_added(input: Tensor, residual: Tensor, weight: Any, bias: Any, dims: int, *options: Any) -> _Results:
    low, (_, _, first, *_, out) = reference.promoted(input.dtype, residual.dtype), options
    rstd = reference.empty_rstd(input, dims).to(reference.accumulation_dtype(low))
    return _form.like(input, _output(low, weight, first, out)), _form.like(input, low), rstd


def _meet(row: torch.dtype, *others: torch.dtype) -> bool:
    """Whether a kernel has these types in one row: no half type beside the other, or float64."""
    beside = {torch.float32: (torch.float32, *_HALF)}
    return all(other in beside.get(row, (row, torch.float32)) for other in others)


def _fits(low: torch.dtype, weight: Tensor | None, bias: Tensor | None, dims: int, *options: Any) -> bool:
    """Whether kernels take it."""
    several = bias is not None and (bias.dim() > dims or (weight is not None and weight.dim() > dims))
    return not several and _meet(low, _output(low, weight, options[2], options[-1]))


def _fits_added(input: Tensor, residual: Tensor, *arguments: Any) -> bool:
    low = reference.promoted(input.dtype, residual.dtype)
    return input.device.type in _form.KERNELS and _meet(low, input.dtype, residual.dtype) and _fits(low, *arguments)


GENERAL = _form.register(
    _form.Form(
        name="general_rms_norm",
        rows=("input",),
        weights=("weight", "bias"),
        options="int dims, float eps, float offset, bool round_first, int counted, bool mean, bool store, "
        "ScalarType? out_dtype",
        outputs=("output", "rstd"),
        follows={"rstd": ("input",)},
        kept=(),
        define=_define,
        like=_like,
        saved=("input", "rstd"),
        grads="Tensor? grad, Tensor? grad_rstd",
        silent=("round_first", "store", "out_dtype"),
        gradients=lambda grads, saved, weights, options: backward(
            grads[0], None, grads[1], saved[0], *weights, *options
        ),
        mixed=True,
        fits=lambda input, *arguments: input.device.type in _form.KERNELS and _fits(input.dtype, *arguments),
    )
)
GENERAL_ADD = _form.register(
    _form.Form(
        name="general_add_rms_norm",
        rows=("input", "residual"),
        weights=("weight", "bias"),
        options="int dims, float eps, float offset, bool round_first, int counted, bool round_sum, "
        "ScalarType? out_dtype",
        outputs=("output", "sum", "rstd"),
        follows=dict.fromkeys(("sum", "rstd"), ("input", "residual")),
        kept=(),
        define=_define_added,
        like=_like_added,
        saved=("sum", "rstd"),
        alike=("residual",),
        grads="Tensor? grad, Tensor? grad_sum, Tensor? grad_rstd",
        silent=("round_first", "round_sum", "out_dtype"),
        gradients=lambda grads, saved, weights, options: backward(*(*grads, saved[0], *weights, *options, True)),
        mixed=True,
        fits=_fits_added,
    )
)
