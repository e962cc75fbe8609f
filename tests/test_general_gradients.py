"""Proves the gradients of what can be asked for beyond the plain norm: against the formula in numpy, the bits of the
norm and a cast, and what is kept for them."""

from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from general_oracle import COLUMNS, PARTS, WIDE, Formula, counted, leaves, near, rows
from oracle import DTYPES, EPS, HALVES, exact, incoming, same_bits, sample
from thinned import heavy_but
from torch import Tensor

from rmsnorm import add_rms_norm, inverse_rms, l2_norm, rms_norm


@pytest.mark.parametrize("columns", [1, 3, 127, 129, 1027])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(target, dtype, columns):
    """dx, dw, db, with what arrives at r, for parts of the columns, and L2 norms of rows above and below the floor."""
    check_gradients(dtype, columns, (1, 70), 400 if target == "reference" else 60)


def check_gradients(dtype: torch.dtype, columns: int, counts: tuple[int, ...], units: float) -> None:
    """Within so many units of fp32 (fp64) of the size of dx's terms."""
    for count, part in product(counts, PARTS):
        x, _, w, b = rows(count, columns, dtype)
        g, gr = incoming(count, columns, dtype), incoming(count, 1, dtype).to(inverse_rms(x, columns).dtype)
        a, v, c = leaves(x, w, b)
        y, r = rms_norm(a, columns, v, EPS, bias=c, offset=1.0, partial=part, return_rstd=True)
        dx, dw, db = torch.autograd.grad((y, r), (a, v, c), (g, gr))
        truth = Formula(exact(x), counted(columns, part))
        want, size, want_w, want_b = truth.backward(exact(g), w, 1.0, exact(gr))
        near(dx, want, size, units, ("dx", part), dtype)
        near(dw, want_w, np.sum(np.abs(exact(g) * truth.x_hat), 0), 60, ("dw", part), dtype)
        near(db, want_b, np.sum(np.abs(exact(g)), 0), 60, ("db", part), dtype)
    length = float(np.median(np.sqrt(np.sum(exact(x) ** 2, -1))))
    for eps, inside in product((length, 1e-3), (False, True)):
        a, v = leaves(x, w)
        dx, dw = torch.autograd.grad(l2_norm(a, columns, v, eps, eps_inside=inside), (a, v), g)
        truth = Formula(exact(x), columns, eps if inside else 0.0, mean=False, floor=0.0 if inside else eps * eps)
        want, size, want_w, _ = truth.backward(exact(g), w, 0.0)
        near(dx, want, size, units, ("dx", eps, inside), dtype)
        near(dw, want_w, np.sum(np.abs(exact(g) * truth.x_hat), 0), 60, "dw", dtype)
    (a,) = leaves(x)
    (dx,) = torch.autograd.grad(inverse_rms(a, columns, EPS), a, gr)
    want, size, *_ = Formula(exact(x), columns).backward(0.0 * exact(x), None, 0.0, exact(gr))
    near(dx, want, size, 60, "of the factor", dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_of_sums(target, dtype):
    """Each arrives in its own type: that of the output; the stream's is fp32, and x's is that, rounded once more."""
    check_gradients_of_sums(dtype, 70, target != "reference")


def check_gradients_of_sums(dtype: torch.dtype, count: int, same: bool = True) -> None:
    x, residual, w, b = rows(count, 129, dtype)
    for stream, options in ((residual.float(), {"out_dtype": dtype}), (residual, {"round_sum": False})):
        a, s, v, c = leaves(x, stream, w, b)
        y, total, r = add_rms_norm(a, s, 129, v, EPS, bias=c, return_rstd=True, **options)
        g, gs = incoming(count, 129, y.dtype), sample(count, 129, total.dtype, seed=5) / 64
        gr = incoming(count, 1, WIDE)
        da, ds, dv, dc = torch.autograd.grad((y, total, r), (a, s, v, c), (g, gs, gr))
        assert (da.dtype, ds.dtype) == (dtype, stream.dtype)
        assert same_bits(da, ds.to(dtype))
        truth = Formula(exact(total), 129)
        want, size, want_w, want_b = truth.backward(exact(g), w, 0.0, exact(gr))
        # What is kept of an unrounded sum is the rounded one, and the r of the other.
        units = 400 if "out_dtype" in options else 2.0**16
        near(ds, want + exact(gs), size + np.abs(exact(gs)), units, "ds", stream.dtype)
        near(dv, want_w, np.sum(np.abs(exact(g) * truth.x_hat), 0), units, "dw", dtype)
        near(dc, want_b, np.sum(np.abs(exact(g)), 0), 60, "db", dtype)
    a, s, v = leaves(x, residual, w)
    plain = torch.autograd.grad(add_rms_norm(a, s, 129, v, EPS)[0], (a, s, v), incoming(count, 129, dtype))
    got = torch.autograd.grad(add_rms_norm(a, s, 129, v, EPS, partial=1.0, out_dtype=dtype)[0], (a, s, v),
                              incoming(count, 129, dtype))  # fmt: skip
    assert not same or all(map(same_bits, got, plain))


@pytest.mark.parametrize("more", ["nothing", "rstd", "bias", "partial"])
@pytest.mark.parametrize("dtype", heavy_but([torch.bfloat16], HALVES), ids=str)
def test_gradients_that_arrive_in_half(native_target, everything_is_large, second_cache, dtype, more):
    """Of fp32 with a half output: the bits of the norm, then a cast. Also where two rows are stored while the next two
    are summed, and past the caches; with a rescued row between others."""
    for columns, count, large, second in product(COLUMNS, (0, 1, 3, 9, 70), (1, 2**60), (2**20, 2**21)):
        everything_is_large(large)
        second_cache(second)
        x, residual, w, b = rows(count, columns, WIDE)
        x[5:6], residual[5:6] = x[5:6] * 2.0**-120, residual[5:6] * 2.0**-120
        x, residual, w, b = leaves(x, residual, w, b)
        options = {"rstd": {"return_rstd": True}, "bias": {"bias": b}, "partial": {"partial": 0.5}}.get(more, {})
        for norm, of in ((partial(rms_norm, x), [x, w]), (partial(add_rms_norm, x, residual), [x, residual, w])):
            results = []
            for out in (dtype, WIDE):
                outputs = norm(columns, w, EPS, out_dtype=out, **options)
                y, *others = outputs if isinstance(outputs, tuple) else (outputs,)
                grads = [incoming(count, columns, dtype), *(incoming(count, t.shape[-1], WIDE) for t in others)]
                results.append(torch.autograd.grad((y.to(dtype), *others), of + [b] * (more == "bias"), grads))
            assert all(map(same_bits, *results)), (columns, count, large, second, len(of))


def test_what_is_kept(target):
    """The sum, as it is returned, the weight, and a number per row; neither x nor the residual, and no bias."""
    x, residual, w, b = leaves(*rows(37, 576, torch.bfloat16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total, rstd = add_rms_norm(x, residual, 576, w, EPS, bias=b, round_sum=False, return_rstd=True)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (total, rstd, w, b)}
