"""The only file that launches the GPU kernels of the other norms: each by its operator's name.

A function of a forward pass takes ``keep`` before what the operator does: whether what is kept is wanted, too. It
returns None for what its kernel doesn't take, and then the definition serves. What all kernels ask of their tensors
``serve.py`` has asked before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import launch, neighbours, triton_quantised, triton_sandwich
from .steps import PLAIN

_Results = tuple[Tensor | None, ...] | None


def add_rms_norm(
    keep: bool,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
) -> _Results:
    return None if eps < 0 else launch.forward(input, residual, weight, dims, eps, offset, round_first, keep)


def rms_norm_add(
    keep: bool,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
) -> _Results:
    results = _sandwich(keep, False, input, residual, (weight, None), dims, (eps, eps), offset, round_first)
    return results and (results[1], results[2])


def sandwich_rms_norm(
    keep: bool,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    next_weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    next_eps: float | None,
) -> _Results:
    both = eps, eps if next_eps is None else next_eps
    return _sandwich(keep, True, input, residual, (weight, next_weight), dims, both, offset, round_first)


def _sandwich(
    keep: bool,
    twice: bool,
    input: Tensor,
    residual: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    dims: int,
    eps: tuple[float, float],
    offset: float,
    round_first: bool,
) -> _Results:
    """``(output, sum, rstd, next_rstd)``; only ``twice`` an output."""
    given = [weight for weight in weights if weight is not None]
    if min(eps) < 0 or len({weight.numel() for weight in given}) > 1:
        return None
    if any(reference.result_dtype(input, weight, round_first) is not input.dtype for weight in given):
        return None
    rows, columns, span = launch._sizes(input, given[0] if given else None, dims)
    block, tile, warps = launch.tile_of(columns, "forward")
    sum, output = input.new_empty(input.shape), input.new_empty(input.shape) if twice else None
    rstd, next_rstd = (reference.empty_rstd(input, dims) if wanted else None for wanted in (keep, keep and twice))
    x, other = (launch._matrix(t, columns) for t in (input, residual))
    first, second = map(launch._in_a_row, weights)
    launch._launch(
        triton_sandwich.sandwich,
        (launch._ceil(rows, tile), span),
        (x, other, first, second, output, sum, rstd, next_rstd, rows, columns, 1 / columns, *eps),
        {"OFFSET": offset, "ROUND_FIRST": round_first, "ROWS": tile, "BLOCK": block, "LOOP": columns > block},
        warps,
    )
    return output, sum, rstd, next_rstd


def quantised_rms_norm(
    keep: bool,
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
) -> _Results:
    if eps < 0 or input.dtype is torch.float64:
        return None
    steps = PLAIN if gate is None else neighbours.gating(gate, input, dims, norm_before_gate, silu)
    rows, columns, span = launch._sizes(input, weight, dims)
    block, tile, warps = launch.tile_of(columns, steps.way("forward"))
    wider = not steps.store and reference.result_dtype(input, weight, round_first) is not input.dtype
    codes, scale = input.new_empty(input.shape, dtype=torch.uint8), reference.empty_rstd(input, dims)
    sum = None if residual is None else input.new_empty(input.shape)
    x, other = (launch._matrix(t, columns) for t in (input, residual))
    launch._launch(
        triton_quantised.quantised,
        (launch._ceil(rows, tile), span),
        (x, other, launch._in_a_row(weight), codes, scale, sum, steps.more, rows, columns, 1 / columns, eps),
        {"LOAD": steps.load, "STORE": steps.store, "OFFSET": offset, "ROUND_FIRST": round_first}
        | {"WIDER": wider, "E4M3": e4m3}
        | {"ROWS": tile, "BLOCK": block, "LOOP": columns > block},
        warps,
    )
    return codes.view(torch.float8_e4m3fn if e4m3 else torch.int8), scale, input.new_empty(0) if sum is None else sum
