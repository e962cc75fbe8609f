"""The only file with the sandwich's kernel for GPUs, in Triton; the rules and the steps are those of triton_steps.py.

    s = residual + norm(x; weight)        y = norm(s; next_weight)

The norm's output is rounded to its type before it is added, and so is the sum. Rows that fit into registers are read
once; of wider ones the second norm reads the sum, which this program has just written.
"""

import triton
import triton.language as tl

from .triton_numbers import _square_sum
from .triton_steps import _gain, _held, _load, _output, _reciprocal, _statistic


@triton.jit
def _sum(residual, normed, row, column, here, kind: tl.constexpr, wide: tl.constexpr):
    """The residual and what was normalised, rounded, in the accumulation type."""
    return (_load(residual, row, column, here).to(wide) + normed.to(kind).to(wide)).to(kind).to(wide)


@triton.jit(do_not_specialize=["rows"])
def sandwich(
    x, residual, weight, next_weight, y, sum, rstd, next_rstd,
    rows, columns, part: tl.float64, eps: tl.float64, next_eps: tl.float64,
    OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """The sum and, if they are given, its norm and each 1/rms; ``part`` is 1 / columns."""
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = row < rows
    row = row * tl.num_programs(1) + tl.program_id(1)
    first = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    here = inside & (first < columns)
    given = (x, None, None, None)
    tile = _held(given, row, inside, columns, wide, BLOCK, LOOP)
    total = _statistic(tile, given, None, row, inside, columns, kind, wide, BLOCK)
    r, scaled_r, scale = _reciprocal(tile, given, None, row, inside, columns, total, part, eps, kind, wide, BLOCK)
    if rstd is not None:
        tl.store(rstd + row, r, inside)

    if LOOP:
        total = tl.zeros([ROWS, 1], tl.float64)
        for start in range(0, columns, BLOCK):
            column = start + first
            here = inside & (column < columns)
            gain = _gain(weight, column, columns, OFFSET, wide)
            normed = _output(_load(x, row, column, here).to(wide), scaled_r, scale, gain, kind, ROUND_FIRST)
            block = _sum(residual, normed, row, column, here, kind, wide)
            tl.store(sum + row * columns + column, block, here)
            total += _square_sum(block, kind)
        tl.debug_barrier()  # other threads of this program read what this one wrote
    else:
        gain = _gain(weight, first, columns, OFFSET, wide)  # not before: fp32 rows of 16384 would spill
        normed = _output(tile, scaled_r, scale, gain, kind, ROUND_FIRST)
        tile = _sum(residual, normed, row, first, here, kind, wide)
        tl.store(sum + row * columns + first, tile, here)
        total = _square_sum(tile, kind)

    if y is not None:
        added = (sum, columns)
        r, scaled_r, scale = _reciprocal(
            tile, (added, None, None, None), None, row, inside, columns, total, part, next_eps, kind, wide, BLOCK
        )
        if next_rstd is not None:
            tl.store(next_rstd + row, r, inside)
        if LOOP:
            for start in range(0, columns, BLOCK):
                column = start + first
                here = inside & (column < columns)
                block = _load(added, row, column, here).to(wide)
                gain = _gain(next_weight, column, columns, OFFSET, wide)
                tl.store(y + row * columns + column, _output(block, scaled_r, scale, gain, kind, ROUND_FIRST), here)
        else:
            gain = _gain(next_weight, first, columns, OFFSET, wide)
            tl.store(y + row * columns + first, _output(tile, scaled_r, scale, gain, kind, ROUND_FIRST), here)
