"""The only file that keeps a norm's output for backward instead of its input: ``memory="lean"``.

What follows a norm, a linear layer say, keeps the output anyway; the input is often kept by nobody else. With the gain
g, all that backward needs is in the output y and in r = 1/rms, one number per row:

    x̂ = y / g      h = grad · g      dx = r · (h - x̂ · mean(grad · y))      dw = Σ grad · x̂

y is rounded, so x̂ is off by up to a rounding of its type (two for Llama's): docs/numerics.md has the bound. Derivatives
of the gradient are taken through the same formulas: y and r are both outputs of the recorded function, and the
gradient that arrives at r is one more term, ``-r² · x̂ / n``.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakIdKeyDictionary

from .. import _form, _ops, reference
from .served import Served

_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
_warned: Any = WeakIdKeyDictionary()  # weights whose layer has been named


def _gradients(
    grads: tuple[Tensor | None, ...],
    saved: tuple[Tensor, Tensor],
    weights: tuple[Tensor | None],
    options: tuple[int, float],
) -> tuple[Tensor, Tensor | None]:
    grad, *of_sum, of_rstd = grads
    (output, rstd), (weight,), (dims, offset) = saved, weights, options
    assert grad is not None
    wide = reference.accumulation_dtype(output.dtype)
    y, grad = output.to(wide), grad.to(wide)
    normalised, h = y, grad
    if weight is not None:
        gain = reference.gain(weight, output, offset)
        normalised = normalised / torch.where(gain == 0, torch.inf, gain)  # 0 where it is 0, as in the kernels
        h = h * gain
    last = tuple(range(-dims, 0))
    mean = reference.mean_here(grad * y, last)  # of h · x̂
    if of_rstd is not None:
        mean = mean + of_rstd * rstd / output.shape[output.dim() - dims :].numel()
    dx = rstd * (h - normalised * mean)
    for more in of_sum:
        dx = dx if more is None else dx + more
    return dx.to(output.dtype), None if weight is None else reference.sum_to_weight(grad * normalised, weight)


def _row(name: str, same: _form.Operators, more: tuple[str, ...], grads: str) -> Served:
    return Served(
        _form.register(
            _form.Form(
                name=name,
                rows=same.form.rows,
                weights=("weight",),
                options="int dims, float eps, float offset, bool round_first",
                outputs=("output", *more, "rstd"),
                kept=(),
                define=same.form.define,
                like=same.form.like,
                saved=("output", "rstd"),
                grads=grads,
                silent=("eps", "round_first"),
                gradients=_gradients,
                alike=same.form.rows[1:],
                same=same,
            )
        )
    )


_norm = _row("rms_norm_lean", _ops.RMS_NORM, (), "Tensor grad, Tensor? grad_rstd")
_added = _row("add_rms_norm_lean", _ops.ADD_RMS_NORM, ("sum",), "Tensor grad, Tensor? grad_sum, Tensor? grad_rstd")


_span: Any = _ops.gain_span._op
_record: Any = _norm.record
_record_added: Any = _added.record


def rms_norm(input: Tensor, weight: Tensor | None, *options: Any) -> Tensor | None:
    """The output, recorded; None where the input has to be kept. The arguments are those of ``rms_norm_forward``."""
    if not _may_go(input, weight, *options):
        return None
    output: Tensor = _norm.record(input, weight, *options)[0]  # type: ignore[misc]
    return output


def add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor] | None:
    """``(output, sum)``, recorded, or None; the arguments are those of the operator ``add_rms_norm_forward``."""
    constant = not (input.requires_grad or residual.requires_grad)  # so is their sum, beside a weight that learns
    if constant or type(residual) not in _PLAIN or not _may_go(input, weight, *options):
        return None
    output, sum, _ = _added.record(input, residual, weight, *options)  # type: ignore[misc]
    return output, sum


def everyday(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> Tensor | None:
    """``rms_norm`` of an everyday call (``functional.py``): 14 µs at 1 × 576, not 23."""
    if torch.compiler.is_compiling() or not _may_go_everyday(input, weight, dims, eps, offset, round_first):
        return None
    output: Tensor = _record(input, weight, dims, eps, offset, round_first)[0]
    return output


def everyday_add(
    input: Tensor, residual: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> tuple[Tensor, Tensor] | None:
    """The same of ``add_rms_norm``."""
    moving = input.requires_grad or residual.requires_grad
    if not moving or not _may_go_everyday(input, weight, dims, eps, offset, round_first):
        return None
    output, sum, _ = _record_added(input, residual, weight, dims, eps, offset, round_first)
    return output, sum


def _may_go_everyday(
    input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool
) -> bool:
    """``_may_go`` of such a call; it doesn't say why not."""
    dtype = input.dtype
    if not input.is_cpu or type(weight) not in _PLAIN or eps < _least_eps(dtype):
        return False
    if weight is None:
        return True
    if round_first and weight.dtype is not dtype:
        return False
    least, most = limits(dtype, weight.numel())
    smallest, largest = _span(weight, offset)
    return least <= smallest and largest <= most  # not for NaN


@cache
def _least_eps(dtype: torch.dtype) -> float:
    return torch.finfo(reference.accumulation_dtype(dtype)).tiny


def _may_go(input: Tensor, weight: Tensor | None, dims: int, eps: float, offset: float, round_first: bool) -> bool:
    """Whether backward can do without the input.

    Not where the gains can't be looked at: in graphs and under transforms, whose tensors have no numbers, and on other
    devices, which the host would have to wait for. Not where the output is wider than the input, as it would be the
    larger thing to keep; and not with an eps of (nearly) 0: 1/rms of subnormal rows may then be no number of its type,
    and is found anew from the input.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or type(input) not in _PLAIN
        or type(weight) not in _PLAIN
        or not input.is_cpu
        or reference.result_dtype(input, weight, round_first) is not input.dtype
        or not eps >= _least_eps(input.dtype)
    ):
        return False
    if weight is None:
        return True
    columns = input.shape[input.dim() - dims :].numel()
    least, most = limits(input.dtype, columns)
    smallest, largest = _span(weight, offset)
    if smallest >= least and largest <= most:
        return True
    if weight not in _warned:
        _warned[weight] = True
        reason = why(weight, offset, input.dtype, columns)
        warnings.warn(f"rmsnorm: memory='lean', but a norm keeps its input: {reason}", stacklevel=4)
    return False


@cache
def limits(dtype: torch.dtype, columns: int) -> tuple[float, float]:
    """The smallest and the largest gain with which the output of rows of this type may stand for the input.

    A rounding of y is relative to y, and so that of x̂ = y / g to x̂, however small g is, while y is a normal number.
    Below those it is half a step of the subnormals, s/2; in x̂ that is s/(2g), and for g = tiny, the smallest normal
    number, s/(2·tiny) = u, the relative error of a rounding. So from tiny on, x̂ is off by at most u·max(|x̂|, 1), where
    1 is the row's own rms. How gains compare with each other changes nothing, only where they lie in the type: tiny is
    6.1e-5 for float16, 1.2e-38 for bfloat16 and float32.

    At the other end y must not overflow, and |x̂| is at most √n (half of the largest number leaves room for
    roundings); nor may 1 / g fall below the normal numbers.
    """
    wide = torch.finfo(reference.accumulation_dtype(dtype))
    return torch.finfo(dtype).tiny, min(torch.finfo(dtype).max / 2 / max(columns, 1) ** 0.5, 1 / wide.tiny)


def _whole(weight: Any) -> Tensor:
    """Of a DTensor all of it: ranks that see their own part alone don't agree, and wait for each other."""
    if not hasattr(weight, "full_tensor"):
        return weight
    try:
        return weight.full_tensor()
    except RuntimeError:  # FSDP2 has offloaded it to a CPU that no backend of the mesh reaches; each call looks again
        return weight.to_local()


def why(weight: Tensor, offset: float, dtype: torch.dtype, columns: int) -> str:
    """Why a norm has to keep its input, with the numbers; nothing if it needn't."""
    weight = _whole(weight)
    # In float64, as the limits: fp64's are 0 and infinite in float32, of a narrower weight.
    gain = reference.gain(weight.detach(), weight, offset).double().abs()
    least, most = limits(dtype, columns)
    kind = str(dtype).removeprefix("torch.")
    if not gain.numel() or ((gain >= least) & (gain <= most)).all():
        return ""
    if (gain <= most).all():
        at, what, limit = gain.argmin(), "smallest", f"at least {least:.2g}"
    else:
        at, what, limit = gain.argmax(), "largest", f"at most {most:.2g}"
    return (
        f"its {what} gain is {gain.flatten()[at]:.3g}, of element {int(at)}, and {kind} needs {limit} for x̂ = y / gain"
    )
