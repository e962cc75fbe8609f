"""The only file that records an everyday call of the plain norm: as little as possible between it and its operator.

An ``autograd.Function`` that does nothing takes 2 µs, forward, and a layer's call 0.9. So each argument counts, each
tensor that is returned, kept and read again, and each question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import _autograd, _handed, _ops
from .forms import lean

_Call = Callable[..., Any]
# As in _everyday.py.
_forward: _Call = _ops.rms_norm_forward._op
_weighted_backward: _Call = _ops.rms_norm_weighted_backward._op
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
FEW = _handed.FEW


class EverydayRMSNorm(torch.autograd.Function):
    """``RMSNormFunction`` in fewer steps, for when nothing but a backward can follow: 13 µs a call instead of 16."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        dims: int,
        eps: float,
        offset: float = 0.0,
        round_first: bool = False,
    ) -> Tensor:
        output, rstd = _forward(input, weight, dims, eps, offset, round_first)
        ctx.options = dims, eps, offset
        ctx.save_for_backward(input, weight, rstd)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        dx, dw = _autograd.backward(ctx, grad, None, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return dx, dw, None, None, None, None


class _Few(torch.autograd.Function):
    """Of a row or a few on the CPU, by an operator of ``(input, weight, eps)``; 1/rms isn't kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        input, weight = ctx.saved_tensors
        need_input, need_weight = ctx.needs_input_grad[:2]
        if (
            is_grad_enabled()  # a graph of this one is wanted
            or grad.dtype is not input.dtype
            or is_dynamo_compiling()
            or _transforms_active()
            or forward_ad._current_level >= 0
        ):
            dims, eps = weight.dim(), ctx.eps
            with torch.no_grad():
                rstd = _ops.rms_norm_forward(input, weight, dims, eps, 0.0, False)[1]
            kept = (input, weight, rstd), (dims, eps, 0.0)
            return *_autograd.gradients(grad, None, *kept, need_input, need_weight), None
        dx, dw = _weighted_backward(grad, input, weight, ctx.eps, need_input, need_weight)
        return dx if need_input else None, dw if need_weight else None, None


def _by_operator(operator: _Call) -> _Call:
    def forward(ctx: Any, input: Tensor, weight: Tensor, eps: float) -> Any:
        ctx.save_for_backward(input, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return operator(input, weight, eps)

    return forward


def _few(forward: _Call) -> _Call:
    """What records so by that forward."""
    members = {"forward": staticmethod(forward), "setup_context": staticmethod(_Few.setup_context)}  # found sooner
    return _apply_of(type("FewRMSNorm", (_Few,), members))  # torch shows the name


def _apply_of(function: type[torch.autograd.Function]) -> _Call:
    """Past Function.apply, which reads the signature of ``forward`` with ``inspect``, each time: 60 µs."""
    apply: _Call = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


_recorded = _apply_of(EverydayRMSNorm)
# By whether Llama's rounding is asked for; and what C++ serves by itself, past the dispatcher.
_few_recorded = [_few(_by_operator(one._op)) for one in (_ops.rms_norm_weighted, _ops.rms_norm_rounded)]
_handed.recorder[:] = map(_few, _handed.few)


def record(
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    out: Tensor | None = None,
    memory: str | None = None,
) -> Tensor:
    """The output of an everyday call of ``rmsnorm.rms_norm``, recorded; an error if more has to be asked first."""
    if out is not None or _tracing_state() is not None:
        raise RuntimeError
    if memory is not None:
        if (output := lean.everyday(input, weight, dims, eps, offset, round_first)) is None:
            raise RuntimeError  # what is kept is decided the long way
    elif weight is not None and not offset and input.is_cpu and input.numel() <= FEW:
        output = _few_recorded[round_first](input, weight, eps)
    elif offset or round_first:
        output = _recorded(input, weight, dims, eps, offset, round_first)
    else:
        output = _recorded(input, weight, dims, eps)  # each argument costs
    return output
