"""The only file that defines the gated norm: its maths in plain torch, and operators with it as default kernel.

    a = silu(gate) or sigmoid(gate), in the accumulation type of the input

    norm_before_gate      y = (x · r(x) · (offset + weight)) · a
    otherwise             z = x · a      y = z · r(z) · (offset + weight)      with r(·) = 1 / sqrt(mean(·²) + eps)

These functions are the definition, the fallback of the C++ kernels and the oracle of their tests, as ``reference.py``
is for the plain norm; derivatives of the gradient are taken through them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _form, reference


def _result_dtype(input: Tensor, weight: Tensor | None, round_first: bool, norm_before_gate: bool) -> torch.dtype:
    """A gate behind the norm rounds the product to the input's type; before it, the norm rounds as ever."""
    return input.dtype if norm_before_gate else reference.result_dtype(input, weight, round_first)


def gated_rms_norm(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    norm_before_gate: bool,
    silu: bool,
    mean: Callable[[Tensor, tuple[int, ...]], Tensor] = reference.mean_here,
    dtype: torch.dtype | None = None,
    normalise: Callable[..., tuple[Tensor, Tensor]] = reference.rms_norm,
) -> tuple[Tensor, Tensor]:
    """Returns ``(output, rstd)``, with ``rstd`` that of what is normalised: the input, or the gated input.

    Rounding first (Llama) rounds the normalised value to the input's type, and, if the gate comes after, its product
    with the weight to their promoted type too. ``mean`` is that of ``reference.rms_norm``; ``dtype`` the
    type to compute in, None for the accumulation type; ``normalise`` what takes the place of ``reference.rms_norm``.
    """
    wide = reference.cast(input, dtype or reference.accumulation_dtype(input.dtype))
    activate = F.silu if silu else torch.sigmoid
    normed = wide if norm_before_gate else wide * activate(reference.cast(gate, wide.dtype))
    normalised, rstd = normalise(normed, None, dims, eps, 0.0, False, mean)
    if not norm_before_gate:
        return reference.apply_gain(normalised, input, weight, offset, round_first).contiguous(), rstd
    if round_first:
        normalised = reference.apply_gain(normalised, input, weight, offset, True)
    elif weight is not None:
        normalised = normalised * reference.gain(weight, input, offset)
    gated = normalised * activate(reference.cast(gate, wide.dtype))
    return reference.cast(gated, input.dtype).contiguous(), rstd


def gated_rms_norm_backward(
    grad: Tensor,
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    norm_before_gate: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the input, the gate and the weight, for real types; roundings count as the identity.

    With σ = sigmoid(gate), a' = σ · (1 + gate · (1 - σ)) for silu and σ · (1 - σ) for sigmoid:

        norm_before_gate      dx, dw = those of the norm, for grad · a       dgate = grad · (norm of x) · a'
        otherwise             dz, dw = those of the norm of z, for grad      dx = dz · a      dgate = dz · x · a'
    """
    wide = input.to(reference.promoted(reference.accumulation_dtype(input.dtype), grad.dtype))
    grad, gate_wide = grad.to(wide.dtype), gate.to(wide.dtype)
    sigmoid = torch.sigmoid(gate_wide)
    activation = gate_wide * sigmoid if silu else sigmoid
    slope = sigmoid * (1 + gate_wide * (1 - sigmoid)) if silu else sigmoid * (1 - sigmoid)
    if norm_before_gate:
        dx, dw = reference.rms_norm_backward(grad * activation, wide, weight, dims, eps, offset)
        normalised = reference.rms_norm(wide, None, dims, eps, 0.0, False)[0]
        dgate = grad * (normalised if weight is None else normalised * reference.gain(weight, input, offset)) * slope
    else:
        dz, dw = reference.rms_norm_backward(grad, wide * activation, weight, dims, eps, offset)
        dx, dgate = dz * activation, dz * wide * slope
    return dx.to(input.dtype), dgate.to(gate.dtype), dw


def _like(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    norm_before_gate: bool,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(input, weight, round_first, norm_before_gate)
    return _form.like(input, dtype), reference.empty_rstd(input, dims)


GATED_RMS_NORM = _form.register(
    _form.Form(
        name="gated_rms_norm",
        rows=("input", "gate"),
        weights=("weight",),
        options="int dims, float eps, float offset, bool round_first, bool norm_before_gate, bool silu",
        outputs=("output",),
        kept=("rstd",),
        define=gated_rms_norm,
        like=_like,
        gradients=lambda grads, saved, weights, options: gated_rms_norm_backward(*grads, *saved, *weights, *options),
    )
)
_gated_rms_norm, _gated_rms_norm_forward, _gated_rms_norm_backward = GATED_RMS_NORM.defaults.values()
rms_norm, forward, backward = GATED_RMS_NORM.plain, GATED_RMS_NORM.forward, GATED_RMS_NORM.backward
