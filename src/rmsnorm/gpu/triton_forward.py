"""The only file with the forward kernel for GPUs, in Triton, of the steps in triton_steps.py.

    y = x · r · (OFFSET + weight)        r = 1 / sqrt(mean(x²) + eps)

with what each norm does before, to the mean, and behind. The other forms' kernels share its rules and its steps.
"""

import triton
import triton.language as tl

from .triton_steps import _centred, _finished, _gain, _held, _mean, _output, _reciprocal, _statistic, _taken


@triton.jit(do_not_specialize=["rows"])
def forward(
    x, residual, weight, y, sum, rstd, more, rows, columns, part: tl.float64, eps: tl.float64,
    LOAD: tl.constexpr, LAYER: tl.constexpr, FLOOR: tl.constexpr, STORE: tl.constexpr,
    OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """The output, if it is given, and if they are, the sum that was normalised, the mean and 1/rms; ``part`` is
    1 / columns, or of those that count, or 1 for an L2 norm."""
    kind: tl.constexpr = sum.dtype.element_ty if sum is not None else x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    # The type whose numbers are squared.
    exact: tl.constexpr = kind if (LOAD == "" or LOAD == "gated" or LOAD == "gated, each") and not LAYER else wide
    SOME: tl.constexpr = more is not None and more.counted is not None
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = row < rows
    row = row * tl.num_programs(1) + tl.program_id(1)
    first = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    given = (x, residual, sum, more)
    if not LOOP:
        gain = _gain(weight, first, columns, OFFSET, wide)
    tile = _held(given, row, inside, columns, wide, BLOCK, LOOP, LOAD)
    mean = None
    if LAYER:
        mean = _mean(tile, given, row, inside, columns, part, wide, BLOCK, LOAD)
        if more.mean is not None:
            tl.store(more.mean + row, mean[0].to(tl.float64) + mean[1].to(tl.float64), inside)
        if not LOOP:
            tile = _centred(tile, mean, inside & (first < columns))
    total = _statistic(tile, given, mean, row, inside, columns, exact, wide, BLOCK, LOAD)
    r, scaled_r, scale = _reciprocal(
        tile, given, mean, row, inside, columns, total, part, eps, kind, wide, BLOCK, LOAD, FLOOR
    )
    if rstd is not None:
        tl.store(rstd + row, r, inside)

    if y is not None:
        if LOOP:
            for start in range(0, columns, BLOCK):
                column = start + first
                here = inside & (column < columns)
                block = _centred(_taken(given, row, column, here, wide, LOAD), mean, here)
                gain = _gain(weight, column, columns, OFFSET, wide)
                block = _output(block, scaled_r, scale, gain, kind, ROUND_FIRST, SOME)
                block = _finished(block, weight, more, row, column, columns, here, kind, wide, STORE, ROUND_FIRST)
                tl.store(y + row * columns + column, block, here)
        else:
            here = inside & (first < columns)
            tile = _output(tile, scaled_r, scale, gain, kind, ROUND_FIRST, SOME)
            tile = _finished(tile, weight, more, row, first, columns, here, kind, wide, STORE, ROUND_FIRST)
            tl.store(y + row * columns + first, tile, here)


@triton.jit(do_not_specialize=["rows"])
def add(x, residual, sum, more, rows, columns, LOAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The load step alone: a sum that nothing normalises."""
    wide: tl.constexpr = tl.float64 if sum.dtype.element_ty == tl.float64 else tl.float32
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    here = (row < rows) & (column < columns)
    tl.store(sum + row * columns + column, _taken((x, residual, sum, more), row, column, here, wide, LOAD), here)
