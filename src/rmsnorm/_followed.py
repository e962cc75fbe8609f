"""The only file with the operators that only graphs of Inductor's have: a norm, and one step beside it.

They are defined as the two steps, one after the other, and so are their bits. Kernels do both in one pass where such a
graph calls them (``_direct.py``); nothing else ever has these operators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._form import define


def _times(
    input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> Tensor:
    return _ops.rms_norm(input, weight, dims, eps, offset, round_first) * residual


def _cast(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    output, sum = _ops.add_rms_norm(input, residual, weight, dims, eps, offset, round_first)
    return output.to(dtype), sum


def _scaled(
    input: Tensor, factor: float, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    sum = input * factor
    return _ops.rms_norm(sum, weight, dims, eps, offset, round_first), sum


def _few_gradients(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    dims: int,
    eps: float,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    if rstd is None:
        rstd = _ops.rms_norm_forward(input, None, dims, eps, 0.0, False)[1]
    gradients: tuple[Tensor, Tensor] = _ops.rms_norm_backward(grad, grad_sum, input, rstd, weight, dims, eps, *others)
    return gradients


def _gradients(grad: Tensor, grad_sum: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    dx, dw = _few_gradients(grad, None, *arguments)
    return dx if grad_sum is None else dx + grad_sum, dw


def _sandwich_gradients(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    sum: Tensor,
    rstd: Tensor | None,
    next_rstd: Tensor | None,
    weight: Tensor | None,
    next_weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    next_eps: float,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    need_next_weight: bool,
) -> tuple[Tensor, ...]:
    ds, next = _gradients(grad, grad_sum, sum, next_rstd, next_weight, dims, next_eps, offset, True, need_next_weight)
    dx, dw = _gradients(ds, None, input, rstd, weight, dims, eps, offset, need_input, need_weight)
    return dx, ds, dw, next


def _around_gradients(
    grad: Tensor,
    other: Tensor | None,
    output: Tensor | None,
    scale: float | None,
    grad_sum: Tensor | None,
    input: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    arrives = grad.to(input.dtype) if other is None else grad * other
    dx, dw = _gradients(arrives, grad_sum, input, *arguments)
    return dx if scale is None else dx * scale, dw, grad.new_empty(0) if output is None else grad * output


def _turned_gradients(grad: Tensor, cos: Tensor, sin: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    first, second = (grad * sin).chunk(2, -1)
    arrives = grad * cos + torch.cat((second, -first), -1)
    return _gradients(arrives.transpose(1, 2).contiguous(), None, *arguments)


def _register(name: str, schema: str, definition: Callable[..., Any]) -> torch._ops.OpOverload:
    return define(name, schema, definition, definition)


def _schema(beside: str, returned: str, options: str = "") -> str:
    plain = "Tensor? weight, int dims, float eps, float offset, bool round_first"
    return f"(Tensor input, {beside}, {plain}{options}) -> {returned}"


def _schema_of(name: str) -> str:
    """Of an operator of all devices, where 1/rms is given: here it may be left out, and is found again."""
    schema = str(getattr(torch.ops.rmsnorm, name).default._schema)
    return re.sub(r"Tensor (?=(next_)?rstd\b)", "Tensor? ", schema[schema.index("(") :])


_BOTH = "(Tensor output, Tensor sum)"
rms_norm_times = _register("rms_norm_times", _schema("Tensor residual", "Tensor"), _times)
scale_rms_norm = _register("scale_rms_norm", _schema("float factor", _BOTH), _scaled)
add_rms_norm_cast = _register("add_rms_norm_cast", _schema("Tensor residual", _BOTH, ", ScalarType dtype"), _cast)

few_rms_norm_backward = _register("few_rms_norm_backward", _schema_of("rms_norm_backward"), _few_gradients)

# Gradients as our operators have them, but what arrives at the sum is added to what was rounded before.
rounded_rms_norm_backward = _register("rounded_rms_norm_backward", _schema_of("rms_norm_backward"), _gradients)
rounded_sandwich_rms_norm_backward = _register(
    "rounded_sandwich_rms_norm_backward", _schema_of("sandwich_rms_norm_backward"), _sandwich_gradients
)

# The same, where what arrives is cast, or multiplied with what the norm's output was, of which this is the gradient,
# too; and dx is multiplied with a number.
_FIRST = "(Tensor grad, Tensor? other, Tensor? output, float? scale, Tensor? grad_sum, Tensor input, Tensor? rstd"
around_rms_norm_backward = _register(
    "around_rms_norm_backward",
    f"{_FIRST}, Tensor? weight, int dims, float eps, float offset, bool need_input, bool need_weight)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_other)",
    _around_gradients,
)

# Those of heads that were turned after the norm, [batch, heads, tokens, head_dim]; the input lies by tokens.
turned_rms_norm_backward = _register(
    "turned_rms_norm_backward",
    "(Tensor grad, Tensor cos, Tensor sin, Tensor input, Tensor? rstd, Tensor? weight, int dims, float eps,"
    " float offset, bool need_input, bool need_weight) -> (Tensor grad_input, Tensor grad_weight)",
    _turned_gradients,
)
