"""The only file with the kernel for GPUs that turns heads, in Triton: behind their norm, as they come, and back.

    half-split     z[j] = y[j]·cos[j] - y[j+h]·sin[j]      z[j+h] = y[j+h]·cos[j+h] + y[j]·sin[j+h]
    interleaved    the same of the columns 2i and 2i+1, not j and j+h

with y a head, normed by the steps of triton_steps.py, or as it came. A row is a head of a token; rows are walked with
the tokens outside and the heads inside, as a projection wrote them. The other column of a pair is loaded, and normed,
once more, from the cache: so no column has to be where another thread is.

A tensor whose rows lie anywhere comes as ``(pointer, strides of sequences, tokens, heads)``. ``by`` is what heads are
turned by: ``(cos, sin, their rows, their columns, heads, tokens)``; cosines of the tokens serve every sequence.
"""

import triton
import triton.language as tl

from .triton_numbers import _square_sum
from .triton_steps import _gain, _output, _reciprocal


@triton.jit
def _begin(matrix, row, by):
    """Where a row begins."""
    heads, tokens = by[4], by[5]
    return row // heads // tokens * matrix[1] + row // heads % tokens * matrix[2] + row % heads * matrix[3]


@triton.jit
def _load_head(matrix, row, column, here, by):
    return tl.load(matrix[0] + _begin(matrix, row, by) + column, here, 0.0)


@triton.jit
def _partner(column, by, INTERLEAVED: tl.constexpr):
    """The other column of each pair, and whether this one is the first."""
    half = by[3] // 2
    if INTERLEAVED:
        first = column % 2 == 0
        return tl.where(first, column + 1, column - 1), first
    first = column < half
    return tl.where(first, column + half, column - half), first


@triton.jit
def _angle(angle, row, column, here, by):
    """A cosine or sine of each element."""
    return tl.load(angle + row // by[4] % by[2] * by[3] + column, here, 0.0)


@triton.jit
def _load_back(grad, row, column, here, by, INTERLEAVED: tl.constexpr, wide: tl.constexpr):
    """The gradient of what was turned, in the accumulation type."""
    whole = _load_head(grad, row, column, here, by).to(wide)
    here = here & (column < by[3])
    partner, first = _partner(column, by, INTERLEAVED)
    straight = whole * _angle(by[0], row, column, here, by).to(wide)
    across = _load_head(grad, row, partner, here, by).to(wide) * _angle(by[1], row, partner, here, by).to(wide)
    return tl.where(column < by[3], straight + tl.where(first, across, -across), whole)


@triton.jit(do_not_specialize=["rows"])
def turn(
    x, by, weight, z, rstd, rows, columns, part: tl.float64, eps: tl.float64,
    NORM: tl.constexpr, BACK: tl.constexpr, INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads turned, or turned back, and if it is given the 1/rms of each; ``part`` is 1 / columns."""
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    angle: tl.constexpr = by[0].dtype.element_ty
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    here = inside & (column < columns)
    to = z[0] + _begin(z, row, by) + column
    if BACK:
        tl.store(to, _load_back(x, row, column, here, by, INTERLEAVED, wide), here)
    else:
        moved = here & (column < by[3])
        partner, first = _partner(column, by, INTERLEAVED)
        y = _load_head(x, row, column, here, by).to(wide)
        other = _load_head(x, row, partner, moved, by).to(wide)
        if NORM:
            total = _square_sum(y, kind)
            r, scaled_r, scale = _reciprocal(
                y, (x, None, None, None), None, row, inside, columns, total, part, eps, kind, wide, BLOCK
            )
            if rstd is not None:
                tl.store(rstd + row, r, inside)
            gain = _gain(weight, column, columns, OFFSET, wide)
            y = _output(y, scaled_r, scale, gain, kind, ROUND_FIRST).to(kind).to(wide)
            gain = _gain(weight, tl.where(column < by[3], partner, column), columns, OFFSET, wide)
            other = _output(other, scaled_r, scale, gain, kind, ROUND_FIRST).to(kind).to(wide)
        # Each is rounded as torch's operators do, to the promoted type of a head and the cosines: that of the latter.
        straight = (y * _angle(by[0], row, column, moved, by).to(wide)).to(angle).to(wide)
        across = (other * _angle(by[1], row, column, moved, by).to(wide)).to(angle).to(wide)
        turned = (straight + tl.where(first, -across, across)).to(angle).to(wide)
        tl.store(to, tl.where(column < by[3], turned, y), here)
