"""Proves that a row or a few are recorded without 1/rms, with the bits of those that keep it, and which calls are."""

from __future__ import annotations

import pytest
import torch
from calls import Silent
from oracle import DTYPES, EPS, LAYOUTS, gains, incoming, lay_out, same_bits, sample
from torch import Tensor
from torch.autograd import forward_ad

import rmsnorm
from rmsnorm import _eager, _handed, _native, _ops, rms_norm

pytestmark = pytest.mark.skipif(not _native.cpu_targets(), reason="the native library is off")
RECORDER = list(_handed.recorder)
FEW, KEEPS = "FewRMSNormBackward", "EverydayRMSNormBackward"


def leaves(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return sample(rows, columns, dtype).requires_grad_(), gains(columns, dtype=dtype).requires_grad_()


WAYS = {"handed": (_eager.FEW, True), "few": (_eager.FEW, False), "kept": (-1, False)}
"""1/rms is found again, of a forward in C++ or of an operator, or it is kept."""


def go(monkeypatch, way: str) -> None:
    few, handed = WAYS[way]
    monkeypatch.setattr(_eager, "FEW", few)
    _handed.recorder[:] = RECORDER if handed else []


@pytest.fixture(autouse=True)
def all_ways():
    yield
    _handed.recorder[:] = RECORDER


@pytest.fixture(params=WAYS)
def either_way(request, monkeypatch):
    go(monkeypatch, request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_has_the_bits_of_those_that_keep(native_target, dtype):
    """Rare rows, too: none of their squares are numbers, or 1/rms is none; a negative eps is a floor."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    for rows, columns in ((1, 4096), (3, 576), (33, 127), (5, 1), (0, 8), (2, 0)):
        for factor in (1.0, 0.0, tiny, tiny / 64, huge / 64, torch.inf, torch.nan):
            x, weight, grad = sample(rows, columns, dtype), gains(columns, dtype=dtype), incoming(rows, columns, dtype)
            x = (x.double() * factor).to(dtype)
            for eps in (EPS, 0.0, -1e-3):
                y, rstd = _ops.rms_norm_forward(x, weight, 1, eps, 0.0, False)
                assert same_bits(_ops.rms_norm_weighted(x, weight, eps), y)
                rounded = _ops.rms_norm_forward(x, weight, 1, eps, 0.0, True)[0]
                assert same_bits(_ops.rms_norm_rounded(x, weight, eps), rounded)
                for needs in ((True, True), (True, False), (False, True), (False, False)):
                    kept = _ops.rms_norm_backward(grad, None, x, rstd, weight, 1, eps, 0.0, *needs)
                    found = _ops.rms_norm_weighted_backward(grad, x, weight, eps, *needs)
                    assert all(map(same_bits, found, kept)), (rows, columns, factor, eps, needs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_do_not_lie_side_by_side(layout):
    weight = gains(32, dtype=torch.float32)
    x, grad = (lay_out(t, layout) for t in (sample(6, 32, torch.float32), incoming(6, 32, torch.float32)))
    kept = _ops.rms_norm_backward(
        grad, None, x, _ops.rms_norm_forward(x, weight, 1, EPS, 0.0, False)[1], weight, 1, EPS, 0.0, True, True
    )
    for g in (grad, grad.contiguous()):
        assert all(map(same_bits, _ops.rms_norm_weighted_backward(g, x, weight, EPS, True, True), kept))


@pytest.mark.parametrize("mode", ["torch", "llama"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_both_ways_are_the_same(monkeypatch, dtype, mode):
    """First ones, the same with a graph of their own, and those of that graph."""
    results = []
    for way in WAYS:
        go(monkeypatch, way)
        x, weight = leaves(3, 64, dtype)
        y = rms_norm(x, 64, weight, EPS, casting_mode=mode)
        assert y.grad_fn.name() == (KEEPS if way == "kept" else FEW)
        grad = incoming(3, 64, dtype).requires_grad_()
        first = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
        again = torch.autograd.grad(y, (x, weight), grad, create_graph=True)
        second = torch.autograd.grad([t.square().sum() for t in again], (x, weight, grad))
        assert all(map(same_bits, first, again))
        results.append((y, *first, *second))
    assert all(map(same_bits, *results[:2]))
    assert all(map(same_bits, *results[1:]))


def test_which_calls_keep_no_number():
    x, weight = leaves(4, 64)
    wide, long = sample(4, 64, torch.bfloat16).requires_grad_(), sample(_eager.FEW // 64 + 1, 64, torch.float32)
    for y, name in (
        (rms_norm(x, 64, weight), FEW),
        (rms_norm(x, 64, weight, casting_mode="llama"), FEW),
        (rmsnorm.RMSNorm(64)(x), FEW),
        (rms_norm(x.detach(), 64, weight), FEW),
        (rms_norm(x, 64, weight.detach()), FEW),
        (rms_norm(wide, 64, weight, casting_mode="llama"), FEW),
        (rms_norm(long, 64, weight), KEEPS),
        (rms_norm(long[1:], 64, weight), FEW),
        (rms_norm(x, 64), KEEPS),
        (rms_norm(x, 64, weight, offset=1.0), KEEPS),
    ):
        assert y.grad_fn.name() == name
    assert rms_norm(x, 64, weight, memory="lean").grad_fn.name() not in (FEW, KEEPS)
    with forward_ad.dual_level():
        assert rms_norm(x, 64, weight).grad_fn.name() not in (FEW, KEEPS)
    assert rms_norm(x.detach(), 64, weight.detach()).grad_fn is None
    with torch.no_grad():
        assert rms_norm(x, 64, weight).grad_fn is None


def test_a_wider_gradient_than_the_input(either_way):
    """Llama's rounding with a wider weight: the output is the weight's type, and what arrives is, too."""
    x, weight = sample(4, 64, torch.bfloat16).requires_grad_(), gains(64, dtype=torch.float32).requires_grad_()
    y = rms_norm(x, 64, weight, EPS, casting_mode="llama")
    dx, dw = torch.autograd.grad(y, (x, weight), incoming(4, 64, torch.float32))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    rstd = _ops.rms_norm_forward(x.detach(), weight.detach(), 1, EPS, 0.0, True)[1]
    wide = incoming(4, 64, torch.float32), None, x.detach().float(), rstd, weight.detach()
    expected = _ops.rms_norm_backward(*wide, 1, EPS, 0.0, True, True)
    assert same_bits(dx, expected[0].bfloat16())
    assert same_bits(dw, expected[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's first dual tensor
def test_what_arrives_in_backward(either_way):
    """A batch; a tangent. And who doesn't learn gets nothing."""
    x, weight = leaves(3, 8, torch.float64)
    y, grad = rms_norm(x, 8, weight, EPS), incoming(3, 8)
    alone = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
    batch = torch.stack([grad, 2 * grad])
    batched = torch.autograd.grad(y, (x, weight), batch, retain_graph=True, is_grads_batched=True)
    with torch.autograd.profiler.profile() as seen:
        mapped = torch.func.vmap(lambda grad: torch.autograd.grad(y, (x, weight), grad, retain_graph=True))(batch)
    assert [event.name for event in seen.function_events].count("rmsnorm::rms_norm_backward") == 1  # for all of it
    for one, *both in zip(alone, batched, mapped, strict=True):
        for found in both:
            torch.testing.assert_close(found, torch.stack([one, 2 * one]), rtol=1e-13, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(grad, 3 * grad)
        moved = torch.autograd.grad(y, (x, weight), dual, retain_graph=True)
        for one, both in zip(alone, moved, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(both).tangent, 3 * one, rtol=1e-13, atol=1e-15)
    for needs in ((True, False), (False, True)):
        tensors = [t.detach().requires_grad_(need) for t, need in zip((x, weight), needs, strict=True)]
        rms_norm(tensors[0], 8, tensors[1], EPS).backward(grad)
        for t, need, one in zip(tensors, needs, alone, strict=True):
            assert same_bits(t.grad, one) if need else t.grad is None


def test_no_gradient_arrives(either_way):
    x, weight = leaves(3, 8)
    Silent.apply(rms_norm(x, 8, weight, EPS)).sum().backward()
    assert x.grad is None
    assert weight.grad is None


def test_what_is_kept_is_watched_and_freed(either_way):
    x, weight = leaves(3, 8)
    y = rms_norm(x, 8, weight, EPS)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    y = rms_norm(x, 8, weight, EPS)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_packed_tensors_are_unpacked_once(either_way):
    x, weight = leaves(3, 8)
    unpacked = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        y = rms_norm(x, 8, weight, EPS)
    kept = 2 if y.grad_fn.name() == FEW else 3
    torch.autograd.grad(y.sum(), x, create_graph=True)
    assert len(unpacked) == kept
