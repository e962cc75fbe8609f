"""Proves a weight that spans more than the normalised dimensions, [heads, head_dim] say: as if each head were a call of
its own, to the bit, with gradients, transforms and the layer; and Qwen4Exp's groups through a view.
"""

from __future__ import annotations

import importlib
import re
from itertools import product

import pytest
import torch
from oracle import DTYPES, EPS, HALVES, LAYOUTS, MODES, gains, incoming, lay_out, rows_of, same_bits, sample

from rmsnorm import RMSNorm, add_rms_norm, rms_norm


def alike(target: str, a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits from the kernels; from the reference nearly, as torch sums in an order of its own."""
    if target != "reference":
        return same_bits(a, b)
    eps = torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=8 * eps, atol=4 * eps * b.abs().max().item()) and a.dtype is b.dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_head_as_a_call_of_its_own(target, dtype, mode):
    """Values and gradients, one and two spanned dimensions, widths off the vectors, weights of each type, an offset."""
    for heads, columns in (((3,), 31), ((2, 3), 64), ((5,), 129), ((1,), 576)):
        count = heads[0] * (heads[1] if len(heads) > 1 else 1)
        for kind, offset in product({dtype, torch.float32, torch.bfloat16}, (0.0, 1.0)):
            x, weight = sample(7 * count, columns, dtype).view(7, *heads, columns), gains(*heads, columns, dtype=kind)
            options = {"offset": offset, "casting_mode": mode}
            results = []
            for apart in (False, True):
                a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
                if apart:
                    parts = zip(a.flatten(1, -2).unbind(1), w.flatten(0, -2), strict=True)
                    y = torch.stack([rms_norm(p, columns, q, EPS, **options) for p, q in parts], 1).view(a.shape)
                else:
                    y = rms_norm(a, columns, w, EPS, **options)
                    assert y.is_contiguous()
                grad = incoming(7 * count, columns, y.dtype).view(y.shape)
                results.append([y.detach(), *torch.autograd.grad(y, (a, w), grad)])
            together, apart = results
            assert alike(target, together[0], apart[0])
            assert alike(target, together[1], apart[1])
            # The weight's gradient is summed over chunks of rows, and here over those of a head.
            narrow = kind if kind in HALVES else torch.promote_types(dtype, torch.float32)
            eps = torch.finfo(narrow).eps
            torch.testing.assert_close(together[2], apart[2], rtol=eps, atol=32 * eps * apart[2].abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(target, layout):
    """The bits of contiguous tensors, also for add and out=, whatever rows the weight repeats over."""
    weight = gains(2, 5, 31, dtype=torch.bfloat16)
    x = lay_out(sample(30, 31, torch.bfloat16), layout)
    x = x if x.dim() == 2 else x.flatten(0, 2) if x.is_contiguous() else x.reshape(30, 31)
    plain = rows_of(sample(30, 31, torch.bfloat16), layout).view(3, 2, 5, 31)
    strided = x.unflatten(0, (3, 2, 5))
    wanted = rms_norm(plain, 31, weight, EPS)
    assert alike(target, rms_norm(strided, 31, weight, EPS), wanted)
    out = torch.empty(31, 3, 2, 5, dtype=torch.bfloat16).movedim(0, -1)
    assert alike(target, rms_norm(strided, 31, weight, EPS, out=out), wanted)
    output, sum = add_rms_norm(strided, plain, 31, weight, EPS)
    assert same_bits(sum, plain + plain)
    assert alike(target, output, rms_norm(plain + plain, 31, weight, EPS))


def test_many_rows(threads):
    """Chunks, batches and threads begin at any head: the same bits, and dW of a thousand rows against float64."""
    x, weight = sample(7 * 1001, 33, torch.float32).view(1001, 7, 33), gains(7, 33, dtype=torch.float32)
    grad = incoming(7 * 1001, 33, torch.float32).view(x.shape)
    results = []
    for count in (1, 2):
        threads(count)
        w = weight.clone().requires_grad_()
        y = rms_norm(x, 33, w, EPS)
        results.append([y.detach(), *torch.autograd.grad(y, w, grad)])
    assert all(map(same_bits, *results))
    wide = x.double()
    truth = (grad.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).sum(0)
    torch.testing.assert_close(results[0][1].double(), truth, rtol=1e-5, atol=1e-6 * truth.abs().max().item())


def test_nothing_to_do(target):
    for shape in ((0, 3, 8), (4, 0, 8), (4, 3, 0)):
        x, weight = torch.zeros(shape, requires_grad=True), torch.ones(shape[1:], requires_grad=True)
        y = rms_norm(x, shape[-1], weight, EPS)
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
        assert (y.shape, dx.shape, dw.shape) == (x.shape, x.shape, weight.shape)
        assert (dw == 0).all()


def test_groups_of_qwen4(target):
    """Statistics per group of the last dimension, a weight over all of it: the class, through a view."""
    module = pytest.importorskip("transformers") and importlib.import_module(
        "transformers.models.qwen4_exp.modeling_qwen4_exp"
    )
    for dtype in (torch.float32, *HALVES):
        theirs = module.Qwen4ExpTextRMSNorm(96, group_size=32, eps=1e-5).to(dtype)
        theirs.weight.data = gains(96, dtype=dtype) - 1
        x = sample(40, 96, dtype)
        ours = rms_norm(x.unflatten(-1, (3, 32)), 32, theirs.weight.view(3, 32), 1e-5, offset=1.0).flatten(-2)
        wanted, eps = theirs(x), torch.finfo(dtype).eps
        assert (
            (ours.double() - wanted.double()).abs() <= (6 if dtype is torch.float32 else 1) * eps * wanted.abs()
        ).all()
        assert dtype is torch.float32 or (ours != wanted).double().mean() <= 1e-3


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_derivatives_and_transforms(target):
    x, weight, other = sample(4 * 6, 5).div(8).view(4, 2, 3, 5), gains(2, 3, 5), gains(2, 3, 5, seed=3)
    f = lambda a, w: rms_norm(a, 5, w, 0.1, offset=0.5)  # noqa: E731
    truth = lambda a, w: a * torch.rsqrt(a.square().mean(-1, keepdim=True) + 0.1) * (0.5 + w)  # noqa: E731
    scalar = lambda f: lambda *a: f(*a).square().sum()  # noqa: E731
    leaves = x[:2].clone().requires_grad_(), weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    for transform in (
        lambda f: torch.func.jvp(f, (x, weight), (x.sin(), other)),
        lambda f: torch.func.hessian(scalar(f), (0, 1))(x[0], weight),
        lambda f: torch.func.vmap(f, (0, None))(x, weight),
        lambda f: torch.func.vmap(f, (None, 0))(x, torch.stack((weight, other))),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), (0, 1)), (0, None))(x, weight),
        lambda f: torch.func.vmap(torch.func.grad(scalar(f), (0, 1)), (None, 0))(x, torch.stack((weight, other))),
        lambda f: torch.func.vmap(f, (1, 0), 1)(x, weight),  # over the spanned dimension
    ):
        torch.testing.assert_close(transform(f), transform(truth), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_equals_eager():
    torch.compiler.reset()
    f = lambda a, w: add_rms_norm(a, a.sin(), 31, w, EPS, casting_mode="llama")[0]  # noqa: E731
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for function in (f, compiled):
        x = sample(12, 31, torch.bfloat16).view(4, 3, 31).requires_grad_()
        weight = gains(3, 31, dtype=torch.bfloat16).requires_grad_()
        y = function(x, weight)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), (x, weight))])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("shape", [(2, 5), (3, 1), (1, 5), (5, 3), (4, 2, 3, 5), (2, 3, 5, 1)])
def test_weights_that_do_not_fit(shape):
    """Nothing is broadcast: the spanned sizes are those of the input."""
    message = f"weight of shape {list(shape)} and normalized_shape = [5]; reshape the weight to [5], or, for one of "
    message += "its own per head or group, to more of the last sizes of input, [2, 3, 5]"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        rms_norm(torch.ones(2, 3, 5), 5, torch.ones(shape))


def test_a_layer_with_a_weight_per_head():
    layer = RMSNorm(31, EPS)
    layer.weight = torch.nn.Parameter(gains(3, 31).float())
    x = sample(12, 31, torch.float32).view(4, 3, 31)
    assert same_bits(layer(x), rms_norm(x, 31, layer.weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_heads(target, dtype):
    """A rank that has none of the heads: an empty weight has no address to read a gain from."""
    for offset in (0.0, 1.0):
        x = torch.zeros(2, 0, 70, dtype=dtype, requires_grad=True)
        weight = torch.ones(0, 70, dtype=dtype, requires_grad=True)
        output = rms_norm(x, 70, weight, EPS, offset=offset)
        grads = torch.autograd.grad(output, (x, weight), torch.zeros_like(output))
        assert [tuple(t.shape) for t in (output, *grads)] == [(2, 0, 70), (2, 0, 70), (0, 70)]
