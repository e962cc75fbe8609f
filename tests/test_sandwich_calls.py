"""The sandwich as a call: derivatives, transforms, graphs, operators and errors; test_sandwich.py has the numbers."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import (
    DTYPES,
    EPS,
    MODES,
    gains,
    incoming,
    same_bits,
)
from test_sandwich import NEXT_EPS, both, half, pair, weight_pairs
from torch import Tensor

import rmsnorm
from rmsnorm import rms_norm, rms_norm_add, sandwich_rms_norm
from rmsnorm.forms import sandwich


@pytest.mark.parametrize("mode", MODES)
def test_derivatives_of_first_and_second_order(target, mode):
    tensors = [(t / s).requires_grad_() for t, s in zip((*pair(3, 4, torch.float64), gains(4), gains(4, seed=3)),
                                                        (8, 8, 1, 1), strict=True)]  # fmt: skip
    options = {"eps": 0.1, "offset": 1.0, "casting_mode": mode}
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, r, w, v: sandwich_rms_norm(x, r, 4, w, v, next_eps=0.2, **options), tensors)
        assert check(lambda x, r: sandwich_rms_norm(x, r, 4, **options), tensors[:2])
        assert check(lambda x, r, w: rms_norm_add(x, r, 4, w, **options), tensors[:3])


def formula(x: Tensor, residual: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    norm = lambda t, gain, eps: t / (t.square().mean(-1, keepdim=True) + eps).sqrt() * gain  # noqa: E731
    total = residual + norm(x, w, EPS)
    return norm(total, v, NEXT_EPS), total


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
def test_transforms_are_those_of_the_formula():
    tensors = (*(t / 8 for t in pair(4, 5, torch.float64)), gains(5), gains(5, seed=3))
    every = (0, 1, 2, 3)
    scalar = lambda f: lambda *a: sum(t.square().sum() for t in f(*a))  # noqa: E731
    for transform in (
        lambda f: torch.func.jvp(f, tensors, tensors),
        lambda f: torch.func.jacrev(f, every)(*tensors),
        lambda f: torch.func.hessian(scalar(f), every)(*tensors),
        lambda f: torch.func.vmap(f, (0, 0, None, None))(*tensors),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), every), (0, 0, None, None))(*tensors),
        lambda f: torch.autograd.functional.jacobian(f, tensors, vectorize=True),
        lambda f: torch.autograd.functional.hvp(scalar(f), tensors, tensors),
    ):
        torch.testing.assert_close(transform(both), transform(formula), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("function", [both, lambda x, r, w, v: (half(x, r, w), v)], ids=["sandwich", "norm + add"])
def test_compiled_equals_eager(function):
    """One graph for all numbers of rows, one node in it, forward and backward, with the bits of eager mode."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 17):
        results = []
        for call in (compiled, function):
            tensors = (*pair(rows, 96, torch.bfloat16), *weight_pairs(96, torch.bfloat16)[1])
            leaves = [t.requires_grad_() for t in tensors]
            outputs = call(*leaves)
            grads = [incoming(rows, 96, torch.bfloat16), torch.ones_like(outputs[1])]
            found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
            results.append([*(t.detach() for t in outputs), *(t for t in found if t is not None)])
            with torch.no_grad():
                results[-1] += call(*leaves)
        assert all(map(same_bits, *results))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (torch.nn.Parameter(gains(32, dtype=torch.float32, seed=i)) for i in (0, 3))

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        return *both(x, residual, self.w, self.v), half(x, residual, self.w)


def test_exported():
    """torch.export: torch's own operators, which run where nobody has heard of us, and can be trained."""
    block, inputs = Block().eval(), pair(5, 32, torch.float32)
    program = torch.export.export(block, inputs)
    assert "rmsnorm" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    block, inputs = Block().eval(), pair(5, 32, torch.float32)
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, inputs, path, opset_version=23, dynamo=True, verbose=False)
    model = onnx.load(path)
    assert [node.op_type for node in model.graph.node].count("RMSNormalization") >= 2
    names = [each.name for each in model.graph.input]
    got = reference.ReferenceEvaluator(model).run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
    for one, two in zip(got, block(*inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), two.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_torchs_rules(dtype):
    x, residual = pair(6, 12, dtype)
    w, v = weight_pairs(12, dtype)[1]
    rstd = torch.ones(6, 1)
    needs = (True, True, True, True)
    samples = {
        sandwich.ADD.plain: (x, residual, w, 1, EPS, 1.0, False),
        sandwich.ADD.forward: (x, residual, None, 1, EPS, 0.0, True),
        sandwich.ADD.backward: (x, residual, rstd, w, 1, EPS, 1.0, True, True),
        sandwich.SANDWICH.plain: (x, residual, w, v, 1, EPS, 1.0, False, None),
        sandwich.SANDWICH.forward: (x, residual, w, None, 1, EPS, 1.0, False, NEXT_EPS),
        sandwich.SANDWICH.backward: (x, None, x, residual, rstd, rstd, w, v, 1, EPS, 0.0, NEXT_EPS, *needs),
    }
    for operator, arguments in samples.items():
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


X = torch.ones(2, 3, 6)
FITS = "residual must have the shape and device of input, (2, 3, 6) on cpu, but is"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X, 5), {}, RuntimeError, "Given normalized_shape=[5], expected input with shape [*, 5], but got input"),
        ((X, X, 6, torch.ones(5)), {}, RuntimeError, "weight of shape [5] and normalized_shape = [6]"),
        ((X, X[0], 6), {}, RuntimeError, f"{FITS} (3, 6) on cpu; expand it first if broadcasting is meant"),
        ((X, X.to("meta"), 6), {}, RuntimeError, f"{FITS} (2, 3, 6) on meta; expand it first"),
        ((X, X.int(), 6), {}, RuntimeError, "residual must be of a real floating type, but is torch.int32"),
        (
            (X.cfloat(), X.cfloat(), 6),
            {},
            RuntimeError,
            "input must be of a real floating type, but is torch.complex64",
        ),
        ((X, None, 6), {}, TypeError, "residual"),
        ((X, X, 6, "w"), {}, TypeError, "weight"),
        ((X, X, 6), {"casting_mode": "fla"}, ValueError, "unknown casting_mode 'fla'; choose one of 'torch', 'llama'"),
        ((X, X, 6), {"offset": "1"}, TypeError, "offset"),
        ((X, X, 6), {"eps": -1.0}, ValueError, "eps must be 0 or more, but is -1.0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message):
    for function in (rms_norm_add, sandwich_rms_norm):
        with pytest.raises(error, match=re.escape(message)) as raised:
            function(*arguments, **options)
        assert function.__name__ in str(raised.value) or "normalized_shape" in message


def test_second_arguments_that_do_not_fit():
    with pytest.raises(RuntimeError, match=re.escape("weight of shape [5] and normalized_shape = [6]")):
        sandwich_rms_norm(X, X, 6, None, torch.ones(5))
    with pytest.raises(ValueError, match=r"sandwich_rms_norm: next_eps must be 0 or more, but is -1\.0"):
        sandwich_rms_norm(X, X, 6, next_eps=-1.0)
    with pytest.raises(TypeError, match="next_eps"):
        sandwich_rms_norm(X, X, 6, next_eps="1e-6")


def test_eps_by_default():
    """None is the machine epsilon of the accumulation type, and the second norm's is the first one's."""
    for dtype in DTYPES:
        x, residual = pair(3, 31, dtype)
        small = x / 1e6
        total = residual + rms_norm(small, 31)
        assert all(map(same_bits, sandwich_rms_norm(small, residual, 31), (rms_norm(total, 31), total)))
        wanted = rms_norm(total, 31, eps=0.5)
        assert same_bits(sandwich_rms_norm(small, residual, 31, next_eps=0.5)[0], wanted)
        total = residual + rms_norm(small, 31, eps=0.5)
        assert same_bits(sandwich_rms_norm(small, residual, 31, eps=0.5)[0], rms_norm(total, 31, eps=0.5))


def test_traced_by_fx():
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            output, total = rmsnorm.sandwich_rms_norm(x, residual, 6)
            return output + total

    x, residual = pair(3, 6, torch.float32)
    torch.testing.assert_close(torch.fx.symbolic_trace(Layer())(x, residual), Layer()(x, residual))
