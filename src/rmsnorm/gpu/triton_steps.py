"""The only file with the steps of a row that GPU kernels are made of: what is loaded, its statistic, what is stored.

A program owns one row, or a tile of narrow ones, and looks at no other's. Rows that fit into registers are read once;
wider ones are read again, BLOCK by BLOCK. Statistics are fp32 (fp64 for fp64) over a block, and fp64 for the few
numbers that there are per row. A weight of several rows is one grid dimension more.

A matrix whose rows may be apart comes as ``(pointer, stride of rows)``; one without a stride is contiguous. ``given``
is ``(x, residual, sum, more)``: what there is to load, where the sum goes, and ``steps.More``, what only some norms
have. Which steps are meant, strings say, as constants of a kernel:

    LOAD    ""               x, or x + residual, rounded
            "unrounded"      x + residual, whose rounding is stored, but not normalised
            "gated"          residual + gate · x, rounded once; of "gated, each" the product is, too
            "silu", …        x · a(gate)
    STORE   ""               x̂ · gain, and a bias
            "each"           the same, rounded after each step
            "silu", …        x̂ · gain · a(gate)
"""

import triton
import triton.language as tl

from .triton_numbers import _activation, _square_sum, _sum, _wide_square_sum


@triton.jit
def _load(matrix, row, column, here):
    return tl.load(matrix[0] + row * matrix[1] + column, here, 0.0)


@triton.jit
def _grouped(matrix, row, column, here, more):
    """A row that several share."""
    return tl.load(matrix[0] + row // more.group * matrix[1] + column, here, 0.0)


@triton.jit
def _taken(given, row, column, here, wide: tl.constexpr, LOAD: tl.constexpr = ""):
    """What is normalised, in the accumulation type."""
    x, residual, sum, more = given
    tile = _load(x, row, column, here).to(wide)
    if LOAD == "gated" or LOAD == "gated, each":
        tile = _grouped(more.gate, row, column, here, more).to(wide) * tile
        if LOAD == "gated, each":
            tile = tile.to(x[0].dtype.element_ty).to(wide)
    elif LOAD == "silu" or LOAD == "sigmoid":
        tile = tile * _activation(_load(more.gate, row, column, here).to(wide), wide, LOAD)
    if residual is not None:
        tile = tile + _load(residual, row, column, here).to(wide)
        if LOAD != "unrounded":
            tile = tile.to(sum.dtype.element_ty).to(wide)
    return tile


@triton.jit
def _counted(tile, more, column):
    """What of it the statistic counts."""
    if more is not None and more.counted is not None:
        tile = tl.where(column < more.counted, tile, 0.0)
    return tile


@triton.jit
def _centred(tile, mean, here):
    """``x - mean``, of which the mean has two parts; beside the row 0. None is no mean."""
    if mean is not None:
        tile = tl.where(here, (tile - mean[0]) - mean[1], 0.0)
    return tile


@triton.jit
def _held(
    given, row, inside, columns, wide: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, LOAD: tl.constexpr = ""
):  # fmt: skip
    """The rows, whose sums go to where they are wanted; None if they are too wide."""
    tile = None
    if not LOOP:
        column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
        here = inside & (column < columns)
        tile = _taken(given, row, column, here, wide, LOAD)
        if given[2] is not None:
            tl.store(given[2] + row * columns + column, tile, here)
    return tile


@triton.jit
def _mean(tile, given, row, inside, columns, part, wide: tl.constexpr, BLOCK: tl.constexpr, LOAD: tl.constexpr):
    """The mean of each row in two parts; in fp64 the second is the mean of what the first leaves."""
    mean = tl.zeros(row.shape, tl.float64)
    left = tl.zeros(row.shape, tl.float64)
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    if tile is None:
        for start in range(0, columns, BLOCK):
            here = inside & (start + column < columns)
            mean += _sum(_taken(given, row, start + column, here, wide, LOAD), wide) * part
        if wide == tl.float64:
            for start in range(0, columns, BLOCK):
                here = inside & (start + column < columns)
                block = _taken(given, row, start + column, here, wide, LOAD)
                left += _sum(tl.where(here, block - mean, 0.0), wide) * part
    else:
        mean += _sum(tile, wide) * part
        if wide == tl.float64:
            left += _sum(tl.where(inside & (column < columns), tile - mean, 0.0), wide) * part
    first = mean.to(wide)
    return first, (mean - first + left).to(wide)


@triton.jit
def _statistic(
    tile, given, mean, row, inside, columns, kind: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr,
    LOAD: tl.constexpr = "",
):  # fmt: skip
    """The sum of squares of each row; of rows that are too wide, sums go to where they are wanted here."""
    if tile is None:
        total = tl.zeros(row.shape, tl.float64)
        for start in range(0, columns, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :].to(tl.int64)
            here = inside & (column < columns)
            block = _taken(given, row, column, here, wide, LOAD)
            if given[2] is not None:
                tl.store(given[2] + row * columns + column, block, here)
            total += _square_sum(_counted(_centred(block, mean, here), given[3], column), kind)
    else:
        total = _square_sum(_counted(tile, given[3], tl.arange(0, BLOCK)[None, :]), kind)
    return total


@triton.jit
def _reciprocal(
    tile, given, mean, row, inside, columns, total, part, eps,
    kind: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr, LOAD: tl.constexpr = "", FLOOR: tl.constexpr = False,
):  # fmt: skip
    """1/rms of each row from its sum of squares, fp64; and a scale for x, with 1/rms divided by it.

    Where squares over- or underflowed fp32 so that it shows, or are NaN, Inf or zero with eps = 0, they are summed
    again in fp64, from the tile or, without one, from memory. The scale is 1 where fp32 can hold 1/rms. FLOOR is the
    other rule: eps is the least mean, and where it holds the first of the three is negative.
    """
    square = total * part
    least = tl.zeros(square.shape, tl.float64) + eps
    mean_square = tl.maximum(square, least, tl.PropagateNan.ALL) if FLOOR else square + eps
    scale = tl.full(total.shape, 1.0, tl.float32)
    if kind == tl.float64:
        r = 1.0 / tl.sqrt(mean_square)
        scaled_r = r
    else:
        r = tl.rsqrt(mean_square.to(tl.float32)).to(tl.float64)
        r = r * (1.5 - 0.5 * mean_square * r * r)  # one step of Newton's: from 2^-22 to 2^-43
        scaled_r = r
        ordinary = (mean_square > 2.0**-100) & (mean_square < 2.0**100)
        if tl.min(ordinary.to(tl.int32)) == 0:
            if tile is None:
                total = tl.zeros(square.shape, tl.float64)
                for start in range(0, columns, BLOCK):
                    column = (start + tl.arange(0, BLOCK))[None, :].to(tl.int64)
                    here = inside & (column < columns)
                    block = _centred(_taken(given, row, column, here, wide, LOAD), mean, here)
                    total += _wide_square_sum(_counted(block, given[3], column))
            else:
                total = _wide_square_sum(_counted(tile, given[3], tl.arange(0, BLOCK)[None, :]))
            square = total * part
            mean_square = tl.maximum(square, least, tl.PropagateNan.ALL) if FLOOR else square + eps
            r = tl.where(ordinary, r, 1.0 / tl.sqrt(mean_square))
            scale = tl.where(r > 2.0**100, 2.0**64, tl.where(r < 2.0**-100, 2.0**-64, scale))
            scaled_r = r * tl.where(r > 2.0**100, 2.0**-64, tl.where(r < 2.0**-100, 2.0**64, 1.0))
    if FLOOR:
        r = tl.where(square < eps, -r, r)
    return r, scaled_r, scale


@triton.jit
def _gain(weight, column, columns, OFFSET: tl.constexpr, wide: tl.constexpr, HINT: tl.constexpr = ""):
    """A row of the weight, with the offset; None without a weight."""
    gain = None
    if weight is not None:
        place = weight + tl.program_id(1) * columns + column
        gain = tl.load(place, column < columns, 0.0, eviction_policy=HINT).to(wide)
        if OFFSET != 0.0:  # -0.0 + 0.0 would be 0.0
            gain += OFFSET
    return gain


@triton.jit
def _output(x, r, scale, gain, kind: tl.constexpr, ROUND_FIRST: tl.constexpr, INFINITE: tl.constexpr = False):
    """``x · r · gain``. For fp32, r has two parts, and ``x · r`` is rounded once. INFINITE is whether x may be so and r
    not 0, as where not all columns count: parts of two signs would make that NaN."""
    if kind == tl.float64:
        y = x * r
    else:
        x = x * scale
        high = r.to(tl.float32)
        y = x * high
        if kind == tl.float32:
            whole = tl.fma(x, high, x * (r - high.to(tl.float64)).to(tl.float32))
            y = tl.where(tl.abs(x) == float("inf"), y, whole) if INFINITE else whole
    if ROUND_FIRST:
        y = y.to(kind).to(y.dtype)
    if gain is not None:
        y = y * gain
    return y


@triton.jit
def _finished(
    y, weight, more, row, column, columns, here,
    kind: tl.constexpr, wide: tl.constexpr, STORE: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """What follows ``_output``: a bias, a modulation, or a gate."""
    if more is not None:
        if more.scale is not None:
            by = 1.0 + _grouped(more.scale, row, column, here, more).to(wide)
            if STORE == "each":
                y = y * by.to(kind).to(wide)
                y = y.to(kind).to(wide)
            else:
                y = y * by
            if more.shift is not None:
                y = y + _grouped(more.shift, row, column, here, more).to(wide)
        elif more.bias is not None:
            y = y + tl.load(more.bias + tl.program_id(1) * columns + column, column < columns, 0.0).to(wide)
        if STORE == "silu" or STORE == "sigmoid":
            if ROUND_FIRST and weight is not None:  # to the type of the product: fp32 unless both are alike
                if weight.dtype.element_ty == kind:
                    y = y.to(kind).to(wide)
            y = y * _activation(_load(more.gate, row, column, here).to(wide), wide, STORE)
    return y
