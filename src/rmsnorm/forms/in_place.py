"""The only file with add + norm in place, for inference: the operator and the function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import (
    _arguments,
    _autograd,
    _everyday,
    _foreign,
    _form,
    _handed,
    _ops,
    _writable,
    functional,
    reference,
)
from . import calls, everyday_ops

_SCHEMA = (
    "(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, int dims, float eps, float offset, bool round_first, "
    "bool round_sum) -> ()"
)


def add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    offset: float = 0.0,
    casting_mode: str = "torch",
    round_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Residual add and RMS normalisation in place, for inference: ``residual += input``, ``input = norm(residual)``.

    The signature is that of vLLM's ``fused_add_rms_norm`` and sglang's ``fused_add_rmsnorm``. The bits are those of
    :func:`rmsnorm.add_rms_norm`, and the output is rounded to the type of ``input``.

    Args:
        input: ``[*, *weight.shape]``; becomes the output.
        residual: of the shape of ``input``, of its type or a wider one; becomes the sum.
        weight: its dimensions are the normalised ones; None normalises the last one, without a gain.
        eps, offset, casting_mode, round_sum: as in :func:`rmsnorm.add_rms_norm`; eps must not be negative.

    Returns:
        ``(input, residual)``, the very tensors.

    Raises:
        RuntimeError: as :func:`rmsnorm.add_rms_norm`; arguments that require grad; a residual of a narrower type;
            tensors that share memory, with each other or within themselves.
        ValueError: an unknown casting mode, a negative eps.

    Examples:
        >>> x, residual = torch.tensor([3.0, 2.0]), torch.tensor([0.0, 2.0])
        >>> _ = add_rms_norm_(x, residual, eps=0.0)
        >>> x, residual
        (tensor([0.8485, 1.1314]), tensor([3., 4.]))

    Source: Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    try:  # the operator checks the rest; what it refuses is served, or worded, the long way
        round_first = _ROUND_FIRST[casting_mode]
        if (
            round_sum is True
            and not is_compiling()
            and _as_objects(1, None, eps, offset, round_first, input, None, None, input, residual, weight)
        ):
            return input, residual
        if not is_compiling() and _straight(None, input, residual, weight, eps, offset, round_first, bool(round_sum)):
            return input, residual
        ordinary = _everyday.ordinary(input, (input, residual, weight)) and type(residual) is Tensor
        numbers = type(eps) in _everyday.NUMBERS and type(offset) in _everyday.NUMBERS and eps >= 0
        if ordinary and numbers and not _autograd.needed(input, weight, residual):
            shape = input.shape[-1:] if weight is None else weight.shape
            dims = len(shape)
            frozen = input.is_inference() or residual.is_inference()
            # There torch 2.10 stops at its own assertion, and frees the tensors once too often.
            negated = input.is_neg() or residual.is_neg()
            if input.shape[input.dim() - dims :] == shape and not (frozen or negated):
                if weight is not None and not offset and casting_mode == "torch":
                    _weighted(input, residual, weight, eps, round_sum)  # 0.4 µs less
                else:
                    _run(input, residual, weight, dims, eps, offset, round_first, round_sum)
                _written((input, residual))
                return input, residual
    except (RuntimeError, KeyError, AttributeError, TypeError, ValueError):
        pass
    name, tensors = "add_rms_norm_", (input, residual, weight)
    if has_torch_function_variadic(*tensors) and _arguments.are_objects(*tensors):
        given = _arguments.given(
            offset=(offset, 0.0), casting_mode=(casting_mode, "torch"), round_sum=(round_sum, True)
        )
        return _everyday.unpacked(handle_torch_function(add_rms_norm_, tensors, *tensors, eps, **given), 2)
    _arguments.check_tensors(name, input=input, weight=weight)
    _arguments.check_dense(name, input=input, weight=weight)
    shape = input.shape[-1:] if weight is None else weight.shape
    dims, eps, round_first, native = functional._resolve(name, input, shape, weight, eps, casting_mode)
    if type(offset) is not float:
        offset = _arguments.as_number(name, "offset", offset)
    calls.check_alike(name, "input", input, input)
    calls.check_alike(name, "residual", residual, input)
    if weight is not None:
        _arguments.check_real(name, weight=weight)
    _check(input, residual, weight, eps)
    options: dict[str, Any] = {"offset": offset, "casting_mode": casting_mode, "round_sum": bool(round_sum)}
    if not native or torch._C._are_functorch_transforms_active() or _foreign.wanted_by(*tensors):
        output, sum = functional.add_rms_norm(input, residual, shape, weight, eps, **options, out_dtype=input.dtype)
        return input.copy_(output), residual.copy_(sum)
    _operator(input, residual, weight, dims, eps, offset, round_first, bool(round_sum))
    _ops.written(input, residual)
    return input, residual


def _check(input: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> None:
    if eps < 0:
        raise ValueError(f"add_rms_norm_: eps must be 0 or more, but is {eps}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, residual, weight)):
        raise RuntimeError(
            "add_rms_norm_: it writes to its arguments, but one of them requires grad; call it under torch.no_grad(), "
            "or call rmsnorm.add_rms_norm"
        )
    for label, tensor in (("input", input), ("residual", residual)):
        _writable.check_may_change("add_rms_norm_", label, tensor)
        if not is_compiling() and tensor.is_neg():
            raise RuntimeError(
                f"add_rms_norm_: {label} is a negated view, whose memory holds other values than it shows; pass a "
                "tensor of its own, or call rmsnorm.add_rms_norm"
            )
    if (sum := reference.promoted(input.dtype, residual.dtype)) is not residual.dtype:
        raise RuntimeError(
            f"add_rms_norm_: residual must have the type of the sum, {sum}, "
            f"but has {residual.dtype}; convert it once, where the stream of residuals begins"
        )


_operator = _form.define("add_rms_norm_", _SCHEMA, _ops.add_rms_norm_by_copies, lambda *arguments: None)
_run: Any = _operator._op
_straight = _handed.straight("add_rms_norm_", _SCHEMA, dims="o")
_weighted, _written, _as_objects = everyday_ops.add_rms_norm_, _ops.increment_versions, _handed.norm
_ROUND_FIRST = functional.ROUND_FIRST
