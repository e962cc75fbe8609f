"""The norm in general as a call: derivatives, transforms, graphs, operators and errors; numbers: test_general.py."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch
from general_oracle import leaves, rows
from oracle import (
    EPS,
    gains,
    lay_out,
    same_bits,
    sample,
)
from torch import Tensor

import rmsnorm
from rmsnorm import add_rms_norm, add_rms_norm_, inverse_rms, l2_norm, rms_norm
from rmsnorm.forms import general_ops, in_place


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


JAGGED = {
    "int": lambda x, w: rms_norm(x, 6, w, 1e-6),
    "llama": lambda x, w: rms_norm(x, (6,), w, 1e-6, casting_mode="llama"),
    "offset": lambda x, w: rms_norm(x, (6,), w, 1e-6, offset=1.0),
    "lean": lambda x, w: rms_norm(x, (6,), w, 1e-6, memory="lean"),
    "bias": lambda x, w: rms_norm(x, (6,), w, 1e-6, bias=w),
    "out_dtype": lambda x, w: rms_norm(x, (6,), w, 1e-6, out_dtype=torch.bfloat16),
    "inverse_rms": lambda x, w: rmsnorm.inverse_rms(x, 6, 1e-6),
    "modulated_norm": lambda x, w: rmsnorm.modulated_norm(x, 6, None, 1e-6, scale=x, shift=x),
    "quantised_rms_norm": lambda x, w: rmsnorm.quantised_rms_norm(x, 6, w, 1e-6)[0],
}


@pytest.mark.parametrize("name", JAGGED)
def test_jagged_tensors(name):
    """Their rows as they are alone; torch's jagged tensors look for ``rms_norm`` by its name, with torch's arguments
    alone, and have no empty tensors."""
    values, w = torch.randn(7, 6), torch.rand(6) + 0.5
    rows = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 6, 7]))
    found, wanted = JAGGED[name](rows, w), JAGGED[name](values, w)
    assert found.is_nested
    assert found.dtype is wanted.dtype
    # The same formula in torch's operators; codes are one apart where a half is rounded.
    tolerance = {torch.int8: 1.0, torch.bfloat16: 2**-6}.get(wanted.dtype, 1e-5)
    torch.testing.assert_close(found.values().double(), wanted.double(), rtol=0, atol=tolerance)


def test_jagged_tensors_learn_with_llamas_rounding():
    layer, values = rmsnorm.RMSNorm(6, casting_mode="llama"), torch.randn(7, 6)
    gradients = []
    for jagged in (False, True):
        leaf = values.clone().requires_grad_()
        layer.zero_grad()
        rows = torch.nested.nested_tensor_from_jagged(leaf, torch.tensor([0, 2, 6, 7])) if jagged else leaf
        output = layer(rows)
        (output.values() if jagged else output).square().sum().backward()
        gradients.append((leaf.grad, layer.weight.grad))
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("partial", [1e-9, 1e-10, 1e-300])
def test_the_smallest_part_is_one_column(partial):
    x = torch.tensor([[2.0, 30.0, 30.0], [0.5, 0.0, 0.0]])
    output, factor = rms_norm(x, 3, None, 0.0, partial=partial, return_rstd=True)
    assert factor.flatten().tolist() == [0.5, 2.0]
    assert output.tolist() == [[1.0, 15.0, 15.0], [1.0, 0.0, 0.0]]
    assert rms_norm(x[:, :0], 0, None, 0.0, partial=partial).shape == (2, 0)
