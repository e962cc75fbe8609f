"""Proves that ``rms_norm`` and ``layer_norm`` pass what torch's test_meta.py, test_fake_tensor.py,
test_proxy_tensor.py, test_aotdispatch.py, test_decomp.py and test_nestedtensor.py check of them. The truth
is torch uninstalled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses import CrossRefFakeMode, FakeTensorMode
from torch.testing._internal import optests
from torch_samples import CASES, FLOATING, call, close, function_of, is_noise, leaves

import rmsnorm
from rmsnorm import _ops

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's, about itself
    from torch.testing._internal.opinfo.definitions.nested import njt_op_db

[RAGGED] = [op for op in njt_op_db if op.name == "nn.functional.rms_norm"]
pytestmark = [
    # CrossRefFakeMode looks at .grad of whatever it meets; one of torch's samples is a row of one number.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:var_mean.*degrees of freedom:UserWarning"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_fake(case, dtype):
    """Fake and meta tensors say of shape, strides and dtype what the real run gives, also of gradients."""
    for sample in case.samples(dtype, requires_grad=True):
        for strided in (False, True):
            one = sample.noncontiguous() if strided else sample
            with case.here():
                real = call(case.function, one)
                grads = torch.autograd.grad(real, leaves(one), torch.ones_like(real))
                mode = FakeTensorMode()
                fake_sample = one.transform(lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t)  # noqa: B023
                with mode:
                    fake = call(case.function, fake_sample)
                    fakes = torch.autograd.grad(fake, leaves(fake_sample), torch.ones_like(fake))
                meta = call(case.function, one.transform(lambda t: t.to("meta") if isinstance(t, Tensor) else t))
            for there, here in ((fake, real), (meta, real), *zip(fakes, grads, strict=True)):
                assert (there.shape, there.dtype) == (here.shape, here.dtype)
                if here.numel() > 1:
                    assert there.stride() == here.stride()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["no amp", "amp"])
def test_fake_crossref_backward(case, autocast):
    """test_fake_crossref_backward_no_amp and _amp: each operator that runs is compared with its fake."""
    for sample in case.samples(torch.float32, requires_grad=True):
        with case.here(), torch.autocast("cpu", enabled=autocast), CrossRefFakeMode():
            y = call(case.function, sample)
            torch.autograd.grad(y, leaves(sample), torch.ones_like(y))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(case, mode):
    for sample in case.samples(torch.float32):
        if sample.input.numel() == 0 and mode == "symbolic":
            continue  # sizes of 0 and 1 are constants in a graph anyway

        def function(x: Tensor, *weights: Tensor, sample: Any = sample) -> Tensor:
            return case.function(x, sample.args[0], *weights, **sample.kwargs)

        tensors = leaves(sample)
        wanted = call(case.torchs, sample)
        with case.here():
            graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode=mode)(*tensors)
            close(graph(*tensors), wanted)
            others = [t + 1 for t in tensors]
            there = graph(*others)
        close(there, function_of(case.torchs, sample)(*others))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_aot_autograd(case, dynamic):
    """test_aot_autograd_exhaustive: outputs and gradients of the graphs are those of the call."""
    for sample in case.samples(torch.float32, requires_grad=True):
        if is_noise(case, sample):
            continue
        with case.here():
            optests.aot_autograd_check(
                function_of(case.function, sample),
                tuple(leaves(sample)),
                {},
                dynamic=dynamic,
                try_check_data_specialization=False,
            )


def test_absent_gradients_are_tensors_of_their_own():
    """Of the kernel for devices that have none, as of the one that says shapes (test_fake_crossref_backward)."""
    x = torch.randn(2, 3)
    dx, dw = _ops._rms_norm_backward(x, None, x, torch.ones(2, 1), None, 1, 1e-5, 0.0, False, False)
    assert dx.shape == dw.shape == (0,)
    assert dx is not dw


ROWS = [((4, 5), 1), ((3, 2, 7), 2), ((2, 64), 1), ((0, 3), 1), ((128, 5, 33), 1)]


def nearer(got: Tensor | None, formula: Tensor | None, wide: Tensor | None) -> None:
    """test_decomp's op_assert_ref: no farther from the formula in float64 than the formula in the type itself is,
    but for one rounding of the largest number (both round, and either may be the lucky one). In float64 the formula is
    the truth, and its roundings are allowed us too."""
    if wide is None or got is None:
        assert got is None
        return
    assert (got.shape, got.dtype) == (formula.shape, formula.dtype)
    if got.numel():
        ours, theirs = ((t.double() - wide).abs().max().item() for t in (got, formula))
        roundings = 16 if got.dtype is torch.float64 else 0.5
        assert ours <= theirs + roundings * torch.finfo(got.dtype).eps * wide.abs().max().item()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "none"])
def test_decomposition(dtype, weighted):
    """torch._decomp's formulas of the two operators against the installed kernels, and of LayerNorm against ours."""
    if not rmsnorm.info().native:
        pytest.skip("without the native library there is nothing to install")
    operators = torch.ops.aten._fused_rms_norm.default, torch.ops.aten._fused_rms_norm_backward.default
    forward, backward = (decomposition_table[operator] for operator in operators)
    layer = decomposition_table[torch.ops.aten.native_layer_norm.default]
    torch.manual_seed(0)  # as torch's tests do: in some draws theirs is the lucky one by more than a rounding
    up = lambda *tensors: [t.double() if isinstance(t, Tensor) else t for t in tensors]  # noqa: E731
    for size, dims in ROWS:
        shape = list(size[-dims:])
        x, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        weight, bias = (torch.randn(shape).to(dtype) if weighted else None for _ in range(2))
        for eps in (1e-5, 0.5, None):
            wide = forward(
                *up(
                    x,
                    shape,
                    weight,
                    eps if eps else torch.finfo(torch.float32 if dtype is not torch.float64 else dtype).eps,
                )
            )
            with rmsnorm.installed():
                got = operators[0](x, shape, weight, eps)
            for one, formula, true in zip(got, forward(x, shape, weight, eps), wide, strict=True):
                assert one.shape == formula.shape
                nearer(one.to(formula.dtype), formula, true)
            rstd = got[1]
            for mask in ([True, weighted], [True, False], [False, weighted]):
                with rmsnorm.installed():
                    back = operators[1](grad, x, shape, rstd, weight, mask)
                formula = backward(grad, x, shape, rstd, weight, mask)
                true = backward(*up(grad, x, shape, rstd, weight), mask)
                for one, theirs, right, wanted in zip(back, formula, true, mask, strict=True):
                    if wanted:
                        nearer(one, theirs, right)
        nearer(
            rmsnorm.layer_norm(x, shape, weight, bias),
            layer(x, shape, weight, bias, 1e-5)[0],
            layer(*up(x, shape, weight, bias), 1e-5)[0],
        )


@pytest.mark.parametrize("case", CASES[:2], ids=str)  # torch has no nested samples of layer_norm
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nested(case, backward):
    """TestNestedTensorOpInfo: jagged tensors give what torch uninstalled gives, or fail as they do there."""
    served = 0
    for sample in RAGGED.sample_inputs("cpu", torch.float32, requires_grad=backward):

        def outcome(function: Callable[..., Tensor], sample: Any = sample) -> Any:
            try:
                y = call(function, sample)
                tensors = [t for t in leaves(sample) if t.requires_grad] if backward else []
                return [y, *(torch.autograd.grad(y, tensors, torch.ones_like(y)) if backward else ())]
            except (RuntimeError, ValueError) as error:
                return type(error)

        wanted = outcome(case.torchs)
        with case.here():
            got = outcome(case.function)
        if isinstance(wanted, type):
            assert got is wanted, sample.name
            continue
        served += 1
        for one, other in zip(got, wanted, strict=True):
            assert one.is_nested == other.is_nested
            close(one.values() if one.is_nested else one, other.values() if other.is_nested else other)
    assert served


@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_nested_layer_norm(case):
    x = torch.nested.nested_tensor([torch.randn(n, 6) for n in (2, 5, 1)], layout=torch.jagged, requires_grad=True)
    weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
    results = []
    for function in (case.torchs, case.function):
        with case.here() if results else nullcontext():
            y = function(x, (6,), weight, bias)
            dx, *others = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
        results.append([y.values(), dx.values(), *others])
    close(*results)
