"""The only file that launches the GPU kernels of norms with a gate or a modulation, and of the gated add: each by its
operator's name, by the rules of forms.py. Which steps they are is all that this file decides."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import launch, triton_forward
from .backward import derive
from .launch import _ceil, _in_a_row, _matrix
from .steps import More, Steps

_Results = tuple[Tensor | None, ...] | None
_ACTIVATIONS = {True: "silu", False: "sigmoid"}


def gated_rms_norm(
    keep: bool,
    input: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    norm_before_gate: bool,
    silu: bool,
) -> _Results:
    if eps < 0:
        return None
    dtype = input.dtype if norm_before_gate else None
    steps = gating(gate, input, dims, norm_before_gate, silu)
    output, _, rstd = launch.forward(
        input, None, weight, dims, eps, offset, round_first, keep, steps=steps, dtype=dtype
    )
    return output, rstd


def gating(gate: Tensor, input: Tensor, dims: int, behind: bool, silu: bool, dgate: Tensor | None = None) -> Steps:
    """The gate's steps, behind the norm or ahead of it."""
    more, activation = More(gate=_rows(gate, input, dims), dgate=dgate), _ACTIVATIONS[silu]
    return Steps(more, store=activation) if behind else Steps(more, load=activation)


def gated_rms_norm_backward(
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
    need_input: bool,
    need_gate: bool,
    need_weight: bool,
) -> _Results:
    dgate = gate.new_empty(gate.shape if need_gate else 0)
    steps = gating(gate, input, dims, norm_before_gate, silu, dgate if need_gate else None)
    dx, dw = derive(
        grad, None, input, rstd, weight, dims, offset, need_input, (weight if need_weight else None,), steps
    )
    return dx, dgate, dw


def modulated_norm(
    keep: bool,
    input: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    layer: bool,
) -> _Results:
    group = _group(input, dims, round_first, scale, shift, gate)
    if eps < 0 or weight is not None or group is None:
        return None
    mean = reference.empty_rstd(input, dims).double() if layer else input.new_empty(0, dtype=torch.float64)
    rows = [_rows(m, input, dims) for m in (gate, scale, shift)]
    more = More(rows[0], rows[1], rows[2], group, mean=mean if layer and keep else None)
    steps = Steps(more, load=_adding(gate, round_first), layer=layer, store="each" if round_first else "")
    output, sum, rstd = launch.forward(input, residual, None, dims, eps, 0.0, round_first, keep, steps=steps)
    return output, input.new_empty(0) if sum is None else sum, mean, rstd


def modulated_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    sum: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    layer: bool,
    need_input: bool,
    need_residual: bool,
    need_gate: bool,
    need_scale: bool,
    need_shift: bool,
    need_weight: bool,
) -> _Results:
    group = _group(input, dims, False, scale, shift, gate)
    if weight is not None or group is None:
        return None
    added = sum.shape == input.shape
    dsum = input.new_empty(input.shape if gate is not None and need_residual else 0)
    more = More(
        gate=_rows(gate, input, dims),
        scale=_rows(scale, input, dims),
        group=group,
        mean=_in_a_row(mean) if layer else None,
        input=_rows(input, input, dims) if gate is not None else None,
        dsum=dsum if dsum.numel() else None,
    )
    like = scale if need_scale else None, shift if need_shift else None, gate if need_gate else None
    steps = Steps(more, load="" if gate is None else "gated", layer=layer)
    wanted = need_input or (gate is None and need_residual)
    dx, dscale, dshift, dgate = derive(
        grad, grad_sum, sum if added else input, rstd, None, dims, 0.0, wanted, like, steps
    )
    if gate is None and need_residual:
        dsum = dx.clone() if need_input else dx  # no two outputs of an operator are one tensor
    none = input.new_empty(0)
    return dx if need_input else none, dsum if need_residual else none.clone(), dgate, dscale, dshift, none.clone()


def gated_add(keep: bool, input: Tensor, residual: Tensor, gate: Tensor, round_first: bool) -> _Results:
    group = _group(input, 1, round_first, gate)
    if group is None:
        return None
    sum, columns = input.new_empty(input.shape), input.shape[-1]
    block, tile, warps = launch.tile_of(columns, "forward")
    rows = input.numel() // columns
    launch._launch(
        triton_forward.add,
        (_ceil(rows, tile), _ceil(columns, block)),
        (
            *(_matrix(input, columns), _matrix(residual, columns), sum),
            *(More(gate=_matrix(gate, columns), group=group), rows, columns),
        ),
        {"LOAD": _adding(gate, round_first), "ROWS": tile, "BLOCK": block},
        warps,
    )
    return (sum,)


def gated_add_backward(grad: Tensor, input: Tensor, gate: Tensor, need_input: bool, need_gate: bool) -> _Results:
    group = _group(input, 1, False, gate)
    if group is None:
        return None
    more = More(gate=_rows(gate, input, 1), group=group, input=_rows(input, input, 1))
    like = None, None, gate if need_gate else None
    dx, _, _, dgate = derive(grad, None, input, None, None, 1, 0.0, need_input, like, Steps(more, load="none"))
    return dx, dgate


def _adding(gate: Tensor | None, round_first: bool) -> str:
    """The load step of a modulated norm."""
    return "" if gate is None else "gated, each" if round_first else "gated"


def _rows(tensor: Tensor | None, input: Tensor, dims: int) -> tuple[Tensor, int] | None:
    return _matrix(tensor, input.shape[input.dim() - dims :].numel())


def _group(input: Tensor, dims: int, round_first: bool, *shared: Tensor | None) -> int | None:
    """How many rows of the input share a row of these, or None for what the kernels don't take: sizes of 1 that aren't
    the last ones before the row, or other types than the input's and, where only the end is rounded, fp32."""
    given = [t for t in shared if t is not None]
    wide = input.dtype if round_first else reference.accumulation_dtype(input.dtype)
    outer = input.dim() - dims
    own = next((d for d in range(outer, 0, -1) if given[0].shape[d - 1] != 1), 0)
    sizes = (*input.shape[:own], *[1] * (outer - own), *input.shape[outer:])
    if any(tuple(t.shape) != sizes or t.dtype not in (input.dtype, wide) for t in given):
        return None
    return input.shape[own:outer].numel()
