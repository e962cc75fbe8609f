"""The only file with the rows of the plain norm and of add + norm, and the operators that nothing else has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native, reference
from ._form import Form, define, library, like, register


def _check(input: Tensor, weight: Tensor | None, dims: int, *_: Any) -> None:
    """What the kernels check, for devices without kernels: ``functional.py`` leaves it to the operator."""
    fits = weight is None or (reference.spans(weight, input, dims) and weight.device == input.device)
    if not fits or not 0 < dims <= input.dim() or input.is_complex() or not input.is_floating_point():
        raise RuntimeError("rmsnorm: input and weight don't fit, or are of no floating type; call rmsnorm.rms_norm")


increment_versions: Callable[[tuple[Tensor, ...]], None] = torch._C._increment_version
"""What ``torch.autograd.graph.increment_version`` calls: a backward that kept what was there before then raises."""


def written(*tensors: Tensor) -> None:
    """Says so to autograd, as torch's own operators do; graphs know it from the schema."""
    if not torch.compiler.is_compiling():
        increment_versions(tensors)


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements are a single memory location, by a stride of 0."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _has_own_places(tensor: Tensor) -> bool:
    """Whether each stride passes over all that shorter ones reach."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return not tensor.numel()
        reach += (size - 1) * stride
    return True


def check_in_place(input: Tensor, residual: Tensor) -> None:
    """Of two tensors that are written to."""
    own = _has_own_places(input) and _has_own_places(residual)
    if not own or input.data_ptr() == residual.data_ptr() != 0:
        raise RuntimeError("rmsnorm: input and residual are written to, and must not share memory")


def add_rms_norm_by_copies(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    round_sum: bool,
) -> None:
    """The definition of ``add_rms_norm_``, in place: the operator that returns new tensors, copied."""
    check_in_place(input, residual)
    options = dims, eps, offset, round_first, -1, round_sum, input.dtype
    output, sum, _ = torch.ops.rmsnorm.general_add_rms_norm(input, residual, weight, None, *options)
    input.copy_(output), residual.copy_(sum)


def check_out(out: Tensor, input: Tensor, weight: Tensor | None, round_first: bool) -> None:
    """The same of where the result is to go."""
    same = out.shape == input.shape and out.device == input.device
    if not same or is_expanded(out) or out.dtype is not reference.result_dtype(input, weight, round_first):
        raise RuntimeError(
            "rmsnorm: out must be on the device of input, of its shape and the dtype of the result, and must not be "
            "expanded; call rmsnorm.rms_norm, which says more"
        )


def _like(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    return like(input, reference.result_dtype(input, weight, round_first)), reference.empty_rstd(input, dims)


def _gradients(
    grads: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor],
    weights: tuple[Tensor | None],
    options: Any,
) -> tuple[Tensor, Tensor | None]:
    dx, dw = reference.rms_norm_backward(grads[0], *saved, *weights, *options)
    return dx if grads[1] is None else dx + grads[1], dw


def _added(
    input: Tensor, residual: Tensor, *arguments: Any, normalise: Any = reference.rms_norm
) -> tuple[Tensor, Tensor, Tensor]:
    sum = (input + residual).contiguous()
    output, rstd = normalise(sum, *arguments)
    return output, sum, rstd


def _like_added(input: Tensor, residual: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, rstd = _like(input, *arguments)
    return output, like(input), rstd


RMS_NORM = register(
    Form(
        name="rms_norm",
        rows=("input",),
        weights=("weight",),
        options="int dims, float eps, float offset=0.0, bool round_first=False",
        outputs=("output",),
        kept=("rstd",),
        define=reference.rms_norm,
        like=_like,
        grads="Tensor grad, Tensor? grad_sum",
        gradients=_gradients,
        check=_check,
    )
)
# Its gradient is that of the plain norm, which takes the one that arrives at the sum.
ADD_RMS_NORM = register(
    Form(
        name="add_rms_norm",
        rows=("input", "residual"),
        weights=("weight",),
        options="int dims, float eps, float offset, bool round_first",
        outputs=("output", "sum"),
        kept=("rstd",),
        define=_added,
        like=_like_added,
        check=lambda input, residual, *arguments: _check(input, *arguments),
    )
)
SCHEMAS = {made.form.name + end: schema for made in (RMS_NORM, ADD_RMS_NORM) for end, schema in made.schemas.items()}
_rms_norm, _rms_norm_forward, _rms_norm_backward = RMS_NORM.defaults.values()
_add_rms_norm, _add_rms_norm_forward, _ = ADD_RMS_NORM.defaults.values()


def _rms_norm_out(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, out: Tensor
) -> None:
    check_out(out, input, weight, round_first)
    out.copy_(_rms_norm(input, weight, dims, eps, offset, round_first))


def _rms_norm_into_nothing(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool, out: Tensor
) -> None:
    if out.device != input.device:  # without data, nobody else would ask
        raise RuntimeError("rmsnorm: out must be on the device of input; call rmsnorm.rms_norm, which says more")


SCHEMAS["rms_norm_out"] = (
    "(Tensor input, Tensor? weight, int dims, float eps, float offset, bool round_first, Tensor(a!) out) -> ()"
)
define("rms_norm_out", SCHEMAS["rms_norm_out"], _rms_norm_out, _rms_norm_into_nothing)


def _rms_norm_weighted(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(input, weight, weight.dim(), eps)


def _rms_norm_rounded(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(input, weight, weight.dim(), eps, 0.0, True)


def _rms_norm_weighted_backward(
    grad: Tensor, input: Tensor, weight: Tensor, eps: float, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    rstd = rms_norm_forward(input, weight, weight.dim(), eps, 0.0, False)[1]
    gradients: tuple[Tensor, Tensor] = rms_norm_backward(
        grad, None, input, rstd, weight, weight.dim(), eps, 0.0, need_input, need_weight
    )
    return gradients


def _add_rms_norm_weighted(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return add_rms_norm(input, residual, weight, weight.dim(), eps, 0.0, False)


def _add_rms_norm_rounded(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return add_rms_norm(input, residual, weight, weight.dim(), eps, 0.0, True)


def _rms_norm_weighted_out(input: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    rms_norm_out(input, weight, weight.dim(), eps, 0.0, False, out)


# The everyday calls of _everyday.py: each argument of an operator takes 0.1 µs on its way from Python, given or not.
# All but the CPU's kernels see `rms_norm`, `add_rms_norm` and `rms_norm_out`. "Rounded" are those of Llama's mode.
_ADDED = "(Tensor input, Tensor residual, Tensor weight, float eps) -> (Tensor output, Tensor sum)"
for _name, _schema in {
    "rms_norm_weighted": "(Tensor input, Tensor weight, float eps) -> Tensor",
    "rms_norm_rounded": "(Tensor input, Tensor weight, float eps) -> Tensor",
    "rms_norm_weighted_backward": (
        "(Tensor grad, Tensor input, Tensor weight, float eps, bool need_input, bool need_weight) -> (Tensor, Tensor)"
    ),
    "add_rms_norm_weighted": _ADDED,
    "add_rms_norm_rounded": _ADDED,
    "rms_norm_weighted_out": "(Tensor input, Tensor weight, float eps, Tensor(a!) out) -> ()",
}.items():
    library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    library.impl(_name, globals()[f"_{_name}"], "CompositeImplicitAutograd")


def _gain_span(weight: Tensor, offset: float) -> tuple[float, float]:
    gain = reference.gain(weight.detach(), weight, offset).abs()
    smallest, largest = gain.aminmax() if gain.numel() else (torch.tensor(torch.inf), torch.tensor(0.0))
    return smallest.item(), largest.item()


# The smallest and the largest |offset + weight|: whether an output may be kept for an input (forms/lean.py).
library.define("gain_span(Tensor weight, float offset) -> (float, float)")
library.impl("gain_span", _gain_span, "CompositeExplicitAutograd")


_native.load()
native = bool(_native.cpu_targets())

rms_norm, rms_norm_forward, rms_norm_backward = RMS_NORM.plain, RMS_NORM.forward, RMS_NORM.backward
add_rms_norm, add_rms_norm_forward = ADD_RMS_NORM.plain, ADD_RMS_NORM.forward
rms_norm_weighted = torch.ops.rmsnorm.rms_norm_weighted.default
rms_norm_rounded = torch.ops.rmsnorm.rms_norm_rounded.default
rms_norm_weighted_backward = torch.ops.rmsnorm.rms_norm_weighted_backward.default
add_rms_norm_weighted = torch.ops.rmsnorm.add_rms_norm_weighted.default
add_rms_norm_rounded = torch.ops.rmsnorm.add_rms_norm_rounded.default
gain_span = torch.ops.rmsnorm.gain_span.default
rms_norm_out = torch.ops.rmsnorm.rms_norm_out.default
rms_norm_weighted_out = torch.ops.rmsnorm.rms_norm_weighted_out.default
