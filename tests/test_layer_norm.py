"""Proves that LayerNorm on our kernels is right: against the formula in twice the precision, forward and backward, for
every dtype, form, layout, size and CPU target; that it is torch's layer wherever the kernels don't serve; that it keeps
what torch keeps."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import COLUMNS, DTYPES, HALVES, LAYOUTS, exact, lay_out, same_bits, sample, ulp
from torch.autograd import gradcheck, gradgradcheck

import rmsnorm
from rmsnorm import LayerNorm, _native, layer_norm
from rmsnorm.forms import layer_norm as layer_norm_file

EPS = 1e-5
FORMS = list(product((False, True), (False, True)))  # weight, bias

# Above correct rounding, in ulps of the product with the gain or of the result, whichever is larger (the bias cancels).
# fp32 and fp64: x - mean, x̂ and gain or bias round once each, a rounding being up to 1 ulp of a later result: 2.5 in
# all, and with both, 3.5.
ULPS = {torch.float32: 2.6, torch.float64: 2.6, torch.bfloat16: 0.52, torch.float16: 0.52}
# Beside it the mean's own error, in deviations: for halves 64 fp32 roundings of |x - shift|, a few deviations each.
DEVIATIONS = {torch.float32: 2.0**-40, torch.float64: 2.0**-60, torch.bfloat16: 2.0**-17, torch.float16: 2.0**-17}

needs_kernels = pytest.mark.skipif(not _native.cpu_targets(), reason=f"{_native.why_not()}")


def pair(columns: int, dtype: torch.dtype, weight: bool, bias: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (sample(1, columns, dtype)[0] if weight else None, sample(2, columns, dtype)[1] if bias else None)


class Truth:
    """x̂, r and y of rows ``x`` in float64 (longdouble for float64): the formula, with the mean corrected once."""

    def __init__(self, x: torch.Tensor, eps: float = EPS) -> None:
        wide = exact(x)
        mean = np.mean(wide, axis=-1, keepdims=True)
        centred = (wide - mean) - np.mean(wide - mean, axis=-1, keepdims=True)  # two parts: 64 bits of 1000 are too few
        self.dtype = x.dtype
        self.r = 1 / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + wide.dtype.type(eps))
        self.normalised = centred * self.r
        self.offset = np.abs(mean) * self.r  # the mean, in deviations: as large a part of it as 2^-48 is rounded off

    def check(self, y: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, what: object) -> None:
        gain = 1.0 if weight is None else exact(weight)
        scaled = self.normalised * gain
        value = scaled if bias is None else scaled + exact(bias)
        low_part = 2.0**-100 if self.dtype is torch.float64 else 2.0**-48
        ulps = ULPS[self.dtype] + (weight is not None and bias is not None and self.dtype not in HALVES)
        margin = ulps * ulp(np.maximum(np.abs(value), np.abs(scaled)), self.dtype)
        margin = margin + np.abs(gain) * (DEVIATIONS[self.dtype] + low_part * self.offset)
        worst = np.max(np.abs(exact(y) - value) / margin, initial=0.0)
        assert worst <= 1, f"{what}: {worst:.4g} times the allowed error"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(native_target, dtype, columns):
    for rows, (weight, bias) in product((1, 3, 70), FORMS):
        x, (w, b) = sample(rows, columns, dtype), pair(columns, dtype, weight, bias)
        y = layer_norm(x, columns, w, b)
        assert y.dtype is dtype
        Truth(x).check(y, w, b, f"{rows} rows, {weight=}, {bias=}")
        for layout in LAYOUTS:
            placed = lay_out(x, layout)
            expected = layer_norm(placed.contiguous(), columns, w, b)
            assert same_bits(layer_norm(placed, columns, w, b), expected), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 129, 4096])
def test_rows_that_cancel(native_target, dtype, columns):
    """A mean far from zero, an outlier where the shift is taken, both; constant rows; rows in need of rescue."""
    x = sample(8, columns, dtype).double() * 0.5
    outlier, far = x.clone(), x + 1000
    outlier[:, 0] = 200 * columns**0.5
    cases = {"far": far, "outlier": outlier, "outlier last": outlier.flip(-1), "both": outlier + 1000}
    if dtype is not torch.float16:
        cases |= {"tiny": x * 2.0**-110, "huge": x * 2.0**110, "very far": x * 1e-3 + 1e4}
    if dtype is torch.float64:
        cases |= {"minute": x * 2.0**-700, "vast": x * 2.0**700}
    for name, values in cases.items():
        rows = values.to(dtype)
        eps = EPS if name not in ("tiny", "minute") else float(rows.double().var())
        Truth(rows, eps).check(layer_norm(rows, columns, None, None, eps), None, None, name)
    constant = torch.full((2, columns), 3.0, dtype=dtype)
    assert torch.equal(layer_norm(constant, columns), torch.zeros_like(constant))


@pytest.mark.parametrize("columns", [1, 3, 129, 576, 1027])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(native_target, dtype, columns):
    for rows, (weight, bias) in product((1, 3, 130), FORMS):
        x, (w, b) = sample(rows, columns, dtype) + 2, pair(columns, dtype, weight, bias)
        grad = sample(rows, columns, dtype).flip(-1)
        inputs = [t.requires_grad_() for t in (x, w, b) if t is not None]
        got = dict(
            zip(
                ("x", *("w" * weight), *("b" * bias)),
                torch.autograd.grad(layer_norm(x, columns, w, b), inputs, grad),
                strict=True,
            )
        )
        truth, g = Truth(x), exact(grad)
        h = g if w is None else g * exact(w)
        x_hat, unit = truth.normalised, torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps / 2
        m, p = (np.mean(t, axis=-1, keepdims=True) for t in (h, h * x_hat))
        wanted = {"x": truth.r * (h - m - x_hat * p), "w": np.sum(g * x_hat, axis=0), "b": np.sum(g, axis=0)}
        # One rounding of the result; 24 roundings in the wide type of the terms that cancel in dx (three of x̂, h,
        # two means), of the largest partial sum in dw and db (up to 130 random terms).
        deviation = 1 + np.abs(x_hat) + truth.offset
        cancelling = np.mean(np.abs(h * x_hat) + np.abs(h), axis=-1, keepdims=True)
        sizes = {
            "x": truth.r * (np.abs(h) + deviation * cancelling),
            "w": np.sum(np.abs(g) * deviation, axis=0),
            "b": np.sum(np.abs(g), axis=0),
        }
        for name, gradient in got.items():
            margin = 0.501 * ulp(wanted[name], dtype) + 24 * unit * sizes[name]
            worst = np.max(np.abs(exact(gradient) - wanted[name]) / margin)
            assert worst <= 1, f"{rows} rows, {weight=}, {bias=}, gradient of {name}: {worst:.4g} times the margin"


@needs_kernels
def test_only_the_gradients_asked_for():
    x, w, b = (sample(5, 64, torch.float32), *pair(64, torch.float32, True, True))
    for needs in product((False, True), repeat=3):
        if not any(needs):
            continue
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
        everything = [t.clone().requires_grad_() for t in (x, w, b)]
        for tensors in (leaves, everything):
            layer_norm(tensors[0], 64, *tensors[1:]).sin().sum().backward()
        for leaf, other, need in zip(leaves, everything, needs, strict=True):
            assert (leaf.grad is not None) == need
            assert not need or same_bits(leaf.grad, other.grad)


@needs_kernels
def test_derivatives():
    arguments = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 5), (2, 5), (2, 5))]

    def call(x, w, b):
        return layer_norm(x, (2, 5), w, b)

    assert type(call(*arguments).grad_fn).__name__.startswith("LayerNormFunction")
    assert gradcheck(call, arguments)
    assert gradgradcheck(call, arguments)
    transformed = torch.func.vmap(
        torch.func.grad(lambda x: layer_norm(x, 5, *[a[0].detach() for a in arguments[1:]]).sin().sum())
    )
    expected = torch.func.vmap(
        torch.func.grad(lambda x: F.layer_norm(x, (5,), *[a[0].detach() for a in arguments[1:]]).sin().sum())
    )
    x = arguments[0].detach()
    torch.testing.assert_close(transformed(x), expected(x))


def test_is_torchs_where_no_kernel_serves():
    x = torch.randn(2, 5, dtype=torch.complex64).real  # strided
    torch.testing.assert_close(layer_norm(x, 5), F.layer_norm(x, (5,)))
    meta = layer_norm(torch.empty(2, 5, device="meta"), 5)
    assert meta.shape == (2, 5)
    assert meta.device.type == "meta"
    compiled = torch.compile(layer_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, 5), F.layer_norm(x, (5,)))
    half = torch.randn(3, 8, dtype=torch.bfloat16)  # a gain wider than the input: torch's CPU kernel has it too
    torch.testing.assert_close(layer_norm(half, 8, torch.ones(8), torch.zeros(8)), F.layer_norm(half, (8,)))


F32, BF16, F16, F64 = DTYPES


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace's: it is deprecated, and sizes become constants
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight", "bias"),
    [
        (F32, BF16, None),
        (F32, F32, F64),
        (F32, F64, F16),
        (BF16, F32, F32),  # torch's has this one
        (BF16, F32, BF16),
        (F16, None, F64),
        (F64, F32, None),
    ],
    ids=str,
)
def test_types_in_any_mixture(dtype, weight, bias, recorded):
    """torch's LayerNorm refuses them, and so would what was recorded of it."""
    torch.manual_seed(0)
    x = torch.randn(8, 3).to(dtype).t().requires_grad_(recorded)
    w, b = (None if kind is None else torch.randn(8).to(kind).requires_grad_(recorded) for kind in (weight, bias))
    want = F.layer_norm(x.double(), (8,), *(t if t is None else t.double() for t in (w, b)), EPS)
    learnt = [t for t in (x, w, b) if t is not None]

    class Layer(torch.nn.Module):
        def forward(self, x):
            return layer_norm(x, 8, w, b, EPS)

    layer = Layer()
    torch.compiler.reset()
    ways = [layer, torch.compile(layer, backend="eager", fullgraph=True)]
    if not recorded:
        ways += torch.jit.trace(layer, x), torch.export.export(layer, (x,)).module()
    # A rounding of the type, and a few of float32's, of numbers up to about 4, and of sums of three.
    near = {"rtol": 2 * max(torch.finfo(t.dtype).eps for t in learnt), "atol": 4e-6}
    for way in ways:
        y = way(x)
        assert y.dtype is dtype
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), want, **near)
        if recorded:
            pairs = (torch.autograd.grad(one.sum(), learnt, retain_graph=True) for one in (y, want))
            for got, expected in zip(*pairs, strict=True):
                torch.testing.assert_close(got, expected, **near)


@pytest.mark.parametrize(
    ("shape", "weight", "bias"),
    [
        ((4,), (5,), None),
        ((5,), (4,), None),
        ((5,), (5,), (4,)),
        ((2, 5), (5,), None),
        ((), None, None),
        ((3, 5), None, None),
    ],
)
def test_errors_are_torchs(shape, weight, bias):
    x, w, b = torch.randn(2, 5), *(None if s is None else torch.randn(s) for s in (weight, bias))
    with pytest.raises(RuntimeError) as theirs:
        F.layer_norm(x, shape, w, b)
    with pytest.raises(RuntimeError) as ours:
        layer_norm(x, shape, w, b)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 0.1}], ids=str)
def test_layer_is_torchs(dtype, options):
    torch.manual_seed(0)
    theirs = torch.nn.LayerNorm((3, 7), **options).to(dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = LayerNorm((3, 7), **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(4, 3, 7).to(dtype)
    tolerance = 2e-6 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
    assert same_bits(copy.deepcopy(ours)(x), ours(x))
    for empty in (torch.empty(0, 3, 7, dtype=dtype), torch.empty(2, 0, 3, 7, dtype=dtype)):
        assert ours(empty).shape == empty.shape


@needs_kernels
def test_kept_for_backward():
    """The input, the weight, the bias, one fp64 and one fp32 per row."""
    x, w, b = torch.randn(6, 32, requires_grad=True), torch.ones(32), torch.zeros(32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer_norm(x, 32, w, b)
    own = [t for t in kept if t.data_ptr() not in {x.data_ptr(), w.data_ptr(), b.data_ptr()}]
    assert sorted((t.numel(), str(t.dtype)) for t in own) == [(6, "torch.float32"), (6, "torch.float64")]
    assert len(kept) == 5


def test_is_on_the_public_page():
    assert rmsnorm.layer_norm is layer_norm_file.layer_norm


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
def test_derivatives_of_derivatives():
    """Nested transforms, against the formula: torch's own operator is wrong in two of these (torch 2.13)."""
    from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

    dice = torch.Generator().manual_seed(0)
    x, tangent = torch.randn(2, 4, 3, 5, generator=dice, dtype=torch.float64)
    weight, bias = torch.randn(2, 5, generator=dice, dtype=torch.float64)

    def formula(x, w, b):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * w + b

    def ours(x, w, b):
        return layer_norm(x, (5,), w, b, EPS)

    def ways(norm):
        def loss(x, w, b):
            return norm(x, w, b).sin().sum()

        def of_weight(sample):
            return grad(loss, 1)(sample, weight, bias)

        def along(x):
            return jvp(lambda x: norm(x, weight, bias), (x,), (tangent,))[1]

        yield jvp(along, (x,), (tangent,))[1]
        yield grad(lambda x: vmap(of_weight)(x).square().sum())(x)
        yield from (hessian(loss, i)(x, weight, bias) for i in range(3))
        yield from (outer(jacrev(loss, 1), 0)(x, weight, bias) for outer in (jacfwd, jacrev))
        yield jacfwd(jacfwd(loss, 1), 0)(x, weight, bias)
        leaf = x.clone().requires_grad_()  # and torch.autograd around them
        yield torch.autograd.grad(vmap(of_weight)(leaf).square().sum(), leaf)[0]
        yield torch.autograd.grad(jacrev(loss, 1)(leaf, weight, bias).square().sum(), leaf)[0]

    for i, (found, right) in enumerate(zip(ways(ours), ways(formula), strict=True)):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12, msg=lambda text, i=i: f"{i}: {text}")
