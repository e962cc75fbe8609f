"""Turned heads as a call: derivatives, transforms, graphs, operators and errors; test_heads.py has the numbers."""

from __future__ import annotations

import re

import pytest
import torch
from heads_oracle import Form, formula
from oracle import gains, same_bits, sample
from test_heads import FORMS, angles, call, projected
from torch import Tensor

import rmsnorm
from rmsnorm import heads_rms_norm_rope, rms_norm, rope
from rmsnorm.forms import heads_ops


@pytest.mark.parametrize("form", [*FORMS[:2], Form(1.0, "llama")], ids=str)
def test_derivatives_of_first_and_second_order(target, form):
    """Of cosines and sines too: those are the definition's."""
    form = Form(form.offset, form.mode, form.interleaved, 0.1)
    query, key = ((sample(n * 2, 6) / 8).view(n, 2, 6).requires_grad_() for n in (2, 1))
    weight, (cos, sin) = gains(6).requires_grad_(), angles(2, 4, torch.float64)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda q, k, w: call(form, q, k, cos, sin, w), (query, key, weight))
        assert check(lambda q, k: rope(q, k, cos, sin, interleaved=form.interleaved), (query, key))
        if form.mode == "torch":
            moved = cos.clone().requires_grad_(), sin.clone().requires_grad_()
            assert check(lambda q, c, s: call(form, q, key.detach(), c, s), (query, *moved))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's forward AD, about itself
@pytest.mark.parametrize("form", [Form(), Form(1.0, interleaved=True)], ids=str)
@pytest.mark.parametrize("normed", [True, False])
def test_transforms_are_those_of_the_formula(form, normed):
    x, w = (sample(6, 6) / 8).view(2, 3, 6), gains(6)
    cos, sin = angles(3, 4, torch.float64)

    def ours(x, w):
        both = (
            heads_rms_norm_rope(x, x, cos, sin, w, w, **form.options())
            if normed
            else rope(x * w, x, cos, sin, interleaved=form.interleaved)
        )
        return both[0]

    def truth(x, w):
        return formula(form, x, cos, sin, w) if normed else formula(form, x * w, cos, sin, None, False)

    scalar = lambda f: lambda *a: f(*a).square().sum()  # noqa: E731
    for transform in (
        lambda f: torch.func.jvp(f, (x, w), (x, w)),
        lambda f: torch.func.hessian(scalar(f), (0, 1))(x, w),
        lambda f: torch.func.vmap(f, (0, None))(torch.stack((x, 2 * x)), w),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), (0, 1)), (0, None))(torch.stack((x, 2 * x)), w),
        lambda f: torch.autograd.functional.jacobian(f, (x, w), vectorize=True),
    ):
        torch.testing.assert_close(transform(ours), transform(truth), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_equals_eager():
    """One graph for all numbers of tokens, forward and backward, with the bits of eager mode; one node for both."""
    torch.compiler.reset()
    weight = gains(64, dtype=torch.bfloat16)

    def eager(q, k, c, s, w):
        normed = heads_rms_norm_rope(q, k, c, s, w, w, 1e-6, casting_mode="llama")
        return (*normed, *rope(q, k, c, s))

    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (6, 17):
        cos, sin = angles(tokens, 64, torch.bfloat16, (1,))
        results = []
        for function in (compiled, eager):
            leaves = [t.detach().requires_grad_() for t in (*projected(64, torch.bfloat16, tokens), weight)]
            outputs = function(*leaves[:2], cos, sin, leaves[2])
            grads = torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs])
            results.append([*(o.detach() for o in outputs), *grads])
            with torch.no_grad():
                results[-1] += function(*leaves[:2], cos, sin, leaves[2])
        assert all(map(same_bits, *results))


def test_operators_keep_torchs_rules():
    for dtype, kind, first in ((torch.float32, torch.float32, False), (torch.bfloat16, torch.float32, True)):
        query, key = projected(12, dtype)
        cos, sin = angles(5, 8, kind)
        w, grads = gains(12, dtype=dtype), [x.contiguous() for x in (query, key)]
        kept = [torch.ones(2, 5, x.shape[1], 1) for x in (query, key)]
        made, turned = heads_ops.HEADS_RMS_NORM_ROPE, heads_ops.ROPE
        samples = [
            (made.plain, (query, key, cos, sin, w, None, 1e-5, 1.0, first, False)),
            (made.forward, (query, key, cos, sin, w, w, 1e-5, 0.0, first, True)),
            (made.backward, (*grads, query, key, cos, sin, *kept, w, None, 1e-5, 1.0, True, True, True, True, False)),
            (turned.plain, (query, key, cos, sin, False)),
            (turned.backward, (*grads, cos, sin, True, True, True)),
        ]
        for operator, arguments in samples:
            result = torch.library.opcheck(operator, arguments)
            assert set(result.values()) == {"SUCCESS"}


class Both(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(gains(16, dtype=torch.float32))

    def forward(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        normed = heads_rms_norm_rope(query, key, cos, sin, self.weight, self.weight, 1e-6)
        return (*normed, *rope(query, key, cos, sin, interleaved=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_exported_graphs_are_torchs(tmp_path):
    """torch.export, TorchScript and ONNX get torch's operators, and the values of the definition."""
    inputs = *projected(16, torch.float32), *angles(5, 8, torch.float32)
    module = Both().eval()
    wanted = module(*inputs)
    program = torch.export.export(module, inputs)
    assert "rmsnorm" not in str(program.graph)
    traced = torch.jit.trace(module, inputs)
    assert "rmsnorm::" not in str(traced.graph)
    for got in (program.module()(*inputs), traced(*inputs)):
        torch.testing.assert_close(got, wanted)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "heads.onnx"
    torch.onnx.export(module, inputs, path, opset_version=23, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    outputs = session.run(None, {n: x.contiguous().numpy() for n, x in zip(names, inputs, strict=True)})
    for got, one in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), one.detach(), rtol=1e-5, atol=1e-5)


def test_types_that_no_kernel_has():
    """Are served by the definition: wider weights under Llama's rounding, wider or narrower cosines, mixed types."""
    q, k = projected(16, torch.bfloat16)
    cos, sin = angles(5, 16, torch.bfloat16)
    wide = gains(16, dtype=torch.float32)
    got = heads_rms_norm_rope(q, k, cos, sin, wide, None, 1e-6, casting_mode="llama")
    assert [t.dtype for t in got] == [torch.float32, torch.bfloat16]
    normed = rms_norm(q, 16, wide, 1e-6, casting_mode="llama")
    torch.testing.assert_close(got[0], rope(normed, normed, cos, sin)[0])
    for x, angle in ((q.float(), cos), (q, cos.double()), (q.double(), cos)):
        assert rope(x, x, angle, angle)[0].dtype is x.dtype
    mixed = rope(q, k.float(), cos, sin)
    assert same_bits(mixed[0], rope(q, k, cos, sin)[0])
    assert mixed[1].dtype is torch.float32
    for big in (q.float(), q.float() * 1e25):  # the norm is the plain one there, too, to the bit, however large
        normed, learnt = rms_norm(big, 16, None, 1e-6), cos.float().requires_grad_()
        assert same_bits(heads_rms_norm_rope(big, big, cos, sin, eps=1e-6)[0], rope(normed, normed, cos, sin)[0])
        by_angle = heads_rms_norm_rope(big, big, learnt, sin.float(), eps=1e-6)[0]
        assert same_bits(by_angle.detach(), rope(normed, normed, cos.float(), sin.float())[0])
    meta = heads_rms_norm_rope(*(t.to("meta") for t in (q, k, cos, sin)))
    assert [t.shape for t in meta] == [q.shape, k.shape]


def test_another_class_may_override():
    class Other(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, len(args), kwargs

    x, c = torch.ones(1, 2, 4), torch.ones(2, 4)
    assert rope(x, x, c.as_subclass(Other), c) == (rope, 4, {})
    asked = heads_rms_norm_rope(x, x, c, c.as_subclass(Other), offset=1.0, interleaved=True)
    assert asked == (heads_rms_norm_rope, 7, {"offset": 1.0, "interleaved": True})


X, C = torch.ones(2, 3, 5, 6), torch.ones(5, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, X, C, C[..., :4]), {}, RuntimeError, "cos and sin must have as many columns each"),
        ((X, X, C[..., :3], C[..., :3]), {}, RuntimeError, "an even number of at most head_dim, 6"),
        ((X, X, torch.ones(5, 8), torch.ones(5, 8)), {}, RuntimeError, "an even number of at most head_dim, 6"),
        (
            (X, X[:1], C, C),
            {},
            RuntimeError,
            "key must have the shape of query but for the number of heads, [2, 'heads', 5",
        ),
        ((X, X[:, :, :4], C, C), {}, RuntimeError, "but has shape [2, 3, 4, 6]"),
        ((X, X, torch.ones(4, 6), C), {}, RuntimeError, "cos must be broadcast over the heads to [2, 5, 6], but has"),
        ((X, X, C, torch.ones(2, 1, 5, 6)), {}, RuntimeError, "sin must be broadcast over the heads to [2, 5, 6]"),
        (
            (X[0, 0], X[0, 0], C, C),
            {},
            RuntimeError,
            "query must be [*, heads, tokens, head_dim], but has shape [5, 6]",
        ),
        ((X, X, C[0], C), {}, RuntimeError, "cos must be [*, tokens, turned], but has shape [6]"),
        ((X, X.int(), C, C), {}, RuntimeError, "key must be of a real floating type, but is torch.int32"),
        ((X.cfloat(), X, C, C), {}, RuntimeError, "query must be of a real floating type, but is torch.complex64"),
        ((X, X.to("meta"), C, C), {}, RuntimeError, "query is on cpu and key on meta; move one"),
        ((X, None, C, C), {}, TypeError, "key must be a torch.Tensor, but is None"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, error, message):
    for function in (heads_rms_norm_rope, rope):
        with pytest.raises(error, match=re.escape(f"{function.__name__}: ") + ".*" + re.escape(message)):
            function(*arguments, **options)


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ((torch.ones(5),), {}, RuntimeError, "query_weight must have the size of a head, [6], but has shape [5]"),
        (
            (None, torch.ones(3, 6)),
            {},
            RuntimeError,
            "key_weight must have the size of a head, [6], but has shape [3, 6]",
        ),
        ((None, 3.0), {}, TypeError, "key_weight must be a torch.Tensor"),
        ((), {"casting_mode": "qwen"}, ValueError, "unknown casting_mode 'qwen'; choose one of 'torch', 'llama'"),
        ((), {"eps": -1.0}, ValueError, "eps must be 0 or more, but is -1.0"),
        ((), {"offset": "1"}, TypeError, "offset must be a float, but is a str"),
    ],
)
def test_options_that_do_not_fit(weights, options, error, message):
    with pytest.raises(error, match=re.escape("heads_rms_norm_rope: ") + ".*" + re.escape(message)):
        heads_rms_norm_rope(X, X, C, C, *weights, **options)


def test_public_names():
    assert {"heads_rms_norm_rope", "rope"} <= set(rmsnorm.__all__)
