"""The only file with the norm whose output is quantised, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _arguments, _form, reference
from .._shown import shown
from . import calls, gated_ops
from .gated import ACTIVATIONS
from .served import Served

TYPES = {torch.int8: False, torch.float8_e4m3fn: True}
_LEAST = torch.finfo(torch.float32).eps


def quantised_rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,  # torch.jit.script stops here, and shows this line: record with torch.jit.trace instead
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    offset: float = 0.0,
    casting_mode: str = "torch",
    activation: str = "silu",
    norm_before_gate: bool = True,
) -> tuple[Tensor, ...]:
    r"""RMS normalisation whose output is quantised in the same pass, with a scale of its own for each row.

        y = rms_norm(input), rms_norm(input + residual), or gated_rms_norm(input, gate)

        int8      scale = max(max|y| / 127.5, 2⁻²³)     codes = clamp(round(y · (1 / scale)), -128, 127)
        float8    scale = max|y| / 448                  codes = e4m3(clamp(y / scale, -448, 448))

    Contract: the codes are those of quantising the rounded output of our other functions, bit for bit, as torchao does
    (``Int8Tensor.from_hp`` and ``Float8Tensor.from_hp`` with ``PerRow()``, torchao 0.18): the scale is rounded to y's
    type, ties go to even. y itself is never written. As there, a row of zeros has float8 codes of NaN; a NaN in y makes
    the row's scale NaN, and its int8 codes 0.

    Args:
        input: ``[*, *normalized_shape]`` in float32, bfloat16 or float16. Any strides.
        normalized_shape, weight, eps, offset, casting_mode: as in :func:`rmsnorm.rms_norm`.
        residual: what is added first, as in :func:`rmsnorm.add_rms_norm`, of the shape and dtype of ``input``.
        gate, activation, norm_before_gate: as in :func:`rmsnorm.gated_rms_norm`; not together with a residual.
        dtype: of the codes, ``torch.int8`` or ``torch.float8_e4m3fn``.

    Returns:
        ``(codes, scale)``, with a residual ``(codes, scale, sum)``: codes of the shape of ``input``, scales in float32
        of its shape with the normalised sizes set to 1. ``codes.float() * scale`` is about y. There is no derivative.

    Raises:
        RuntimeError: as :func:`rmsnorm.rms_norm`; a residual and a gate; arguments that require grad.
        ValueError: another ``dtype``, an unknown casting mode or activation, a negative eps.

    Examples:
        >>> codes, scale = quantised_rms_norm(torch.tensor([0.1, 0.1, 0.2, 0.3]), 4, eps=0.0)
        >>> codes
        tensor([ 42,  42,  85, 127], dtype=torch.int8)

    Source: the rules are torchao's, https://github.com/pytorch/ao.
    """
    tensors = input, residual, gate, weight
    try:
        more = norm_before_gate, ACTIVATIONS[activation], TYPES[dtype]
        results = calls.everyday_norm(_served, tensors, normalized_shape, eps, offset, casting_mode, *more)
        if results is not None:
            return results[:2] if residual is None else results
    except (KeyError, TypeError):
        pass
    if not isinstance(dtype, torch.dtype) or dtype not in TYPES:
        raise ValueError(f"quantised_rms_norm: dtype must be torch.int8 or torch.float8_e4m3fn, but is {shown(dtype)}")
    _arguments.check_one_of("quantised_rms_norm", "activation", activation, ACTIVATIONS)
    if residual is not None and gate is not None:
        raise RuntimeError("quantised_rms_norm: there is a residual and a gate, but only one can be; add first")
    if isinstance(input, Tensor) and input.dtype in (torch.float64, torch.complex64, torch.complex128):
        raise RuntimeError(
            f"quantised_rms_norm: input must be float32, bfloat16 or float16, but is {input.dtype}; convert it, e.g. "
            "input.float()"
        )
    return calls.call(
        _served,
        quantised_rms_norm,
        {"input": input, "residual": residual, "gate": gate},
        normalized_shape,
        {"weight": weight},
        eps,
        {
            "offset": (offset, 0.0),
            "casting_mode": (casting_mode, "torch"),
            "dtype": (dtype, torch.int8),
            "activation": (activation, "silu"),
            "norm_before_gate": (norm_before_gate, True),
        },
        more,
        by_name=("residual", "gate"),
        pick=slice(2 if residual is None else 3),
    )


def quantise(y: Tensor, dims: int, e4m3: bool) -> tuple[Tensor, Tensor]:
    """``(codes, scale)`` of rows of ``dims`` dimensions."""
    last = tuple(range(-dims, 0))
    if not y.numel():
        shape = (*y.shape[: y.dim() - dims], *[1] * dims)
        floor = 0.0 if e4m3 else _LEAST
        return y.to(torch.float8_e4m3fn if e4m3 else torch.int8), torch.full(shape, floor, device=y.device)
    largest = y.abs().amax(last, keepdim=True)
    if e4m3:
        scale = (largest / 448.0).float()
        return (y.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale
    scale = (largest / 127.5).clamp(min=_LEAST).float()
    return (y * (1.0 / scale)).round().clamp(-128, 127).nan_to_num(0.0).to(torch.int8), scale


def _define(
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    norm_before_gate: bool,
    silu: bool,
    e4m3: bool,
    normalise: Callable[..., tuple[Tensor, Any]] = reference.rms_norm,
) -> tuple[Tensor, ...]:
    options = dims, eps, offset, round_first
    sum = input if residual is None else (input + residual).contiguous()
    if gate is not None:
        part = reference.rms_norm if normalise is calls.plain_norm else normalise  # as gated_rms_norm's own definition
        y = gated_ops.gated_rms_norm(input, gate, weight, *options, norm_before_gate, silu, normalise=part)[0]
    else:
        y = normalise(sum, weight, *options)[0]
    return *quantise(y, dims, e4m3), reference.nothing(input) if residual is None else sum


def _like(input: Tensor, residual: Tensor | None, gate: Any, weight: Any, dims: int, *options: Any) -> Any:
    codes = _form.like(input, torch.float8_e4m3fn if options[-1] else torch.int8)
    scale = reference.empty_rstd(input, dims).float()
    return codes, scale, input.new_empty(0) if residual is None else _form.like(input)


_served = Served(
    _form.register(
        _form.Form(
            name="quantised_rms_norm",
            rows=("input", "residual?", "gate?"),
            weights=("weight",),
            options="int dims, float eps, float offset, bool round_first, bool norm_before_gate, bool silu, bool e4m3",
            outputs=("codes", "scale", "sum"),
            kept=(),
            define=_define,
            like=_like,
        )
    ),
    calls.plain_norm,
)
