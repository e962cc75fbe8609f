"""Proves the second rule for eps, ``r = 1/sqrt(max(mean(x²), floor))``: for every dtype, in every CPU target, with rows
of zeros, of subnormals, on both sides of the floor and near overflow; its derivatives, which have no projection where
the floor holds; and that a negative eps of the public functions is still added, as torch adds it.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from floored_oracle import FlooredTruth, gradients, rows_around
from oracle import DTYPES, HALVES, MODES, bound, gains, incoming, same_bits, sample

import rmsnorm
from rmsnorm import _autograd, _native, _ops, add_rms_norm, gated_rms_norm, layer_norm, rms_norm
from rmsnorm.forms import gated_ops
from rmsnorm.forms.floored import floored_rms_norm

COLUMNS = (1, 3, 127, 129, 576, 1027, 5137)


# F.normalize's own; one that ordinary rows can be below; and one whose 1/rms no fp32 holds.
FLOORS = {"normalize": lambda n: 1e-24 / n, "large": lambda n: 0.01, "tiny": lambda n: 1e-90}


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


def test_half_types_keep_the_row_in_mind():
    """A half type's own subnormals, under F.normalize's floor: 1e12 times them, rounded once."""
    for dtype in HALVES:
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        x = (torch.arange(1, 130).double() % 7 * step).to(dtype).view(1, -1)
        FlooredTruth(x, 1e-24 / 129).forward(None, 0.0, "torch", 0.51).check(floored_rms_norm(x, 129), dtype)
