"""The only file with the rows of the modulated norm (AdaLN) and of the gated add before it.

    s = residual + gate·x        y = x̂·(1 + scale) + shift        x̂ the norm of s, or of x

Rounded once, in the accumulation type before; or, with ``round_first``, after every step, as torch's operators do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _form, reference

_Maybe = Tensor | None


def add(input: Tensor, residual: Tensor, gate: _Maybe, round_first: bool, **_: Any) -> tuple[Tensor]:
    """The first half."""
    if gate is None or round_first:
        return ((residual + (input if gate is None else gate * input)).contiguous(),)
    dtype = reference.promoted(input.dtype, residual.dtype)
    input, residual, gate = (t.to(reference.accumulation_dtype(dtype)) for t in (input, residual, gate))
    return ((residual + gate * input).to(dtype).contiguous(),)


def modulate(normed: Tensor, scale: Tensor, shift: _Maybe) -> Tensor:
    """The last steps, in whatever types they are given."""
    output = normed * (1 + scale)
    return output if shift is None else output + shift


def centred(input: Tensor, dims: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm without weight and bias: ``(output, mean, rstd)``."""
    last = tuple(range(-dims, 0))
    output = F.layer_norm(input, input.shape[input.dim() - dims :], None, None, eps)
    wide = input.to(reference.accumulation_dtype(input.dtype))
    mean = wide.mean(last, keepdim=True)
    return output, mean.double(), torch.rsqrt((wide - mean).square().mean(last, keepdim=True) + eps)


def norm(
    input: Tensor,
    residual: _Maybe,
    gate: _Maybe,
    scale: Tensor,
    shift: _Maybe,
    weight: _Maybe,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    layer: bool,
    normalise: Callable[..., tuple[Tensor, Any]] = reference.rms_norm,
    centre: Callable[..., tuple[Tensor, Any, Any]] = centred,
) -> tuple[Any, ...]:
    """Returns ``(output, sum, mean, rstd)``; what is not there is empty."""
    sum = input if residual is None else add(input, residual, gate, round_first)[0]
    x = sum
    if not round_first:  # nothing but the end is rounded
        wide = reference.accumulation_dtype(sum.dtype)
        x, scale, shift = sum.to(wide), scale.to(wide), shift if shift is None else shift.to(wide)
    mean: Any = reference.nothing(input, torch.float64)
    if layer:
        normed, mean, rstd = centre(x, dims, eps)
    else:
        normed, rstd = normalise(x, weight, dims, eps, offset, round_first)
    output = modulate(normed, scale, shift)
    output = (output if round_first else output.to(sum.dtype)).contiguous()
    return output, reference.nothing(input) if residual is None else sum, mean, rstd


def _summed(product: Tensor, modulation: _Maybe) -> _Maybe:
    """Over the rows that share it."""
    return None if modulation is None else product.sum_to_size(modulation.shape).to(modulation.dtype)


def _gradients(
    grads: tuple[Tensor, _Maybe],
    saved: tuple[Tensor, _Maybe, Tensor, _Maybe, Tensor],
    weights: tuple[_Maybe],
    options: tuple[int, float, float, bool],
) -> tuple[_Maybe, ...]:
    """With ``h = dy·(1 + scale)·w``: ``ds = r·(h - mean(h) - x̂·mean(h·x̂))``, where RMS has no first mean."""
    (grad, grad_sum), (input, gate, scale, shift, sum), (weight,) = grads, saved, weights
    dims, eps, offset, layer = options
    last, added = tuple(range(-dims, 0)), sum.shape == input.shape
    given = sum if added else input
    wide = reference.promoted(reference.accumulation_dtype(given.dtype), reference.accumulation_dtype(grad.dtype))
    x, dy = given.to(wide), grad.to(wide)
    if layer:
        x = x - x.mean(last, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(last, keepdim=True) + eps)
    normalised = x * rstd
    gain = 1.0 if weight is None else reference.gain(weight, x, offset)
    product = dy * (1 + scale.to(wide))
    h = product * gain
    ds = h - normalised * (h * normalised).mean(last, keepdim=True)
    ds = rstd * (ds - h.mean(last, keepdim=True) if layer else ds)
    ds = (ds if grad_sum is None else ds + grad_sum).to(given.dtype)
    dscale, dshift = _summed(dy * normalised * gain, scale), _summed(dy, shift)
    dw = None if weight is None else reference.sum_to_weight(product * normalised, weight)
    if not added:
        return ds, None, None, dscale, dshift, dw
    dx, dgate = _add_gradients((ds,), (input, gate))
    return dx, ds, dgate, dscale, dshift, dw


def _add_gradients(
    grads: tuple[Tensor], saved: tuple[Tensor, _Maybe], weights: Any = (), options: Any = ()
) -> tuple[Tensor, _Maybe]:
    (ds,), (input, gate) = grads, saved
    if gate is None:
        return ds, None
    wide = reference.accumulation_dtype(ds.dtype)
    return (ds.to(wide) * gate.to(wide)).to(input.dtype), _summed(ds.to(wide) * input.to(wide), gate)


def _type_of(modulations: Sequence[_Maybe], input: Tensor, round_first: bool) -> bool:
    """Whether the kernels know them beside the input: of its type, or of fp32 where nothing is rounded between."""
    wide = input.dtype if round_first else reference.accumulation_dtype(input.dtype)
    kinds = {m.dtype for m in modulations if m is not None}
    return len(kinds) <= 1 and kinds <= {input.dtype, wide}


def _fits(input: Tensor, residual: _Maybe, gate: _Maybe, *arguments: Any) -> bool:
    scale, shift, weight, _, _, _, round_first, _ = arguments
    alike = _type_of((scale, shift), input, round_first) and _type_of((gate,), input, round_first)
    return input.device.type in _form.KERNELS and weight is None and alike


def _like(input: Tensor, residual: _Maybe, gate: _Maybe, *arguments: Any) -> tuple[Tensor, ...]:
    scale, shift, weight, dims, _, _, round_first, layer = arguments
    dtype = input.dtype if residual is None else reference.promoted(input.dtype, residual.dtype)
    total = reference.promoted(dtype, gate.dtype) if round_first and gate is not None else dtype
    output = total
    for other in (scale, shift, weight) if round_first else ():
        output = output if other is None else reference.promoted(output, other.dtype)
    rstd = reference.empty_rstd(input.new_empty(input.shape, dtype=total), dims)
    # Not rstd.double(), which of fp64 is rstd: a tracer takes one tensor for one output.
    mean = torch.empty_like(rstd, dtype=torch.float64) if layer else input.new_empty(0, dtype=torch.float64)
    sum = input.new_empty(0) if residual is None else _form.like(input, total)
    return _form.like(input, output), sum, mean, rstd


def _sources(grads: Any, saved: Sequence[Any]) -> tuple[Any, ...]:
    input, gate, scale, shift, sum = saved
    whole = sum.dim() == input.dim() and sum.shape == input.shape  # without a residual it is [0]
    return input, sum if whole else None, gate, scale, shift


MODULATED_NORM = _form.register(
    _form.Form(
        name="modulated_norm",
        rows=("input", "residual?", "gate?", "scale", "shift?"),
        weights=("weight",),
        options="int dims, float eps, float offset, bool round_first, bool layer",
        outputs=("output", "sum"),
        follows={"sum": ("input", "residual?", "gate?")},
        kept=("mean", "rstd"),
        define=norm,
        like=_like,
        saved=("input", "gate?", "scale", "shift?", "sum"),
        grads="Tensor grad, Tensor? grad_sum",
        gradients=_gradients,
        shared=("gate?", "scale", "shift?"),
        sources=_sources,
        fits=_fits,
    )
)
GATED_ADD = _form.register(
    _form.Form(
        name="gated_add",
        rows=("input", "residual", "gate"),
        weights=(),
        options="bool round_first",
        outputs=("sum",),
        kept=(),
        define=add,
        like=lambda input, residual, gate, round_first: (
            _form.like(input, reference.promoted(input.dtype, gate.dtype) if round_first else None),
        ),
        saved=("input", "gate"),
        gradients=_add_gradients,
        shared=("gate",),
        straight=("residual",),
        fits=lambda input, residual, gate, first: (
            input.device.type in _form.KERNELS and _type_of((gate,), input, first)
        ),
    )
)
