"""The modulated norm as a call: derivatives, transforms, graphs, operators and errors; numbers: test_modulated.py."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import EPS, same_bits
from test_modulated import STATISTICS, inputs, modulations, small
from torch import Tensor

import rmsnorm
from rmsnorm import gated_add, modulated_norm
from rmsnorm.forms import modulated_ops


@pytest.mark.parametrize("statistic", STATISTICS)
def test_derivatives_of_first_and_second_order(target, statistic):
    def both(x, r, g, s, t):
        return modulated_norm(x, 4, None, 0.1, residual=r, gate=g, scale=s, shift=t, statistic=statistic)

    tensors = small()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(both, tensors)
        assert check(lambda x, s: modulated_norm(x, 4, None, 0.1, scale=s, statistic=statistic), tensors[::3])
        assert check(gated_add, tensors[:3])


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("statistic", STATISTICS)
def test_transforms_are_those_of_the_formula(statistic):
    def both(x, r, g, s, t):
        return modulated_norm(x, 4, None, EPS, residual=r, gate=g, scale=s, shift=t, statistic=statistic)

    def formula(x, r, g, s, t):
        total = r + g.unsqueeze(-2) * x
        z = total - total.mean(-1, keepdim=True) if statistic == "layer" else total
        y = z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
        return y * (1 + s.unsqueeze(-2)) + t.unsqueeze(-2), total

    tensors, every = tuple(t.detach() for t in small()), (0, 1, 2, 3, 4)
    scalar = lambda f: lambda *a: sum(t.square().sum() for t in f(*a))  # noqa: E731
    for transform in (
        lambda f: torch.func.jvp(f, tensors, tensors),
        lambda f: torch.func.jacrev(f, every)(*tensors),
        lambda f: torch.func.hessian(scalar(f), (0, 3))(*tensors),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), every))(*tensors),
    ):
        torch.testing.assert_close(transform(both), transform(formula), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_equals_eager():
    """One graph for all numbers of tokens, with the bits of eager mode, forward and backward."""
    torch.compiler.reset()

    def both(x, residual, gate, scale, shift):
        named = {"gate": gate, "scale": scale, "shift": shift, "residual": residual}
        y, s = modulated_norm(x, 96, None, EPS, statistic="layer", **named)
        return y, s, gated_add(x, y, gate)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 17):
        results = []
        for call in (compiled, both):
            m = modulations("sample", tokens, 96, torch.bfloat16)
            leaves = [
                t.requires_grad_() for t in (*inputs(tokens, 96, torch.bfloat16), m["gate"], m["scale"], m["shift"])
            ]
            outputs = call(*leaves)
            found = torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])
            results.append([*(t.detach() for t in outputs), *found])
            with torch.no_grad():
                results[-1] += call(*leaves)
        assert all(map(same_bits, *results))


class Block(torch.nn.Module):
    def __init__(self, statistic: str = "rms") -> None:
        super().__init__()
        self.statistic = statistic

    def forward(self, x: Tensor, residual: Tensor, both: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate = both.chunk(3, 1)
        named = {"gate": gate, "scale": scale, "shift": shift, "residual": residual}
        y, s = modulated_norm(x, 32, None, EPS, statistic=self.statistic, **named)
        return y, s, gated_add(y, s, gate)


def for_block() -> tuple[Tensor, Tensor, Tensor]:
    return *inputs(5, 32, torch.float32), torch.randn(2, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_exported(statistic):
    """torch.export: torch's own operators, which run where nobody has heard of us, and can be trained."""
    block, given = Block(statistic).eval(), for_block()
    program = torch.export.export(block, given)
    assert "rmsnorm" not in str(program.graph)
    torch.testing.assert_close(program.module()(*given), block(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("statistic", STATISTICS)
def test_onnx(tmp_path, statistic):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    block, given = Block(statistic).eval(), for_block()
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, given, path, opset_version=23, dynamo=True, verbose=False)
    model = onnx.load(path)
    operator = "RMSNormalization" if statistic == "rms" else "LayerNormalization"
    assert [node.op_type for node in model.graph.node].count(operator) == 1
    names = [each.name for each in model.graph.input]
    got = reference.ReferenceEvaluator(model).run(None, dict(zip(names, (t.numpy() for t in given), strict=True)))
    for one, two in zip(got, block(*given), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), two.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_torchs_rules(dtype):
    x, residual = inputs(3, 12, dtype)
    m = modulations("sample", 3, 12, dtype)
    gate, scale, shift = m["gate"], m["scale"], m["shift"]
    rstd, mean, none = torch.ones(2, 3, 1), torch.zeros(2, 3, 1, dtype=torch.float64), torch.empty(0, dtype=dtype)
    needs, options = (True,) * 6, (1, EPS, 0.0)
    norm, add = modulated_ops.MODULATED_NORM, modulated_ops.GATED_ADD
    samples = [
        (norm.plain, (x, residual, gate, scale, shift, None, *options, True, True)),
        (norm.plain, (x, None, None, scale, None, None, *options, False, False)),
        (norm.forward, (x, residual, gate, scale, shift, None, *options, False, True)),
        (norm.backward, (x, None, x, gate, scale, shift, residual, mean, rstd, None, *options, True, *needs)),
        (norm.backward, (x, None, x, None, scale, None, none, none.double(), rstd, None, *options, False, *needs)),
        (add.plain, (x, residual, gate, True)),
        (add.forward, (x, residual, gate, False)),
        (add.backward, (x, x, gate, True, True)),
    ]
    for operator, arguments in samples:
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


X = torch.ones(2, 3, 6)
S = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, 5), {"scale": S}, RuntimeError, "Given normalized_shape=[5], expected input with shape [*, 5], but got"),
        ((X, 6), {"scale": torch.ones(3, 6)}, RuntimeError, "scale must have the first and the last sizes of input"),
        ((X, 6), {"scale": S, "shift": torch.ones(2, 2, 6)}, RuntimeError, "shift must have the first and the last"),
        ((X, 6), {"scale": S.to("meta")}, RuntimeError, "but is [2, 6] on meta"),
        ((X, 6), {"scale": S.int()}, RuntimeError, "scale must be of a real floating type, but is torch.int32"),
        ((X, 6), {"scale": None}, RuntimeError, "scale must be a tensor, but is None"),
        ((X, 6), {"scale": [1.0]}, TypeError, "scale must be a torch.Tensor, but is a list"),
        ((X, 6), {"scale": S, "gate": S}, RuntimeError, "there is a gate, which scales what is added to a residual"),
        ((X, 6), {"scale": S, "residual": X[0]}, RuntimeError, "residual must have the shape and device of input"),
        ((X, 6, torch.ones(6)), {"scale": S, "statistic": "layer"}, RuntimeError, "LayerNorm is without weight"),
        ((X, 6), {"scale": S, "statistic": "mean"}, ValueError, "unknown statistic 'mean'; choose one of 'rms'"),
        ((X, 6), {"scale": S, "casting_mode": "fla"}, ValueError, "unknown casting_mode 'fla'"),
        ((X, 6, None, -1.0), {"scale": S}, ValueError, "eps must be 0 or more, but is -1.0"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        modulated_norm(*arguments, **options)


def test_adds_that_do_not_fit():
    for arguments, message in (
        ((X, X[0], S), "gated_add: residual must have the shape and device of input"),
        ((X, X, torch.ones(5)), "gated_add: gate must have the first and the last sizes of input"),
        ((X, X, torch.tensor(2.0)), "sizes with 1 where rows share it (of [2, 3, 6] on cpu, e.g. [2, 6]), but is []"),
        # A size was read behind those of the last: this one's, which torch keeps, are 6.
        ((X, X, torch.ones(6).resize_(())), "(of [2, 3, 6] on cpu, e.g. [2, 6]), but is []"),
        ((X.cfloat(), X.cfloat(), S), "must be of a real floating type"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            gated_add(*arguments)
    with pytest.raises(TypeError, match="gate"):
        gated_add(X, X, None)
    with pytest.raises(ValueError, match="casting_mode"):
        gated_add(X, X, S, casting_mode="fla")


def test_eps_by_default():
    x, m = inputs(3, 31, torch.float32)[0] / 1e6, modulations("sample", 3, 31, torch.float32)
    for statistic, eps in (("rms", torch.finfo(torch.float32).eps), ("layer", 1e-5)):
        one = modulated_norm(x, 31, scale=m["scale"], statistic=statistic)
        assert same_bits(one, modulated_norm(x, 31, None, eps, scale=m["scale"], statistic=statistic))


def test_traced_by_fx():
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
            output, total = rmsnorm.modulated_norm(x, 6, residual=residual, gate=scale, scale=scale)
            return rmsnorm.gated_add(output, total, scale)

    x, residual = inputs(3, 6, torch.float32)
    scale = modulations("sample", 3, 6, torch.float32)["scale"]
    traced = torch.fx.symbolic_trace(Layer())
    torch.testing.assert_close(traced(x, residual, scale), Layer()(x, residual, scale))


def test_a_mode_and_a_subclass_see_the_call_alone():
    """By its public name, once, whichever tensor is of a class with a say."""

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    seen: list[str] = []
    with Mode():
        modulated_norm(X, 6, scale=S, shift=S, residual=X, gate=S)
        gated_add(X, X, S)
    assert seen == ["modulated_norm", "gated_add"]
    for name in ("scale", "shift", "gate"):
        seen.clear()
        modulated_norm(X, 6, **({"scale": S, "shift": S, "residual": X, "gate": S} | {name: S.as_subclass(Logged)}))
        assert seen == ["modulated_norm"], name
    seen.clear()
    gated_add(X, X, S.as_subclass(Logged))
    assert seen == ["gated_add"]
