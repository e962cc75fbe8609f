"""The only file that launches the norm's GPU kernels, and says for all: which tiles, how many programs, with what.

Tiles, warps and the shape of every sum follow from sizes alone, never from strides, addresses or the device: a row's
bits depend neither on the batch nor on the number of multiprocessors. The constants were chosen by the figures in
docs/gpu.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import reference
from . import triton_backward, triton_forward

if TYPE_CHECKING:
    from .heads import Turn

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")

WIDEST = {"forward": 16384, "backward": 8192}
"""Columns that a program holds in registers without spilling."""
LOOP_BLOCK = {"forward": 4096, "backward": 8192}
"""Columns of wider rows that it takes at once."""
NARROW = 1024
TILE = {"forward": (1024, 1024), "backward": (2048, 4096)}
"""Elements that a tile has at least, if its rows are narrow and if not: narrow ones come several at a time."""
PER_WARP = {"forward": 1024, "backward": 512}
FEWEST_WARPS, MOST_WARPS = 2, 16
PARTIALS = 384, 256
"""Rows of partial sums of dW at most, if narrow and if not: programs of 4 or 8 warps, three or two for each
multiprocessor of an H100, which is how many their registers let it have."""
FEWEST_STEPS, STEPS = 4, 32
"""Tiles in a partial sum at least, and tiles that are added up in fp32 at most."""
FOLD = 64, 32, 8
"""The last sum of dW: rows and columns of its tile, and warps. 16 × 64, with 4, took 6 µs more on an H200."""


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
        triton_forward.forward,
        (_ceil(rows, tile), span),
        (x, other, _in_a_row(weight), out, sum, rstd if keep else None, rows, columns, 1 / columns, eps),
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
    turn: Turn | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator ``rms_norm_backward``: ``(grad_input, grad_weight)``, of shape [0] if not needed. Of heads that are
    turned, the first is as a projection wrote them."""
    rows, columns, span = _sizes(input, weight, dims)
    block, tile, warps = tile_of(columns, "backward")
    held = columns <= block
    part, chunk = 1 / columns, tile
    dx = input.new_empty(0) if not need_input else input.new_empty(input.shape) if turn is None else turn.room(input)
    dw, partial = input.new_empty(0), None
    if need_weight and weight is not None:
        steps = max(FEWEST_STEPS, _ceil(_ceil(rows, tile), PARTIALS[columns > NARROW]))
        chunk = tile * steps
        short = steps <= STEPS and input.dtype is not torch.float64
        kind = torch.float32 if short else torch.float64
        partial = input.new_empty((_ceil(rows, chunk), span * columns), dtype=kind)
        dw = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    weight, rstd = _in_a_row(weight), _in_a_row(rstd)
    of = _matrix if turn is None else turn.matrix
    g, more, x = of(grad, columns), _matrix(grad_sum, columns), of(input, columns)
    if partial is not None or (need_input and held):
        _launch(
            triton_backward.backward,
            (_ceil(rows, chunk), span, _ceil(columns, block)),
            (
                *(g, more, x, rstd, turn and turn.by(input), weight, dx if need_input and held else None, partial),
                *(rows, columns, chunk, part),
            ),
            {
                "INTERLEAVED": bool(turn and turn.interleaved),
                "OFFSET": offset,
                "ROWS": tile,
                "BLOCK": block,
                "STEPS": STEPS,
            },
            warps,
        )
    if need_input and not held:
        _launch(
            triton_backward.backward_wide,
            (rows, span),
            (g, more, x, rstd, weight, dx, columns, part),
            {"OFFSET": offset, "BLOCK": block},
            warps,
        )
    if partial is not None:
        depth, width, warps = FOLD
        _launch(
            triton_backward.fold,
            (_ceil(span * columns, width),),
            (partial, dw, len(partial), span * columns),
            {"DEPTH": depth, "BLOCK": width},
            warps,
        )
    return dx, dw


def tile_of(columns: int, direction: str) -> tuple[int, int, int]:
    """Columns and rows of a tile, and warps: by the columns alone. Rows wider than the tile come in blocks."""
    block = 1 << (columns - 1).bit_length() if columns <= WIDEST[direction] else LOOP_BLOCK[direction]
    rows = max(1, TILE[direction][columns > NARROW] // block)
    return block, rows, min(MOST_WARPS, max(FEWEST_WARPS, rows * block // PER_WARP[direction]))


def _sizes(input: Tensor, weight: Tensor | None, dims: int) -> tuple[int, int, int]:
    """Rows for each row of the weight, columns, and rows of the weight."""
    columns = input.shape[input.dim() - dims :].numel()
    span = 1 if weight is None else weight.numel() // columns
    return input.numel() // columns // span, columns, span


def _matrix(tensor: Tensor | None, columns: int) -> tuple[Tensor, int] | None:
    """[rows, columns] and the stride of its rows; a copy of what isn't laid out like a contiguous tensor, or wider.

    The compiler chooses its vectors by what 16 divides, strides and addresses, and the order of a sum by its vectors: a
    row of 129 columns, cut out of 144, would be added up in another order than alone.
    """
    if tensor is None:
        return None
    matrix = tensor.reshape(-1, columns)
    apart = matrix.stride(0) if len(matrix) > 1 else columns
    alike = (apart % 16 == 0, apart == 1) == (columns % 16 == 0, columns == 1)
    if not alike or (matrix.stride(1) != 1 and columns > 1) or (columns % 16 == 0 and matrix.data_ptr() % 16):
        return matrix.clone(memory_format=torch.contiguous_format), columns
    return matrix, apart


def _in_a_row(tensor: MaybeTensor) -> MaybeTensor:
    """Contiguous, at an address as an allocation has it."""
    if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    """Launches on the current device. From the second time on, the compiled kernel is found by what Triton compiles
    anew for: 12 µs where Triton's own way takes 15."""
    if 0 in grid:
        return
    key = kernel.__name__, warps, *constants.values(), *map(_kind, arguments)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
    else:
        compiled[(*grid, 1, 1)](*arguments, *constants.values())


_compiled: dict[tuple[Any, ...], Any] = {}


def _kind(argument: Any) -> Any:
    """What Triton compiles anew for: devices, types, what 16 divides, integers that are 1 or beyond 32 bits."""
    if isinstance(argument, Tensor):
        return argument.get_device(), argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument < 2**31
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else type(argument)
