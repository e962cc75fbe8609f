"""The only file that defines the gated norm: its maths in plain torch, and operators with it as default kernel.

    a = silu(gate) or sigmoid(gate), in the accumulation type of the input

    norm_before_gate      y = (x · r(x) · (offset + weight)) · a
    otherwise             z = x · a      y = z · r(z) · (offset + weight)      with r(·) = 1 / sqrt(mean(·²) + eps)

These functions are the definition, the fallback of the C++ kernels and the oracle of their tests, as ``reference.py``
is for the plain norm; derivatives of the gradient are taken through them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, _ops, reference


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


_OPTIONS = "Tensor? weight, int dims, float eps, float offset, "
SCHEMAS = {
    "gated_rms_norm": f"(Tensor input, Tensor gate, {_OPTIONS}bool round_first, bool norm_before_gate, bool silu)"
    " -> Tensor",
    "gated_rms_norm_forward": f"(Tensor input, Tensor gate, {_OPTIONS}bool round_first, bool norm_before_gate, "
    "bool silu) -> (Tensor output, Tensor rstd)",
    "gated_rms_norm_backward": f"(Tensor grad, Tensor input, Tensor gate, Tensor rstd, {_OPTIONS}"
    "bool norm_before_gate, bool silu, bool need_input, bool need_gate, bool need_weight)"
    " -> (Tensor grad_input, Tensor grad_gate, Tensor grad_weight)",
}


def _gated_rms_norm(input: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    return _gated_rms_norm_forward(input, gate, weight, *options)[0]


def _gated_rms_norm_forward(input: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    _native.warn_if_missing(input)
    return gated_rms_norm(input, gate, weight, *options)


def _gated_rms_norm_backward(
    grad: Tensor,
    input: Tensor,
    gate: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    norm_before_gate: bool,
    silu: bool,
    *needs: bool,
) -> tuple[Tensor, ...]:
    gradients = gated_rms_norm_backward(grad, input, gate, weight, dims, eps, offset, norm_before_gate, silu)
    return tuple(
        g.contiguous() if need and g is not None else input.new_empty(0)
        for g, need in zip(gradients, needs, strict=True)
    )


def _fake_gated_rms_norm(
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    norm_before_gate: bool,
    silu: bool,
) -> Tensor:
    return input.new_empty(input.shape, dtype=_result_dtype(input, weight, round_first, norm_before_gate))


def _fake_gated_rms_norm_forward(
    input: Tensor, gate: Tensor, weight: Tensor | None, dims: int, *options: Any
) -> tuple[Tensor, Tensor]:
    return _fake_gated_rms_norm(input, gate, weight, dims, *options), reference.empty_rstd(input, dims)


def _fake_gated_rms_norm_backward(
    grad: Tensor, input: Tensor, gate: Tensor, rstd: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(
        input.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((input, gate, weight), options[-3:], strict=True)
    )


for _name, _schema in SCHEMAS.items():
    _ops.library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _ops.library.impl(_name, globals()[f"_{_name}"], "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmsnorm::{_name}", globals()[f"_fake_{_name}"], lib=_ops.library)

rms_norm = torch.ops.rmsnorm.gated_rms_norm.default
forward = torch.ops.rmsnorm.gated_rms_norm_forward.default
backward = torch.ops.rmsnorm.gated_rms_norm_backward.default
