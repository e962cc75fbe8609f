"""The only file with the steps of a row that GPU kernels of a backward pass are made of; the rules and the names of
steps are those of triton_steps.py, and two LOADs more:

    LOAD    "lean"           x is the output y, and x̂ = y / gain
            "none"           nothing was normalised: the gradient is the sum's
"""

import triton
import triton.language as tl

from .triton_numbers import _divided, _slope
from .triton_steps import _centred, _counted, _gain, _grouped, _load


@triton.jit
def _program(more):
    """Which chunk of rows this program has, of which row of the weight (or group), and how many of those there are."""
    chunk, own, owns = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    if more is not None and more.group is not None:
        chunk, own, owns = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    return chunk.to(tl.int64), own.to(tl.int64), owns


@triton.jit
def _place(step, end, rows, column, columns, more, ROWS: tl.constexpr):
    """The rows of the tile that begins at ``step``, which of them there are, and which of its elements. A single row is
    a number: as a tensor, each thread would load what belongs to it several times."""
    _, own, owns = _program(more)
    row = step if ROWS == 1 else (step + tl.arange(0, ROWS))[:, None]
    inside = row < end
    if more is not None and more.group is not None:
        row = own * rows + row
    else:
        row = row * owns + own
    return row, inside, inside & (column < columns)


@triton.jit
def _factor(weight, more, column, columns, OFFSET: tl.constexpr, wide: tl.constexpr):
    """The gain of this program's rows, or None: of a weight, or of their group."""
    gain = _gain(weight, column, columns, OFFSET, wide)
    if more is not None and more.scale is not None:
        gain = 1.0 + _shared(more.scale, more, column, columns, wide)
    return gain


@triton.jit
def _factor_of(weight, more, row, column, columns, OFFSET: tl.constexpr, wide: tl.constexpr):
    """The same of one row, which a program has alone."""
    gain = _gain(weight, column, columns, OFFSET, wide)
    if more is not None and more.scale is not None:
        gain = 1.0 + _grouped(more.scale, row, column, column < columns, more).to(wide)
    return gain


@triton.jit
def _shared(matrix, more, column, columns, wide: tl.constexpr):
    """The row that this program's rows share."""
    _, own, _ = _program(more)
    return tl.load(matrix[0] + own * matrix[1] + column, column < columns, 0.0).to(wide)


@triton.jit
def _inverse(gain, LOAD: tl.constexpr, wide: tl.constexpr):
    """1 / gain for an output that is divided by it, and 0 for 0; None where there is none."""
    by = None
    if LOAD == "lean" and gain is not None:
        by = tl.where(gain == 0.0, 0.0, _divided(tl.full(gain.shape, 1.0, wide), gain, wide))
    return by


@triton.jit
def _halves(mean, row, inside, wide: tl.constexpr):
    """The mean of each row in two parts."""
    mean = tl.load(mean + row, inside, 0.0)
    high = mean.to(wide)
    return high, (mean - high.to(tl.float64)).to(wide)


@triton.jit
def _normalised(
    x, r, by, more, row, column, inside, here, wide: tl.constexpr, LOAD: tl.constexpr, LAYER: tl.constexpr
):  # fmt: skip
    """``(x̂, a(gate), a'(gate))`` of what was read, the last two of a gate ahead of the norm, else anything. ``by`` is
    what ``_inverse`` returns."""
    a, slope = r, r
    if LOAD == "lean":
        x_hat = x
        if by is not None:
            x_hat = x * by
    elif LOAD == "silu" or LOAD == "sigmoid":
        a, slope = _slope(_load(more.gate, row, column, here).to(wide), wide, LOAD)
        x_hat = x * a * r
    elif LAYER:
        x_hat = _centred(x, _halves(more.mean, row, inside, wide), here) * r
    else:
        x_hat = x * r
    return x_hat, a, slope


@triton.jit
def _ungated(
    h, x_hat, gain, more, row, column, columns, here, wide: tl.constexpr, STORE: tl.constexpr, KEEP: tl.constexpr = True
):
    """The gradient before the gate behind the norm, whose own is stored where it is wanted."""
    if STORE == "silu" or STORE == "sigmoid":
        a, slope = _slope(_load(more.gate, row, column, here).to(wide), wide, STORE)
        if KEEP and more.dgate is not None:
            normed = x_hat
            if gain is not None:
                normed = x_hat * gain
            tl.store(more.dgate + row * columns + column, h * normed * slope, here)
        h = h * a
    return h


@triton.jit
def _means(products, sums, r, more, row, inside, part, wide: tl.constexpr, FLOOR: tl.constexpr, LAYER: tl.constexpr):
    """``(mean(h · x̂), mean(h))`` from sums over each row, of which the second is LayerNorm's, else anything."""
    total = products.to(tl.float64)
    if more is not None and more.grad_rstd is not None:
        total += tl.load(more.grad_rstd + row, inside, 0.0).to(tl.float64) * tl.abs(r).to(tl.float64)
    mean = (total * part).to(wide)
    if FLOOR:
        mean = tl.where(r < 0.0, 0.0, mean)
    other = mean
    if LAYER:
        other = (sums.to(tl.float64) * part).to(wide)
    return mean, other


@triton.jit
def _derived(h, x_hat, r, means, more, column, FLOOR: tl.constexpr, LAYER: tl.constexpr):
    """``r · (h - x̂ · mean(h · x̂) - mean(h))``, with zeros for the x̂ that don't count."""
    if FLOOR:
        r = tl.abs(r)
    if LAYER:
        h = h - means[1]
    return r * (h - _counted(x_hat, more, column) * means[0])


@triton.jit
def _left(
    t, x, a, slope, gate, dx, more, row, column, columns, here,
    kind: tl.constexpr, wide: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of rows that follow from that of what is normalised, t; and returns what a gate that several
    rows share adds up, or None."""
    product = None
    if LOAD == "silu" or LOAD == "sigmoid":
        if more.dgate is not None:
            tl.store(more.dgate + row * columns + column, t * x * slope, here)
        t = t * a
    elif LOAD == "gated" or LOAD == "none":
        t = t.to(kind)
        if more.dsum is not None:
            tl.store(more.dsum + row * columns + column, t, here)
        t = t.to(wide)
        if more.gate_sums is not None:
            product = t * _load(more.input, row, column, here).to(wide)
        t = t * gate
    if dx is not None:
        tl.store(dx + row * columns + column, t, here)
    return product
