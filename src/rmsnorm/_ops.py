"""The only file that names operators: their schemas, their shapes without data, and their default kernels.

Every operator exists on every device from here on: the default kernel is ``reference.py``. The C++ library
(``csrc/ops.cpp``) registers itself for CPU, a more specific key, and torch's dispatcher prefers it. So "no
compiler" and "another device" are the same path, and no code of ours chooses.

Outputs are always contiguous. A gradient that is not asked for comes back as an empty tensor of shape ``[0]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native, reference

library = torch.library.Library("rmsnorm", "DEF")

SCHEMAS = {
    "rms_norm": "(Tensor input, Tensor? weight, int dims, float eps, float offset=0.0, bool round_first=False)"
    " -> Tensor",
    "rms_norm_out": "(Tensor input, Tensor? weight, int dims, float eps, float offset, bool round_first, "
    "Tensor(a!) out) -> ()",
    "rms_norm_forward": "(Tensor input, Tensor? weight, int dims, float eps, float offset, bool round_first)"
    " -> (Tensor output, Tensor rstd)",
    "rms_norm_backward": "(Tensor grad, Tensor? grad_sum, Tensor input, Tensor rstd, Tensor? weight, int dims, "
    "float eps, float offset, bool need_input, bool need_weight) -> (Tensor grad_input, Tensor grad_weight)",
    "add_rms_norm": "(Tensor input, Tensor residual, Tensor? weight, int dims, float eps, float offset, "
    "bool round_first) -> (Tensor output, Tensor sum)",
    "add_rms_norm_forward": "(Tensor input, Tensor residual, Tensor? weight, int dims, float eps, float offset, "
    "bool round_first) -> (Tensor output, Tensor sum, Tensor rstd)",
}


def _check(input: Tensor, weight: Tensor | None, dims: int) -> None:
    """What the kernels check, for devices without kernels: ``functional.py`` leaves it to the operator."""
    fits = weight is None or (reference.spans(weight, input, dims) and weight.device == input.device)
    if not fits or not 0 < dims <= input.dim() or input.is_complex() or not input.is_floating_point():
        raise RuntimeError("rmsnorm: input and weight don't fit, or are of no floating type; call rmsnorm.rms_norm")


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements are a single memory location, by a stride of 0."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def check_out(out: Tensor, input: Tensor, weight: Tensor | None, round_first: bool) -> None:
    """The same of where the result is to go."""
    same = out.shape == input.shape and out.device == input.device
    if not same or is_expanded(out) or out.dtype is not reference.result_dtype(input, weight, round_first):
        raise RuntimeError(
            "rmsnorm: out must be on the device of input, of its shape and the dtype of the result, and must not be "
            "expanded; call rmsnorm.rms_norm, which says more"
        )


def _rms_norm(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float = 0.0, round_first: bool = False
) -> Tensor:
    _native.warn_if_missing(input)
    _check(input, weight, dims)
    return reference.rms_norm(input, weight, dims, eps, offset, round_first)[0]


def _rms_norm_out(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, out: Tensor
) -> None:
    check_out(out, input, weight, round_first)
    out.copy_(_rms_norm(input, weight, dims, eps, offset, round_first))


def _rms_norm_forward(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    _native.warn_if_missing(input)
    _check(input, weight, dims)
    return reference.rms_norm(input, weight, dims, eps, offset, round_first)


def _rms_norm_backward(
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
) -> tuple[Tensor, Tensor]:
    dx, dw = reference.rms_norm_backward(grad, input, weight, dims, eps, offset)
    if grad_sum is not None:
        dx = dx + grad_sum
    return (  # an empty one each: no two outputs of an operator are one tensor
        dx.contiguous() if need_input else input.new_empty(0),
        dw if need_weight and dw is not None else input.new_empty(0),
    )


def _add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    return _add_rms_norm_forward(input, residual, weight, dims, eps, offset, round_first)[:2]


def _add_rms_norm_forward(
    input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _native.warn_if_missing(input)
    _check(input, weight, dims)
    sum = (input + residual).contiguous()
    output, rstd = reference.rms_norm(sum, weight, dims, eps, offset, round_first)
    return output, sum, rstd


def _like(input: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return input.new_empty(input.shape, dtype=dtype)


def _fake_rms_norm(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float = 0.0, round_first: bool = False
) -> Tensor:
    _check(input, weight, dims)
    return _like(input, reference.result_dtype(input, weight, round_first))


def _fake_rms_norm_out(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, out: Tensor
) -> None:
    return None


def _fake_rms_norm_forward(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    return _fake_rms_norm(input, weight, dims, eps, offset, round_first), reference.empty_rstd(input, dims)


def _fake_rms_norm_backward(
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
) -> tuple[Tensor, Tensor]:
    dx = _like(input) if need_input else input.new_empty(0)
    dw = _like(weight) if need_weight and weight is not None else input.new_empty(0)
    return dx, dw


def _fake_add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    return _fake_rms_norm(input, weight, dims, eps, offset, round_first), _like(input)


def _fake_add_rms_norm_forward(
    input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output, rstd = _fake_rms_norm_forward(input, weight, dims, eps, offset, round_first)
    return output, _like(input), rstd


for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmsnorm::{_name}", globals()[f"_fake_{_name}"], lib=library)


def _rms_norm_weighted(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(input, weight, weight.dim(), eps)


def _rms_norm_weighted_out(input: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    rms_norm_out(input, weight, weight.dim(), eps, 0.0, False, out)


# The everyday calls of _everyday.py: each argument of an operator takes 0.1 µs on its way from Python, given or not.
# All but the CPU's kernels see `rms_norm` and `rms_norm_out`.
for _name, _schema in {
    "rms_norm_weighted": "(Tensor input, Tensor weight, float eps) -> Tensor",
    "rms_norm_weighted_out": "(Tensor input, Tensor weight, float eps, Tensor(a!) out) -> ()",
}.items():
    library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(_name, globals()[f"_{_name}"], "CompositeImplicitAutograd")


def define_recorded(
    name: str, schema: str, plain: Callable[..., Any], fake: Callable[..., Any], recorded: Callable[..., Any]
) -> torch._ops.OpOverload:
    """The operator ``name`` with a derivative that torch knows, for graphs that ``torch.compile`` records.

    dynamo traces one node and never looks into an ``autograd.Function``, which it can't do with two norms of changing
    size in one graph (torch 2.13). Eager calls don't come here: what torch asks at an operator with a derivative costs
    them 2 to 4 µs. ``recorded`` calls ``plain`` in turn, and that is the node which is left in the compiled graph.
    """
    library.define(f"{name}_recorded{schema}", tags=torch.Tag.pt2_compliant_tag)
    library.impl(f"{name}_recorded", plain, "CompositeExplicitAutograd")
    library.impl(f"{name}_recorded", recorded, "Autograd")
    torch.library.register_fake(f"rmsnorm::{name}_recorded", fake, lib=library)
    return getattr(torch.ops.rmsnorm, f"{name}_recorded").default


_native.load()
native = bool(_native.cpu_targets())

rms_norm: torch._ops.OpOverload = torch.ops.rmsnorm.rms_norm.default
rms_norm_weighted = torch.ops.rmsnorm.rms_norm_weighted.default
rms_norm_out = torch.ops.rmsnorm.rms_norm_out.default
rms_norm_weighted_out = torch.ops.rmsnorm.rms_norm_weighted_out.default
rms_norm_forward = torch.ops.rmsnorm.rms_norm_forward.default
rms_norm_backward = torch.ops.rmsnorm.rms_norm_backward.default
add_rms_norm = torch.ops.rmsnorm.add_rms_norm.default
add_rms_norm_forward = torch.ops.rmsnorm.add_rms_norm_forward.default
