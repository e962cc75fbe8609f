"""The only file that launches the GPU kernels of what a call may ask for beyond the plain norm, and of the lean
backward: each by its operator's name, by the rules of forms.py. Which steps they are is all that this file decides."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import launch
from .backward import derive
from .launch import _in_a_row
from .steps import NOTHING, More, Steps

_Results = tuple[Tensor | None, ...] | None


def general_rms_norm(
    keep: bool,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    counted: int,
    mean: bool,
    store: bool,
    out_dtype: torch.dtype | None,
) -> _Results:
    if _are_several(dims, weight, bias) or not counted:
        return None
    steps, eps = _general(input, eps, counted, mean, More(bias=_in_a_row(bias)))
    output, _, rstd = launch.forward(
        *(input, None, weight, dims, eps, offset, round_first, True),
        steps=steps,
        dtype=out_dtype,
        store=store,
    )
    return output, rstd


def general_add_rms_norm(
    keep: bool,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    counted: int,
    round_sum: bool,
    out_dtype: torch.dtype | None,
) -> _Results:
    if _are_several(dims, weight, bias) or not counted:
        return None
    sum = input.new_empty(input.shape, dtype=reference.promoted(input.dtype, residual.dtype))
    steps, eps = _general(sum, eps, counted, True, More(bias=_in_a_row(bias)), "" if round_sum else "unrounded")
    output, _, rstd = launch.forward(
        *(input, residual, weight, dims, eps, offset, round_first, True),
        steps=steps,
        dtype=out_dtype,
        sum=sum,
    )
    return output, sum, rstd


def added_in_place(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    round_sum: bool,
) -> bool:
    """Whether it was done: of tensors that lie as a kernel writes, and of rows that it reads once, before it writes."""
    columns = input.shape[input.dim() - dims :].numel()
    written = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (input, residual))
    wide = reference.promoted(input.dtype, residual.dtype) is residual.dtype
    if not written or not wide or eps < 0 or columns > launch.WIDEST["forward"]:
        return False
    steps = Steps(load="" if round_sum else "unrounded")
    launch.forward(
        *(input, residual, weight, dims, eps, offset, round_first, False), out=input, steps=steps, sum=residual
    )
    return True


def general_rms_norm_backward(
    grad: Tensor | None,
    grad_rstd: Tensor | None,
    input: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    counted: int,
    mean: bool,
    *needs: bool,
) -> _Results:
    return _general_backward(
        grad, None, grad_rstd, input, rstd, (weight, bias), dims, eps, offset, counted, mean, needs
    )


def general_add_rms_norm_backward(
    grad: Tensor | None,
    grad_sum: Tensor | None,
    grad_rstd: Tensor | None,
    sum: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    counted: int,
    *needs: bool,
) -> _Results:
    return _general_backward(
        grad, grad_sum, grad_rstd, sum, rstd, (weight, bias), dims, eps, offset, counted, True, needs
    )


def rms_norm_lean_backward(
    grad: Tensor,
    grad_rstd: Tensor | None,
    output: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
    offset: float,
    need_input: bool,
    need_weight: bool,
) -> _Results:
    return add_rms_norm_lean_backward(
        grad, None, grad_rstd, output, rstd, weight, dims, offset, need_input, need_weight
    )


def add_rms_norm_lean_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    grad_rstd: Tensor | None,
    output: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
    offset: float,
    need_input: bool,
    need_weight: bool,
) -> _Results:
    more = None if grad_rstd is None else More(grad_rstd=_in_a_row(grad_rstd))
    like = (weight if need_weight else None,)
    return tuple(derive(grad, grad_sum, output, rstd, weight, dims, offset, need_input, like, Steps(more, load="lean")))


def _general(x: Tensor, eps: float, counted: int, mean: bool, more: More, load: str = "") -> tuple[Steps, float]:
    """The steps, and eps as the kernels have it: without a sign, and for a floor no subnormal number."""
    floor = eps < 0
    if floor:
        least: float = torch.finfo(reference.accumulation_dtype(x.dtype)).tiny
        eps = max(-eps, least)
    if counted >= 0:
        more = more._replace(counted=counted)
    number = (counted if counted >= 0 else None) if mean else 1
    return Steps(more if any(part is not None for part in more) else None, load=load, floor=floor, number=number), eps


def _general_backward(
    grad: Tensor | None,
    grad_sum: Tensor | None,
    grad_rstd: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    dims: int,
    eps: float,
    offset: float,
    counted: int,
    mean: bool,
    needs: tuple[bool, ...],
) -> _Results:
    if _are_several(dims, *weights) or not counted:
        return None
    steps, _ = _general(x, eps, counted, mean, More(grad_rstd=_in_a_row(grad_rstd)))
    need_input, *learn = needs
    like = tuple(t if need else None for t, need in zip(weights, learn, strict=True))
    if like[1] is not None and steps.more is None:
        steps = steps._replace(more=NOTHING)
    return tuple(derive(grad, grad_sum, x, rstd, weights[0], dims, offset, need_input, like, steps))


def _are_several(dims: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether there is a bias, and a row of it or of the weight for each head."""
    return bias is not None and (bias.dim() > dims or (weight is not None and weight.dim() > dims))
