"""The only file that decides what is kept for the gated norm's backward, and who serves a call.

Its first derivatives run on the operators of ``gated_ops.py``. Whatever is unusual (torch.func, forward mode,
derivatives of the gradient, mixed types that no kernel has) is the formula there, with torch's own derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _autograd, _foreign, _onnx, _ops, reference
from . import gated_ops


def serve(native: bool, input: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> Any:
    if gate.dtype is not input.dtype and reference.promoted(gate.dtype, input.dtype) is input.dtype:
        gate = gate.to(input.dtype)  # Mamba-2's scan leaves fp32 beside a half gate
    unusual = (
        not native
        or gate.dtype is not input.dtype
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _foreign.wanted_by(input, gate, weight)
        or _autograd.refused()
    )
    if torch.onnx.is_in_onnx_export():
        return gated_ops.gated_rms_norm(input, gate, weight, *options, *_onnx.GATED)[0]
    if unusual:
        return gated_ops.gated_rms_norm(input, gate, weight, *options)[0]
    if _autograd.needed(input, weight, gate):
        if _foreign.not_to_be_kept(input, gate, weight):
            return gated_ops.gated_rms_norm(input, gate, weight, *options)[0]
        apply = _traced if torch.compiler.is_compiling() else _recorded
        return apply(input, gate, weight, *options)
    return gated_ops.rms_norm(input, gate, weight, *options)


def everyday(input: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """Serves a call of which nothing unusual is known; RuntimeError for what no kernel has."""
    return (_recorded if _autograd.needed(input, weight, gate) else _plain)(input, gate, weight, *options)


class GatedRMSNormFunction(torch.autograd.Function):
    """Kept for backward: the input, the gate, the weight, and one fp32 (fp64 for fp64) per row."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
        output, rstd = gated_ops.forward(input, gate, weight, *options)
        ctx.options = options
        ctx.save_for_backward(input, gate, weight, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, gate, weight, rstd = ctx.saved_tensors
        needs, none = ctx.needs_input_grad[:3], (None,) * len(ctx.options)
        # A graph of the gradient is wanted, or grad is a batch.
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        ):
            return *_differentiable(grad, (input, gate, weight), needs, ctx.options), *none
        dims, eps, offset, _, norm_before_gate, silu = ctx.options
        # Llama rounding with a wider weight: the output, and so its gradient, is wider than the input.
        x, g = (input, gate) if grad.dtype == input.dtype else (input.to(grad.dtype), gate.to(grad.dtype))
        dx, dgate, dw = gated_ops.backward(grad, x, g, rstd, weight, dims, eps, offset, norm_before_gate, silu, *needs)
        gradients = (dx.to(input.dtype), dgate.to(gate.dtype), dw)
        return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *none


def _differentiable(
    grad: Tensor, arguments: tuple[Tensor | None, ...], needs: Sequence[bool], options: tuple[Any, ...]
) -> list[Tensor | None]:
    """The gradients by the formula in torch's operators, which have derivatives."""
    with torch.enable_grad():
        output = gated_ops.gated_rms_norm(*arguments, *options)[0]  # type: ignore[arg-type]
        wanted = [t for t, need in zip(arguments, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]


_traced = _ops.define_recorded(
    "gated_rms_norm",
    gated_ops.SCHEMAS["gated_rms_norm"],
    gated_ops.rms_norm,
    gated_ops._fake_gated_rms_norm,
    GatedRMSNormFunction.apply,
)
_plain: Callable[..., Tensor] = gated_ops.rms_norm._op  # OpOverload.__call__ adds 0.5 µs
# Past Function.apply, which reads the signature of `forward` with `inspect`, each time: 60 µs.
_recorded: Callable[..., Tensor] = super(torch.autograd.Function, GatedRMSNormFunction).apply
