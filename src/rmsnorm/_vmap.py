"""The only file with batching rules: what ``torch.func.vmap`` does with the operators and the autograd functions.

A batch of problems that share a weight is one problem with more rows. Where each has a weight of its own, the kernel
normalises without a gain, in the wide type, and the gain and its gradient are a multiplication and a sum around it.
A rule is written once, around ``apply``: the operator itself, or the ``autograd.Function`` that records it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _form, _ops, reference

_Apply = Callable[..., Any]
_Rule = Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]


def _front(tensor: Tensor, batch_dim: int | None, size: int) -> Tensor:
    """The batch as the first dimension; a tensor without one is repeated, which copies nothing."""
    return tensor.expand(size, *tensor.shape) if batch_dim is None else tensor.movedim(batch_dim, 0)


def _own_weights(weight: Tensor, batch_dim: int, input: Tensor) -> Tensor:
    """Weights [batch, *weight.shape] with a 1 for each outer dimension of the input between."""
    weight = weight.movedim(batch_dim, 0)
    return weight.reshape(len(weight), *[1] * (input.dim() - weight.dim()), *weight.shape[1:])


def forward(apply: _Apply) -> _Rule:
    """For ``(input, weight, dims, eps, offset, round_first) -> (output, rstd)``."""

    def rule(
        info: Any,
        in_dims: Any,
        input: Tensor,
        weight: Tensor | None,
        dims: int,
        eps: float,
        offset: float,
        round_first: bool,
    ) -> Any:
        x = _front(input, in_dims[0], info.batch_size)
        if weight is None or in_dims[1] is None:
            return apply(x, weight, dims, eps, offset, round_first), (0, 0)
        weight = _own_weights(weight, in_dims[1], x)
        output, rstd = apply(x.to(reference.accumulation_dtype(x.dtype)), None, dims, eps, 0.0, False)
        return (reference.apply_gain(output, x, weight, offset, round_first), rstd), (0, 0)

    return rule


def add_forward(apply: _Apply, normalise: _Apply) -> _Rule:
    """For ``(input, residual, weight, …) -> (output, sum, rstd)``; ``normalise`` is what ``forward`` is made of."""

    def rule(info: Any, in_dims: Any, input: Tensor, residual: Tensor, weight: Tensor | None, *options: Any) -> Any:
        x, other = (_front(t, d, info.batch_size) for t, d in zip((input, residual), in_dims[:2], strict=True))
        if weight is None or in_dims[2] is None:
            return apply(x, other, weight, *options), (0, 0, 0)
        sum = x + other
        (output, rstd), _ = forward(normalise)(info, (0, in_dims[2]), sum, weight, *options)
        return (output, sum, rstd), (0, 0, 0)

    return rule


def backward(apply: _Apply, normalise: _Apply) -> _Rule:
    """For the operator ``rms_norm_backward``; ``normalise`` is what ``forward`` is made of."""

    def rule(
        info: Any,
        in_dims: Any,
        grad: Tensor,
        grad_sum: Tensor | None,
        input: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        dims: int,
        eps: float,
        offset: float,
        need_input: bool,
        need_weight: bool,
    ) -> Any:
        grad, input, rstd = (
            _front(t, d, info.batch_size)
            for t, d in zip((grad, input, rstd), (in_dims[0], in_dims[2], in_dims[3]), strict=True)
        )
        if grad_sum is not None:
            grad_sum = _front(grad_sum, in_dims[1], info.batch_size)
        own = weight is not None and in_dims[4] is not None
        if not own and not need_weight:
            dx, dw = apply(grad, grad_sum, input, rstd, weight, dims, eps, offset, need_input, False)
            return (dx, dw), (0 if need_input else None, None)
        assert weight is not None
        # Each problem has a weight's gradient of its own, so none is summed over the batch.
        dtype, wide = input.dtype, reference.accumulation_dtype(input.dtype)
        dx, dw = input.new_empty(0), input.new_empty(0)
        if need_input:
            gain = _own_weights(weight, in_dims[4], input) if own else weight
            scaled = grad.to(wide) * reference.gain(gain, input, offset)
            grad_sum = grad_sum if grad_sum is None else grad_sum.to(wide)
            dx = apply(scaled, grad_sum, input.to(wide), rstd, None, dims, eps, 0.0, True, False)[0].to(dtype)
        if need_weight:
            normalised = normalise(input.to(wide), None, dims, eps, 0.0, False)[0]
            outer = tuple(range(1, input.dim() - weight.dim() + own))
            dw = grad.to(wide) * normalised
            dw = (dw.sum(outer) if outer else dw).to(weight.dtype)
        return (dx, dw), (0 if need_input else None, 0 if need_weight else None)

    return rule


def _first(rule: _Rule, count: int) -> _Rule:
    """The rule of an operator that returns only the first ``count`` results."""

    def shorter(info: Any, in_dims: Any, *args: Any) -> Any:
        results, out_dims = rule(info, in_dims, *args)
        return (results[0], out_dims[0]) if count == 1 else (results[:count], out_dims[:count])

    return shorter


_normal = forward(_ops.rms_norm_forward)
_added = add_forward(_ops.add_rms_norm_forward, _ops.rms_norm_forward)
# out= has no rule, as torch's own out= operators have none.
_RULES = {
    "rms_norm": _first(_normal, 1),
    "rms_norm_forward": _normal,
    "rms_norm_backward": backward(_ops.rms_norm_backward, _ops.rms_norm_forward),
    "add_rms_norm": _first(_added, 2),
    "add_rms_norm_forward": _added,
}
for _name, _rule in _RULES.items():
    torch.library.register_vmap(f"rmsnorm::{_name}", _rule, lib=_form.library)


def fused_backward(
    info: Any,
    in_dims: Any,
    grad: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    rstd: Tensor,
    weight: Tensor | None,
    mask: list[bool],
) -> Any:
    """The rule of torch's own ``aten::_fused_rms_norm_backward``, in use while ``install()`` is."""
    apply = torch.ops.aten._fused_rms_norm_backward.default
    grad, input, rstd = (
        _front(t, d, info.batch_size)
        for t, d in zip((grad, input, rstd), (in_dims[0], in_dims[1], in_dims[3]), strict=True)
    )
    wide, dims = reference.accumulation_dtype(input.dtype), len(normalized_shape)
    x, dx, dw = input.to(wide), None, None
    if mask[0] and weight is not None and in_dims[4] is not None:
        scaled = grad.to(wide) * _own_weights(weight, in_dims[4], input).to(wide)
        dx = apply(scaled, x, normalized_shape, rstd, None, [True, False])[0].to(input.dtype)
    elif mask[0]:
        dx = apply(grad, input, normalized_shape, rstd, weight, [True, False])[0]
    if mask[1] and weight is not None:
        # 1/rms is given as a constant; as a function of the input, with the eps that it implies, it has derivatives.
        last, outer = tuple(range(-dims, 0)), tuple(range(1, input.dim() - dims))
        mean = x.square().mean(last, keepdim=True)
        dw = grad.to(wide) * x * torch.rsqrt(mean + (rstd.to(wide).pow(-2) - mean).detach())
        dw = (dw.sum(outer) if outer else dw).to(weight.dtype)
    return (dx, dw), (None if dx is None else 0, None if dw is None else 0)
