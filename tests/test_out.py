"""Proves that a tensor to write to is refused where it doesn't fit, with one clear error, and then not written to."""

import re
from itertools import product

import pytest
import torch

from rmsnorm import _ops, rms_norm
from rmsnorm.gpu import route

X = torch.ones(2, 3, 5)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(2, 5), "out must have shape [2, 3, 5], dtype torch.float32 and device cpu, but has shape [2, 5]"),
        (torch.empty(2, 3, 5, dtype=torch.bfloat16), "but has shape [2, 3, 5], dtype torch.bfloat16"),
        (torch.empty(2, 3, 5, device="meta"), "dtype torch.float32 and device meta"),
        (torch.empty(2, 3, 5, requires_grad=True), "out= does not support automatic differentiation"),
    ],
)
def test_out_that_does_not_fit(out, message):
    before = out.detach().clone()
    for weight in (None, torch.ones(5)):  # operators of their own
        with pytest.raises(RuntimeError, match=re.escape(message)):
            rms_norm(X, 5, weight, out=out)
    if out.device.type == "cpu":
        assert torch.equal(out.detach().view(torch.uint8), before.view(torch.uint8)), "out was written to"


@pytest.mark.parametrize(
    "out",
    [torch.ones(2, 5), torch.ones(2, 3, 5).double(), torch.ones(5).expand(2, 3, 5)],
    ids=["shape", "dtype", "expanded"],
)
def test_operators_check_out_themselves(out):
    """An everyday call leaves that to them, and they write nowhere but where a result belongs."""
    whole = 1, 1e-6, 0.0, False
    for operator, arguments in (
        (_ops.rms_norm_out, whole),
        (_ops.rms_norm_weighted_out, (1e-6,)),
        (_ops._rms_norm_out, whole),  # other devices' default
        (route.rms_norm_out, whole),
    ):
        with pytest.raises(RuntimeError, match="out must be on the device of input, of its shape and the dtype of the"):
            operator(2 * X, torch.ones(5), *arguments, out)
    assert (out == 1).all()


@pytest.mark.parametrize("which", ["input", "weight"])
def test_out_with_gradients(which):
    x, weight = X.clone().requires_grad_(which == "input"), torch.ones(5, requires_grad=which == "weight")
    out = torch.empty_like(X)
    with pytest.raises(RuntimeError, match=r"drop out=, or call it under torch\.no_grad"):
        rms_norm(x, 5, weight, out=out)
    with torch.no_grad():
        assert rms_norm(x, 5, weight, out=out) is out


def test_out_that_overlaps(target):
    """An ``out`` that is its own neighbour is refused; one that overlaps the input is refused or right, as in torch."""
    for place, weight in product((torch.zeros(5), torch.zeros(1)), (None, torch.ones(5))):
        with pytest.raises(RuntimeError, match=r"single memory location|overlap"):
            rms_norm(X, 5, weight, out=place.expand(2, 3, 5))
    for shift in (1, 5):
        buffer = torch.linspace(-3, 2, 30 + shift)
        x, out = buffer[:-shift].view(6, 5), buffer[shift:].view(6, 5)
        expected = rms_norm(x.clone(), 5)
        try:
            rms_norm(x, 5, out=out)
        except RuntimeError as refusal:
            if "overlap" not in str(refusal):
                raise
        else:
            assert torch.equal(out, expected), f"out is the input shifted by {shift}"


@pytest.mark.parametrize(
    "out",
    [torch._neg_view(torch.ones(2, 5)), torch.ones(2, 5, dtype=torch.complex64).conj().imag],
    ids=["negated", "imaginary part of a conjugate"],
)
def test_out_whose_memory_holds_other_values(out):
    assert out.is_neg()
    before = out.clone()
    for weight, offset in product((None, torch.ones(5)), (0.0, 1.0)):
        with pytest.raises(RuntimeError, match=r"^rms_norm: out is a negated view.*; pass a tensor of its own"):
            rms_norm(torch.ones(2, 5), 5, weight, offset=offset, out=out)
    assert torch.equal(out, before), "out was written to"
    z = torch.ones(2, 5, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"^rms_norm: out is a conjugate view"):
        rms_norm(z, 5, out=z.clone().conj())


@pytest.mark.parametrize("weight", [None, torch.linspace(-1, 1, 5)], ids=["no weight", "weight"])
def test_out_beside_other_views_and_devices(weight):
    """The short way of a call asks for neither: what the operators refuse is served or worded the long way."""
    out = torch.empty_like(X)
    assert rms_norm(torch._neg_view(X), 5, weight, out=out) is out
    assert torch.equal(out, rms_norm(-X, 5, weight))
    if _ops.native and weight is not None:  # torch itself calls the kernel before it finds that it can't
        with pytest.raises(RuntimeError, match="a tensor is a negated view; call"):
            _ops.rms_norm_weighted_out(X, weight, 1e-6, torch._neg_view(out))
    for dims in (5, (5,)):
        with pytest.raises(RuntimeError, match=r"^rms_norm: out must have shape .* and device meta, but has"):
            rms_norm(X.to("meta"), dims, None if weight is None else weight.to("meta"), out=out)


INTO = {
    "made within": lambda x: rms_norm(x, 5, torch.ones(5), out=torch.empty_like(x)),
    "given, and used": lambda x: [out := torch.empty_like(x), rms_norm(x, 5, out=out), out][-1],
    "a negative eps": lambda x: rms_norm(x, 5, None, -1e-6, out=torch.empty_like(x)),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's, of its own forward mode
@pytest.mark.parametrize("way", INTO)
def test_out_under_transforms(way):
    """Which have no rule for an operator that writes: the result is copied. It was refused for requiring grad."""
    x = torch.linspace(-3, 2, 30).view(2, 3, 5)
    want = INTO[way](x)
    torch.testing.assert_close(torch.func.functionalize(INTO[way])(x), want)
    torch.testing.assert_close(torch.func.vmap(INTO[way])(x), want)
    torch.testing.assert_close(torch.func.jvp(INTO[way], (x,), (x,))[1], torch.zeros_like(x), rtol=0, atol=1e-3)
    below = torch.func.grad(lambda x: torch.func.vmap(INTO[way])(x).pow(3).sum())(x)
    torch.testing.assert_close(below, torch.func.grad(lambda x: rms_norm(x, 5).pow(3).sum())(x), rtol=1e-3, atol=1e-3)
    for given in (x, x.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="one of the arguments requires grad"):
            torch.func.grad(lambda x: INTO[way](x).sum())(given)
    with pytest.raises(RuntimeError, match="out must have shape"):
        torch.func.functionalize(lambda x: rms_norm(x, 5, out=torch.empty(5)))(x)
