"""Proves what can be asked for beyond the plain norm: values against the formula in numpy, and the bits of the plain
norm wherever the steps are its own."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from general_oracle import COLUMNS, PARTS, WIDE, Formula, counted, rows
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    Bounds,
    bound,
    exact,
    gains,
    incoming,
    lay_out,
    rows_of,
    same_bits,
    sample,
)

from rmsnorm import add_rms_norm, add_rms_norm_, inverse_rms, l2_norm, rms_norm


@pytest.mark.parametrize("columns", COLUMNS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(target, dtype, columns):
    """Part of the columns, a bias, an offset and another type of output, crossed."""
    for count in (1, 3, 1025 if columns in (3, 129) else 5):
        x, _, w, b = rows(count, columns, dtype)
        outs = (dtype, *(HALVES if dtype is WIDE else ()), *((WIDE,) if dtype is torch.float64 else ()))
        for part, weight, bias, offset, out in product(PARTS, (w, None), (b, None), (0.0, 1.0), outs):
            y = rms_norm(x, columns, weight, EPS, partial=part, bias=bias, offset=offset, out_dtype=out)
            truth = Formula(exact(x), counted(columns, part))
            assert y.dtype is out
            assert y.is_contiguous()
            ulps = bound(target, out) if dtype is not WIDE or out is WIDE else 0.51
            truth.forward(weight, bias, offset, out, ulps + (bias is not None)).check(y, (part, offset, out))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_plain_norm(native_target, dtype, columns):
    """What changes nothing changes no bit, and another type of output is the same norm, rounded to it."""
    for count in (0, 3):
        x, residual, w, _ = rows(count, columns, dtype)
        zero = torch.full((columns,), -0.0, dtype=dtype)
        for weight, offset, mode in product((w, None), (0.0, 1.0), MODES):
            options = {"offset": offset, "casting_mode": mode}
            wanted = rms_norm(x, columns, weight, EPS, **options)
            y, rstd = rms_norm(x, columns, weight, EPS, **options, return_rstd=True)
            assert same_bits(y, wanted)
            assert same_bits(rstd, inverse_rms(x, columns, EPS))
            for more in ({"bias": zero}, {"partial": 1.0}, {"out_dtype": dtype}):
                assert same_bits(rms_norm(x, columns, weight, EPS, **options, **more), wanted), more
            both = add_rms_norm(x, residual, columns, weight, EPS, **options)
            for more in ({"bias": zero}, {"partial": 1}, {"round_sum": dtype not in HALVES}):
                if more != {"round_sum": False} or dtype not in HALVES:
                    got = add_rms_norm(x, residual, columns, weight, EPS, **options, **more)
                    assert all(map(same_bits, got, both)) or more == {"round_sum": False}, more
            for out in HALVES if dtype is WIDE else ():
                got = rms_norm(x, columns, weight, EPS, **options, out_dtype=out)
                assert same_bits(got, wanted.to(out))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_wider_residual(native_target, dtype, columns):
    """fp32 stream, half blocks: the fp32 norm of the fp32 sum, rounded to the type of x; either may be the wide one."""
    x, residual, w, b = rows(5, columns, dtype)
    for first, second in ((x, residual.float() * 1.001), (x.float() * 1.001, residual)):
        for weight, mode in product((w, w.float(), None), MODES):
            got = add_rms_norm(first, second, columns, weight, EPS, casting_mode=mode, out_dtype=dtype)
            total = first + second
            wide = None if weight is None else weight.float()
            assert same_bits(got[1], total)
            assert same_bits(got[0], rms_norm(total, columns, wide, EPS, casting_mode=mode).to(dtype))
        y, total, rstd = add_rms_norm(first, second, columns, w, EPS, bias=b, partial=0.5, return_rstd=True)
        assert (y.dtype, total.dtype, rstd.dtype) == (WIDE, WIDE, WIDE)
        assert same_bits(y, rms_norm(total, columns, w, EPS, bias=b, partial=0.5))
    weight, wide = w.float() / 3, residual.double() * 1.001
    for offset, more in product((0.0, 1.0), ({}, {"round_sum": False}, {"bias": b.float()})):
        # The offset was added in fp32: 6e-8 off.
        y, total, _ = add_rms_norm(x.float(), wide, columns, weight, EPS, offset=offset, return_rstd=True, **more)
        assert same_bits(total, x.double() + wide)
        bias = b.double() if "bias" in more else None
        assert same_bits(y, rms_norm(total, columns, weight.double(), EPS, offset=offset, bias=bias)), (offset, more)
    other = HALVES[dtype is HALVES[0]]
    y, total = add_rms_norm(x, residual.to(other), columns, w, EPS, out_dtype=dtype)
    assert same_bits(total, x + residual.to(other))
    assert same_bits(y, rms_norm(total, columns, w.float(), EPS).to(dtype))


@pytest.mark.parametrize("columns", COLUMNS[1:])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_unrounded_sum(target, dtype, columns):
    """Against the exact sum in fp64: within 0.51 ulp, where the norm of the rounded sum is off by as much as it."""
    x, residual, w, _ = rows(40, columns, dtype)
    y, total = add_rms_norm(x, residual, columns, w, EPS, round_sum=False)
    truth = Formula(exact(x) + exact(residual), columns)
    truth.forward(w, None, 0.0, dtype, 0.51).check(y, columns)
    assert same_bits(total, x + residual)
    if columns > 100:
        with pytest.raises(AssertionError):
            truth.forward(w, None, 0.0, dtype, 0.51).check(add_rms_norm(x, residual, columns, w, EPS)[0], columns)
    first = add_rms_norm(x, residual, columns, w, EPS, round_sum=False, casting_mode="llama")[0]
    wanted = rms_norm(x.float() + residual.float(), columns, None, EPS).to(dtype) * w
    if target != "reference":
        assert same_bits(first, wanted)


@pytest.mark.parametrize("columns", [*COLUMNS[1:], 32, 64, 4096])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_unrounded_sum_is_a_row_of_fp32(native_target, dtype, columns):
    """Whichever kernel has it: alone, with an offset or without a weight, in place, for rows that need rescue, too."""
    x, residual, w, _ = rows(9, columns, dtype)
    x[1], x[2], x[3] = 0, torch.finfo(dtype).max / 4, torch.finfo(dtype).tiny
    residual[1], residual[2], residual[3] = 0, torch.finfo(dtype).max / 8, torch.finfo(dtype).tiny / 2
    unrounded = x.float() + residual.float()
    for weight, offset in ((w, 0.0), (w, 0.5), (None, 0.0)):
        y, total, rstd = add_rms_norm(
            x, residual, columns, weight, EPS, offset=offset, round_sum=False, return_rstd=True
        )
        wide = None if weight is None else weight.float()
        wanted, factor = rms_norm(unrounded, columns, wide, EPS, offset=offset, return_rstd=True)
        assert all(map(same_bits, (y, total, rstd), (wanted.to(dtype), x + residual, factor)))
        a, s = x.clone(), residual.clone()
        if weight is not None:
            add_rms_norm_(a, s, weight, EPS, offset=offset, round_sum=False)
            assert all(map(same_bits, (a, s), (y, total)))


def test_no_bit_of_the_others(native_target):
    """fp32 and fp64 sums are rounded as they are added: ``round_sum`` says nothing."""
    for dtype in (WIDE, torch.float64):
        x, residual, w, _ = rows(5, 129, dtype)
        got = add_rms_norm(x, residual, 129, w, EPS, round_sum=False)
        assert all(map(same_bits, got, add_rms_norm(x, residual, 129, w, EPS)))


@pytest.mark.parametrize("columns", COLUMNS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l2(target, dtype, columns):
    """Both rules for eps, with and without a gain; the rows' lengths lie on both sides of a large one."""
    x, _, w, _ = rows(7, columns, dtype)
    lengths = np.sqrt(np.sum(exact(x) ** 2, -1))
    for eps, inside, weight in product((0.0, 1e-12, float(np.median(lengths))), (False, True), (None, w)):
        y = l2_norm(x, columns, weight, eps, eps_inside=inside)
        floor, added = (0.0, eps) if inside else (eps * eps, 0.0)
        truth = Formula(exact(x), columns, added, mean=False, floor=floor)
        truth.forward(weight, None, 0.0, dtype, bound(target, dtype)).check(y, (eps, inside))
    wide = l2_norm(x, columns, out_dtype=WIDE)
    torch.testing.assert_close(wide, F.normalize(x.double(), dim=-1).float(), rtol=1e-5, atol=1e-7)


def test_l2_of_an_eps_without_a_square(target):
    """Rows of zeros, and rows as short as eps or shorter, whose squares underflow as well."""
    for size, eps in product((0.0, 1e-250, 1e-200, 1e-170, 1e-165, 1.0), (1e-250, 1e-200, 1e-165)):
        x = torch.full((2, 4), size, dtype=torch.float64)
        expected = torch.full_like(x, size / max(2 * size, eps))
        torch.testing.assert_close(l2_norm(x, 4, eps=eps), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_factor_alone(target, dtype):
    for columns in COLUMNS[1:]:
        x = sample(7, columns, dtype)
        r = inverse_rms(x, columns, EPS)
        assert r.shape == (7, 1)
        assert r.dtype is (torch.float64 if dtype is torch.float64 else WIDE)
        unit = 40 if dtype in HALVES else 3
        Bounds(*(Formula(exact(x), columns).r * (1 + s * unit * torch.finfo(r.dtype).eps / 2) for s in (-1, 1))).check(
            r, columns
        )
    assert inverse_rms(sample(6, 12, dtype).view(2, 3, 3, 4), (3, 4), EPS).shape == (2, 3, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(target, dtype):
    """The bits of contiguous tensors, forward and backward; nothing beside them is read."""
    w, b = gains(129, dtype=dtype), gains(129, dtype=dtype, seed=3)
    x, residual, *_ = rows(10, 129, dtype)
    dy = incoming(10, 129, dtype)
    for layout in LAYOUTS:
        results = []
        for arrange in (lay_out, rows_of):
            a, r, g = (arrange(t, layout) for t in (x, residual, dy))
            a, r = a.detach().requires_grad_(), r.detach().requires_grad_()
            y = rms_norm(a, 129, w, EPS, bias=b, partial=0.5)
            s, total, _ = add_rms_norm(a, r, 129, w, EPS, round_sum=False, bias=b, return_rstd=True)
            found = torch.autograd.grad((y, s, total), (a, r), (g.view(y.shape), g.view(y.shape), g.view(y.shape)))
            results.append([y, s, total, l2_norm(a, 129), inverse_rms(a, 129), *found])
        for one, two in zip(*results, strict=True):
            if target != "reference":
                assert same_bits(one.detach().reshape(two.shape), two.detach()), layout
            torch.testing.assert_close(one.reshape(two.shape), two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_range(native_target, dtype):
    """Rows whose squares over- or underflow, zeros, NaN and Inf; what does not count harms no other column."""
    small, large = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    x, _, w, _ = rows(6, 129, torch.float64)
    x = x / x.abs().amax(1, keepdim=True)
    scales = torch.tensor([small, small * 64, large * 0.9, large * 0.9, 1.0, 0.0], dtype=torch.float64)
    x = (x * scales[:, None]).to(dtype)
    w = w.to(dtype)
    for part in PARTS:
        y = rms_norm(x, 129, None, 0.0, partial=part)
        for i in range(5):
            row = Formula(exact(x[i : i + 1]), counted(129, part), 0.0)
            row.forward(None, None, 0.0, dtype, bound("", dtype)).check(y[i : i + 1], (part, i))
        assert y[5].isnan().all()
        assert rms_norm(x, 129, None, EPS, partial=part)[5].count_nonzero() == 0
    lengths = exact(l2_norm(x, 129, eps=0.0)[:5])
    np.testing.assert_allclose(np.sum(lengths**2, -1), 1, rtol=0.02)
    assert l2_norm(x, 129)[5].count_nonzero() == 0
    odd = sample(4, 129, dtype)
    odd[0, 100], odd[1, 100], odd[2, 3], odd[3, 3] = torch.inf, torch.nan, torch.inf, torch.nan
    y = rms_norm(odd, 129, None, EPS, partial=0.5)
    assert y[0, 100] == torch.inf
    assert y[1, 100].isnan()
    assert y[:2, :100].isfinite().all()
    assert y[2, 3].isnan()
    assert y[2, :3].count_nonzero() == 0
    assert y[3].isnan().all()


def test_a_wide_sum_is_rescued(native_target):
    for dtype in HALVES:
        x, residual, w, _ = rows(5, 129, dtype)
        stream = residual.float()
        stream[1] *= 1e34
        stream[2] *= 1e-36
        x[1:3] = 0
        y, total = add_rms_norm(x, stream, 129, w, 0.0, out_dtype=dtype)
        assert same_bits(total, stream + x)
        assert same_bits(y, rms_norm(total, 129, w.float(), 0.0).to(dtype))
