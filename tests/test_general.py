"""Proves what can be asked for beyond the plain norm: values and gradients against the formula in numpy, the bits of
the plain norm wherever the steps are its own, and add + norm in place."""

from __future__ import annotations

import re
from itertools import product
from math import ceil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    EPS,
    HALVES,
    LAYOUTS,
    MODES,
    WRITABLE,
    Bounds,
    bound,
    exact,
    gain,
    gains,
    incoming,
    lay_out,
    outside,
    rows_of,
    same_bits,
    sample,
    ulp,
)
from torch import Tensor

import rmsnorm
from rmsnorm import add_rms_norm, add_rms_norm_, inverse_rms, l2_norm, rms_norm
from rmsnorm.forms import general_ops, in_place

COLUMNS = (0, 1, 3, 127, 129, 576, 1027, 5137)
PARTS = (1.0, 0.5, 0.0625)
WIDE = torch.float32


def rows(count: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight, bias."""
    x, residual = sample(count, columns, dtype), (sample(count, columns, seed=2) * 1.37).to(dtype)
    return x, residual, gains(columns, dtype=dtype), gains(columns, dtype=dtype, seed=3)


def counted(columns: int, partial: float) -> int:
    return ceil(columns * partial - 1e-9)


class Formula:
    """``x̂ = x·r`` of rows in float64 or longdouble, with what each option means; ``k`` columns count."""

    def __init__(self, x: np.ndarray, k: int, eps: float = EPS, mean: bool = True, floor: float = 0.0) -> None:
        squares = np.sum(x[:, :k] ** 2, axis=-1, keepdims=True)
        self.n = k if mean else 1
        with np.errstate(divide="ignore", invalid="ignore"):
            self.r = 1 / np.sqrt(np.maximum(squares / self.n, floor) + eps)
        self.floored, self.k = squares / self.n < floor, k
        self.x_hat = x * self.r

    def forward(self, w: Tensor | None, b: Tensor | None, offset: float, out: torch.dtype, ulps: float) -> Bounds:
        """Within ``ulps`` of y; a bias can cancel, so what came before it adds an error of its own size."""
        product = self.x_hat if w is None else self.x_hat * gain(w, out, offset)
        y = product if b is None else product + exact(b)
        margin = ulps * ulp(y, out)
        if b is not None:
            eps = 20 * 2.0**-23 if out in HALVES else ulps * np.finfo(np.float32 if out is WIDE else np.float64).eps
            margin = margin + eps * np.abs(product)
        return Bounds(y - margin, y + margin)

    def backward(self, g: np.ndarray, w: Tensor | None, offset: float, gr: np.ndarray | float = 0.0) -> tuple:
        """dx, the size of its terms, dw and db."""
        h = g if w is None else g * (exact(w) + offset)
        total = np.where(self.floored, 0.0, (np.sum(h * self.x_hat, -1, keepdims=True) + gr * self.r) / self.n)
        inside = np.arange(h.shape[1]) < self.k
        dx = self.r * (h - inside * self.x_hat * total)
        size = (np.sum(np.abs(h * self.x_hat), -1, keepdims=True) + np.abs(gr) * self.r) / self.n
        size = self.r * (np.abs(h) + np.abs(self.x_hat) * size)
        return dx, size, np.sum(g * self.x_hat, 0), np.sum(g, 0)


def near(got: Tensor, value: np.ndarray, size: np.ndarray, units: float, what: object, low: torch.dtype) -> None:
    """Rounded once, from arithmetic of fp32 (fp64 for fp64) in which terms of that size were added."""
    unit = torch.finfo(torch.float64 if got.dtype is torch.float64 else torch.float32).eps / 2
    value = np.asarray(value, dtype=exact(got).dtype)
    margin = 0.501 * ulp(value, low) + units * unit * size + torch.finfo(low).smallest_normal * 2.0**-20
    Bounds(value - margin, value + margin).check(got, what)


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


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


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


def test_what_is_kept(target):
    """The sum, as it is returned, the weight, and a number per row; neither x nor the residual, and no bias."""
    x, residual, w, b = leaves(*rows(37, 576, torch.bfloat16))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total, rstd = add_rms_norm(x, residual, 576, w, EPS, bias=b, round_sum=False, return_rstd=True)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (total, rstd, w, b)}


def every(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    n, more = x.shape[-1], {"bias": b, "partial": 0.5, "offset": 1.0, "return_rstd": True}
    return (
        *rms_norm(x, n, w, 0.1, **more),
        *add_rms_norm(x, residual, n, w, 0.1, **more),
        l2_norm(x, n, w, 0.1),
        l2_norm(x, n, None, 0.1, eps_inside=True),
        inverse_rms(residual, n, 0.1),
    )


def formula(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    n, total = x.shape[-1], x + residual
    factor = lambda t, k: 1 / (t[..., :k].square().mean(-1, keepdim=True) + 0.1).sqrt()  # noqa: E731
    half, of_sum, squares = factor(x, (n + 1) // 2), factor(total, (n + 1) // 2), x.square().sum(-1, keepdim=True)
    normed = [t * r * (1 + w) + b for t, r in ((x, half), (total, of_sum))]
    rules = x * w / squares.sqrt().clamp_min(0.1), x / (squares + 0.1).sqrt()
    return normed[0], half, normed[1], total, of_sum, *rules, factor(residual, n)


def test_derivatives_of_first_and_second_order(target):
    x, residual, w, b = (t / 4 for t in rows(3, 5, torch.float64))
    tensors = leaves(x + 0.3, residual, w, b)
    assert torch.autograd.gradcheck(every, tensors)
    assert torch.autograd.gradgradcheck(every, tensors)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
def test_transforms_are_those_of_the_formula():
    tensors = tuple(t / 8 for t in rows(4, 5, torch.float64))
    scalar = lambda f: lambda *a: sum(t.square().sum() for t in f(*a))  # noqa: E731
    for transform in (
        lambda f: torch.func.jvp(f, tensors, tensors),
        lambda f: torch.func.jacrev(f, (0, 1, 2, 3))(*tensors),
        lambda f: torch.func.hessian(scalar(f), (0, 1, 2, 3))(*tensors),
        lambda f: torch.func.vmap(f, (0, 0, None, None))(*tensors),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), (0, 2)), (0, 0, None, None))(*tensors),
        lambda f: torch.autograd.functional.jacobian(f, tensors, vectorize=True),
        lambda f: torch.autograd.functional.hvp(scalar(f), tensors, tensors),
    ):
        torch.testing.assert_close(transform(every), transform(formula), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_equals_eager():
    """One graph for all numbers of rows, forward and backward, with the bits of eager mode."""
    torch.compiler.reset()

    def calls(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        wide = add_rms_norm(x, residual.float(), 96, w, EPS, out_dtype=torch.bfloat16)
        return *every(x, residual, w, b), *add_rms_norm(x, residual, 96, w, EPS, round_sum=False), *wide

    compiled = torch.compile(calls, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (6, 17):
        results = []
        for call in (compiled, calls):
            tensors = leaves(*rows(count, 96, torch.bfloat16))
            outputs = call(*tensors)
            found = torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs])
            results.append([*(t.detach() for t in outputs), *found])
            with torch.no_grad():
                results[-1] += call(*tensors)
        assert all(map(same_bits, *results))


def test_compiled_in_place():
    """The graph has the operator's functional form, and the tensors change."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x, r, w: add_rms_norm_(x, r, w, EPS)[0] * 2, fullgraph=True, backend="aot_eager")
    x, residual, w, _ = rows(6, 96, torch.bfloat16)
    results = []
    for call in (compiled, lambda x, r, w: add_rms_norm_(x, r, w, EPS)[0] * 2):
        a, r = x.clone(), residual.clone()
        results.append([call(a, r, w), a, r])
    assert all(map(same_bits, *results))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = (torch.nn.Parameter(gains(32, dtype=torch.float32, seed=i)) for i in (0, 3))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return every(x, residual, self.w, self.b)


def test_exported():
    """torch.export: torch's own operators, which run where nobody has heard of us, and can be trained."""
    block, inputs = Block().eval(), rows(5, 32, torch.float32)[:2]
    program = torch.export.export(block, inputs)
    assert "rmsnorm" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    block, inputs = Block().eval(), rows(5, 32, torch.float32)[:2]
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, inputs, path, opset_version=23, dynamo=True, verbose=False)
    model = onnx.load(path)
    names = [each.name for each in model.graph.input]
    got = reference.ReferenceEvaluator(model).run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
    for one, two in zip(got, block(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), two.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors_and_several_threads(native_target, everything_is_large, threads, dtype):
    """What goes past the caches, aligned or not, and on two threads: the same bits."""
    everything_is_large(1 << 40)
    for columns, layout in product((96, 4096, 1027), ("contiguous", "misaligned")):
        x, residual = (lay_out(t, layout) for t in rows(300 if columns == 96 else 70, columns, dtype)[:2])
        w, b = gains(columns, dtype=dtype), gains(columns, dtype=dtype, seed=3)
        results = []
        for least, count in ((1 << 40, 1), (1, 1), (1 << 40, 2)):
            everything_is_large(least)
            threads(count)
            a, r, v, c = leaves(x, residual, w, b)
            outputs = (
                *rms_norm(a, columns, v, EPS, bias=c, return_rstd=True, out_dtype=torch.bfloat16),
                *add_rms_norm(a, r, columns, v, EPS, round_sum=False, partial=0.5),
            )
            outputs = (
                [y.detach() for y in outputs],
                torch.autograd.grad(outputs, (a, r, v, c), [torch.ones_like(y) for y in outputs]),
            )
            pair = x.clone(), residual.clone()
            results.append([*outputs[0], *outputs[1], *add_rms_norm_(*pair, w)])
        for other in results[1:]:
            assert all(map(same_bits, results[0], other)), (columns, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(target, dtype):
    """The bits of the function that returns new tensors; both tensors change, and nothing beside them."""
    for columns, count in product(COLUMNS, (0, 1, 3, 70)):
        x, residual, w, _ = rows(count, columns, dtype)
        for weight, mode, rounded in product((w, None), MODES, (True, False)):
            options = {"casting_mode": mode, "round_sum": rounded}
            a, r = x.clone(), residual.clone()
            got = add_rms_norm_(a, r, weight, EPS, **options)
            assert got[0] is a
            assert got[1] is r
            if target != "reference":
                assert all(map(same_bits, got, add_rms_norm(x, residual, columns, weight, EPS, **options)))
    for layout in WRITABLE:
        x, residual, w, _ = rows(10, 129, dtype)
        a, r = lay_out(x, layout), lay_out(residual, layout)
        add_rms_norm_(a, r, w, EPS)
        wanted = add_rms_norm(x, residual, 129, w, EPS)
        if target != "reference":
            assert same_bits(a.reshape(x.shape), wanted[0]), layout
            assert same_bits(r.reshape(x.shape), wanted[1])
        assert all(outside(t).isnan().all() for t in (a, r))
    if dtype in HALVES:
        x, residual, w, _ = rows(5, 129, dtype)
        stream = residual.float()
        a, r = x.clone(), stream.clone()
        wanted = add_rms_norm(x, stream, 129, w, EPS, out_dtype=dtype)
        if target != "reference":
            assert all(map(same_bits, add_rms_norm_(a, r, w, EPS), wanted))


def test_in_place_of_one_projection(native_target):
    """Two parts of one tensor lie between each other and share nothing; one that overlaps is refused."""
    whole = sample(6, 300, torch.float32)
    parts = whole[:, :129], whole[:, 150:279]
    wanted = add_rms_norm(*parts, 129, None, 1e-6)
    add_rms_norm_(*parts)
    assert all(map(same_bits, parts, wanted))
    for a, r in (
        (whole[:, :129], whole[:, 100:229]),
        (whole, whole),
        (whole[:3], whole[1:4]),
        (whole[:1].expand(6, 300), whole.clone()),
        (whole.clone(), whole[:1].expand(6, 300)),
    ):
        with pytest.raises(RuntimeError, match="must not share memory"):
            add_rms_norm_(a, r)


def test_operators_keep_torchs_rules():
    for dtype in (torch.float32, torch.bfloat16):
        x, residual, w, b = rows(6, 12, dtype)
        rstd = torch.ones(6, 1)
        options = 1, EPS, 1.0, False, 6
        samples = {
            general_ops.GENERAL.plain: (x, w, b, *options, True, True, None),
            general_ops.GENERAL.forward: (x, w, None, 1, EPS, 0.0, True, -1, False, True, torch.float32),
            general_ops.GENERAL.backward: (x, rstd, x, rstd, w, b, 1, EPS, 1.0, 6, True, True, True, True),
            general_ops.GENERAL_ADD.plain: (x, residual, w, b, *options, True, None),
            general_ops.GENERAL_ADD.forward: (x, residual, w, b, *options, False, torch.float32),
            general_ops.GENERAL_ADD.backward: (x, x, None, x, rstd, w, b, 1, EPS, 1.0, -1, True, True, True),
            in_place._operator: (x.clone(), residual.clone(), w, 1, EPS, 0.0, False, True),
        }
        for operator, arguments in samples.items():
            assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}, operator


class Seen(Tensor):
    """Sees which functions it is given to."""

    calls: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append((function, kwargs))
        return "seen"


def test_overrides():
    x = torch.ones(2, 6).as_subclass(Seen)
    assert rms_norm(x, 6, bias=torch.ones(6), partial=0.5) == "seen"
    assert add_rms_norm(torch.ones(2, 6), x, 6, round_sum=False) == "seen"
    assert (l2_norm(x, 6), inverse_rms(x, 6), add_rms_norm_(x, x)) == ("seen",) * 3
    functions = [function for function, _ in Seen.calls]
    assert functions == [rms_norm, add_rms_norm, l2_norm, inverse_rms, add_rms_norm_]
    assert set(Seen.calls[0][1]) == {"bias", "partial"}


def test_where_no_kernel_serves(native_target):
    """Types that no kernel has in one row, and a bias beside a weight of several rows: the definition."""
    x = sample(6, 32, torch.bfloat16).view(2, 3, 32)
    y = rms_norm(x, 32, None, EPS, out_dtype=torch.float16)
    torch.testing.assert_close(y, rms_norm(x.float(), 32, None, EPS).half(), rtol=2e-3, atol=0)
    several, bias = gains(3, 32, dtype=torch.bfloat16), gains(32, dtype=torch.bfloat16)
    a, w, b = leaves(x, several, bias)
    torch.autograd.grad(rms_norm(a, 32, w, EPS, bias=b).sum(), (a, w, b))
    a, w = leaves(x.float(), several.float())
    got = torch.autograd.grad(rms_norm(a, 32, w, EPS, partial=0.5).sum(), (a, w))
    wide = leaves(x.double(), several.double())
    wanted = torch.autograd.grad(rms_norm(wide[0], 32, wide[1], EPS, partial=0.5).sum(), wide)
    torch.testing.assert_close([t.double() for t in got], list(wanted), rtol=1e-4, atol=1e-5)
    wide = add_rms_norm(x, x.double(), 32, None, EPS, out_dtype=torch.bfloat16)
    assert [t.dtype for t in wide] == [torch.bfloat16, torch.float64]


X = torch.ones(2, 3, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rms_norm(X, 6, partial=0.0), ValueError, "partial must be above 0 and at most 1, a part of the col"),
        (lambda: rms_norm(X, 6, partial=1.5), ValueError, "rms_norm: partial must be above 0"),
        (lambda: rms_norm(X, 6, partial="half"), TypeError, "rms_norm: partial must be a float, but is a str"),
        (lambda: rms_norm(X, 6, bias=torch.ones(5)), RuntimeError, "of shape [5] and normalized_shape = [6]"),
        (lambda: rms_norm(X, 6, bias="b"), TypeError, "rms_norm: bias must be a torch.Tensor or None, but is a str"),
        (lambda: rms_norm(X, 6, out_dtype=torch.int8), ValueError, "out_dtype must be one of torch.float32, torch.bf"),
        (lambda: rms_norm(X, 6, bias=None, out=X), RuntimeError, "rms_norm: out= is for the plain norm alone; drop it"),
        (lambda: rms_norm(X, 6, eps=-1.0, partial=0.5), ValueError, "rms_norm: eps must be 0 or more, but is -1.0"),
        (lambda: rms_norm(X, 6, biass=None), TypeError, "rms_norm() got an unexpected keyword argument 'biass'"),
        (lambda: rms_norm(X.cfloat(), 6, partial=0.5), RuntimeError, "input must be of a real floating type, but is"),
        (lambda: add_rms_norm(X, X[0], 6, partial=0.5), RuntimeError, "add_rms_norm: residual must have the shape and"),
        (lambda: add_rms_norm(X, X, 5, round_sum=False), RuntimeError, "Given normalized_shape=[5], expected input"),
        (lambda: l2_norm(X, 5), RuntimeError, "l2_norm: Given normalized_shape=[5], expected input with shape [*, 5]"),
        (lambda: l2_norm(X, 6, eps=-1.0), ValueError, "l2_norm: eps must be 0 or more, but is -1.0"),
        (lambda: l2_norm(X, 6, casting_mode="fla"), ValueError, "l2_norm: unknown casting_mode 'fla'; choose one of"),
        (lambda: inverse_rms(X, 5), RuntimeError, "inverse_rms: Given normalized_shape=[5], expected input with shape"),
        (lambda: inverse_rms(X, 6, eps=-1.0), ValueError, "inverse_rms: eps must be 0 or more, but is -1.0"),
        (lambda: add_rms_norm_(X, X[0]), RuntimeError, "add_rms_norm_: residual must have the shape and device of inp"),
        (lambda: add_rms_norm_(X, X.clone(), torch.ones(5)), RuntimeError, "add_rms_norm_: "),
        (lambda: add_rms_norm_(X, X.clone(), eps=-1.0), ValueError, "add_rms_norm_: eps must be 0 or more, but is -1."),
        (
            lambda: add_rms_norm_(X, X.half()),
            RuntimeError,
            "residual must have the type of the sum, torch.float32, but",
        ),
        (
            lambda: add_rms_norm_(X, X.clone(), torch.ones(6, requires_grad=True)),
            RuntimeError,
            "it writes to its arguments, but one of them requires grad; call it under torch.no_grad()",
        ),
    ],
)
def test_arguments_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_public_signatures():
    """Type checkers see the keywords, which a call that has none of them doesn't pay for."""
    assert rmsnorm.rms_norm.__kwdefaults__.keys() == {"offset", "casting_mode", "out", "memory"}
