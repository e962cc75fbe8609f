"""The only file with the kernel for GPUs of the quantised norm, in Triton; the rules are those of triton_steps.py.

    int8      s = max(T(largest / 127.5), 2^-23)   code = min(nearest(y · (1/s)), 127)        symmetric, ties to even
    e4m3      s = T(largest / 448)                 code = e4m3(clamp(y / s, ±448))            float8, ties to even

with largest = max |y|, a NaN if one is, and T() one rounding to y's type; the rest is fp32. y itself is never written.
"""

import triton
import triton.language as tl

from .triton_steps import _finished, _gain, _held, _output, _reciprocal, _statistic, _taken


@triton.jit
def _rounded(
    x, r, scale, weight, more, row, column, columns, here,
    kind: tl.constexpr, out: tl.constexpr, OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """The norm's output as its type has it, in fp32."""
    gain = _gain(weight, column, columns, OFFSET, tl.float32)
    y = _output(x, r, scale, gain, kind, ROUND_FIRST)
    y = _finished(y, weight, more, row, column, columns, here, kind, tl.float32, STORE, ROUND_FIRST)
    return y.to(out).to(tl.float32)


@triton.jit
def _largest(y):
    """Of each row. As integers magnitudes are in the numbers' order, with NaN above all."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True)


@triton.jit
def _code(y, scale, E4M3: tl.constexpr):
    """The byte of each element."""
    if E4M3:
        # Compilers have no such type for all GPUs, so bits are put together here.
        x = tl.div_rn(y, scale)
        bits = x.to(tl.int32, bitcast=True)
        magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        # Below 2^-6 all have the step 2^-9, the last bit of what is about 2^14.
        small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
        code = tl.where(magnitude < (121 << 23), small, normal) | ((bits >> 24) & 0x80)
        code = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7F, code)
    else:
        x = y * scale
        # Added to 1.5 · 2^23, a number's last bit is 1: the sum is rounded to the nearest integer.
        nearest = (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        nan = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000
        code = tl.where(nan, 0, tl.maximum(tl.minimum(nearest, 127), -128))
    return code


@triton.jit(do_not_specialize=["rows"])
def quantised(
    x, residual, weight, codes, scales, sum, more, rows, columns, part: tl.float64, eps: tl.float64,
    LOAD: tl.constexpr, STORE: tl.constexpr,
    OFFSET: tl.constexpr, ROUND_FIRST: tl.constexpr, WIDER: tl.constexpr, E4M3: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """The bytes, the scale of each row and, if it is given, the sum that was normalised. WIDER is a y of fp32 beside an
    x of a half type."""
    kind: tl.constexpr = x[0].dtype.element_ty
    wide: tl.constexpr = tl.float32
    out: tl.constexpr = wide if WIDER else kind
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    inside = row < rows
    row = row * tl.num_programs(1) + tl.program_id(1)
    first = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    here = inside & (first < columns)
    given = (x, residual, sum, more)
    tile = _held(given, row, inside, columns, wide, BLOCK, LOOP, LOAD)
    total = _statistic(tile, given, None, row, inside, columns, kind if LOAD == "" else wide, wide, BLOCK, LOAD)
    _, r, by = _reciprocal(tile, given, None, row, inside, columns, total, part, eps, kind, wide, BLOCK, LOAD)

    if LOOP:
        most = tl.zeros([ROWS, 1], tl.int32)
        for start in range(0, columns, BLOCK):
            column = start + first
            here = inside & (column < columns)
            block = _taken(given, row, column, here, wide, LOAD)
            block = _rounded(
                block, r, by, weight, more, row, column, columns, here, kind, out, OFFSET, ROUND_FIRST, STORE
            )
            most = tl.maximum(most, _largest(block))
    else:  # the weight is not loaded before: fp32 rows of 16384 would spill
        tile = _rounded(tile, r, by, weight, more, row, first, columns, here, kind, out, OFFSET, ROUND_FIRST, STORE)
        most = _largest(tile)
    largest = most.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, 448.0 if E4M3 else 127.5, wide)).to(out).to(wide)
    if not E4M3:
        scale = tl.where(scale < 2.0**-23, 2.0**-23, scale)
    tl.store(scales + row, scale, inside)
    if not E4M3:
        scale = tl.div_rn(tl.full(scale.shape, 1.0, wide), scale)

    if LOOP:
        for start in range(0, columns, BLOCK):
            column = start + first
            here = inside & (column < columns)
            block = _taken(given, row, column, here, wide, LOAD)
            block = _rounded(
                block, r, by, weight, more, row, column, columns, here, kind, out, OFFSET, ROUND_FIRST, STORE
            )
            tl.store(codes + row * columns + column, _code(block, scale, E4M3).to(tl.uint8), here)
    else:
        tl.store(codes + row * columns + first, _code(tile, scale, E4M3).to(tl.uint8), here)
