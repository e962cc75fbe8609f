"""The only file with the arithmetic of GPU kernels that knows no rows of memory: sums, exponentials, gates.

Nothing may be contracted (``enable_fp_fusion=False``): where a fused multiply-add is meant, it is written. What stands
behind an ``if`` that returns is compiled all the same, for every type: what one type can't have stands in an ``else``.
"""

import triton
import triton.language as tl


@triton.jit
def _above(x, kind: tl.constexpr):
    """A power of two that is 2 to 4 times x."""
    if kind == tl.float64:
        above = ((x.to(tl.int64, bitcast=True) & 0x7FF0000000000000) + (2 << 52)).to(tl.float64, bitcast=True)
    else:
        above = ((x.to(tl.int32, bitcast=True) & 0x7F800000) + (2 << 23)).to(tl.float32, bitcast=True)
    return above


@triton.jit
def _sum(x, wide: tl.constexpr):
    """The sum of each row, as good as ``_square_sum`` and by its way, fp64 [ROWS, 1]. What would overflow is scaled."""
    rough = tl.sum(tl.abs(x), 1, keep_dims=True)
    upper = (x + _above(rough, wide)) - _above(rough, wide)
    rest = tl.sum(x - upper, 1, keep_dims=True).to(tl.float64)
    total = tl.sum(upper, 1, keep_dims=True).to(tl.float64) + rest
    if wide == tl.float32:
        large = rough >= 2.0**120
        if tl.max(large.to(tl.int32)) == 1:
            total = tl.where(large, tl.sum(x * 2.0**-32, 1, keep_dims=True).to(tl.float64) * 2.0**32, total)
    return total


@triton.jit
def _square_sum(x, kind: tl.constexpr):
    """The sum of squares of each row, fp64 [ROWS, 1]; ``kind`` is the type whose numbers x has.

    Squares of half types are exact in fp32, and their plain sum is good to 2^-19. fp32 needs better for 2 ulp, and
    fp64 is slow on many GPUs. So squares are cut at a power of two above their sum: the upper parts add up without any
    rounding, in whatever order; the lower ones, with what squaring lost, are so small that their errors don't count.
    """
    square = x * x
    rough = tl.sum(square, 1, keep_dims=True)
    if kind.primitive_bitwidth == 16:
        return rough.to(tl.float64)
    cut = _above(rough, kind)
    upper = (square + cut) - cut
    lower = (square - upper) + tl.fma(x, x, -square)
    total = tl.sum(upper, 1, keep_dims=True).to(tl.float64) + tl.sum(lower, 1, keep_dims=True).to(tl.float64)
    return tl.where(rough < 2.0 ** (1000 if kind == tl.float64 else 120), total, rough.to(tl.float64))


@triton.jit
def _wide_square_sum(x):
    x = x.to(tl.float64)
    return tl.sum(x * x, 1, keep_dims=True)


@triton.jit
def _divided(a, b, wide: tl.constexpr):
    """By IEEE's rule; Triton's own division of fp32 is off by 2 ulp."""
    return a / b if wide == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _exponential(x, wide: tl.constexpr):
    """exp(x) for x that are 0 or less, within 1 ulp. The hardware's own would be off by 2^-24 · |x|.

    With n the nearest integer to x / ln 2 and t = x - n · ln 2, |t| < 0.35: Taylor's polynomial of degree 7 is off by
    5e-9, a tenth of a unit. ln 2 has two parts, of which the first has 8 zeros at its end: n · ln 2 is exact.
    """
    if wide == tl.float64:
        result = tl.exp(x)
    else:
        x = tl.where(x < -120.0, -120.0, x)  # exp(-120) is 0; NaN stays
        shifted = x * 1.4426950408889634 + 12582912.0  # added to 1.5 · 2^23, a number's last bit is 1
        n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        whole = shifted - 12582912.0
        t = tl.fma(whole, -0.693145751953125, x)
        t = tl.fma(whole, -1.428606765330187e-06, t)
        y = tl.full(x.shape, 1 / 5040, tl.float32)
        y = tl.fma(y, t, 1 / 720)
        y = tl.fma(y, t, 1 / 120)
        y = tl.fma(y, t, 1 / 24)
        y = tl.fma(y, t, 1 / 6)
        y = tl.fma(y, t, 0.5)
        y = tl.fma(y, t, 1.0)
        y = tl.fma(y, t, 1.0)
        half = n >> 1  # 2^n in two steps, as it may be subnormal
        result = y * _power(half) * _power(n - half)
    return result


@triton.jit
def _power(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(gate, wide: tl.constexpr):
    e = _exponential(-tl.abs(gate), wide)
    whole = 1.0 + e
    top = tl.where(gate < 0.0, e, 1.0)
    if wide == tl.float64:
        sigmoid = top / whole
    else:
        # 1 / whole of numbers between 1 and 2. IEEE's division would be called as a function, with a stack.
        part = tl.rsqrt(whole)
        part = part * part
        part = tl.fma(part, tl.fma(-whole, part, 1.0), part)  # one step of Newton's: from 2^-21 to 2^-24
        sigmoid = top * part
    return sigmoid


@triton.jit
def _activation(gate, wide: tl.constexpr, GATE: tl.constexpr):
    """a(gate): GATE is ``"silu"`` or ``"sigmoid"``."""
    sigmoid = _sigmoid(gate, wide)
    return gate * sigmoid if GATE == "silu" else sigmoid


@triton.jit
def _slope(gate, wide: tl.constexpr, GATE: tl.constexpr):
    """``(a(gate), a'(gate))``."""
    sigmoid = _sigmoid(gate, wide)
    other = _sigmoid(-gate, wide)  # 1 - sigmoid, as far as it is small
    if GATE == "silu":
        return gate * sigmoid, sigmoid * (1.0 + gate * other)
    return sigmoid, sigmoid * other
