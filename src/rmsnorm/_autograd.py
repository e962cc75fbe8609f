"""The only file that decides what is kept for backward, and what the derivatives are.

Kept: the input (or the sum), the weight, and one fp32 (fp64 for fp64) per row. Backward is one operator that
computes just the gradients asked for. When backward itself is recorded (``create_graph=True``) it runs in the
differentiable torch code of ``reference.py`` instead: more passes, no term dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops, reference

_Ctx = Any


def _backward(
    ctx: _Ctx, grad: Tensor | None, grad_sum: Tensor | None, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the normalised tensor (plus what arrives at it directly, ``grad_sum``) and of the weight."""
    if grad is None:
        return grad_sum if need_input else None, None
    input, weight, rstd = ctx.saved_tensors
    need_weight = need_weight and weight is not None
    if torch.is_grad_enabled():
        dx, dw = reference.rms_norm_backward(grad, input, weight, ctx.dims, ctx.eps, ctx.offset)
        dx = dx if grad_sum is None else dx + grad_sum
    elif grad.dtype != input.dtype:
        # Llama rounding with a wider weight: the output, and so its gradient, is wider than the input.
        dx, dw = _ops.rms_norm_backward(
            grad, None, input.to(grad.dtype), rstd, weight, ctx.dims, ctx.eps, ctx.offset, need_input, need_weight
        )
        dx = dx.to(input.dtype) if grad_sum is None or not need_input else dx.to(input.dtype) + grad_sum
    else:
        dx, dw = _ops.rms_norm_backward(
            grad, grad_sum, input, rstd, weight, ctx.dims, ctx.eps, ctx.offset, need_input, need_weight
        )
    return dx if need_input else None, dw if need_weight else None


def _save(ctx: _Ctx, normalised: Tensor, weight: Tensor | None, rstd: Tensor, options: tuple[Any, ...]) -> None:
    ctx.dims, ctx.eps, ctx.offset, _ = options
    ctx.save_for_backward(normalised, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
    ) -> tuple[Tensor, Tensor]:
        return _ops.rms_norm_forward(input, weight, dims, eps, offset, round_first)

    @staticmethod
    def setup_context(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, *options = inputs
        _save(ctx, input, weight, output[1], tuple(options))

    @staticmethod
    def backward(ctx: _Ctx, grad: Tensor | None, _rstd: None) -> tuple[Tensor | None, ...]:
        dx, dw = _backward(ctx, grad, None, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return dx, dw, None, None, None, None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        dims: int,
        eps: float,
        offset: float,
        round_first: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.add_rms_norm_forward(input, residual, weight, dims, eps, offset, round_first)

    @staticmethod
    def setup_context(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, _, weight, *options = inputs
        _save(ctx, output[1], weight, output[2], tuple(options))

    @staticmethod
    def backward(ctx: _Ctx, grad: Tensor | None, grad_sum: Tensor | None, _rstd: None) -> tuple[Tensor | None, ...]:
        need_input, need_residual, need_weight = ctx.needs_input_grad[:3]
        ds, dw = _backward(ctx, grad, grad_sum, need_input or need_residual, need_weight)
        return ds if need_input else None, ds if need_residual else None, dw, None, None, None, None


rms_norm: Callable[..., tuple[Tensor, Tensor]] = RMSNormFunction.apply
add_rms_norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = AddRMSNormFunction.apply
