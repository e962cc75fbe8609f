"""Proves the second rule for eps, ``r = 1/sqrt(max(mean(x²), floor))``: for every dtype, in every CPU target, with rows
of zeros, of subnormals, on both sides of the floor and near overflow; its derivatives, which have no projection where
the floor holds; and that a negative eps of the public functions is still added, as torch adds it.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, HALVES, MODES, Bounds, Truth, bound, exact, gain, gains, incoming, same_bits, sample, ulp
from test_derivatives import TRANSFORMS

import rmsnorm
from rmsnorm import _autograd, _native, _ops, add_rms_norm, gated_rms_norm, layer_norm, rms_norm
from rmsnorm.forms import gated_ops
from rmsnorm.forms.floored import floored_rms_norm

COLUMNS = (1, 3, 127, 129, 576, 1027, 5137)
# F.normalize's own; one that ordinary rows can be below; and one whose 1/rms no fp32 holds.
FLOORS = {"normalize": lambda n: 1e-24 / n, "large": lambda n: 0.01, "tiny": lambda n: 1e-90}


def rows_around(floor: float, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of each size in turn: a few bits of a half type and a mean square suffice to tell 0.98 from 1.02."""
    info, root = torch.finfo(dtype), floor**0.5
    sizes = (0.0, root * 0.98, root * 1.02, info.smallest_normal / 4, 1e-30, 1.0, 1e4, info.max / 16, 1e-20)
    x = sample(rows, columns).clamp(-1e3, 1e3)
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    x = x.clamp(-12, 12) if columns > 200 else x
    x = x * torch.tensor([sizes[i % len(sizes)] for i in range(rows)], dtype=torch.float64).view(-1, 1)
    return x.clamp(-info.max, info.max).to(dtype)


class FlooredTruth(Truth):
    def __init__(self, x: torch.Tensor, floor: float) -> None:
        wide = exact(x)
        self.dtype = x.dtype
        square = np.mean(wide * wide, axis=-1, keepdims=True)
        self.moves = square >= floor  # as clamp_min has it
        self.r = 1 / np.sqrt(np.maximum(square, wide.dtype.type(floor)))
        self.normalised = wide * self.r

    def backward(self, grad, weight, offset):
        """The bounds of the other rule, without its projection where the floor holds; beyond the largest number of the
        type the gradient is infinite, as 1e12 times anything is in fp16."""
        g, x_hat = exact(grad), self.normalised
        h = g if weight is None else g * gain(weight, self.dtype, offset)
        accumulation = torch.finfo(torch.float64 if self.dtype is torch.float64 else torch.float32)
        unit, step = accumulation.eps / 2, accumulation.smallest_normal * accumulation.eps
        mean = np.where(self.moves, np.mean(h * x_hat, axis=-1, keepdims=True), 0)
        spread = np.where(self.moves, np.mean(np.abs(h * x_hat), axis=-1, keepdims=True), 0)
        dx = self.r * (h - x_hat * mean)
        size = self.r * (np.abs(h) + np.abs(x_hat) * spread)
        margin = 0.501 * ulp(dx, self.dtype) + 16 * unit * size + self.r * step * (1 + np.abs(x_hat) + np.abs(mean))
        low, high, largest = dx - margin, dx + margin, torch.finfo(self.dtype).max
        dx_bounds = Bounds(np.where(low < -largest, -np.inf, low), np.where(high > largest, np.inf, high))
        if weight is None:
            return dx_bounds, None
        dw = np.sum(g * x_hat, axis=0)
        margin = 0.501 * ulp(dw, weight.dtype) + 16 * unit * np.sum(np.abs(g * x_hat), axis=0)
        return dx_bounds, Bounds(dw - margin, dw + margin)


def gradients(x, weight, grad, floor, **options):
    """[y, dx, dw]"""
    leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
    y = floored_rms_norm(leaves[0], x.shape[-1], *leaves[1:] or [None], floor, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", FLOORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(target, dtype, kind, columns):
    """Forward, dx and dw; the reference has no scaled sums, so the largest rows and the smallest floor aren't its."""
    floor = FLOORS[kind](columns)
    if target == "reference" and kind == "tiny":
        pytest.skip("fp32 has no such floor")
    for rows in (0, 1, 3, 9, 1025 if columns <= 129 else 19):
        x, grad = rows_around(floor, rows, columns, dtype), incoming(rows, columns, dtype)
        if target == "reference":
            x[7::9] = 1.0
        truth = FlooredTruth(x, floor)
        for weight, offset, mode in [
            (None, 0.0, "torch"),
            *product((gains(columns, dtype=dtype), gains(columns, dtype=torch.float32)), (0.0, 1.0), MODES),
        ]:
            if weight is not None and weight.dtype is not dtype and dtype is torch.float64:
                continue
            what = f"{rows} rows, weight {getattr(weight, 'dtype', None)}, {offset=}, {mode}"
            options = {"offset": offset, "casting_mode": mode}
            y, dx, *dw = gradients(x, weight, grad, floor, **options)
            truth.forward(weight, offset, mode, bound(target, dtype)).check(y, what)
            assert same_bits(floored_rms_norm(x, columns, weight, floor, **options), y), what
            for name, got, bounds in zip(("dx", "dw"), (dx, *dw), truth.backward(grad, weight, offset), strict=False):
                bounds.check(got, f"{name}, {what}")
    if columns == 129 and target != "reference":  # a row alone has the bits that it has in any batch
        many = gradients(x, None, grad, floor)
        for row in range(20):
            one = gradients(x[row : row + 1], None, grad[row : row + 1], floor)
            assert all(same_bits(a, b[row : row + 1]) for a, b in zip(one, many, strict=True)), row


def test_is_that_of_normalize(target):
    """The default floor, zeros, and a row of norm 1e-20, which no sum of fp32 squares sees."""
    for dtype, columns in product(DTYPES, (1, 3, 576)):
        x, weight = sample(5, columns), gains(columns, dtype=dtype)
        x[1], x[2] = 0.0, 1e-20 * x[2] / x[2].norm()
        x, grad = x.to(dtype), incoming(5, columns, dtype)
        leaves = [t.double().requires_grad_() for t in (x, weight)]
        wanted = F.normalize(leaves[0], dim=-1) * columns**0.5 * leaves[1]
        wanted = [wanted, *torch.autograd.grad(wanted, leaves, grad.double())]
        tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}.get(dtype, 4 * torch.finfo(dtype).eps)
        for got, truth in zip(gradients(x, weight, grad, None), wanted, strict=True):
            # In the type: fp16 has no 1e12.
            torch.testing.assert_close(got, truth.to(dtype), rtol=tolerance, atol=tolerance * 10)
        assert not floored_rms_norm(torch.zeros(2, columns, dtype=dtype), columns, weight).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_side_of_the_floor_is_forwards(native_target, dtype):
    """A mean square 2^-27 off the floor (2^-50 in fp64, where the row isn't scaled) has its 1/rms, rounded, and a
    derivative of its own. Scaled rows and plain ones, of one size, so that their mean square is exact."""
    off = 2.0**-27 if dtype is torch.float32 else 2.0**-50
    for size, columns in product((1.0, 2.0**-40, 2.0**-70, 2.0**40), (1, 128, 1024)):
        x, grad = torch.full((2, columns), size, dtype=dtype), incoming(2, columns, dtype)
        below, above = (gradients(x, None, grad, size * size * (1 + side * off)) for side in (1, -1))
        torch.testing.assert_close(below[1], grad / size, rtol=1e-6, atol=0.0)
        wanted = (grad - grad.mean(-1, keepdim=True)) / size
        torch.testing.assert_close(above[1], wanted, rtol=1e-5, atol=1e-6 / size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_row(native_target, dtype):
    """NaN over its row; beside an Inf NaN and zeros; a gradient's NaN spreads only where r moves."""
    x, grad = sample(5, 129, dtype), incoming(5, 129, dtype)
    x[3:] = 0.0
    clean = gradients(x, None, grad, 1e-6)
    x[0, 7], x[1, 8], grad[2, 9], grad[3, 9] = torch.nan, torch.inf, torch.nan, torch.nan
    y, dx = gradients(x, None, grad, 1e-6)
    assert y[0].isnan().all()
    assert y[1, 8].isnan()
    assert y[1].count_nonzero() == 1
    assert dx[[0, 2]].isnan().all()
    assert dx[3].isnan().nonzero().flatten().tolist() == [9]
    assert same_bits(y[2:], clean[0][2:])
    assert same_bits(dx[4], clean[1][4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_targets_give_the_same_bits(dtype, restored_target):
    """The norm, add's and the gated one's operators, forward and backward."""
    for columns, kind in product(COLUMNS, FLOORS):
        floor, results = FLOORS[kind](columns), []
        x, grad = rows_around(floor, 19, columns, dtype), incoming(19, columns, dtype)
        weight = gains(columns, dtype=dtype)
        for name in _native.cpu_targets():
            _native.set_cpu_target(name)
            tensors = gradients(x, weight, grad, floor)
            tensors += _ops.add_rms_norm_forward(x, grad, weight, 1, -floor, 0.0, False)
            for first in (False, True):
                y, rstd = gated_ops.forward(x, grad, weight, 1, -floor, 0.0, False, not first, True)
                tensors += [y, rstd]
                options = (weight, 1, -floor, 0.0, not first, True, True, True, True)
                tensors += gated_ops.backward(grad, x, grad, rstd, *options)
            results.append([t.nan_to_num(nan=7.0) for t in tensors])
        for other in results[1:]:
            assert all(map(same_bits, results[0], other)), f"{columns} columns, {kind}"


def test_add_and_gated_operators_know_it(target):
    """Against the definition in fp64, on both sides of the floor."""
    x, other, w = (sample(7, 129, seed=i).mul(0.02) for i in range(3))
    w = gains(129)
    leaves = [t.clone().requires_grad_() for t in (x, other, w)]
    formula = F.normalize(leaves[0] + leaves[1], dim=-1, eps=129**0.5 * 0.1) * 129**0.5 * leaves[2]
    held = (x + other).square().mean(-1) < 0.01
    assert 0 < held.sum() < 7
    wanted = torch.autograd.grad(formula.sin().sum(), leaves)
    output, total, _ = _autograd.add_rms_norm(*leaves, 1, -0.01, 0.0, False)
    torch.testing.assert_close(output, formula)
    torch.testing.assert_close(total, x + other)
    torch.testing.assert_close(torch.autograd.grad(output.sin().sum(), leaves), wanted)
    for first in (False, True):
        options = (w, 1, -0.01, 0.0, False, not first, True)
        leaves = [t.clone().requires_grad_() for t in (x * 10, other)]
        formula = gated_ops.gated_rms_norm(*leaves, *options)[0]
        y, rstd = gated_ops.forward(x * 10, other, *options)
        torch.testing.assert_close(y, formula)
        assert 0 < (rstd < 0).sum() < 7
        wanted = torch.autograd.grad(formula.sum(), leaves)
        got = gated_ops.backward(
            torch.ones_like(y), x * 10, other, rstd, w, 1, -0.01, 0.0, not first, True, True, True, True
        )
        torch.testing.assert_close(got[:2], wanted)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("casting_mode", MODES)
def test_derivatives_of_first_and_second_order(target, casting_mode):
    """Against finite differences in fp64: rows below the floor, one of zeros, and rows above."""
    x = sample(4, 12).sin() * torch.tensor([[0.1], [0.0], [3.0], [0.3]], dtype=torch.float64)
    x, weight = x.view(4, 3, 4).requires_grad_(), gains(3, 4).requires_grad_()
    run = lambda a, w: floored_rms_norm(a, (3, 4), w, 0.5, offset=1.0, casting_mode=casting_mode)  # noqa: E731
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(run, (x, weight))
        assert check(lambda a: run(a, None), (x,))
    assert torch.autograd.gradcheck(run, (x, weight), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_those_of_the_formula(name):
    x, dx, ws = sample(4, 5), sample(4, 5, seed=1), torch.stack([gains(5, seed=i) for i in range(4)])
    x = x / x.abs().amax(-1, keepdim=True) * torch.tensor([[0.1], [0.2], [2.0], [3.0]], dtype=torch.float64)
    floor, w, dw = 0.09, gains(5), gains(5, seed=9)
    ours = lambda a, b: floored_rms_norm(a, 5, b, floor)  # noqa: E731
    formula = lambda a, b: F.normalize(a, dim=-1, eps=(5 * floor) ** 0.5) * 5**0.5 * b  # noqa: E731
    got, wanted = (TRANSFORMS[name](f, x, w, dx, dw, ws) for f in (ours, formula))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_has_the_bits_of_eager(dtype):
    torch.compiler.reset()
    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=False)
    forward = torch.compile(floored_rms_norm, backend="aot_eager", fullgraph=True)
    weight = gains(129, dtype=dtype)
    for rows in (4, 9):
        x, grad = rows_around(0.01, rows, 129, dtype), incoming(rows, 129, dtype)
        assert same_bits(forward(x, 129, weight, 0.01), floored_rms_norm(x, 129, weight, 0.01))
        assert all(map(same_bits, compiled(x, weight, grad, 0.01), gradients(x, weight, grad, 0.01)))
    torch.compiler.reset()


def test_errors():
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="floor must be 0 or more, but is -1"):
        floored_rms_norm(x, 4, None, -1.0)
    with pytest.raises(ValueError, match="floored_rms_norm: unknown casting_mode"):
        floored_rms_norm(x, 4, casting_mode="other")
    with pytest.raises(RuntimeError, match="floored_rms_norm: Given normalized_shape=\\[3\\]"):
        floored_rms_norm(x, 3)
    with pytest.raises(RuntimeError, match="must be real"):
        floored_rms_norm(x.to(torch.complex64), 4)
    assert floored_rms_norm(x, 4, None, 0.0).eq(1).all()
    assert floored_rms_norm(torch.zeros(1, 4), 4, None, 0.0).isnan().all()
    assert floored_rms_norm(x, 4, torch.ones(2, 4)).eq(1).all()  # a weight for each row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_negative_eps_is_added(target, dtype):
    """Everywhere in public, as torch has it: NaN where the mean square is less."""
    x, w, b = sample(6, 64, dtype), gains(64, dtype=dtype), gains(64, dtype=dtype, seed=1)
    x[0] *= 0.001
    close = lambda a, b: torch.testing.assert_close(a, b, equal_nan=True)  # noqa: E731
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    wanted = F.rms_norm(leaves[0], (64,), leaves[1], -0.01)
    assert wanted.isnan().any()
    assert not wanted.isnan().all()
    y = rms_norm(leaves[0], 64, leaves[1], -0.01)
    close(y, wanted)
    both = [torch.autograd.grad(t[1:].sum(), leaves) for t in (y, wanted)]
    close(both[0][0], both[1][0])
    out = torch.empty_like(x)
    assert rms_norm(x, 64, w, -0.01, out=out) is out
    close(out, wanted)
    close(add_rms_norm(x, torch.zeros_like(x), 64, w, -0.01)[0], wanted)
    close(gated_rms_norm(x, b.expand(6, 64), 64, w, -0.01), (wanted.double() * F.silu(b.double())).to(dtype))
    close(layer_norm(x, 64, w, b, -0.01), F.layer_norm(x, (64,), w, b, -0.01))
    if target != "reference":
        with rmsnorm.installed():
            assert torch.equal(F.rms_norm(x, (64,), w, -0.01).isnan(), wanted.isnan())
            close(F.rms_norm(x, (64,), w, -0.01), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Norm(torch.nn.Module):
        def forward(self, x):
            return floored_rms_norm(x, 64, None, 0.01)

    x = rows_around(0.01, 5, 64, torch.float32)
    torch.onnx.export(Norm().eval(), (x,), dynamo=True, opset_version=23, verbose=False).save(tmp_path / "norm.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "norm.onnx", providers=["CPUExecutionProvider"])
    [got] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), floored_rms_norm(x, 64, None, 0.01))


def test_half_types_keep_the_row_in_mind():
    """A half type's own subnormals, under F.normalize's floor: 1e12 times them, rounded once."""
    for dtype in HALVES:
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        x = (torch.arange(1, 130).double() % 7 * step).to(dtype).view(1, -1)
        FlooredTruth(x, 1e-24 / 129).forward(None, 0.0, "torch", 0.51).check(floored_rms_norm(x, 129), dtype)
