"""The only file with the backward kernels for GPUs, in Triton; the rules are those of triton_forward.py.

    dx = r · (h - x̂ · mean(h · x̂))        dW = Σ_rows grad · x̂        with x̂ = x · r and h = grad · (OFFSET + weight)

A program owns a chunk of tiles of rows, or one row that is too wide for registers, and looks at no other's. What
arrives at heads that were turned is turned back as it is loaded: see triton_heads.py.
"""

import triton
import triton.language as tl

from .triton_forward import _gain, _load
from .triton_heads import _load_back, _load_head


@triton.jit
def _place(step, end, column, columns, ROWS: tl.constexpr):
    """The rows of the tile that begins at ``step``, which of them there are, and which of its elements."""
    row = (step + tl.arange(0, ROWS))[:, None]
    here = (row < end) & (column < columns)
    return row * tl.num_programs(1) + tl.program_id(1), row < end, here


@triton.jit
def _operands(
    grad, x, rstd, by, step, end, column, columns, wide: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """What is read of the tile that begins at ``step``: 1/rms of each row, the gradient, and x."""
    row, inside, here = _place(step, end, column, columns, ROWS)
    r = tl.load(rstd + row, inside, 0.0)
    if by is None:
        h, tile = _load(grad, row, column, here), _load(x, row, column, here)
    else:
        h, tile = _load_back(grad, row, column, here, by, INTERLEAVED, wide), _load_head(x, row, column, here, by)
    return r, h, tile


@triton.jit
def _graded(grad, weight, row, column, columns, OFFSET: tl.constexpr, wide: tl.constexpr):
    """h, for a block of a row."""
    h = _load(grad, row, column, column < columns).to(wide)
    gain = _gain(weight, column, columns, OFFSET, wide)
    if gain is not None:
        h = h * gain
    return h


@triton.jit(do_not_specialize=["rows", "chunk"])
def backward(
    grad, grad_sum, x, rstd, by, weight, dx, partial, rows, columns, chunk, part: tl.float64,
    INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of rows, and a row of partial sums of dW: fp32 over STEPS tiles, then the type of ``partial``.

    While a tile is worked on, the next one is on its way, as few programs share a multiprocessor: on an H200 that takes
    bfloat16 rows of 4096 from 2.1 to 1.7 times the time of a copy; the bytes are 1.5. But for fp32 rows of 8192: it
    brings nothing there, and on a B200 they would spill. And but for heads that were turned: twice as much is loaded.
    """
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    AHEAD: tl.constexpr = by is None and kind.primitive_bitwidth * BLOCK <= 2**17
    begin = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, rows)
    column = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    gain = _gain(weight, column, columns, OFFSET, wide)
    next_r, next_h, next_x = _operands(grad, x, rstd, by, begin, end, column, columns, wide, INTERLEAVED, ROWS)
    for first in range(begin, end, ROWS * STEPS):
        dw = tl.zeros([ROWS, BLOCK], wide)
        for step in range(first, tl.minimum(first + ROWS * STEPS, end), ROWS):
            r, h, x_hat = next_r, next_h.to(wide), next_x.to(wide) * next_r
            if AHEAD:
                then = step + ROWS
                next_r, next_h, next_x = _operands(
                    grad, x, rstd, by, then, end, column, columns, wide, INTERLEAVED, ROWS
                )
            if partial is not None:
                dw += h * x_hat
            if dx is not None:
                if gain is not None:
                    h = h * gain
                mean = (tl.sum(h * x_hat, 1, keep_dims=True).to(tl.float64) * part).to(wide)
                tile = r * (h - x_hat * mean)
                row, _, here = _place(step, end, column, columns, ROWS)
                if grad_sum is not None:
                    tile += _load(grad_sum, row, column, here).to(wide)
                tl.store(dx + row * columns + column, tile, here)
            if not AHEAD:
                then = step + ROWS
                next_r, next_h, next_x = _operands(
                    grad, x, rstd, by, then, end, column, columns, wide, INTERLEAVED, ROWS
                )
        if partial is not None:
            place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * columns + column
            dw_sum = tl.sum(dw, 0, keep_dims=True).to(partial.dtype.element_ty)
            if first > begin:
                dw_sum += tl.load(partial + place, column < columns, 0.0)
            tl.store(partial + place, dw_sum, column < columns)


@triton.jit
def backward_wide(
    grad, grad_sum, x, rstd, weight, dx, columns, part: tl.float64, OFFSET: tl.constexpr, BLOCK: tl.constexpr
):
    """dx of one row that doesn't fit into registers."""
    wide: tl.constexpr = tl.float64 if x[0].dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    first = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    r = tl.load(rstd + row)
    mean = tl.zeros([1, 1], tl.float64)
    for start in range(0, columns, BLOCK):
        column = start + first
        h = _graded(grad, weight, row, column, columns, OFFSET, wide)
        x_hat = _load(x, row, column, column < columns).to(wide) * r
        mean += tl.sum(h * x_hat, 1, keep_dims=True).to(tl.float64) * part
    for start in range(0, columns, BLOCK):
        column = start + first
        h = _graded(grad, weight, row, column, columns, OFFSET, wide)
        tile = r * (h - _load(x, row, column, column < columns).to(wide) * r * mean.to(wide))
        if grad_sum is not None:
            tile += _load(grad_sum, row, column, column < columns).to(wide)
        tl.store(dx + row * columns + column, tile, column < columns)


@triton.jit(do_not_specialize=["count"])
def fold(partial, dw, count, columns, DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """dW: its partial sums, added up in fp64 and in one order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([DEPTH, BLOCK], tl.float64)
    for first in range(0, count, DEPTH):
        row = (first + tl.arange(0, DEPTH)[:, None]).to(tl.int64)
        here = (row < count) & (column < columns)
        total += tl.load(partial + row * columns + column, here, 0.0).to(tl.float64)
    wide: tl.constexpr = tl.float64 if dw.dtype.element_ty == tl.float64 else tl.float32
    tl.store(dw + column, tl.sum(total, 0, keep_dims=True).to(wide), column < columns)
