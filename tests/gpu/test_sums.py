"""Proves what the Triton kernels make room for: tiles of rows, partial sums of the weight's gradient, which don't drift
with the rows, only the gradients that are asked for, and what is kept. As test_values.py, from the public function on.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calls import asked_for, gradients
from crossed import TWO, types
from oracle import DTYPES, EPS, HALVES, Truth, exact, gains, incoming, same_bits, sample
from torch import Tensor

from rmsnorm import rms_norm
from rmsnorm.gpu import backward, launch

pytestmark = pytest.mark.usefixtures("on_triton", "never_the_definition")


def test_which_rows_are_held():
    assert [launch.tile_of(n, "forward")[:2] for n in (1, 100, 4096, 16384, 16385)] == [
        (1, 1024),
        (128, 8),
        (4096, 1),
        (16384, 1),
        (4096, 1),
    ]
    tiles = [launch.tile_of(n, "backward") for n in (4096, 8192, 8193, 16384, 16385)]
    assert [(block, warps) for block, _, warps in tiles] == [
        (4096, 8),
        (8192, 16),
        (16384, 32),
        (16384, 32),
        (8192, 16),
    ]


@pytest.mark.parametrize("dtype", types(torch.bfloat16, torch.float64))
@pytest.mark.parametrize("partials", [384, 2])
@pytest.mark.parametrize("rows", [2**12, pytest.param(2**15, marks=pytest.mark.heavy)])
def test_dw_over_many_rows(monkeypatch, dtype, partials, rows):
    """Terms of one sign: a running sum in a half type would stop growing, one in fp32 would drift with the rows. With
    384 partial sums at most, 256 tiles, of 128 rows of 16 columns or here of 16, are four to a partial sum; with 2, a
    partial takes 128 tiles, 32 of them in fp32, then fp64. Beside a half type's own rounding, a sum of 32 in fp32 may
    be off by sqrt(32)/2 u and a tile of 128 by about as much: 6u, at any number of rows. fp64: sums of 128 and 128,
    32u."""
    monkeypatch.setattr(backward, "PARTIALS", (partials, partials))
    if rows < 2**15:
        monkeypatch.setitem(launch.TILE, "backward", (256, 256))
        monkeypatch.setitem(launch.TILE, "forward", (8192, 8192))
    weight = gains(16, dtype=dtype)
    rounding = 0.51 * torch.finfo(dtype).eps if dtype in HALVES else 0.0
    allowed = rounding + (32 * 2.0**-53 if dtype is torch.float64 else 6 * 2.0**-24)
    x = sample(rows, 16, dtype)
    grad = torch.sign(x) * incoming(rows, 16, dtype).abs()
    grad = grad / 64 if dtype is torch.float16 else grad  # the sums are below its largest number
    dw = exact(gradients(x, weight, grad)[2])
    truth = (exact(grad) * Truth(x, EPS).normalised).sum(0)
    worst = np.max(np.abs(dw - truth) / truth)
    assert worst <= allowed, f"{rows} rows: relative error {worst:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("rows", [1, 100, 5000, 10**6])
@pytest.mark.parametrize(("columns", "most"), [(128, 384), (4096, 256)])
def test_partial_sums_are_bounded(monkeypatch, rows, columns, most):
    """However many rows, dW is folded from at most 384 rows of partial sums, of wide ones 256."""
    seen = {}
    monkeypatch.setattr(
        launch, "_launch", lambda kernel, grid, arguments, *_: seen.update({kernel.__name__: arguments})
    )
    x = torch.empty(1, columns).expand(rows, columns)
    backward.backward(x, None, x, torch.empty(rows), x[0], 1, EPS, 0.0, False, True)
    assert 1 <= len(seen["fold"][0]) <= most


@pytest.mark.parametrize("dtype", TWO)
def test_only_what_is_asked_for(form, dtype):
    x, weight, grad = sample(17, 129, dtype), gains(129, dtype=dtype), incoming(17, 129, dtype)
    _, dx, dw = gradients(x, weight, grad)
    for ask_x, ask_w in ((True, False), (False, True)):
        got_x, got_w = asked_for(x, weight, grad, (ask_x, ask_w))
        assert same_bits(got_x, dx) if ask_x else got_x is None
        assert same_bits(got_w, dw) if ask_w else got_w is None


def test_nothing_but_x_the_weight_and_one_number_per_row_is_kept():
    for dtype in DTYPES:
        x, weight = sample(37, 576, dtype).requires_grad_(), gains(576, dtype=dtype).requires_grad_()
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            rms_norm(x, 576, weight, EPS)
        others = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
        assert len(kept) == 3
        assert [t.untyped_storage().nbytes() for t in others] == [37 * (8 if dtype is torch.float64 else 4)]
