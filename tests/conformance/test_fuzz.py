"""Proves by random search that any problem (see problems.py) meets the numerics contract: the forward within its bound,
gradients within theirs, the same bits for a row however it is computed, and NaN and Inf only where they came in.

`make test` runs the same few hundred problems each time; `make fuzz` draws 10,000 new ones per property. What it found
is kept as an ``@example`` or a test of its own. Only native kernels: the reference makes no such promises, and fp64
weights of narrower inputs run there.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from oracle import HALVES, ULPS, Bounds, Truth, exact, gain, outside, same_bits
from problems import TARGETS, Layout, Problem, problems
from torch import Tensor

from rmsnorm import RMSNorm, _native, add_rms_norm, rms_norm

pytestmark = pytest.mark.skipif(not _native.cpu_targets(), reason="the contract is about the native kernels")


@pytest.fixture(autouse=True)
def _restored(restored_target, threads):
    """Every case sets the CPU target and the threads."""


def use(target: str, threads: int = 1) -> None:
    _native.set_cpu_target(target)
    torch.set_num_threads(threads)


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits; NaNs are NaNs, but their sign and payload are not promised."""
    nan = torch.tensor(torch.nan, dtype=a.dtype)
    return bool((a.isnan() == b.isnan()).all()) and same_bits(
        torch.where(a.isnan(), nan, a), torch.where(b.isnan(), nan, b)
    )


def run(problem: Problem, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output by one of the ways to it, and what was normalised."""
    inner, eps, options = problem.inner, problem.eps, problem.options
    if problem.api == "add":
        residual = problem.layout.place(problem.values(1))
        y, s = add_rms_norm(x, residual, inner, weight, eps, **options)
        assert same(s, x + residual)
        return y, s
    if problem.api == "autograd":
        y = rms_norm(x.requires_grad_(), inner, weight, eps, **options).detach()
        return y, x.detach()
    if problem.api == "module":
        kind = None if weight is None else weight.dtype
        layer = RMSNorm(inner, eps, weight is not None, dtype=kind, **options).requires_grad_(False)
        if weight is not None:
            layer.weight.copy_(weight)
        return layer(x), x
    if problem.api == "out":
        dtype = rms_norm(x, inner, weight, eps, **options).dtype
        out = problem.grad_layout.place(torch.zeros(x.shape, dtype=dtype), expand=False)
        assert rms_norm(x, inner, weight, eps, out=out, **options) is out
        assert outside(out).isnan().all(), "wrote outside of out"
        return out, x
    return rms_norm(x, inner, weight, eps, **options), x


def as_rows(x: Tensor, columns: int) -> Tensor:
    return x.contiguous().view(-1, columns)


def sound(rows: Tensor, eps: float) -> Tensor:
    """Which rows have a finite output: no NaN, no Inf, no 0/0."""
    return rows.isfinite().all(-1) & ((eps > 0) | (rows != 0).any(-1))


def finite(bounds: Bounds, dtype: torch.dtype) -> Bounds:
    """The bounds where the truth leaves the type: the largest number and Inf are both right."""
    largest = torch.finfo(dtype).max
    low, high = np.minimum(bounds.low, largest), np.maximum(bounds.high, -largest)
    return Bounds(np.where(low <= -largest, -np.inf, low), np.where(high >= largest, np.inf, high))


def few(rows: int) -> range:
    """At most 12 rows, to be computed alone."""
    return range(0, rows, -(-rows // 12) or 1)


def step(dtype: torch.dtype) -> float:
    """The smallest number of the accumulation type."""
    info = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32)
    return info.smallest_normal * info.eps


def wider(bounds: Bounds, margin: np.ndarray | float) -> Bounds:
    return Bounds(bounds.low - margin, bounds.high + margin)


def subnormal(truth: Truth, weight: Tensor | None, offset: float) -> np.ndarray | float:
    """Where x̂ is subnormal, or nearly, as others in its row are 10^38 times as large, x·low and x̂ are rounded to whole
    steps of fp32 (fp64), half a step each, and the gain multiplies that. Half types don't see fp32's steps."""
    if weight is None or truth.dtype in HALVES:
        return 0.0
    small = np.abs(truth.normalised) < 4 * torch.finfo(truth.dtype).smallest_normal
    return step(truth.dtype) * np.abs(gain(weight, truth.dtype, offset)) * small


def rescued_mean(truth: Truth) -> np.ndarray | float:
    """csrc/rescue.h adds up the mean of a backward row in fp64, one column after the other: up to n·u more where u is
    fp64's, in rows whose 1/rms is beyond 2^±400."""
    if truth.dtype is not torch.float64:
        return 0.0
    return truth.normalised.shape[-1] * (np.abs(np.log2(truth.r)) > 399)


@given(problems())
def test_forward(problem):
    columns, options, eps = problem.columns, problem.options, problem.true_eps
    weight = problem.weight()
    use(problem.target, problem.threads)
    y, x = run(problem, problem.layout.place(problem.values()), weight)
    assert y.shape == problem.shape
    rows, got = as_rows(x, columns), as_rows(y, columns)
    good = sound(rows, eps)
    flat = None if weight is None else weight.reshape(-1)
    truth = Truth(rows[good], eps)
    bounds = truth.forward(flat, problem.offset, problem.mode, ULPS[problem.dtype])
    finite(wider(bounds, subnormal(truth, flat, problem.offset)), y.dtype).check(got[good], "forward")

    for row, out in zip(rows[~good], got[~good], strict=True):  # torch's formula: r is NaN, or 0, or 1/0 and 0·r NaN
        if row.isnan().any() or not row.isinf().any():
            assert out.isnan().all(), "a NaN, or 0/0, is the whole row's"
        else:
            assert torch.equal(out.isnan(), row.isinf()), "Inf·0 is NaN"
            assert out[row.isfinite()].count_nonzero() == 0, "and the rest of the row 0"

    use(problem.other)
    for i in few(len(rows)):
        alone = rms_norm(rows[i].clone(), columns, flat, problem.eps, **options)
        assert same(alone, got[i]), f"row {i} alone and contiguous, by {problem.other}: other bits"


GAIN_OF_ZERO = Problem(  # -0.5 + offset: only x̂·mean is left of dx, and it is subnormal
    dtype=torch.float32,
    outer=(1,),
    inner=(3197,),
    weight_type=torch.bfloat16,
    weight_power=0,
    weight_step=1,
    offset=0.5,
    eps=1e-06,
    mode="torch",
    powers=(-73, -73),
    spread=0,
    zeros=False,
    poison="",
    grad_power=-2,
    layout=Layout((0, 1), (1, 1), (0, 0), (False, False)),
    grad_layout=Layout((0, 1), (1, 1), (0, 0), (False, False)),
    threads=1,
    target=TARGETS[0],
    other=TARGETS[0],
    api="rms_norm",
    seed=0,
)


@example(GAIN_OF_ZERO)
@given(problems())
def test_backward(problem):
    columns, options = problem.columns, problem.options
    x = problem.layout.place(problem.values()).requires_grad_()
    weight = problem.weight()
    leaves = (x,) if weight is None else (x, weight.requires_grad_())
    use(problem.target, problem.threads)
    y = rms_norm(x, problem.inner, weight, problem.eps, **options)
    grad = problem.grad_layout.place(problem.grad(y.dtype))
    dx, *dw = torch.autograd.grad(y, leaves, grad)

    rows, grads, got = as_rows(x.detach(), columns), as_rows(grad, columns), as_rows(dx, columns)
    good = sound(rows, problem.true_eps)
    flat = None if weight is None else weight.detach().reshape(-1)
    truth = Truth(rows[good], problem.true_eps)
    dx_bounds, dw_bounds = truth.backward(grads[good], flat, problem.offset, rescued_mean(truth))
    finite(dx_bounds, dx.dtype).check(got[good], "dx")
    if dw and good.all():
        # Each term is off by a step of its own, and by its x̂'s times the gradient.
        margin = step(problem.dtype) * (len(grads) + np.abs(exact(grads)).sum(0))
        finite(wider(dw_bounds, margin), weight.dtype).check(dw[0], "dw")

    def plain(rows: Tensor, grads: Tensor) -> list[Tensor]:
        leaf, gain = rows.clone().requires_grad_(), None if flat is None else flat.clone().requires_grad_()
        y = rms_norm(leaf, columns, gain, problem.eps, **options)
        return torch.autograd.grad(y, (leaf,) if gain is None else (leaf, gain), grads.clone())

    use(problem.other)
    for i in few(len(rows)):
        assert same(plain(rows[i], grads[i])[0], got[i]), f"dx of row {i} alone, by {problem.other}: other bits"
    if dw:
        assert same(plain(rows, grads)[1], dw[0].reshape(-1)), f"dw contiguous, by {problem.other}: other bits"
    for row, out in zip(rows[~good], got[~good], strict=True):
        if row.isnan().any():
            assert out.isnan().all(), "a NaN is the whole row's"
    assert exact(got[good]).size == good.sum() * columns
