"""Proves that add_rms_norm is the two steps done one after the other, to the bit: the sum is torch's sum, the output
is rms_norm of that rounded sum, and the gradients are right whichever of the two outputs is used.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from oracle import (
    DTYPES,
    EPS,
    LAYOUTS,
    MODES,
    Bounds,
    Truth,
    alike,
    exact,
    gains,
    incoming,
    lay_out,
    rows_of,
    same_bits,
    sample,
    ulp,
    weights,
)
from torch import Tensor

import rmsnorm
from rmsnorm import _ops, add_rms_norm, functional, rms_norm


def pair(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A row and a residual whose exact sum does not fit the type."""
    return sample(rows, columns, dtype), (sample(rows, columns, seed=2) * 1.37).to(dtype)


@pytest.mark.parametrize("columns", [1, 31, 129, 576, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_two_steps(target, dtype, columns):
    """Every weight, offset and mode; every layout of both operands for 6 rows of 129 and 576 columns."""
    for rows in (0, 1, 6, 130 if columns < 1000 else 17):
        x, residual = pair(rows, columns, dtype)
        layouts = [("contiguous", "contiguous"), ("row-strided", "contiguous"), ("contiguous", "sliced")]
        if rows == 6:
            full = columns in (129, 576)
            layouts = [p for p in product(LAYOUTS, LAYOUTS) if full or "contiguous" in p]
        for weight, offset, mode in product(weights(columns, dtype), (0.0, 1.0), MODES):
            options = {"offset": offset, "casting_mode": mode}
            for layout, other in layouts:
                a, b = alike(lay_out(x, layout), lay_out(residual, other))
                what = f"{rows} rows, {layout} + {other}, weight {getattr(weight, 'dtype', None)}, {options}"
                output, total = add_rms_norm(a, b, columns, weight, EPS, **options)
                assert total.is_contiguous(), what
                assert output.is_contiguous(), what
                assert same_bits(total, a + b), f"{what}: the sum is not torch's"
                assert same_bits(output, rms_norm(total, columns, weight, EPS, **options)), what
                assert same_bits(a.reshape(x.shape), rows_of(x, layout)), f"{what}: the input changed"
                assert same_bits(b.reshape(x.shape), rows_of(residual, other)), f"{what}: the residual changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_see_the_rounded_sum(target, dtype):
    """A residual that vanishes in the rounding must vanish from the output; one sum in a wider type would show it."""
    x = sample(130, 576, dtype).abs() + 1
    vanishing = torch.full_like(x, torch.finfo(dtype).eps / 3)
    assert same_bits(x + vanishing, x)
    assert same_bits(add_rms_norm(x, vanishing, 576, None, EPS)[0], rms_norm(x, 576, None, EPS))


def test_two_dtypes_promote(target):
    for a, b in product(DTYPES, DTYPES):
        x, residual = sample(6, 129, a), sample(6, 129, b, seed=2)
        for weight in (None, gains(129), gains(129, dtype=torch.bfloat16)):
            output, total = add_rms_norm(x, residual, 129, weight, EPS, offset=1.0)
            assert total.dtype is torch.promote_types(a, b)
            assert same_bits(total, x + residual), f"{a} + {b}"
            assert same_bits(output, rms_norm(x + residual, 129, weight, EPS, offset=1.0)), f"{a} + {b}"


def expected(
    total: Tensor, weight: Tensor | None, offset: float, grads: dict[str, Tensor]
) -> tuple[Bounds, Bounds | None]:
    """dx plus what arrives at the sum directly, which adds one rounding of the total to that of dx."""
    zeros = torch.zeros_like(total)
    dx, dw = Truth(total, EPS).backward(grads.get("output", zeros), weight, offset)
    direct = exact(grads.get("sum", zeros))
    low, high = dx.low + direct, dx.high + direct
    margin = 0.5 * ulp(np.maximum(np.abs(low), np.abs(high)), total.dtype)
    return Bounds(low - margin, high + margin), dw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_any_use(target, dtype):
    """Both outputs used or one of them, for every weight and mode, in every layout of the incoming gradients; both
    operands get the same gradient."""
    cases = product(((33, 129), (6, 31), (0, 31)), (("output", "sum"), ("output",), ("sum",)), MODES)
    for (rows, columns), used, mode in cases:
        x, residual = pair(rows, columns, dtype)
        for weight, offset in product(weights(columns, dtype), (0.0, 1.0)):
            tensors = [t for t in (x, residual, weight) if t is not None]
            bounds = {}
            for layout in LAYOUTS if rows == 6 else ("contiguous", "expanded"):
                what = f"{used}, gradients {layout}, {rows}x{columns}, {mode}, weight {getattr(weight, 'dtype', None)}"
                shape = lay_out(x, layout).shape
                leaves = [t.reshape(shape if t.dim() > 1 else t.shape).clone().requires_grad_() for t in tensors]
                y = add_rms_norm(*leaves[:2], columns, *leaves[2:] or [None], EPS, offset=offset, casting_mode=mode)
                results = dict(zip(("output", "sum"), y, strict=True))
                flat = {"output": incoming(rows, columns, y[0].dtype), "sum": sample(rows, columns, dtype, seed=5) / 64}
                got = torch.autograd.grad(
                    [results[name] for name in used],
                    leaves,
                    [lay_out(flat[name], layout) for name in used],
                    allow_unused=True,
                )
                kind = layout == "expanded"
                if kind not in bounds:
                    grads = {name: rows_of(flat[name], layout) for name in used}
                    bounds[kind] = expected(x + residual, weight, offset, grads)
                bounds[kind][0].check(got[0], f"dx, {what}")
                assert same_bits(got[0], got[1]), what
                if weight is not None and "output" in used:
                    bounds[kind][1].check(got[2], f"dw, {what}")
                elif weight is not None:
                    assert got[2] is None or got[2].count_nonzero() == 0, what


def test_nothing_used(target):
    x, residual, weight = (t.requires_grad_() for t in (*pair(3, 8, torch.float32), gains(8, dtype=torch.float32)))
    add_rms_norm(x, residual, 8, weight)
    x.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert residual.grad is None
    assert weight.grad is None


def test_accumulating_into_one_gradient_does_not_touch_the_other(target):
    """Both operands get the same numbers: in-place work on one ``.grad`` must not reach the other."""
    x, residual = (t.requires_grad_() for t in pair(3, 8, torch.float32))
    output, total = add_rms_norm(x, residual, 8)
    (output.sum() + total.sum()).backward()
    before = residual.grad.clone()
    x.grad.zero_()
    assert before.count_nonzero() > 0
    assert torch.equal(residual.grad, before)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_frozen_operands(target, frozen):
    """Only what is asked for, with the bits that it has when everything is asked for."""
    for dtype in DTYPES:
        tensors = [*pair(33, 129, dtype), gains(129, dtype=dtype)]
        grads = incoming(33, 129, dtype), incoming(33, 129, dtype).flip(0)
        full = [t.clone().requires_grad_() for t in tensors]
        torch.autograd.backward(add_rms_norm(*full[:2], 129, full[2], EPS), grads)
        part = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
        results = [
            (y, g) for y, g in zip(add_rms_norm(*part[:2], 129, part[2], EPS), grads, strict=True) if y.requires_grad
        ]
        torch.autograd.backward([y for y, _ in results], [g for _, g in results])
        for i, (a, b) in enumerate(zip(part, full, strict=True)):
            assert a.grad is None if i in frozen else same_bits(a.grad, b.grad), f"{dtype}, operand {i}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_as_both(target, dtype):
    x = sample(6, 129, dtype)
    weight = gains(129, dtype=dtype)
    leaf = x.clone().requires_grad_()
    output, total = add_rms_norm(leaf, leaf, 129, weight, EPS)
    assert same_bits(total, x + x)
    assert same_bits(output, rms_norm(x + x, 129, weight, EPS))
    grad = incoming(6, 129, dtype)
    (dx,) = torch.autograd.grad(output, leaf, grad)
    other = (x + x).requires_grad_()
    (half,) = torch.autograd.grad(rms_norm(other, 129, weight, EPS), other, grad)
    assert same_bits(dx, half + half)


def test_only_the_sum_the_weight_and_one_number_per_row_are_kept(target):
    x, residual, weight = (
        t.requires_grad_() for t in (*pair(37, 576, torch.bfloat16), gains(576, dtype=torch.bfloat16))
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = add_rms_norm(x, residual, 576, weight)
    rest = [t for t in kept if t.data_ptr() not in (total.data_ptr(), weight.data_ptr())]
    assert (len(kept), [t.untyped_storage().nbytes() for t in rest]) == (3, [37 * 4])


@pytest.mark.parametrize("shape", [64, (64,), [64], torch.Size([64])], ids=["int", "tuple", "list", "Size"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rms_norm_add", "sandwich_rms_norm", "gated_rms_norm"])
def test_any_shape_takes_the_short_way(name: str, shape: object, monkeypatch) -> None:
    """`weight.shape` is a torch.Size: with it calls took the long way, 33 µs instead of 6."""
    if not _ops.native:
        pytest.skip("without kernels there is no short way")
    monkeypatch.setattr(functional, "_resolve", lambda *_: pytest.fail("the long way"))
    x, weight = torch.ones(2, 64), torch.ones(64)
    rows = (x,) if name == "rms_norm" else (x, x)
    getattr(rmsnorm, name)(*rows, shape, weight, eps=1e-6)
