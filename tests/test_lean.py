"""Proves that a norm which keeps its output for backward has the outputs of one that keeps its input, to the bit, and
gradients within the bound that docs/numerics.md states; that it keeps nothing else; and that it keeps its input, and
says so, where the output can't stand for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from oracle import (
    DTYPES,
    EPS,
    GRADS,
    HALVES,
    LAYOUTS,
    MODES,
    Bounds,
    Truth,
    alike,
    exact,
    gain,
    gains,
    grad_rows,
    incoming,
    lay_out,
    lay_out_grad,
    rows_of,
    same_bits,
    sample,
)
from torch import Tensor

from rmsnorm import _ops, add_rms_norm, rms_norm
from rmsnorm.forms import lean

# How far x̂ = y / g may be off, relative to x̂, in u, the relative error of one rounding: y in each mode (0.51 ulp in a
# half type, 2 in fp32 and fp64, and an ulp is at most 2u), then 1 / g and the product with it where those are of y's
# own type. The reference's y has 5 ulp.
ROUNDINGS = {torch.float32: 6.0, torch.float64: 6.0, torch.bfloat16: 1.03, torch.float16: 1.03}


def off(dtype: torch.dtype, mode: str, target: str) -> float:
    units = ROUNDINGS[dtype] + (6.0 if target == "reference" and dtype not in HALVES else 0.0)
    return units * (2 if mode == "llama" and dtype in HALVES else 1) * torch.finfo(dtype).eps / 2


def wider(bounds: Bounds, more: np.ndarray) -> Bounds:
    return Bounds(bounds.low - more, bounds.high + more)


def lean_bounds(
    x: Tensor, grad: Tensor, weight: Tensor | None, offset: float, delta: float, eps: float = EPS
) -> tuple[Bounds, Bounds | None, np.ndarray]:
    """What docs/numerics.md allows dx and dw, and how much of dx's is the price: r·|x̂|·(2 + δ)·δ·mean|h·x̂|, and
    δ·Σ|grad·x̂|. A y below the normal numbers is off by half a step s, so x̂ by s/(2g) more."""
    truth = Truth(x, eps)
    dx, dw = truth.backward(grad, weight, offset)
    g, x_hat = exact(grad).reshape(truth.normalised.shape), truth.normalised
    h = g if weight is None else g * gain(weight, x.dtype, offset)
    info = torch.finfo(x.dtype)
    half = delta / info.eps * (info.smallest_normal * info.eps)
    step = half / np.abs(1.0 if weight is None else gain(weight, x.dtype, offset))
    mean, size = (np.mean(each, axis=-1, keepdims=True) for each in (h * x_hat, np.abs(h * x_hat)))
    price = truth.r * np.abs(x_hat) * (size * (2 + delta) * delta + np.mean(np.abs(g), axis=-1, keepdims=True) * half)
    price = price + truth.r * step * (np.abs(mean) + delta * size)
    if dw is not None:
        dw = wider(dw, np.sum(np.abs(g) * (delta * np.abs(x_hat) + step), axis=0))
    return wider(dx, price), dw, price


def gradients(x: Tensor, weight: Tensor | None, grad: Tensor, memory: str | None = "lean", **options: object) -> list:
    """[y, dx, dw]; where lean was asked for, it must be what runs."""
    leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
    y = rms_norm(leaves[0], x.shape[-1], *leaves[1:] or [None], options.pop("eps", EPS), memory=memory, **options)
    assert ("Lean" in y.grad_fn.name()) is (memory == "lean")
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("columns", [0, 1, 3, 127, 129, 576, 1027, 5137])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_within_the_bound(target, dtype, columns):
    """Every weight, offset and mode in four layouts; every pair of layouts of 129 columns; 0 to 1025 rows."""
    for rows in (0, 1, 3, 1025 if columns in (3, 129) else 17):
        x, grad = sample(rows, columns, dtype), incoming(rows, columns, dtype)
        layouts = [("contiguous", "contiguous"), ("sliced", "row-strided"), ("heads", "heads"), ("expanded", "scalar")]
        if rows == 3 and columns == 129:
            layouts = list(product(LAYOUTS, GRADS))
        kinds = [None, dtype, *([torch.float32] if dtype in HALVES and columns == 129 else [])]
        for kind, (offset, mode), (layout, other) in product(kinds, ((0.0, "torch"), (1.0, "llama")), layouts):
            if mode == "llama" and kind not in (None, dtype):
                continue  # a wider output keeps the input
            weight = None if kind is None else gains(columns, dtype=kind, seed=3)
            what = rows, layout, other, kind, offset, mode
            a, b = alike(lay_out(x, layout), lay_out_grad(grad, other))
            y, dx, *dw = gradients(a, weight, b, offset=offset, casting_mode=mode)
            assert same_bits(y, rms_norm(a, columns, weight, EPS, offset=offset, casting_mode=mode)), what
            if not columns:
                assert dx.shape == a.shape
                continue
            bounds = lean_bounds(rows_of(x, layout), grad_rows(grad, other), weight, offset, off(dtype, mode, target))
            bounds[0].check(dx, what)
            if dw:
                assert bounds[1] is not None
                bounds[1].check(dw[0], what)


def test_the_bound_is_no_larger_than_it_has_to_be(native_target):
    """In bf16 the price of keeping y is seen: with gradients for which mean(h·x̂) is as large as mean|h·x̂|, somewhere
    0.4 of what is allowed."""
    for mode in MODES:
        x, weight = sample(64, 576, torch.bfloat16), gains(576, dtype=torch.bfloat16)
        grad = (x * weight).sign()
        wide = [t.float() for t in (x, grad, weight)]  # dx in fp32, from y in bf16
        y = rms_norm(x, 576, weight, EPS, casting_mode=mode)
        rstd = _ops.rms_norm_forward(x, weight, 1, EPS, 0.0, mode == "llama")[1]
        dx, _ = lean._norm.backward(wide[1], None, y.float(), rstd, wide[2], 1, 0.0, True, True)
        *_, price = lean_bounds(x, grad, weight, 0.0, off(torch.bfloat16, mode, "native"))
        usual = Truth(wide[0], EPS).backward(wide[1], wide[2], 0.0)[0]
        share = np.abs(exact(dx) - (usual.low + usual.high) / 2) / (price + (usual.high - usual.low) / 2)
        assert 0.4 < share.max() <= 1, mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(target, dtype):
    """Output and sum have the bits of the form that keeps the sum; either, both, or none of them in the loss."""
    for columns, mode in ((3, "torch"), (129, "llama"), (576, "torch")):
        x, residual = sample(17, columns, dtype), (sample(17, columns, seed=2) * 1.37).to(dtype)
        weight, grads = gains(columns, dtype=dtype), [incoming(17, columns, dtype), incoming(18, columns, dtype)[1:]]
        for used in ((0,), (1,), (0, 1)):
            results = []
            for memory in ("lean", None):
                leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
                both = add_rms_norm(*leaves[:2], columns, leaves[2], EPS, casting_mode=mode, memory=memory)
                chosen = [both[i] for i in used]
                found = torch.autograd.grad(chosen, leaves, [grads[i] for i in used], allow_unused=True)
                results.append((both, found))
            (both, found), (wanted, usual) = results
            assert "Lean" in both[0].grad_fn.name()
            assert all(same_bits(a.detach(), b.detach()) for a, b in zip(both, wanted, strict=True))
            assert same_bits(found[0], found[1])
            if used == (1,):
                assert torch.equal(found[0], grads[1])
                continue
            delta = off(dtype, mode, target)
            dx, dw, price = lean_bounds(x + residual, grads[0], weight, 0.0, delta)
            dw.check(found[2], (columns, used))
            if used == (0,):
                dx.check(found[0], (columns, used))
            else:  # and what arrives at the sum, rounded once with it
                slack = torch.from_numpy((price * 1.01).astype(np.float64)).view(x.shape)
                slack += 2 * torch.finfo(dtype).eps * (usual[0].abs() + grads[1].abs()).double()
                assert ((found[0].double() - usual[0].double()).abs() <= slack).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_company(native_target, dtype, threads):
    """A row's dx alone, in a batch, in other strides and on two threads; and both on every CPU target."""
    x, grad, weight = sample(65, 1027, dtype), incoming(65, 1027, dtype), gains(1027, dtype=dtype)
    y, dx, dw = gradients(x, weight, grad)
    for row in (0, 1, 64):
        assert same_bits(gradients(x[row : row + 1], weight, grad[row : row + 1])[1], dx[row : row + 1])
    for layout in ("transposed", "misaligned"):
        assert all(map(same_bits, gradients(lay_out(x, layout), weight, lay_out(grad, layout)), (y, dx, dw)))
    threads(2)
    assert all(map(same_bits, gradients(x, weight, grad), (y, dx, dw)))
    seen = _SEEN.setdefault(dtype, (dx, dw))
    assert all(map(same_bits, (dx, dw), seen)), native_target


_SEEN: dict[torch.dtype, tuple[Tensor, Tensor]] = {}


def test_weights_of_several_rows(target):
    for dtype in DTYPES:
        x, grad = sample(24, 64, dtype).view(8, 3, 64), incoming(24, 64, dtype).view(8, 3, 64)
        weight = gains(3, 64, dtype=dtype)
        both = []
        for memory in ("lean", None):
            leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            both.append(torch.autograd.grad(rms_norm(leaves[0], 64, leaves[1], EPS, memory=memory), leaves, grad))
        for head in range(3):
            delta = off(dtype, "torch", target)
            dx, dw, _ = lean_bounds(x[:, head], grad[:, head], weight[head], 0.0, delta)
            dx.check(both[0][0][:, head], (dtype, head))
            dw.check(both[0][1][head], (dtype, head))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_asked_for_alone(target, dtype):
    """dx without dw and dw without dx are those of both."""
    x, grad, weight = sample(33, 129, dtype), incoming(33, 129, dtype), gains(129, dtype=dtype)
    _, dx, dw = gradients(x, weight, grad)
    for ask in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(one) for t, one in zip((x, weight), ask, strict=True)]
        rms_norm(leaves[0], 129, leaves[1], EPS, memory="lean").backward(grad)
        for leaf, one, wanted in zip(leaves, ask, (dx, dw), strict=True):
            assert same_bits(leaf.grad, wanted) if one else leaf.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_that_are_rescued(target, dtype):
    """Squares that over- or underflow: y is right there, and 1/rms is a number, so dx is as everywhere else. 1/rms of
    the largest rows is a subnormal number, whose step is what dx may lose beside the bound."""
    large = 2.0**1000 if dtype is torch.float64 else 2.0**120
    if target == "reference":
        pytest.skip("the definition overflows")
    for factor, eps in ((large, EPS), (large / 2, EPS), (1 / large, 1e-30), (2.0**-130, 1e-36)):
        x = (sample(5, 129) / sample(5, 129).abs().max() * factor).to(dtype)
        weight, grad = gains(129, dtype=dtype), incoming(5, 129, dtype)
        y, dx, dw = gradients(x, weight, grad, eps=eps)
        usual = gradients(x, weight, grad, None, eps=eps)
        assert same_bits(y, usual[0])
        *_, price = lean_bounds(x, grad, weight, 0.0, off(dtype, "torch", target), eps)
        info = torch.finfo(dtype)
        slack = torch.from_numpy(price.astype(np.float64)) + 8 * info.eps * usual[1].double().abs()
        step = info.smallest_normal * info.eps
        assert ((dx.double() - usual[1].double()).abs() <= slack + 300 * step).all(), factor
        torch.testing.assert_close(dw, usual[2], rtol=4 * info.eps, atol=16 * info.eps)


def test_zeros_nans_and_infinities(target):
    """Rows of zeros have x̂ = 0, dx = r·h; a NaN or an Inf spreads as it does where the input was kept; no other row
    notices."""
    for dtype in DTYPES:
        x, grad, weight = sample(6, 129, dtype), incoming(6, 129, dtype), gains(129, dtype=dtype)
        x[1] = 0.0
        x[2, 5], x[3, 7], grad[4, 9] = torch.nan, torch.inf, torch.nan
        clean = gradients(sample(6, 129, dtype), weight, incoming(6, 129, dtype))[1]
        dx = gradients(x, weight, grad)[1]
        usual = gradients(x, weight, grad, None)[1]
        assert torch.equal(dx.isnan(), usual.isnan()), dtype
        assert same_bits(dx[1], usual[1])
        assert same_bits(dx[[0, 5]], clean[[0, 5]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_gains_down_to_the_limit(target, dtype):
    """At the smallest gain that is taken, x̂ is off by u·max(|x̂|, 1): of y that is subnormal, half a step."""
    least, _ = lean.limits(dtype, 129)
    x, grad = sample(17, 129, dtype), torch.ones(17, 129, dtype=dtype)
    weight = torch.full((129,), least, dtype=dtype)
    weight[::2] = 1.0
    _, dx, dw = gradients(x, weight, grad)
    truth = Truth(x, EPS)
    u = off(dtype, "torch", target)
    wanted = np.sum(truth.normalised, axis=0)
    allowed = u * np.sum(np.maximum(np.abs(truth.normalised), 1), axis=0) + torch.finfo(dtype).eps * np.abs(wanted)
    assert (np.abs(exact(dw) - wanted) <= allowed * 1.01).all()
    lean_bounds(x, grad, weight, 0.0, u)[0].check(dx, dtype)


def refused(call: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """What a call that keeps its input returns, and what it warns of, if it does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = call()
    assert "Lean" not in y.grad_fn.name()
    return y, str(caught[0].message) if caught else ""


GAINS = {
    "zero": (0.0, 0.0, {torch.bfloat16: "is 0", torch.float16: "is 0", torch.float32: "is 0", torch.float64: "is 0"}),
    "zero with an offset": (-1.0, 1.0, {torch.bfloat16: "is 0", torch.float32: "is 0"}),
    "subnormal": (1e-5, 0.0, {torch.float16: "is 1e-05, of element 7, and float16 needs at least 6.1e-05"}),
    "large": (6e4, 0.0, {torch.float16: "is 6e+04, of element 7, and float16 needs at most 2.9e+03"}),
    "NaN": (torch.nan, 0.0, {torch.float32: "is nan"}),
}


@pytest.mark.parametrize("name", GAINS)
def test_gains_that_are_refused(target, name):
    """The input is kept then: the bits of every gradient are the usual ones; one warning for each layer says why."""
    value, offset, types = GAINS[name]
    for dtype, says in types.items():
        weight = gains(129, dtype=dtype).requires_grad_()
        with torch.no_grad():
            weight[7] = value
        x, grad = sample(5, 129, dtype).requires_grad_(), incoming(5, 129, dtype)
        y, said = refused(lambda: rms_norm(x, 129, weight, EPS, offset=offset, memory="lean"))  # noqa: B023
        assert "keeps its input" in said
        assert says in said
        usual = rms_norm(x, 129, weight, EPS, offset=offset)
        pairs = (torch.autograd.grad(one, (x, weight), grad) for one in (y, usual))
        assert all(same_bits(a, b) for a, b in zip(*pairs, strict=True))
        assert not refused(lambda: add_rms_norm(x, x, 129, weight, EPS, offset=offset, memory="lean")[0])[1]  # noqa: B023
        other = weight.detach().clone().requires_grad_()
        assert refused(lambda: rms_norm(x, 129, other, EPS, offset=offset, memory="lean"))[1]  # noqa: B023
        with torch.no_grad():
            weight[7] = 1.0  # and back: as lean as ever
        assert "Lean" in rms_norm(x, 129, weight, EPS, memory="lean").grad_fn.name()


def test_a_narrower_gain_that_is_refused(target):
    """The limits of float64 are beyond what the gain's own type has."""
    x, weight = sample(5, 129, torch.float64).requires_grad_(), gains(129, dtype=torch.bfloat16)
    weight[7] = -1.0
    said = refused(lambda: rms_norm(x, 129, weight, EPS, offset=1.0, memory="lean"))[1]
    assert "its smallest gain is 0, of element 7, and float64 needs at least 2.2e-308" in said


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_calls_that_keep_the_input(target):
    """Nobody is warned: a wider output, an eps of 0, a graph, a transform, forward mode."""
    x, weight = sample(5, 129, torch.bfloat16).requires_grad_(), gains(129, dtype=torch.float32)
    assert refused(lambda: rms_norm(x, 129, weight, EPS, casting_mode="llama", memory="lean"))[1] == ""
    assert refused(lambda: rms_norm(x, 129, weight, 0.0, memory="lean"))[1] == ""
    x, weight = sample(5, 129).requires_grad_(), gains(129)
    one, other = (lambda x, m=m: rms_norm(x, 129, weight, EPS, memory=m).square().sum() for m in ("lean", None))
    assert same_bits(torch.func.grad(one)(x), torch.func.grad(other)(x))
    assert same_bits(torch.func.vmap(torch.func.grad(one))(x), torch.func.vmap(torch.func.grad(other))(x))
    assert torch.equal(torch.func.hessian(one)(x[0]), torch.func.hessian(other)(x[0]))
    tangents = [torch.func.jvp(f, (x,), (torch.ones_like(x),))[1] for f in (one, other)]
    assert same_bits(*tangents)
