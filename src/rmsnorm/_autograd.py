"""The only file that decides what is kept for backward, and what the derivatives are.

Kept: the input (or the sum), the weight, and one fp32 (fp64 for fp64) per row. Every first derivative, in reverse and
in forward mode, runs on the fused operators; so does the gradient under ``create_graph=True``. Derivatives of the
gradient are those of the formulas in ``reference.py``, in differentiable torch code: more passes, no term dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _ops, _recorded, _vmap, reference

_Ctx = Any
_Apply = Callable[..., Any]


def needed(input: Tensor, weight: Tensor | None, other: Tensor | None = None) -> bool:
    """Whether a derivative may be taken of a function of these tensors; 0.3 µs of every call.

    A tangent can't be seen cheaply, nor whether a tensor below a batch of ``vmap`` requires grad: inside forward mode
    and torch.func's transforms the answer is yes.
    """
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return transformed or learns(input, weight, other)


def learns(input: Tensor, weight: Tensor | None, other: Tensor | None = None) -> bool:
    """Whether one of them is seen to require grad, and gradients are recorded."""
    required = input.requires_grad or (weight is not None and weight.requires_grad)
    return (required or (other is not None and other.requires_grad)) and torch.is_grad_enabled()


def refused() -> bool:
    """Whether the reference has to serve, as torch can't take the derivatives of a Function here.

    Forward mode in forward mode: a Function's tangent counts as a constant (torch 2.13: jvp of jvp of ``x**3`` written
    as a Function is 0). ``functionalize``, which has no rule for Functions. A transform of torch.func under
    torch.compile: dynamo doesn't trace Functions there.
    torch.export with gradients enabled: it would keep the Function's operator and lose its derivative.
    """
    if torch.compiler._is_exporting_flag:
        return torch.is_grad_enabled()
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    levels = torch._C._functorch.get_interpreter_stack() or []
    kinds, kind = [level.key() for level in levels], torch._C._functorch.TransformType
    return kinds.count(kind.Jvp) > 1 or kind.Functionalize in kinds


def backward(
    ctx: _Ctx, grad: Tensor | None, grad_sum: Tensor | None, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the normalised tensor (plus what arrives at it directly, ``grad_sum``) and of the weight."""
    if grad is None:
        return grad_sum if need_input else None, None
    return gradients(grad, grad_sum, ctx.saved_tensors, ctx.options, need_input, need_weight)


def gradients(
    grad: Tensor, grad_sum: Tensor | None, saved: Any, options: Any, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same of what was kept."""
    input, weight, rstd = saved
    need_weight = need_weight and weight is not None
    if not (need_input or need_weight):
        return None, None
    apply = _gradient if needed(input, weight, grad) or needed(grad, grad_sum) else _ops.rms_norm_backward
    if grad.dtype == input.dtype:
        dx, dw = apply(grad, grad_sum, input, rstd, weight, *options, need_input, need_weight)
    else:
        # Llama rounding with a wider weight: the output, and so its gradient, is wider than the input.
        dx, dw = apply(grad, None, input.to(grad.dtype), rstd, weight, *options, need_input, need_weight)
        dx = dx.to(input.dtype) if grad_sum is None or not need_input else dx.to(input.dtype) + grad_sum
    return dx if need_input else None, dw if need_weight else None


def _tangent(
    ctx: _Ctx, input: Tensor, output: Tensor, weight: Tensor | None, rstd: Tensor, moved: Tensor | None, weight_t: Any
) -> Tensor:
    """The output's tangent. The derivative of x̂ by x is symmetric, so backward without a gain applies it."""
    dims, eps, offset = ctx.options
    wide = input.to(reference.accumulation_dtype(input.dtype))
    terms = []
    if moved is not None:
        normalised_t = _gradient(moved.to(wide.dtype), None, wide, rstd, None, dims, eps, 0.0, True, False)[0]
        terms.append(normalised_t if weight is None else normalised_t * reference.gain(weight, input, offset))
    if weight_t is not None:
        terms.append(_normalise(wide, None, dims, eps, 0.0, False)[0] * weight_t)
    return sum(terms[1:], terms[0]).to(output.dtype) if terms else torch.zeros_like(output)


def _save(ctx: _Ctx, normalised: Tensor, weight: Tensor | None, rstd: Tensor, output: Tensor, options: Any) -> None:
    ctx.options = options[:3]
    ctx.save_for_backward(normalised, weight, rstd)
    ctx.save_for_forward(normalised, weight, rstd, output)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


class TracedRMSNorm(torch.autograd.Function):
    """What ``torch.compile`` records: it refuses a Function with rules for forward mode and vmap."""

    @staticmethod
    def forward(
        input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
    ) -> tuple[Tensor, Tensor]:
        return _ops.rms_norm_forward(input, weight, dims, eps, offset, round_first)

    @staticmethod
    def setup_context(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, *options = inputs
        _save(ctx, input, weight, output[1], output[0], options)

    @staticmethod
    def backward(ctx: _Ctx, grad: Tensor | None, _rstd: None) -> tuple[Tensor | None, ...]:
        dx, dw = backward(ctx, grad, None, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        return dx, dw, None, None, None, None


class RMSNormFunction(TracedRMSNorm):
    @staticmethod
    def jvp(ctx: _Ctx, input_t: Tensor | None, weight_t: Tensor | None, *_: None) -> tuple[Tensor, None]:
        input, weight, rstd, output = ctx.saved_tensors
        return _tangent(ctx, input, output, weight, rstd, input_t, weight_t), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap.forward(_normalise)(info, in_dims, *args)


class TracedAddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.add_rms_norm_forward(input, residual, weight, dims, eps, offset, round_first)

    @staticmethod
    def setup_context(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, _, weight, *options = inputs
        _save(ctx, output[1], weight, output[2], output[0], options)

    @staticmethod
    def backward(ctx: _Ctx, grad: Tensor | None, grad_sum: Tensor | None, _rstd: None) -> tuple[Tensor | None, ...]:
        need_input, need_residual, need_weight = ctx.needs_input_grad[:3]
        ds, dw = backward(ctx, grad, grad_sum, need_input or need_residual, need_weight)
        return ds if need_input else None, ds if need_residual else None, dw, None, None, None, None


class AddRMSNormFunction(TracedAddRMSNorm):
    @staticmethod
    def jvp(
        ctx: _Ctx, input_t: Tensor | None, residual_t: Tensor | None, weight_t: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor, None]:
        sum, weight, rstd, output = ctx.saved_tensors
        moved = [t for t in (input_t, residual_t) if t is not None]
        sum_t = moved[0] if len(moved) == 1 else moved[0] + moved[1] if moved else None
        output_t = _tangent(ctx, sum, output, weight, rstd, sum_t, weight_t)
        return output_t, torch.zeros_like(sum) if sum_t is None else sum_t.clone(), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap.add_forward(_add, _normalise)(info, in_dims, *args)


class BackwardFunction(torch.autograd.Function):
    """The gradient as a function of ``grad, grad_sum, input, rstd, weight`` that has derivatives of its own."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _ops.rms_norm_backward(*args)

    @staticmethod
    def setup_context(ctx: _Ctx, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        grad, _, input, _, weight, *ctx.options, ctx.need_input, ctx.need_weight = inputs
        ctx.save_for_backward(grad, input, weight)
        ctx.save_for_forward(grad, input, weight)
        ctx.mark_non_differentiable(*(t for t, need in zip(output, inputs[-2:], strict=True) if not need))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: _Ctx, dx_grad: Tensor | None, dw_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        cotangents = {i: grad for i, grad in enumerate((dx_grad, dw_grad)) if grad is not None}
        if not cotangents:
            return (None,) * 10

        def gradients(grad: Tensor, input: Tensor, weight: Tensor | None = None) -> tuple[Tensor | None, ...]:
            both = reference.rms_norm_backward(grad, input, weight, *ctx.options)
            return tuple(both[i] for i in cotangents)

        pull = torch.func.vjp(gradients, *(t for t in ctx.saved_tensors if t is not None))[1]
        of_grad, of_input, *of_weight = pull(tuple(cotangents.values()))
        of_grad_sum = dx_grad if ctx.needs_input_grad[1] else None
        return of_grad, of_grad_sum, of_input, None, *(of_weight or [None]), *[None] * 5

    @staticmethod
    def jvp(ctx: _Ctx, grad_t: Any, grad_sum_t: Any, input_t: Any, _rstd: Any, weight_t: Any, *_: None) -> Any:
        tangents = (grad_t, input_t, weight_t)
        grad, input, weight = ctx.saved_tensors
        dx_t, dw_t = reference.rms_norm_backward_tangent(grad, input, weight, tangents, *ctx.options)
        if grad_sum_t is not None:
            dx_t = dx_t + grad_sum_t
        return dx_t if ctx.need_input else None, dw_t if ctx.need_weight else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return _vmap.backward(_gradient, _normalise)(info, in_dims, *args)


_gradient: _Apply = BackwardFunction.apply
_normalise: _Apply = RMSNormFunction.apply
_add: _Apply = AddRMSNormFunction.apply
traced = _recorded.recorded(_ops.RMS_NORM, "_forward", TracedRMSNorm.apply)
_traced_add = _recorded.recorded(_ops.ADD_RMS_NORM, "_forward", TracedAddRMSNorm.apply)
# Past Function.apply, which reads the signature of `forward` with `inspect`, each time: 75 µs a call instead of 17.
_plain: _Apply = super(torch.autograd.Function, RMSNormFunction).apply
_plain_add: _Apply = super(torch.autograd.Function, AddRMSNormFunction).apply
_unwrap: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead


def rms_norm(input: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """``(output, rstd)``, recorded; the arguments are those of the operator ``rms_norm_forward``."""
    if torch.compiler.is_compiling():
        return traced(input, weight, *options)
    if torch._C._are_functorch_transforms_active():
        return _normalise(input, weight, *options)
    return _plain(_unwrap(input), weight if weight is None else _unwrap(weight), *options)


def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``(output, sum, rstd)``, recorded; the arguments are those of the operator ``add_rms_norm_forward``."""
    if torch.compiler.is_compiling():
        return _traced_add(input, residual, weight, *options)
    if torch._C._are_functorch_transforms_active():
        return _add(input, residual, weight, *options)
    results = _plain_add(_unwrap(input), _unwrap(residual), weight if weight is None else _unwrap(weight), *options)
    if input.requires_grad or residual.requires_grad or forward_ad._current_level >= 0:
        return results
    output, sum, rstd = results
    return output, sum.detach(), rstd  # of two constants, beside a weight that learns
