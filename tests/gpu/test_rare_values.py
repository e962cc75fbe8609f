"""Proves that the Triton kernels are right where numbers are rare: sums that lose much, eps of every size, rows beyond
their type's range, NaN and Inf, and that no row sees the others. As test_values.py, from the public function on.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from calls import gradients
from crossed import BOUNDS, TWO
from oracle import DTYPES, EPS, Truth, gains, incoming, same_bits, sample

from rmsnorm import inverse_rms, rms_norm

pytestmark = pytest.mark.usefixtures("on_triton", "never_the_definition")


def test_two_ulp_in_fp32_need_a_reciprocal_in_two_parts():
    """With 1/rms rounded to fp32 some of 160,000 elements are off by up to 2.5 ulp: the other tests have too few."""
    x, weight = sample(40, 4096, torch.float32), gains(4096, dtype=torch.float32)
    Truth(x, EPS).forward(weight, 0.0, "torch", 2.0).check(rms_norm(x, 4096, weight, EPS), "y")


def test_what_squaring_loses_is_kept():
    """Equal values make errors of equal sign. Without the squares' own errors 1/rms would be off by half a unit more:
    1.33 ulp were seen for these rows then, and 1.15 with them."""
    x = sample(20000, 3, torch.float32)[:, :1].expand(20000, 3).contiguous()
    weight = gains(3, dtype=torch.float32)
    Truth(x, EPS).forward(weight, 0.0, "torch", 1.25).check(rms_norm(x, 3, weight, EPS), "y")


def test_eps_rule():
    for dtype in DTYPES:
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
        x = (sample(3, 64, seed=1) / 32 * eps**0.5).to(dtype)
        for given, true in ((None, eps), (0.0, 0.0), (3.0, 3.0), (1e-45, 1e-45), (1e200, 1e200)):
            y = rms_norm(x, 64, None, given)
            Truth(x, true).forward(None, 0.0, "torch", BOUNDS[dtype]).check(y, f"{dtype}, eps={given}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e37, 1e-37, *(pytest.param(s, marks=pytest.mark.heavy) for s in (1e30, 1e-30))])
def test_range(form, dtype, size):
    """Rows whose squares over- or underflow, beside ordinary ones, which don't notice; dx ~ grad/size, and dw doesn't
    see the size. fp64's own range is not rescued."""
    ordinary, columns = sample(5, 300, dtype), 300
    extreme = (torch.rand(5, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5) * size * 8
    extreme[0, 100] = 3e38 if size > 1 else 0.0
    x = torch.cat([ordinary, extreme.to(dtype), ordinary])
    grad = incoming(15, 300, dtype) * (1e8 if size > 1 else 1e-8)
    for eps, weight in product((0.0, EPS, *([size * size] if size < 1 else [])), (None, gains(300, dtype=dtype))):
        y, dx, *dw = gradients(x, weight, grad, eps=eps)
        Truth(x, eps).forward(weight, 0.0, "torch", BOUNDS[dtype]).check(y, f"{eps=}")
        assert same_bits(y[:5], rms_norm(ordinary, columns, weight, eps)), "a neighbour changed"
        dx_bounds, dw_bounds = Truth(x, eps).backward(grad, weight, 0.0)
        dx_bounds.check(dx, f"dx, {eps=}")
        if dw:
            dw_bounds.check(dw[0], f"dw, {eps=}")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_subnormal_rows(form, dtype):
    """Rows of subnormal numbers, whose 1/rms is beyond fp32, and the largest finite values."""
    info = torch.finfo(dtype)
    small = torch.arange(1, 130).double() % 7 * (info.smallest_normal * info.eps)
    x = torch.stack([small, torch.full((129,), info.max, dtype=torch.float64), small * 300]).to(dtype)
    assert x[0].count_nonzero() > 100
    for eps in (0.0, EPS):
        y = rms_norm(x, 129, None, eps)
        Truth(x, eps).forward(None, 0.0, "torch", BOUNDS[dtype]).check(y, f"{eps=}")


@pytest.mark.parametrize("dtype", TWO)
def test_special_values_stay_in_their_row(form, dtype):
    x, weight, grad = sample(65, 129, dtype), gains(129, dtype=dtype), incoming(65, 129, dtype)
    clean_y, clean_dx, _ = gradients(x, weight, grad)
    poisoned = x.clone()
    poisoned[3, 7], poisoned[50, 128], poisoned[51, 0] = torch.nan, torch.inf, -torch.inf
    poisoned[60] = torch.inf
    poisoned[30] = 0.0
    touched = [3, 30, 50, 51, 60]
    others = [i for i in range(65) if i not in touched]
    y, dx, dw = gradients(poisoned, weight, grad)
    assert same_bits(y[others], clean_y[others])
    assert same_bits(dx[others], clean_dx[others])
    assert y[[3, 60]].isnan().all()
    assert dw.isnan().all()
    for row, column in ((50, 128), (51, 0)):  # r = 0, so inf·0 is NaN and the rest is 0
        assert y[row].isnan().nonzero().tolist() == [[column]]
        assert y[row].nan_to_num().count_nonzero() == 0
    assert y[30].count_nonzero() == 0
    Truth(poisoned[30:31], EPS).backward(grad[30:31], weight, 0.0)[0].check(dx[30:31], "dx of a zero row")
    y = rms_norm(poisoned, 129, weight, 0.0)
    assert y[30].isnan().all(), "0·(1/sqrt(0)) is NaN"
    assert same_bits(y[others], rms_norm(x, 129, weight, 0.0)[others])


def test_an_infinity_of_which_the_statistic_alone_is_used(form):
    """Nothing arrives at the norm itself, which isn't zeros: 0 · inf would be NaN in the whole row."""
    x = sample(3, 129, torch.float32)
    x[1, 7] = torch.inf
    clean, leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(inverse_rms(leaf, 129, EPS).sum(), leaf)
    steps = (clean.square().mean(-1) + EPS).rsqrt().sum()
    torch.testing.assert_close(dx, torch.autograd.grad(steps, clean)[0], equal_nan=True)


@pytest.mark.parametrize("dtype", TWO)
def test_a_row_does_not_see_the_batch(dtype):
    """y and dx of a row alone and in a batch, at widths with tiles of many rows and of one."""
    for columns, rows in ((3, 700), (127, 20), (1027, 5), (5137, 2)):
        x, weight, grad = sample(rows, columns, dtype), gains(columns, dtype=dtype), incoming(rows, columns, dtype)
        together = gradients(x, weight, grad)[:2]
        for i in (0, rows // 2, rows - 1):
            alone = gradients(x[i], weight, grad[i])[:2]
            assert all(same_bits(a, t[i]) for a, t in zip(alone, together, strict=True)), (columns, i)
