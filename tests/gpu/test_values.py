"""Proves the Triton kernels against the fp64 oracle and on the axes of the C++ ones: in Triton's interpreter, or, with
RMSNORM_TEST_DEVICE=cuda, on a GPU.

Every call goes the way that a GPU's goes: public function, autograd, dispatcher, route, launch. Sizes are small where
axes are crossed, and awkward widths come once each. ``held`` keeps rows in registers; ``blocks`` is what rows of more
than 16384 columns get, forced upon narrow ones. The interpreter's sums are numpy's, other trees than a
GPU's: bounds that depend on the tree are argued in src/rmsnorm/gpu/triton_forward.py.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from calls import forward, gradients
from crossed import BOUNDS, PROBLEMS, TWO, types
from oracle import (
    DTYPES,
    EPS,
    GRADS,
    LAYOUTS,
    MODES,
    WRITABLE,
    Bounds,
    Truth,
    alike,
    exact,
    gains,
    grad_rows,
    incoming,
    lay_out,
    lay_out_grad,
    outside,
    rows_of,
    same_bits,
    sample,
    weights,
)
from torch import Tensor

from rmsnorm import add_rms_norm, rms_norm
from rmsnorm.gpu import backward, launch

pytestmark = pytest.mark.usefixtures("on_triton", "never_the_definition")


@pytest.mark.parametrize(("dtype", "form", "columns"), PROBLEMS, indirect=["form"])
def test_forward(form, dtype, columns):
    """dtype × columns × rows × weight type × offset × casting mode; then, up to 129 columns, layouts.
    They must not change a bit."""
    for rows in (0, 1, 3, 33 if columns < 500 else 5):
        x = sample(rows, columns, dtype)
        truth = Truth(x, EPS)
        offsets = (0.0, 1.0) if rows == 3 else (1.0,)
        for weight, offset, mode in product(weights(columns, dtype), offsets, MODES):
            what = f"{rows} rows, weight {getattr(weight, 'dtype', None)}, {offset=}, {mode}"
            y = rms_norm(x, columns, weight, EPS, offset=offset, casting_mode=mode)
            wide = mode == "llama" and weight is not None
            assert y.dtype is (torch.promote_types(dtype, weight.dtype) if wide else dtype), what
            assert y.is_contiguous(), what
            truth.forward(weight, offset, mode, BOUNDS[dtype]).check(y, what)
    weight = gains(columns, dtype=dtype)
    for layout in LAYOUTS if columns < 500 else []:
        tensor = lay_out(x, layout)
        y = rms_norm(tensor, columns, weight, EPS, offset=1.0)
        assert same_bits(y.view(x.shape), rms_norm(rows_of(x, layout), columns, weight, EPS, offset=1.0)), layout
        assert same_bits(tensor.reshape(x.shape), rows_of(x, layout)), f"{layout}: the input changed"


@pytest.mark.parametrize(("dtype", "form", "columns"), PROBLEMS, indirect=["form"])
def test_backward(form, dtype, columns):
    """dtype × columns × rows × weight type × offset × mode, against the oracle; then layouts of x × of the gradient, in
    full for bf16 in 129 columns that are held and else one side at a time, which must not change a bit."""

    for rows in (0, 1, 3, 33 if columns < 500 else 5):
        x, wide_grad = sample(rows, columns, dtype), incoming(rows, columns)
        truth = Truth(x, EPS)
        crossed = rows == 3 and columns < 500
        options = product((0.0, 1.0), MODES) if crossed else [(1.0, "torch")]
        for weight, (offset, mode) in product(weights(columns, dtype), list(options)):
            what = f"{rows} rows, weight {getattr(weight, 'dtype', None)}, {offset=}, {mode}"
            y, leaves = forward(x, weight, offset=offset, casting_mode=mode)
            got = torch.autograd.grad(y, leaves, wide_grad.to(y.dtype))
            assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in leaves], what
            bounds = truth.backward(wide_grad.to(y.dtype), weight, offset)
            for name, t, bound in zip(("dx", "dw"), got, bounds, strict=False):
                bound.check(t, f"{name}, {what}")
    x, grad = sample(6, columns, dtype), incoming(6, columns, dtype)
    weight, shape = gains(columns, dtype=dtype), lay_out(x, "heads")
    wanted = {}
    for layout, grad_layout in product(LAYOUTS, GRADS):
        full = columns == 129 and form == "held" and dtype is torch.bfloat16
        if full or (columns in (3, 129) and "contiguous" in (layout, grad_layout)):
            tensor, g, _ = alike(lay_out(x, layout), lay_out_grad(grad, grad_layout), shape)
            key = layout == "expanded", grad_layout if grad_layout in ("expanded", "scalar") else ""
            if key not in wanted:
                wanted[key] = gradients(rows_of(x, layout), weight, grad_rows(grad, grad_layout))
            for name, t, right in zip(("y", "dx", "dw"), gradients(tensor, weight, g), wanted[key], strict=True):
                assert same_bits(t.reshape(right.shape), right), f"{name}: {layout} x, {grad_layout} gradient"


@pytest.mark.parametrize("dtype", TWO)
def test_add(form, dtype):
    """The sum is torch's, the output that of the sum, and the gradient what comes by both ways."""
    for columns, mode, layout in (*product((129,), MODES, LAYOUTS), *product((576,), MODES, ("contiguous",))):
        x, other = alike(
            lay_out(sample(5, columns, dtype), layout), lay_out(sample(5, columns, dtype, 1), "row-strided")
        )
        weight, what = gains(columns, dtype=dtype), f"{columns} columns, {mode}, {layout}"
        y, total = add_rms_norm(x, other, columns, weight, EPS, casting_mode=mode)
        assert same_bits(total, (x + other).contiguous()), what
        assert same_bits(y, rms_norm(total, columns, weight, EPS, casting_mode=mode)), what
    leaves = [t.detach().requires_grad_() for t in (sample(5, 129, dtype), sample(5, 129, dtype, 1))]
    grad, grad_sum = incoming(5, 129, dtype), incoming(5, 129, dtype).flip(0)
    y, total = add_rms_norm(*leaves, 129, None, EPS)
    for both in ((grad, grad_sum), (grad, torch.zeros_like(grad)), (torch.zeros_like(grad), grad_sum)):
        dx, d_other = torch.autograd.grad((y, total), leaves, both, retain_graph=True)
        assert same_bits(dx, d_other)
        bounds, _ = Truth(total, EPS).backward(both[0], None, 0.0)
        low, high = (side + exact(both[1]) for side in (bounds.low, bounds.high))
        margin = 0.51 * torch.finfo(dtype).eps * np.maximum(np.abs(low), np.abs(high))  # the sum's own rounding
        Bounds(low - margin, high + margin).check(dx, "dx")


@pytest.mark.parametrize("dtype", TWO)
def test_a_weight_for_each_head(form, dtype):
    """Weights of [heads, columns] give each head the bits that it has alone, and dW is each head's own."""
    x, grad = sample(30, 129, dtype).view(2, 5, 3, 129), incoming(30, 129, dtype).view(2, 5, 3, 129)
    for kind in {dtype, torch.float32}:
        weight = gains(3, 129, dtype=kind)
        y, dx, dw = gradients_spanning(x, weight, grad)
        for head in range(3):
            alone = gradients(x[:, :, head], weight[head], grad[:, :, head], offset=1.0)
            assert same_bits(y[:, :, head].contiguous(), alone[0]), head
            assert same_bits(dx[:, :, head].contiguous(), alone[1]), head
            assert same_bits(dw[head], alone[2]), head


def gradients_spanning(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = rms_norm(leaves[0], x.shape[-1], leaves[1], EPS, offset=1.0)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_normalised_dimensions(dtype):
    x, grad, weight = sample(6, 315, dtype), incoming(6, 315, dtype), gains(315, dtype=dtype)
    dx_bounds, dw_bounds = Truth(x, EPS).backward(grad, weight, 1.0)
    for turned in (lambda t: t, lambda t: t.mT.contiguous().mT, lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0)):
        leaves = [turned(x.view(6, 3, 5, 21)).requires_grad_(), turned(weight.view(3, 5, 21)).requires_grad_()]
        y = rms_norm(leaves[0], (3, 5, 21), leaves[1], EPS, offset=1.0)
        Truth(x, EPS).forward(weight, 1.0, "torch", BOUNDS[dtype]).check(y, "y")
        dx, dw = torch.autograd.grad(y, leaves, turned(grad.view(6, 3, 5, 21)))
        dx_bounds.check(dx, "dx")
        dw_bounds.check(dw, "dw")


@pytest.mark.parametrize("dtype", TWO)
def test_out(form, dtype):
    """``out=`` gets the bits of a fresh output, and nothing beside it is touched; it may be the input itself."""
    x = sample(6, 129, dtype)
    for mode, weight in product(MODES, (None, gains(129, dtype=torch.float32))):
        expected = rms_norm(x, 129, weight, EPS, casting_mode=mode)
        for layout in WRITABLE:
            tensor, out = alike(x, lay_out(torch.zeros(x.shape, dtype=expected.dtype), layout))
            assert rms_norm(tensor, 129, weight, EPS, casting_mode=mode, out=out) is out
            assert same_bits(out.reshape(x.shape), expected), layout
            assert outside(out).isnan().all(), f"{layout}: wrote outside of out"
            if expected.dtype is dtype:
                tensor = lay_out(x, layout)
                rms_norm(tensor, 129, weight, EPS, casting_mode=mode, out=tensor)
                assert same_bits(tensor.reshape(x.shape), expected), f"{layout} in place"
                assert outside(tensor).isnan().all(), f"{layout} in place: wrote outside"


WIDE = (16384, 16385, *(pytest.param(n, marks=pytest.mark.heavy) for n in (8193, 20000, 32768, 2**16 + 1)))
"""Those that a program of 1024 threads has backward, those that it hasn't, and the error bound for 2^16."""


@pytest.mark.parametrize("dtype", types(torch.bfloat16))
@pytest.mark.parametrize("columns", WIDE)
def test_very_wide_rows(dtype, columns):
    """As they come, without forcing; a row's gradient is its own, and that of the weight doesn't ask for the others."""
    x, weight, grad = sample(3, columns, dtype), gains(columns, dtype=dtype), incoming(3, columns, dtype)
    y, dx, dw = gradients(x, weight, grad)
    Truth(x, EPS).forward(weight, 0.0, "torch", BOUNDS[dtype]).check(y, columns)
    dx_bounds, dw_bounds = Truth(x, EPS).backward(grad, weight, 0.0)
    dx_bounds.check(dx, f"dx, {columns}")
    dw_bounds.check(dw, f"dw, {columns}")
    assert same_bits(dx[1:2], gradients(x[1:2], weight, grad[1:2])[1])
    rstd = launch.forward(x, None, weight, 1, EPS, 0.0, False, True)[2]
    given = grad, None, x, rstd, weight, 1, EPS, 0.0
    assert same_bits(dw, backward.backward(*given, False, True)[1])
    assert same_bits(dx, backward.backward(*given, True, False)[0])
