"""The only file that launches the norm's forward kernel, and says for all: which tiles, how many programs, with what.

Tiles, warps and the shape of every sum follow from sizes alone, never from strides, addresses or the device: a row's
bits depend neither on the batch nor on the number of multiprocessors. The constants were chosen by the figures in
docs/gpu.md.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import reference
from . import triton_forward
from .steps import PLAIN, Steps

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")

WIDEST = {
    "forward": 16384,
    "forward, more": 8192,
    "backward": 16384,
    "backward, more": 4096,
    "backward, fp64": 4096,
}
"""Columns that a program holds in registers; ``more`` is of a norm with more than the plain one's tensors."""
LOOP_BLOCK = {
    "forward": 4096,
    "forward, more": 4096,
    "backward": 8192,
    "backward, more": 2048,
    "backward, fp64": 4096,
}
"""Columns of wider rows that it takes at once."""
NARROW = 1024
TILE = {
    "forward": (1024, 1024),
    "forward, more": (1024, 1024),
    "backward": (2048, 4096),
    "backward, more": (2048, 2048),
    "backward, fp64": (2048, 4096),
}
"""Elements that a tile has at least, if its rows are narrow and if not: narrow ones come several at a time."""
PER_WARP = {"forward": 1024, "forward, more": 1024, "backward": 512, "backward, more": 256, "backward, fp64": 512}
FEWEST_WARPS, MOST_WARPS = 2, 16 if torch.version.hip else 32
"""A program has 1024 threads at most, which are 16 of AMD's warps."""


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
    steps: Steps = PLAIN,
    sum: Tensor | None = None,
    dtype: torch.dtype | None = None,
    store: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(output, sum, rstd)``: without a residual no sum, and only with ``keep`` an rstd that isn't empty. A contiguous
    ``out`` is written to, and may be the input; ``dtype`` is that of the output, without ``store`` an empty one; and
    ``sum`` is of another type than the input's."""
    rows, columns, span = _sizes(input, weight, dims)
    block, tile, warps = tile_of(columns, steps.way("forward"))
    if residual is not None and sum is None:
        sum = input.new_empty(input.shape)
    added = input if sum is None else sum
    if out is None:
        out = (
            input.new_empty(input.shape, dtype=dtype or reference.result_dtype(added, weight, round_first))
            if store
            else added.new_empty(0)
        )
    rstd = reference.empty_rstd(added, dims) if keep else input.new_empty(0)
    x, other = (_matrix(t, columns) for t in (input, residual))
    to = out if store else None, sum, rstd if keep else None
    _launch(
        triton_forward.forward,
        (_ceil(rows, tile), span),
        (x, other, _in_a_row(weight), *to, steps.more, rows, columns, 1 / (steps.number or columns), eps),
        {**steps.named, "OFFSET": offset, "ROUND_FIRST": round_first}
        | {"ROWS": tile, "BLOCK": block, "LOOP": columns > block},
        warps,
    )
    return out, sum, rstd


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
        try:
            _compiled[key] = kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=False)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            raise RuntimeError(
                f"{error}: this driver loads no kernel while a graph is captured. Call rmsnorm once before, with "
                "tensors of the same types and widths, and the same options"
            ) from error
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
