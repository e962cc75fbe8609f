"""The only file that launches GPU kernels: which tiles, how many programs, with what.

Tiles, warps and the shape of every sum follow from sizes alone, never from the device: a row's bits depend neither on
the batch nor on the number of multiprocessors. The figures that the constants were chosen by are in docs/gpu.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _triton, reference

WIDEST = {"forward": 16384, "backward": 8192}
"""Columns that a program holds in registers without spilling."""
LOOP_BLOCK = 4096
TILE, PER_WARP, MOST_WARPS = 2048, 512, 16
"""Elements that a tile has at least (narrow rows come several at a time) and that each of its warps gets."""
PARTIALS, FEWEST_STEPS, STEPS = 256, 4, 32
"""Of dW: rows of partial sums at most, tiles in each at least, and tiles that are added up in fp32 at most."""


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    dims: int,
    eps: float,
    offset: float,
    round_first: bool,
    keep: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(output, sum, rstd)``: without a residual no sum, and only with ``keep`` an rstd that isn't empty. A contiguous
    ``out`` is written to, and may be the input."""
    rows, columns, span = _sizes(input, weight, dims)
    block, tile, warps = tile_of(columns, "forward")
    if out is None:
        out = input.new_empty(input.shape, dtype=reference.result_dtype(input, weight, round_first))
    sum = None if residual is None else input.new_empty(input.shape)
    rstd = reference.empty_rstd(input, dims) if keep else input.new_empty(0)
    x, other = (_matrix(t, columns) for t in (input, residual))
    _launch(
        _triton.forward,
        (_ceil(rows, tile), span),
        (x, other, _contiguous(weight), out, sum, rstd if keep else None, rows, columns, 1 / columns, eps),
        {"OFFSET": offset, "ROUND_FIRST": round_first, "ROWS": tile, "BLOCK": block, "LOOP": columns > block},
        warps,
    )
    return out, sum, rstd


def backward(
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
    """The operator ``rms_norm_backward``: ``(grad_input, grad_weight)``, of shape [0] if not needed."""
    rows, columns, span = _sizes(input, weight, dims)
    block, tile, warps = tile_of(columns, "backward")
    held = columns <= block
    part, chunk = 1 / columns, tile
    dx = input.new_empty(input.shape if need_input else 0)
    dw, partial = input.new_empty(0), None
    if need_weight and weight is not None:
        steps = max(FEWEST_STEPS, _ceil(_ceil(rows, tile), PARTIALS))
        chunk = tile * steps
        short = steps <= STEPS and input.dtype is not torch.float64
        kind = torch.float32 if short else torch.float64
        partial = input.new_empty((_ceil(rows, chunk), span * columns), dtype=kind)
        dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    weight, rstd = _contiguous(weight), rstd.contiguous()
    g, more, x = (_matrix(t, columns) for t in (grad, grad_sum, input))
    if partial is not None or (need_input and held):
        _launch(
            _triton.backward,
            (_ceil(rows, chunk), span, _ceil(columns, block)),
            (g, more, x, rstd, weight, dx if need_input and held else None, partial, rows, columns, chunk, part),
            {"OFFSET": offset, "ROWS": tile, "BLOCK": block, "STEPS": STEPS},
            warps,
        )
    if need_input and not held:
        _launch(
            _triton.backward_wide,
            (rows, span),
            (g, more, x, rstd, weight, dx, columns, part),
            {"OFFSET": offset, "BLOCK": block},
            warps,
        )
    if partial is not None:
        depth, width = 16, 64
        _launch(
            _triton.fold,
            (_ceil(span * columns, width),),
            (partial, dw, len(partial), span * columns),
            {"DEPTH": depth, "BLOCK": width},
            4,
        )
    return dx, dw


def tile_of(columns: int, direction: str) -> tuple[int, int, int]:
    """Columns and rows of a tile, and warps: by the columns alone. Rows wider than the tile come in blocks."""
    block = 1 << (columns - 1).bit_length() if columns <= WIDEST[direction] else LOOP_BLOCK
    rows = max(1, TILE // block)
    return block, rows, min(MOST_WARPS, rows * block // PER_WARP)


def _sizes(input: Tensor, weight: Tensor | None, dims: int) -> tuple[int, int, int]:
    """Rows for each row of the weight, columns, and rows of the weight."""
    columns = input.shape[input.dim() - dims :].numel()
    span = 1 if weight is None else weight.numel() // columns
    return input.numel() // columns // span, columns, span


def _matrix(tensor: Tensor | None, columns: int) -> tuple[Tensor, int, int] | None:
    """[rows, columns] with its strides; a copy if the rows have several."""
    if tensor is None:
        return None
    matrix = tensor.reshape(-1, columns)
    return matrix, matrix.stride(0), matrix.stride(1)


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    if 0 not in grid:
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
