"""Proves that dx and dw are right for every dtype, weight, offset, and layout of x and of the incoming gradient, in
every CPU target; that dw stays right over many rows; that rows, threads, layouts and targets never change a bit; and
that nothing but x, the weight and one number per row is kept.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from calls import asked_for, forward, gradients
from oracle import (
    AWKWARD,
    COLUMNS,
    DTYPES,
    EPS,
    GRADS,
    HALVES,
    LAYOUTS,
    MODES,
    Truth,
    alike,
    exact,
    gains,
    grad_rows,
    incoming,
    lay_out,
    lay_out_grad,
    rows_of,
    same_bits,
    sample,
    weights,
)
from thinned import heavy_but
from torch import Tensor

from rmsnorm import _native, add_rms_norm, rms_norm


@pytest.mark.parametrize("columns", heavy_but(AWKWARD, COLUMNS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(target, dtype, columns):
    """x layouts × gradient layouts in full for 127, 129 and 576 columns, one side at a time for the others; rows 6
    (strides reach the kernels row by row), and contiguous x of 0, 1, 3 and 130 rows. From 1027 columns on, 130 or 33
    rows (more than one chunk of dw) are contiguous with offset 1: nothing else depends on both sizes."""
    for rows in (0, 1, 3, 6, 130 if columns <= 1027 else 33):
        many = rows * columns > 10**5
        x, grad = sample(rows, columns, dtype), incoming(rows, columns)
        pairs = [("contiguous", g) for g in GRADS[:1] + ([] if many else ["expanded", "scalar"])]
        if rows == 6:
            pairs = [p for p in product(LAYOUTS, GRADS) if columns in (127, 129, 576) or "contiguous" in p]
        truths = {name: Truth(rows_of(x, name), EPS) for name in ("contiguous", "expanded")}
        bounds = {}
        shape = lay_out(x, "heads")  # all layouts as [batch, heads, sequence, columns]
        for weight, offset, mode in product(weights(columns, dtype), (1.0,) if many else (0.0, 1.0), MODES):
            outputs, firsts, options = {}, {}, {"offset": offset, "casting_mode": mode}
            for layout, grad_layout in pairs:
                kind = getattr(weight, "dtype", None)
                what = f"{rows} rows, {layout} x, {grad_layout} grad, {options}, weight {kind}"
                if layout not in outputs:
                    outputs[layout] = forward(alike(lay_out(x, layout), shape)[0], weight, **options)
                y, leaves = outputs[layout]
                g = alike(lay_out_grad(grad.to(y.dtype), grad_layout), shape)[0]
                before = g.clone()
                got = torch.autograd.grad(y, leaves, g, retain_graph=True)
                assert [(t.dtype, t.shape) for t in got] == [(t.dtype, t.shape) for t in leaves], what
                assert torch.equal(g, before), f"{what}: the incoming gradient changed"
                repeated = grad_layout if grad_layout in ("expanded", "scalar") else ""
                key = kind, offset, y.dtype, layout == "expanded", repeated
                if key not in bounds:
                    truth = truths["expanded" if layout == "expanded" else "contiguous"]
                    bounds[key] = truth.backward(grad_rows(grad.to(y.dtype), grad_layout), weight, offset)
                if target == "reference" or key not in firsts:
                    firsts[key] = got
                    for name, t, bound in zip(("dx", "dw"), got, bounds[key], strict=False):
                        bound.check(t, f"{name}, {what}")
                assert all(map(same_bits, got, firsts[key])), f"{what}: other bits than another layout"
            for layout, (_, leaves) in outputs.items():
                assert same_bits(leaves[0].detach().reshape(x.shape), rows_of(x, layout)), f"{layout}: x changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_normalised_dimensions(target, dtype):
    """x, the gradient and the weight permuted inside a row, each against each; dw comes back in the weight's shape."""
    x, grad, weight = sample(6, 315, dtype), incoming(6, 315, dtype), gains(315, dtype=dtype)
    bounds = Truth(x, EPS).backward(grad, weight, 1.0)
    permuted = {
        "contiguous": lambda t: t,
        "reversed": lambda t: t.mT.contiguous().mT,
        "rows last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    for (name, a), (grad_name, b), (weight_name, c) in product(permuted.items(), repeat=3):
        leaves = [a(x.view(6, 3, 5, 21)).requires_grad_(), c(weight.view(3, 5, 21)).requires_grad_()]
        y = rms_norm(leaves[0], (3, 5, 21), leaves[1], EPS, offset=1.0)
        dx, dw = torch.autograd.grad(y, leaves, b(grad.view(6, 3, 5, 21)))
        bounds[0].check(dx, f"dx, {name} x, {grad_name} grad, {weight_name} weight")
        bounds[1].check(dw, f"dw, {name} x, {grad_name} grad, {weight_name} weight")


def test_very_wide_rows(target):
    """The sums of dx run over a million columns: 64u where the reference adds them in fp32."""
    for dtype in DTYPES:
        x, grad, weight = sample(2, 2**20 + 3, dtype), incoming(2, 2**20 + 3, dtype), gains(2**20 + 3, dtype=dtype)
        _, dx, dw = gradients(x, weight, grad)
        for name, got, bounds in zip(("dx", "dw"), (dx, dw), Truth(x, EPS).backward(grad, weight, 0.0), strict=True):
            bounds.check(got, f"{name}, {dtype}")


def test_no_columns(target):
    """Rows of nothing: empty results of the right shape, as torch gives."""
    for shape in ((0,), (0, 4), (2, 0)):
        x, weight = torch.ones(3, *shape, requires_grad=True), torch.ones(shape, requires_grad=True)
        y = rms_norm(x, shape, weight)
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
        assert (y.shape, dx.shape, dw.shape) == (x.shape, x.shape, shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_is_asked_for(target, dtype):
    """A frozen weight or input gets None, and the other gradient keeps its bits."""
    x, weight, grad = sample(33, 129, dtype), gains(129, dtype=dtype), incoming(33, 129, dtype)
    _, dx, dw = gradients(x, weight, grad)
    for ask_x, ask_w in ((True, False), (False, True)):
        got_x, got_w = asked_for(x, weight, grad, (ask_x, ask_w))
        assert same_bits(got_x, dx) if ask_x else got_x is None
        assert same_bits(got_w, dw) if ask_w else got_w is None
    assert not rms_norm(x, 129, weight, EPS).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dw_over_many_rows(target, dtype):
    """Terms of one sign: a running sum in a half type would stop growing, one in fp32 would drift with the rows.
    Relative errors, after the rounding of a half type's own dw (bf16 2^-9, fp16 2^-12): 4u of fp32 at any number of
    rows; plain fp64 sums of 512 rows and of 128 chunks may wander by their square roots, so 32u of fp64."""
    weight = gains(128, dtype=dtype)
    rounding = 0.51 * torch.finfo(dtype).eps if dtype in HALVES else 0.0
    allowed = rounding + (32 * 2.0**-53 if dtype is torch.float64 else 4 * 2.0**-24)
    assert allowed < 4e-3
    for rows in (1024, 65536):
        x = sample(rows, 128, dtype)
        grad = torch.sign(x) * incoming(rows, 128, dtype).abs()
        grad = grad / 64 if dtype is torch.float16 else grad  # the sums are below its largest number
        dw = exact(gradients(x, weight, grad)[2])
        truth = (exact(grad) * Truth(x, EPS).normalised).sum(0)
        worst = np.max(np.abs(dw - truth) / truth)
        assert worst <= allowed, f"{rows} rows: relative error {worst:.3g}, allowed {allowed:.3g}"


def test_nothing_but_x_the_weight_and_one_number_per_row_is_kept(target):
    """Of a row or a few not even that number, where the kernels find it again."""
    for dtype, rows in product(DTYPES, (1, 57)):
        x = lay_out(sample(rows, 576, dtype), "row-strided").requires_grad_()
        weight = gains(576, dtype=dtype).requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = rms_norm(x, 576, weight, EPS)
        others = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
        wide = 8 if dtype is torch.float64 else 4
        number = [rows * wide] if rows > 1 or target == "reference" else []
        assert [t.untyped_storage().nbytes() for t in others] == number, f"{dtype}: {[t.shape for t in kept]}"
        assert len(kept) == 2 + len(number), dtype
        assert y.grad_fn is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e30, 1e37, 1e-30, 1e-37])
def test_range(native_target, dtype, size):
    """Rows whose squares leave the range, between ordinary ones: dx ~ grad/size, and dw does not see the size."""
    size = size if dtype is not torch.float64 else size**8
    generator = torch.Generator().manual_seed(3)
    extreme = (torch.rand(5, 576, generator=generator, dtype=torch.float64) - 0.5) * size * 8
    x = torch.cat([sample(5, 576), extreme, sample(5, 576, seed=4)]).to(dtype)
    for eps, weight, grad_size in product(
        (0.0, EPS), (None, gains(576, dtype=dtype)), (1.0, 1e8 if size > 1 else 1e-8)
    ):
        grad = torch.randn(15, 576, generator=generator, dtype=torch.float64).mul(grad_size / 8).to(dtype)
        _, dx, *dw = gradients(x, weight, grad, eps=eps)
        dx_bounds, dw_bounds = Truth(x, eps).backward(grad, weight, 0.0)
        dx_bounds.check(dx, f"dx, {eps=}, gradients of {grad_size}")
        if dw:
            dw_bounds.check(dw[0], f"dw, {eps=}, gradients of {grad_size}")


def test_special_values_stay_in_their_row(target):
    for dtype in DTYPES:
        x, grad, weight = sample(130, 129, dtype), incoming(130, 129, dtype), gains(129, dtype=dtype)
        clean = gradients(x, weight, grad)[1]
        x[3, 7], x[50, 128], grad[70, 5], grad[71, 6] = torch.nan, torch.inf, torch.nan, torch.inf
        dx = gradients(x, weight, grad)[1]
        others = [i for i in range(130) if i not in (3, 50, 70, 71)]
        assert same_bits(dx[others], clean[others]), dtype
        assert dx[[3, 70]].isnan().all(), dtype
        assert not dx[50, 128].isfinite(), dtype
        assert not dx[71, 6].isfinite(), dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_threads_change_no_bit(native_target, dtype, threads):
    """y and dx of a row: alone, in any batch, at any place. All that kernels write: 1, 2, 3 and 5 threads, with chunks
    that are flushed once and, of 33 rows, twice."""
    sizes = ((130, 1027), (2049, 129), (4130, 33))
    for (rows, columns), layout in product(sizes, ("contiguous", "sliced", "transposed")):
        x, grad, weight = sample(rows, columns, dtype), incoming(rows, columns, dtype), gains(columns, dtype=dtype)
        x, expected = lay_out(x, layout), []
        for count in (1, 2, 3, 5):
            threads(count)
            out = rms_norm(x, columns, weight, EPS, out=lay_out(torch.zeros_like(grad), layout))
            results = *gradients(x, weight, grad), out, *add_rms_norm(x, grad, columns, weight, EPS)
            for name, a, b in zip(("y", "dx", "dw", "out", "output", "sum"), results, expected or results, strict=True):
                assert same_bits(a, b), f"{name} of {rows}x{columns}, {layout}: {count} threads, other bits than one"
            expected = results
        for size, start in product((1, 2, 3, 7, 64), (0, 1, 66)):
            part = slice(start, start + size)
            y, dx, _ = gradients(x[part], weight, grad[part])
            assert same_bits(y, expected[0][part]), f"y: rows {part}"
            assert same_bits(dx, expected[1][part]), f"dx: rows {part}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gradients_have_the_bits_of_small_ones(native_target, everything_is_large, second_cache, dtype):
    """dx streamed two rows at a time, the odd row that isn't, rows at alignments that can't be, and rescued ones; and
    with a large second cache two rows stored while others are summed."""

    def results():
        for columns, rows in product(COLUMNS, (0, 1, 3, 70)):
            x, grad = sample(rows, columns, dtype), incoming(rows, columns, dtype)
            x[5:6] *= 2.0**-120 if dtype is not torch.float16 else 2.0**-8
            for weight in weights(columns, dtype):
                yield from gradients(x, weight, grad)
                rstd = torch.ops.rmsnorm.rms_norm_forward(x, weight, 1, EPS, 0.0, False)[1]
                options = weight, 1, EPS, 0.0, True, weight is not None
                yield from torch.ops.rmsnorm.rms_norm_backward(grad, grad * 3, x, rstd, *options)  # a sum's, too

    everything_is_large(2**60)
    second_cache(2**20)
    wanted = list(results())
    for second, least in ((2**20, 1), (2**21, 2**60), (2**21, 1)):
        second_cache(second)
        everything_is_large(least)
        for expected, y in zip(wanted, results(), strict=True):
            assert same_bits(y, expected), (second, least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_give_the_same_bits(dtype, restored_target):
    """Forward, dx and dw in every mode, for ordinary and rescued rows."""
    targets = _native.cpu_targets()
    if len(targets) < 2:
        pytest.skip(f"two CPU targets are needed, and there are {targets}")
    for columns, offset, mode in product(COLUMNS, (0.0, 1.0), MODES):
        for weight in weights(columns, dtype):
            x = sample(7, columns, dtype)
            x[3] = x[3] * (2.0**-120 if dtype is not torch.float16 else 2.0**-8)
            results = []
            for name in targets:
                _native.set_cpu_target(name)
                wide = weight is not None and mode == "llama"
                grad = sample(7, columns, torch.promote_types(dtype, weight.dtype) if wide else dtype, seed=1)
                results.append(gradients(x, weight, grad, offset=offset, casting_mode=mode))
            for name, result in zip(targets[1:], results[1:], strict=True):
                for what, a, b in zip(("y", "dx", "dw"), result, results[0], strict=False):
                    assert same_bits(a, b), f"{what}: {name} differs from {targets[0]}, {columns=}, {offset=}, {mode}"
