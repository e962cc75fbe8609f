"""Proves that the layer and the functions live where torch's do, with state_dicts, copies, dtypes, devices, torch.func
and autocast; and that they equal torch.nn.RMSNorm and F.rms_norm.
"""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, MODES, gains, same_bits, sample
from torch import Tensor

from rmsnorm import RMSNorm, add_rms_norm, rms_norm


def filled(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer with gains that tell a lost weight from a kept one."""
    with torch.no_grad():
        layer.weight.copy_(gains(*layer.weight.shape))
    return layer


def close(got: Tensor, wanted: Tensor) -> None:
    """Both within a few ulps of the truth: 4 + 2 ulp, each below one eps of the dtype relative."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    torch.testing.assert_close(got, wanted, rtol=6 * torch.finfo(got.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1.0, 1e-4], ids=["ordinary", "eps matters"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop_in_for_torch(target, dtype, size):
    """The same positional arguments and values, for every eps rule; ``size`` 1e-4 has a mean square below eps=None's
    1.2e-7 (in fp64, whose eps is 2.2e-16, 1e-8 does)."""
    x = (
        torch.randn(7, 3, 129, generator=torch.Generator().manual_seed(0))
        * (size**2 if dtype is torch.float64 else size)
    ).to(dtype)
    for shape, eps in product(((129,), (3, 129)), (None, 1e-6, 0.5, 0.0)):
        weight = gains(*shape, dtype=dtype)
        close(rms_norm(x, shape, weight, eps), F.rms_norm(x, shape, weight, eps))
        close(rms_norm(x, shape, None, eps), F.rms_norm(x, shape, None, eps))
        ours, theirs = RMSNorm(shape, eps, True, None, dtype), torch.nn.RMSNorm(shape, eps, True, None, dtype)
        close(ours(x), theirs(x))
        close(RMSNorm(shape, eps, False)(x), torch.nn.RMSNorm(shape, eps, False)(x))
    small = rms_norm(x, 129, None, None)
    assert same_bits(
        small, rms_norm(x, (129,), eps=torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps)
    )
    assert (small - rms_norm(x, 129, None, 0.0)).abs().max() > 0.1 or size == 1.0, "eps did not matter"


def test_a_subclass_with_the_same_state():
    ours, theirs = filled(RMSNorm((3, 5), eps=0.25)), torch.nn.RMSNorm((3, 5), eps=0.25)
    assert isinstance(ours, torch.nn.RMSNorm)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.weight, ours.weight)
    back = RMSNorm((3, 5), eps=0.25)
    back.load_state_dict(theirs.state_dict())
    x = sample(4, 15, torch.float32).view(4, 3, 5)
    assert same_bits(back(x), ours(x))
    assert RMSNorm(5, elementwise_affine=False).state_dict() == {}
    assert RMSNorm(5, elementwise_affine=False).weight is None
    assert [name for name, _ in ours.named_parameters()] == ["weight"]


def test_repr():
    assert repr(RMSNorm(5)) == repr(torch.nn.RMSNorm(5)) == "RMSNorm((5,), eps=None, elementwise_affine=True)"
    text = repr(RMSNorm(5, 1e-6, offset=1.0, casting_mode="llama"))
    assert text == "RMSNorm((5,), eps=1e-06, elementwise_affine=True, offset=1.0, casting_mode='llama')"


@pytest.mark.parametrize("offset", [0.0, 1.0, 0.5])
def test_a_fresh_layer_has_gain_one(offset):
    layer = RMSNorm(129, offset=offset)
    x = sample(4, 129, torch.float32)
    assert torch.equal(layer.weight, torch.full((129,), 1 - offset))
    assert same_bits(layer(x), rms_norm(x, 129))
    filled(layer).reset_parameters()
    assert same_bits(layer(x), rms_norm(x, 129))


def test_options_reach_the_kernel():
    x, residual = sample(4, 129, torch.bfloat16), sample(4, 129, torch.bfloat16, seed=1)
    results = []
    for offset, mode, eps in product((0.0, 1.0), MODES, (None, 0.5)):
        layer = filled(RMSNorm(129, eps, dtype=torch.bfloat16, offset=offset, casting_mode=mode))
        options = {"offset": offset, "casting_mode": mode}
        assert same_bits(layer(x), rms_norm(x, 129, layer.weight, eps, **options))
        for got, wanted in zip(
            layer(x, residual), add_rms_norm(x, residual, 129, layer.weight, eps, **options), strict=True
        ):
            assert same_bits(got, wanted)
        results.append(layer(x))
    assert not any(torch.equal(a, b) for i, a in enumerate(results) for b in results[:i]), "an option had no effect"


def through_bytes(layer: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_bytes])
def test_copies(again):
    layer = filled(RMSNorm(5, 0.25, offset=1.0, casting_mode="llama"))
    other = again(layer)
    x = sample(4, 5, torch.float32)
    assert type(other) is RMSNorm
    assert repr(other) == repr(layer)
    assert same_bits(other(x), layer(x))
    assert (other.weight is layer.weight) == (again is copy.copy)


def test_a_torch_layer_whose_class_is_swapped():
    layer = filled(torch.nn.RMSNorm(5, 0.25))
    x = sample(4, 5, torch.float32)
    wanted = layer(x)
    layer.__class__ = RMSNorm
    close(layer(x), wanted)
    assert repr(layer) == repr(torch.nn.RMSNorm(5, 0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_another_dtype(dtype):
    layer = filled(RMSNorm(129, offset=1.0)).to(dtype)
    x = sample(4, 129, dtype)
    assert layer.weight.dtype is dtype
    assert same_bits(layer(x), rms_norm(x, 129, gains(129, dtype=torch.float32).to(dtype), offset=1.0))


def test_meta_device():
    layer = RMSNorm(5, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    x = torch.empty(2, 3, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y, total = layer(x, x)
    assert [(t.shape, t.dtype, t.device.type) for t in (y, total)] == [((2, 3, 5), torch.bfloat16, "meta")] * 2
    layer(x).sum().backward()
    assert (x.grad.shape, layer.weight.grad.shape) == ((2, 3, 5), (5,))
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert same_bits(real(sample(4, 5, torch.bfloat16)), rms_norm(sample(4, 5, torch.bfloat16), 5))


def test_functional_call_and_torch_func():
    layer, x, other = filled(RMSNorm(5)), sample(4, 5, torch.float32), gains(5, dtype=torch.float32, seed=9)
    assert same_bits(torch.func.functional_call(layer, {"weight": other}, (x,)), rms_norm(x, 5, other))
    got = torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)).square().sum())(other)
    leaf = other.clone().requires_grad_()
    rms_norm(x, 5, leaf).square().sum().backward()
    torch.testing.assert_close(got, leaf.grad)


def test_autocast():
    """Under autocast to bf16 both kinds of input go through, keep their dtype and can be differentiated."""
    layer = filled(RMSNorm(16))
    linear = torch.nn.Linear(16, 16)
    for dtype in (torch.float32, torch.bfloat16):
        x = sample(4, 16, dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype is dtype
            assert same_bits(y.detach(), rms_norm(x.detach(), 16, layer.weight.detach()))
            linear(layer(linear(x), x)[0]).sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad.count_nonzero() > 0
