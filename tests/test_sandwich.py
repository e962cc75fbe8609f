"""Proves that norm + add and the sandwich are their steps done one after the other, to the bit, forward and backward,
and that they are what the models compute; the truth beside them is an oracle's.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    Bounds,
    Truth,
    alike,
    bound,
    exact,
    gains,
    incoming,
    lay_out,
    rows_of,
    same_bits,
    sample,
    ulp,
)
from thinned import heavy_but
from torch import Tensor

from rmsnorm import add_rms_norm, rms_norm, rms_norm_add, sandwich_rms_norm

COLUMNS = (0, 1, 3, 127, 129, 576, 1027, 5137)
NEXT_EPS = 1e-3
Weights = tuple[Tensor | None, Tensor | None]


def pair(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return sample(rows, columns, dtype), (sample(rows, columns, seed=2) * 1.37).to(dtype)


def weight_pairs(columns: int, dtype: torch.dtype) -> list[Weights]:
    """None, alike, one of them, and of other types: what the kernels read in place, and what is formed before."""
    own, other = gains(columns, dtype=dtype), gains(columns, dtype=dtype, seed=3)
    mixed = torch.float32 if dtype in HALVES else torch.bfloat16
    pairs: list[Weights] = [(None, None), (own, other), (own, None), (None, other)]
    return [*pairs, (gains(columns, dtype=mixed), other), (own, gains(columns, dtype=mixed, seed=3))]


def steps(x: Tensor, residual: Tensor, w: Tensor | None, v: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
    """Ours, one after the other: ``(output, sum)``."""
    shape = x.shape[-1:]
    total = residual + rms_norm(x, shape, w, EPS, **options)
    return rms_norm(total, shape, v, NEXT_EPS, **options), total


def both(x: Tensor, residual: Tensor, w: Tensor | None, v: Tensor | None, **options: object) -> tuple[Tensor, Tensor]:
    return sandwich_rms_norm(x, residual, x.shape[-1], w, v, EPS, next_eps=NEXT_EPS, **options)


def half(x: Tensor, residual: Tensor, w: Tensor | None, **options: object) -> Tensor:
    return rms_norm_add(x, residual, x.shape[-1], w, EPS, **options)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_steps(target, dtype, columns):
    """Every pair of weights, offset and mode; every layout of both operands for 6 rows of 129."""
    for rows in (0, 1, 3, 1025 if columns in (3, 129) else 6):
        x, residual = pair(rows, columns, dtype)
        for (w, v), offset, mode in product(weight_pairs(columns, dtype), (0.0, 1.0), MODES):
            options = {"offset": offset, "casting_mode": mode}
            output, total = both(x, residual, w, v, **options)
            wanted, sum = steps(x, residual, w, v, **options)
            assert total.is_contiguous()
            assert output.is_contiguous()
            what = f"{rows} rows, {getattr(w, 'dtype', None)}, {getattr(v, 'dtype', None)}, {options}"
            assert same_bits(total, sum), what
            assert same_bits(output, wanted), what
            assert same_bits(half(x, residual, w, **options), sum), what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(target, dtype):
    """The bits of contiguous tensors, for both operands and both gradients; nothing beside them is read or written."""
    w, v = gains(129, dtype=dtype), gains(129, dtype=dtype, seed=3)
    x, residual = pair(10, 129, dtype)
    dy, ds = incoming(10, 129, dtype), sample(10, 129, dtype, seed=5) / 64
    for layout, other in [*product(LAYOUTS, ["contiguous"]), *product(["sliced"], LAYOUTS)]:
        results = []
        for arrange in (lay_out, rows_of):
            a, b, da, db = alike(
                *(arrange(t, name) for t, name in zip((x, residual, dy, ds), (layout, other) * 2, strict=True))
            )
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            leaves = (a, b, w.clone().requires_grad_(), v.clone().requires_grad_())
            outputs = both(*leaves)
            results.append([*outputs, *torch.autograd.grad(outputs, leaves, (da, db))])
        for one, two in zip(*results, strict=True):
            if target != "reference":
                assert same_bits(one.reshape(two.shape), two), (layout, other)
            torch.testing.assert_close(one.reshape(two.shape), two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(target, dtype):
    """Against the oracle: the first norm's bounds, one more rounding; the second norm of the sum that came out."""
    for columns, offset, mode in product((1, 31, 129, 1027), (0.0, 1.0), MODES):
        x, residual = pair(7, columns, dtype)
        w, v = gains(columns, dtype=dtype), gains(columns, dtype=dtype, seed=3)
        output, total = both(x, residual, w, v, offset=offset, casting_mode=mode)
        normed = Truth(x, EPS).forward(w, offset, mode, bound(target, dtype))
        unit = ulp(normed.low, dtype) / 2  # rounded to the type: at the ends of the interval, to either side
        low, high = exact(residual) + normed.low - unit, exact(residual) + normed.high + unit
        Bounds(low - ulp(low, dtype) / 2, high + ulp(high, dtype) / 2).check(total, "sum")
        Truth(total, NEXT_EPS).forward(v, offset, mode, bound(target, dtype)).check(output, "output")


def chained(x: Tensor, residual: Tensor, w: Tensor | None, v: Tensor | None, **options: object) -> tuple[Tensor, ...]:
    """The steps whose backward rounds where ours does: the gradient of the sum once."""
    columns = x.shape[-1]
    return add_rms_norm(rms_norm(x, columns, w, EPS, **options), residual, columns, v, NEXT_EPS, **options)


def gradients(
    function: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor | None, ...], frozen: tuple[int, ...] = (),
    used: tuple[int, ...] = (0, 1), **options: object,
) -> list[Tensor | None]:  # fmt: skip
    leaves = [t if t is None else t.detach().clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    outputs = function(*leaves, **options)
    grads = incoming(*outputs[0].shape, outputs[0].dtype), sample(*outputs[1].shape, outputs[1].dtype, seed=5) / 64
    pairs = [(outputs[i], grads[i]) for i in used if outputs[i].requires_grad]
    torch.autograd.backward([y for y, _ in pairs], [g for _, g in pairs])
    return [None if t is None else t.grad for t in leaves]


@pytest.mark.parametrize("columns", [1, 3, 127, 129, 1027, 5137])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_steps(target, dtype, columns):
    """To the bit: dx, the residual's, both weights', for odd and even rows, one chunk and several."""
    for rows in (0, 1, 3, 1025 if columns in (3, 129) else 35):
        x, residual = pair(rows, columns, dtype)
        for w, v in weight_pairs(columns, dtype):
            for offset, mode in ((0.0, "torch"), (1.0, "llama")):
                options = {"offset": offset, "casting_mode": mode}
                got = gradients(both, (x, residual, w, v), **options)
                wanted = gradients(chained, (x, residual, w, v), **options)
                for one, two in zip(got, wanted, strict=True):
                    assert (one is None) == (two is None)
                    if one is not None and target != "reference":
                        assert same_bits(one, two), (rows, w is None, v is None, options)
                    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_use(target, dtype):
    """One output used or both, and any of the operands frozen: the bits of the steps."""
    tensors = (*pair(33, 129, dtype), gains(129, dtype=dtype), gains(129, dtype=dtype, seed=3))
    frozen = [tuple(i for i in range(4) if mask >> i & 1) for mask in range(15)]
    for used, fixed in product(((0, 1), (0,), (1,)), frozen):
        got = gradients(both, tensors, fixed, used)
        wanted = gradients(chained, tensors, fixed, used)
        for i, (one, two) in enumerate(zip(got, wanted, strict=True)):
            assert two is None or one is not None
            if two is None:
                assert one is None or one.count_nonzero() == 0
            elif target == "reference":
                torch.testing.assert_close(one, two)
            else:
                assert same_bits(one, two), (used, fixed, i)
        got = gradients(lambda x, r, w, v: (half(x, r, w),) * 2, tensors, fixed, (1,))
        wanted = gradients(lambda x, r, w, v: (r + rms_norm(x, 129, w, EPS),) * 2, tensors, fixed, (1,))
        for one, two in zip(got[:3], wanted[:3], strict=True):
            assert (one is None) == (two is None)
            assert one is None or same_bits(one, two), fixed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_size(target, dtype):
    """Rows whose squares over- or underflow, in x or in the sum; zeros, NaN and Inf: as the steps, and alone."""
    info = torch.finfo(dtype)
    rows = [0.0, info.max / 8, info.smallest_normal * 4, info.smallest_normal * info.eps, torch.nan, torch.inf, 1.0]
    x, residual = pair(len(rows) ** 2, 129, dtype)
    for i, (a, b) in enumerate(product(rows, rows)):
        x[i], residual[i] = (sample(1, 129).clamp(-4, 4).sign() * a).to(dtype), (sample(1, 129, seed=4).sign() * b)
        if not torch.tensor(a).isfinite():
            x[i, 1:] = 1
        if not torch.tensor(b).isfinite():
            residual[i, 1:] = 1
    w, v = gains(129, dtype=dtype), gains(129, dtype=dtype, seed=3)
    output, total = both(x, residual, w, v)
    wanted, sum = steps(x, residual, w, v)
    got, truth = gradients(both, (x, residual, w, v))[:2], gradients(chained, (x, residual, w, v))[:2]
    for one, two in ((output, wanted), (total, sum), *zip(got, truth, strict=True)):
        assert torch.equal(one.isnan(), two.isnan())
        if target != "reference":
            assert same_bits(one.nan_to_num(), two.nan_to_num())
    alone = both(x[-1:], residual[-1:], w, v)
    assert same_bits(output[-1:], alone[0])
    assert same_bits(total[-1:], alone[1])


@pytest.mark.parametrize("dtype", heavy_but([torch.bfloat16], [torch.float32, torch.bfloat16]), ids=str)
def test_large_tensors(native_target, everything_is_large, dtype):
    """What goes past the caches, a sum through scratch: the same bits, aligned or not, on any number of threads."""
    everything_is_large()
    for columns in (96, 576, 4096, 1027):
        for layout in ("contiguous", "misaligned"):
            tensors = (*(lay_out(t, layout) for t in pair(71, columns, dtype)), *weight_pairs(columns, dtype)[1])
            tensors[0][5] *= 1e30  # one row through the rescue, one more of the sum
            tensors[1][9] *= 1e30
            for got, wanted in zip(both(*tensors), steps(*tensors), strict=True):
                assert same_bits(got, wanted)
            assert same_bits(half(*tensors[:3]), steps(*tensors)[1])
            for used, frozen in product(((0, 1), (0,), (1,)), ((), (0,), (1,), (2,), (3,), (2, 3))):
                ours, wanted = (gradients(f, tensors, frozen, used) for f in (both, chained))
                for got, other in zip(ours, wanted, strict=True):
                    known = [t for t in (got, other) if t is not None]  # of a norm that nobody used, nothing or zeros
                    same = same_bits(*known) if len(known) == 2 else not any(t.any() for t in known)
                    assert same, (columns, layout, used, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_pair_is_not_safe(native_target, dtype):
    """Of long rows, which a kernel may take two together: the first, the second, the last of an odd number, and those
    that are summed while the two before them, of another call of the kernel, are stored."""
    places = [*product((8, 9), (2, 3, -1)), *product((40,), (16, 17, 20, 33))]
    for (rows, r), k in product(places, (0, 1)):
        tensors = (*pair(rows, 2050, dtype), *weight_pairs(2050, dtype)[1])
        tensors[k][r] *= 1e30
        for mode in MODES:
            for got, wanted in zip(*(f(*tensors, casting_mode=mode) for f in (both, steps)), strict=True):
                assert same_bits(got, wanted)
            for got, wanted in zip(*(gradients(f, tensors, casting_mode=mode) for f in (both, chained)), strict=True):
                assert same_bits(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(300, 576), (4130, 34)])  # chunks of 32 rows, and of 33
def test_several_threads(native_target, threads, dtype, rows, columns):
    tensors = (*pair(rows, columns, dtype), *weight_pairs(columns, dtype)[1])
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append([*both(*tensors), half(*tensors[:3]), *gradients(both, tensors)])
        assert all(map(same_bits, results[0], results[-1]))


def test_two_dtypes_and_wider_weights(target):
    """Of two types, or where Llama's rounding makes the norm wider than its input: the steps, of any types."""
    for a, b, c in product((torch.float32, *HALVES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)):
        x, residual, w, v = sample(6, 31, a), sample(6, 31, b, seed=2), gains(31, dtype=c), gains(31, dtype=b, seed=3)
        for mode in MODES:
            got, wanted = (f(x, residual, w, v, casting_mode=mode) for f in (both, steps))
            assert all(map(same_bits, got, wanted)), (a, b, c, mode)
            grads = [gradients(f, (x, residual, w, v), casting_mode=mode) for f in (both, chained)]
            torch.testing.assert_close(*grads)


def test_weights_of_several_rows(target):
    """Each head with gains of its own, in one norm or in both."""
    for dtype, (heads, others) in product(DTYPES, (((3,), ()), ((), (3,)), ((3,), (5, 3)))):
        x, residual = (t.view(2, 5, 3, 31) for t in pair(30, 31, dtype))
        w, v = gains(*heads, 31, dtype=dtype), gains(*others, 31, dtype=dtype, seed=3)
        leaves = [[t.clone().requires_grad_() for t in (x, residual, w, v)] for _ in range(2)]
        results = []
        for function, tensors in zip((both, chained), leaves, strict=True):
            outputs = function(*tensors)
            grads = torch.autograd.grad(outputs, tensors, [torch.ones_like(outputs[0]), outputs[1].detach() / 64])
            results.append([*outputs, *grads])
        for one, two in zip(*results, strict=True):
            if target != "reference":
                assert same_bits(one, two)
            torch.testing.assert_close(one, two)


def test_what_is_kept(target):
    """x, the sum, the weights and two numbers per row; the residual never. Norm + add keeps no sum."""
    x, residual = (t.requires_grad_() for t in pair(37, 576, torch.bfloat16))
    w, v = (t.requires_grad_() for t in weight_pairs(576, torch.bfloat16)[1])
    for function, tensors, numbers in ((both, (x, residual, w, v), 2), (half, (x, residual, w), 1)):
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            outputs = function(*tensors)
        known = {t.data_ptr() for t in (x, w, v, *outputs[1:2])} if numbers == 2 else {x.data_ptr(), w.data_ptr()}
        rest = [t for t in kept if t.data_ptr() not in known]
        assert [t.untyped_storage().nbytes() for t in rest] == [37 * 4] * numbers
        assert len(kept) == len(known) + numbers
