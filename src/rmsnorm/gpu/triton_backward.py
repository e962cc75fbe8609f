"""The only file with the backward kernels for GPUs, in Triton, of the steps in triton_gradients.py.

    dx = r · (h - x̂ · mean(h · x̂))        dW = Σ_rows grad · x̂        with x̂ = x · r and h = grad · (OFFSET + weight)

with what each norm did before, to the mean, and behind. A program owns a chunk of tiles of rows, and looks at no
other's. Of rows that are too wide for registers it has a block of columns, and another kernel went ahead, which finds
their means. What arrives at heads that were turned is turned back as it is loaded: see triton_heads.py.
"""

import triton
import triton.language as tl

from .triton_gradients import (
    _derived,
    _factor,
    _factor_of,
    _inverse,
    _left,
    _means,
    _normalised,
    _place,
    _program,
    _shared,
    _ungated,
)
from .triton_heads import _load_back, _load_head
from .triton_steps import _gain, _load


@triton.jit
def _operands(
    grad, x, rstd, means, by, more, step, end, rows, column, columns,
    wide: tl.constexpr, LAYER: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is read of the tile that begins at ``step``: 1/rms of each row, its means (or anything), the gradient, and
    x."""
    row, inside, here = _place(step, end, rows, column, columns, more, ROWS)
    r = tl.full([ROWS, 1], 1.0, wide)
    if rstd is not None:
        r = tl.load(rstd + row, inside, 0.0)
    mean, other = r, r
    if means is not None:
        place = means + row * (2 if LAYER else 1)
        mean = tl.load(place, inside, 0.0)
        if LAYER:
            other = tl.load(place + 1, inside, 0.0)
    if by is not None:
        h, tile = _load_back(grad, row, column, here, by, INTERLEAVED, wide), _load_head(x, row, column, here, by)
    elif grad is None:
        h, tile = tl.zeros([ROWS, BLOCK], wide), _load(x, row, column, here)
    else:
        h, tile = _load(grad, row, column, here), _load(x, row, column, here)
    return r, mean, other, h, tile


@triton.jit
def _add_to(sums, terms, place, here, again):
    """Adds up what a tile has of each column, and adds that to a row of partial sums."""
    total = tl.sum(terms, 0, keep_dims=True).to(sums.dtype.element_ty)
    if again:
        total += tl.load(sums + place, here, 0.0)
    tl.store(sums + place, total, here)


@triton.jit(do_not_specialize=["rows", "chunk"])
def backward(
    grad, grad_sum, x, rstd, means, by, weight, dx, partial, more, rows, columns, chunk, part: tl.float64,
    LOAD: tl.constexpr, LAYER: tl.constexpr, FLOOR: tl.constexpr, STORE: tl.constexpr, ROWWISE: tl.constexpr,
    INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of rows, and a row of partial sums of dW: fp32 over STEPS tiles, then the type of ``partial``.
    ROWWISE is whether a gradient is wanted that takes a mean over the row, which is in ``means`` if rows are wide.

    While a tile is worked on, the next one is on its way, as few programs share a multiprocessor: on an H200 that takes
    bfloat16 rows of 4096 from 2.1 to 1.7 times the time of a copy; the bytes are 1.5. But for fp32 rows of 8192: it
    brings nothing there, and on a B200 they would spill. And but for heads that were turned, and norms with more than
    the plain steps: more is loaded there. A row of more than 8192 columns has 1024 threads, whose 64 registers hold x̂
    and dW: the gradient and the weight are loaded AGAIN when the mean is known, from the cache. (Two loads with the
    same hint would become one.)
    """
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    AHEAD: tl.constexpr = by is None and more is None and kind.primitive_bitwidth * BLOCK <= 2**17
    AGAIN: tl.constexpr = BLOCK > 8192 and grad is not None
    number, own, owns = _program(more)
    begin = number * chunk
    end = tl.minimum(begin + chunk, rows)
    column = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :].to(tl.int64)
    gain = _factor(weight, more, column, columns, OFFSET, wide)
    inverse = _inverse(gain, LOAD, wide)
    gate = None
    if LOAD == "gated" or LOAD == "none":
        gate = _shared(more.gate, more, column, columns, wide)
    if AHEAD:
        next_r, next_mean, next_other, next_h, next_x = _operands(
            grad, x, rstd, means, by, more, begin, end, rows, column, columns, wide, LAYER, INTERLEAVED, ROWS, BLOCK
        )
    for first in range(begin, end, ROWS * STEPS):
        dw = tl.zeros([ROWS, BLOCK], wide)
        db = tl.zeros([ROWS, BLOCK], wide)
        dgate = tl.zeros([ROWS, BLOCK], wide)
        for step in range(first, tl.minimum(first + ROWS * STEPS, end), ROWS):
            if AHEAD:
                r, mean, other, h, tile = next_r, next_mean, next_other, next_h.to(wide), next_x.to(wide)
            else:
                r, mean, other, h, tile = _operands(
                    *(grad, x, rstd, means, by, more, step, end, rows, column, columns),
                    *(wide, LAYER, INTERLEAVED, ROWS, BLOCK),
                )
                h, tile = h.to(wide), tile.to(wide)
            row, inside, here = _place(step, end, rows, column, columns, more, ROWS)
            length = tl.abs(r) if FLOOR else r
            factor = _factor(weight, more, column, columns, OFFSET, wide) if AGAIN else gain
            by_factor = _inverse(factor, LOAD, wide) if AGAIN else inverse
            x_hat, a, slope = _normalised(tile, length, by_factor, more, row, column, inside, here, wide, LOAD, LAYER)
            if AHEAD:
                then = step + ROWS
                next_r, next_mean, next_other, next_h, next_x = _operands(
                    *(grad, x, rstd, means, by, more, then, end, rows, column, columns),
                    *(wide, LAYER, INTERLEAVED, ROWS, BLOCK),
                )
            h = _ungated(h, x_hat, factor, more, row, column, columns, here, wide, STORE)
            if partial is not None:
                dw += h * x_hat
            if more is not None and more.bias_sums is not None:
                db += h
            if ROWWISE:
                t = h
                if LOAD != "none":
                    if factor is not None:
                        h = h * factor
                    if means is None:
                        sums = tl.sum(h, 1, keep_dims=True) if LAYER else h
                        products = tl.sum(h if grad is None else h * x_hat, 1, keep_dims=True)  # 0 · inf is NaN
                        mean, other = _means(products, sums, r, more, row, inside, part, wide, FLOOR, LAYER)
                    if AGAIN:
                        h = tl.load(grad[0] + row * grad[1] + column, here, 0.0, eviction_policy="evict_first").to(wide)
                        factor = _gain(weight, column, columns, OFFSET, wide, "evict_last")
                        if factor is not None:
                            h = h * factor
                    t = _derived(h, x_hat, r, (mean, other), more, column, FLOOR, LAYER)
                if grad_sum is not None:
                    t += _load(grad_sum, row, column, here).to(wide)
                product = _left(t, tile, a, slope, gate, dx, more, row, column, columns, here, kind, wide, LOAD)
                if product is not None:
                    dgate += product
        place = (number * owns + own) * columns + column
        if partial is not None:
            _add_to(partial, dw, place, column < columns, first > begin)
        if more is not None:
            if more.bias_sums is not None:
                _add_to(more.bias_sums, db, place, column < columns, first > begin)
            if more.gate_sums is not None:
                _add_to(more.gate_sums, dgate, place, column < columns, first > begin)


@triton.jit
def wide_means(
    grad, x, rstd, weight, means, more, columns, part: tl.float64,
    LOAD: tl.constexpr, LAYER: tl.constexpr, FLOOR: tl.constexpr, STORE: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The means of one row that doesn't fit into registers, for ``backward``, which reads it again."""
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float64 if kind == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    r = tl.load(rstd + row)
    length = tl.abs(r) if FLOOR else r
    products = tl.zeros([1, 1], tl.float64)
    sums = tl.zeros([1, 1], tl.float64)
    for start in range(0, columns, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :].to(tl.int64)
        here = column < columns
        gain = _factor_of(weight, more, row, column, columns, OFFSET, wide)
        tile = _load(x, row, column, here).to(wide)
        h = tl.zeros(tile.shape, wide) if grad is None else _load(grad, row, column, here).to(wide)
        x_hat, _, _ = _normalised(
            tile, length, _inverse(gain, LOAD, wide), more, row, column, row >= 0, here, wide, LOAD, LAYER
        )
        h = _ungated(h, x_hat, gain, more, row, column, columns, here, wide, STORE, False)
        if gain is not None:
            h = h * gain
        products += tl.sum(h if grad is None else h * x_hat, 1, keep_dims=True).to(tl.float64)
        if LAYER:
            sums += tl.sum(h, 1, keep_dims=True).to(tl.float64)
    mean, other = _means(products, sums, r, more, row, row >= 0, part, wide, FLOOR, LAYER)
    place = means + row * (2 if LAYER else 1) + tl.arange(0, 1)[None, :]
    tl.store(place, mean)
    if LAYER:
        tl.store(place + 1, other)


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
