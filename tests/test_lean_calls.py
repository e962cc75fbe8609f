"""The lean backward as a call: derivatives, graphs, operators, layers and errors; test_lean.py has the numbers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from itertools import product

import pytest
import torch
from oracle import (
    DTYPES,
    EPS,
    gains,
    incoming,
    same_bits,
    sample,
)
from torch import Tensor

import rmsnorm
from rmsnorm import RMSNorm, _ops, add_rms_norm, rms_norm
from rmsnorm.bench.memory import kept
from rmsnorm.forms import lean


def functions() -> dict[str, tuple[Callable[..., object], int]]:
    return {
        "norm": (lambda x, w: rms_norm(x, 7, w, 1e-2, offset=0.25, memory="lean"), 1),
        "norm without a weight": (lambda x: rms_norm(x, 7, None, 1e-2, memory="lean"), 1),
        "add": (lambda x, r, w: add_rms_norm(x, r, 7, w, 1e-2, memory="lean"), 2),
    }


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", functions())
def test_derivatives(target, name):
    """First and second ones, in reverse, forward and batched; those of the gradient through y and r."""
    function, rows = functions()[name]
    leaves = [sample(3, 7, seed=seed).requires_grad_() for seed in range(rows)]
    leaves += [gains(7).requires_grad_()] if "without" not in name else []
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_batched_grad=True)
    y = function(*leaves)
    assert "Lean" in (y if isinstance(y, Tensor) else y[0]).grad_fn.name()


def test_third_derivatives():
    x, w = sample(2, 5).requires_grad_(), gains(5).requires_grad_()
    found = []
    for memory in ("lean", None):
        total = rms_norm(x, 5, w, 1e-2, memory=memory).pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(total, (x, w), create_graph=True)
            total = sum((g * torch.arange(g.numel()).view(g.shape)).sum() for g in grads)
        found.append(grads)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_an_output_that_is_overwritten():
    x, weight = sample(5, 129).requires_grad_(), gains(129).requires_grad_()
    y = rms_norm(x, 129, weight, EPS, memory="lean")
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = rms_norm(x, 129, weight, EPS, memory="lean")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept(dtype):
    """The output, which the linear behind it keeps anyway, and one number per row: no input, no sum."""
    x, residual = (torch.randn(64, 576, dtype=dtype, requires_grad=True) for _ in range(2))
    norm, linear = RMSNorm(576, EPS, dtype=dtype, memory="lean"), torch.nn.Linear(576, 8, dtype=dtype)
    leaves = [x, residual, *norm.parameters(), *linear.parameters()]
    number = 8 if dtype is torch.float64 else 4
    for call in (lambda: linear(norm(x * 1)), lambda: linear(norm(x * 1, residual * 1)[0])):
        assert sorted(size for size, _ in kept(call, leaves)) == [64 * number, x.nbytes]
    usual = RMSNorm(576, EPS, dtype=dtype)
    assert sum(size for size, _ in kept(lambda: linear(usual(x * 1)), [*leaves, usual.weight])) == (
        2 * x.nbytes + 64 * number
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled(native_target):
    """A graph keeps the input: the bits of eager calls that do."""
    torch.compiler.reset()
    layer, usual = RMSNorm(129, EPS, memory="lean"), RMSNorm(129, EPS)
    compiled = torch.compile(lambda x, r: layer(x, r)[0] * layer(x), fullgraph=True, backend="aot_eager")
    x, residual = sample(5, 129, torch.float32).requires_grad_(), sample(5, 129, torch.float32, seed=1)
    results = [
        torch.autograd.grad(y, x, torch.ones_like(x))[0]
        for y in (compiled(x, residual), usual(x, residual)[0] * usual(x))
    ]
    assert same_bits(*results)


def test_operators():
    """They keep the rules of torch.library."""
    x, weight, grad = sample(5, 7, torch.float32), gains(7, dtype=torch.float32), incoming(5, 7, torch.float32)
    y, rstd = _ops.rms_norm_forward(x, weight, 1, EPS, 0.0, False)
    for more, needs in product((None, torch.ones_like(rstd)), ((True, True), (True, False), (False, True))):
        torch.library.opcheck(
            torch.ops.rmsnorm.rms_norm_lean_backward.default, (grad, more, y, rstd, weight, 1, 0.0, *needs)
        )
        torch.library.opcheck(
            torch.ops.rmsnorm.add_rms_norm_lean_backward.default, (grad, grad, more, y, rstd, weight, 1, 0.0, *needs)
        )


def test_operators_say_what_is_wrong(native_target):
    x, weight = sample(5, 7, torch.float32), gains(7, dtype=torch.float32)
    y, rstd = _ops.rms_norm_forward(x, weight, 1, EPS, 0.0, False)
    call = torch.ops.rmsnorm.add_rms_norm_lean_backward.default
    good = [x, None, None, y, rstd, weight, 1, 0.0, True, True]
    for place, bad, says in ((0, x[1:], "grad"), (1, x.double(), "grad_sum"), (2, x, "grad_rstd"), (4, x, "rstd")):
        with pytest.raises(RuntimeError, match=f"rmsnorm: {says} must"):
            call(*good[:place], bad, *good[place + 1 :])


def test_the_gradient_of_the_statistic(target):
    """The kernels take in what arrives at 1/rms: -r²·x̂/n times that."""
    for dtype in DTYPES:
        x, weight, grad = sample(9, 129, dtype), gains(129, dtype=dtype), incoming(9, 129, dtype)
        x[3] *= 2.0**-7 if dtype is torch.float16 else 2.0**-90
        y, rstd = _ops.rms_norm_forward(x, weight, 1, 2.0**-100, 0.0, False)
        more = torch.linspace(-1, 1, 9, dtype=rstd.dtype).view(9, 1) / rstd
        with_it, without = (
            lean._norm.backward(grad, each, y, rstd, weight, 1, 0.0, True, False)[0].double() for each in (more, None)
        )
        x_hat = x.double() * rstd
        wanted = without - more * rstd.double().square() * x_hat / 129
        size = (rstd.double() * (1 + x_hat.abs())) * (grad.double().abs().max() + 1) * 4
        assert ((with_it - wanted).abs() <= 4 * torch.finfo(dtype).eps * size).all(), dtype


def test_layers():
    """The option is remembered, shown, copied and written; older layers and pickles of torch's have none."""
    layer = RMSNorm(8, memory="lean")
    assert "memory='lean'" in repr(layer)
    assert "memory" not in repr(RMSNorm(8))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert "Lean" in twin(torch.randn(2, 8)).grad_fn.name()
    twin = torch.nn.RMSNorm(8)
    twin.__class__ = RMSNorm
    assert "Lean" not in twin(torch.randn(2, 8)).grad_fn.name()
    with torch.no_grad():
        assert same_bits(layer(torch.ones(2, 8)), RMSNorm(8)(torch.ones(2, 8)))


def test_errors():
    x = torch.ones(2, 8, requires_grad=True)
    for name, call in {
        "rms_norm": lambda: rms_norm(x, 8, memory="small"),
        "add_rms_norm": lambda: add_rms_norm(x, x, 8, memory="small"),
        "RMSNorm": lambda: RMSNorm(8, memory="small"),
        "patch": lambda: rmsnorm.patch(torch.nn.RMSNorm(8), memory="small"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: unknown memory 'small'; choose one of 'lean'$"):
            call()


def test_who_overrides_sees_it():
    class Seen(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return kwargs

    x = torch.ones(2, 8).as_subclass(Seen)
    assert rms_norm(x, 8, memory="lean")["memory"] == add_rms_norm(x, x, 8, memory="lean")["memory"] == "lean"
    assert "memory" not in rms_norm(x, 8)
    assert "memory" not in add_rms_norm(x, x, 8)
