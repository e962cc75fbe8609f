"""The only file with the forward kernel for GPUs, in Triton; those of the other forms share its rules and its steps.

    y = x · r · (OFFSET + weight)        r = 1 / sqrt(mean(x²) + eps)

A program owns one row, or a tile of narrow ones, and looks at no other's. Rows that fit into registers are read once;
wider ones are read again, BLOCK by BLOCK. Statistics are fp32 (fp64 for fp64) over a block, and fp64 for the few
numbers that there are per row. Nothing may be contracted (``enable_fp_fusion=False``): where a fused multiply-add is
meant, it is written. A weight of several rows is one grid dimension more.

A matrix whose rows may be apart comes as ``(pointer, stride of rows)``; one without a stride is contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def _load(matrix, row, column, here):
    return tl.load(matrix[0] + row * matrix[1] + column, here, 0.0)


@triton.jit
def _load_sum(x, residual, row, column, here, wide: tl.constexpr):
    """x, or x + residual rounded to its type; in the accumulation type."""
    tile = _load(x, row, column, here).to(wide)
    if residual is not None:
        tile = (tile + _load(residual, row, column, here).to(wide)).to(x[0].dtype.element_ty).to(wide)
    return tile


@triton.jit
def _square_sum(x, kind: tl.constexpr):
    """The sum of squares of each row, fp64 [ROWS, 1].

    Squares of half types are exact in fp32, and their plain sum is good to 2^-19. fp32 needs better for 2 ulp, and
    fp64 is slow on many GPUs. So squares are cut at a power of two above their sum: the upper parts add up without any
    rounding, in whatever order; the lower ones, with what squaring lost, are so small that their errors don't count.
    """
    square = x * x
    rough = tl.sum(square, 1, keep_dims=True)
    if kind.primitive_bitwidth == 16:
        return rough.to(tl.float64)
    if kind == tl.float64:
        cut = ((rough.to(tl.int64, bitcast=True) & 0x7FF0000000000000) + (2 << 52)).to(tl.float64, bitcast=True)
    else:
        cut = ((rough.to(tl.int32, bitcast=True) & 0x7F800000) + (2 << 23)).to(tl.float32, bitcast=True)
    upper = (square + cut) - cut
    lower = (square - upper) + tl.fma(x, x, -square)
    total = tl.sum(upper, 1, keep_dims=True).to(tl.float64) + tl.sum(lower, 1, keep_dims=True).to(tl.float64)
    return tl.where(rough < 2.0 ** (1000 if kind == tl.float64 else 120), total, rough.to(tl.float64))


@triton.jit
def _wide_square_sum(x):
    x = x.to(tl.float64)
    return tl.sum(x * x, 1, keep_dims=True)


@triton.jit
def _held(
    x, residual, sum, row, inside, columns, wide: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr
):  # fmt: skip
    """The rows, whose sums go to where they are wanted; None if they are too wide."""
    tile = None
    if not LOOP:
        column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
        here = inside & (column < columns)
        tile = _load_sum(x, residual, row, column, here, wide)
        if sum is not None:
            tl.store(sum + row * columns + column, tile, here)
    return tile


@triton.jit
def _statistic(
    tile, x, residual, sum, row, inside, columns, kind: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The sum of squares of each row; of rows that are too wide, sums go to where they are wanted here."""
    if tile is None:
        total = tl.zeros(row.shape, tl.float64)
        for start in range(0, columns, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :].to(tl.int64)
            here = inside & (column < columns)
            block = _load_sum(x, residual, row, column, here, wide)
            if sum is not None:
                tl.store(sum + row * columns + column, block, here)
            total += _square_sum(block, kind)
    else:
        total = _square_sum(tile, kind)
    return total


@triton.jit
def _reciprocal(
    x, residual, tile, row, inside, columns, total, part, eps,
    kind: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1/rms of each row from its sum of squares, fp64; and a scale for x, with 1/rms divided by it.

    Where squares over- or underflowed fp32 so that it shows, or are NaN, Inf or zero with eps = 0, they are summed
    again in fp64, from the tile or, without one, from memory. The scale is 1 where fp32 can hold 1/rms.
    """
    mean = total * part + eps
    scale = tl.full(total.shape, 1.0, tl.float32)
    if kind == tl.float64:
        r = 1.0 / tl.sqrt(mean)
        scaled_r = r
    else:
        r = tl.rsqrt(mean.to(tl.float32)).to(tl.float64)
        r = r * (1.5 - 0.5 * mean * r * r)  # one step of Newton's: from 2^-22 to 2^-43
        scaled_r = r
        ordinary = (mean > 2.0**-100) & (mean < 2.0**100)
        if tl.min(ordinary.to(tl.int32)) == 0:
            if tile is None:
                total = tl.zeros(mean.shape, tl.float64)
                for start in range(0, columns, BLOCK):
                    column = (start + tl.arange(0, BLOCK))[None, :].to(tl.int64)
                    total += _wide_square_sum(_load_sum(x, residual, row, column, inside & (column < columns), wide))
            else:
                total = _wide_square_sum(tile)
            r = tl.where(ordinary, r, 1.0 / tl.sqrt(total * part + eps))
            scale = tl.where(r > 2.0**100, 2.0**64, tl.where(r < 2.0**-100, 2.0**-64, scale))
            scaled_r = r * tl.where(r > 2.0**100, 2.0**-64, tl.where(r < 2.0**-100, 2.0**64, 1.0))
    return r, scaled_r, scale


@triton.jit
def _gain(weight, column, columns, OFFSET: tl.constexpr, wide: tl.constexpr):
    """A row of the weight, with the offset; None without a weight."""
    gain = None
    if weight is not None:
        gain = tl.load(weight + tl.program_id(1) * columns + column, column < columns, 0.0).to(wide)
        if OFFSET != 0.0:  # -0.0 + 0.0 would be 0.0
            gain += OFFSET
    return gain


@triton.jit
def _output(x, r, scale, gain, kind: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """``x · r · gain``. For fp32, r has two parts, and ``x · r`` is rounded once."""
    if kind == tl.float64:
        y = x * r
    else:
        x = x * scale
        high = r.to(tl.float32)
        y = x * high
        if kind == tl.float32:
            y = tl.fma(x, high, x * (r - high.to(tl.float64)).to(tl.float32))
    if gain is not None:
        if ROUND_FIRST:
            y = y.to(kind).to(y.dtype)
        y = y * gain
    return y


@triton.jit(do_not_specialize=["rows"])
def forward(
    x, residual, weight, y, sum, rstd, rows, columns, part: tl.float64, eps: tl.float64,
    OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """The output and, if they are given, the sum that was normalised and 1/rms; ``part`` is 1 / columns."""
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = row < rows
    row = row * tl.num_programs(1) + tl.program_id(1)
    first = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    if not LOOP:
        gain = _gain(weight, first, columns, OFFSET, wide)
    tile = _held(x, residual, sum, row, inside, columns, wide, BLOCK, LOOP)
    total = _statistic(tile, x, residual, sum, row, inside, columns, kind, wide, BLOCK)
    r, scaled_r, scale = _reciprocal(x, residual, tile, row, inside, columns, total, part, eps, kind, wide, BLOCK)
    if rstd is not None:
        tl.store(rstd + row, r, inside)

    if LOOP:
        for start in range(0, columns, BLOCK):
            column = start + first
            here = inside & (column < columns)
            block = _load_sum(x, residual, row, column, here, wide)
            gain = _gain(weight, column, columns, OFFSET, wide)
            tl.store(y + row * columns + column, _output(block, scaled_r, scale, gain, kind, ROUND_FIRST), here)
    else:
        here = inside & (first < columns)
        tl.store(y + row * columns + first, _output(tile, scaled_r, scale, gain, kind, ROUND_FIRST), here)
