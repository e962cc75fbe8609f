"""Proves that a patched norm answers for what was proven, and its own forward for the rest: other arguments, flags,
switches, widths, dimensions, globals. Each norm here would be silently wrong without one rule of conditions.py.
"""

from __future__ import annotations

import copy
import gc
import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from oracle import gains
from torch import Tensor, nn

import rmsnorm
from rmsnorm.models.binding import binding_of

FAST = True


class Own(nn.Module):
    """Somebody's norm, with more than a norm's arguments."""

    def __init__(self, size: int = 96, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(gains(size, dtype=torch.float32)), eps

    def core(self, x: Tensor) -> Tensor:
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)

    def forward(self, x, residual=None, prenorm=False):
        x = x if residual is None else x + residual
        return (self.core(x), x) if prenorm else self.core(x)


class Switched(Own):
    """A switch, a number and a tuple among its attributes; a number of its class."""

    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.on, self.times, self.shift = True, 1.0, (0.0, 0.0)

    def forward(self, x):
        y = self.core(x) * self.times + self.shift[1]
        return y**self.power if self.on else -y


class ByGlobal(Own):
    def forward(self, x):
        return self.core(x) if FAST else 2 * self.core(x)


class WeightlessNorm(nn.Module):
    """Right at one width alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.norm = size**0.5, None

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale


class OneNumber(Own):
    """A gain for all columns."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x):
        return self.core(x)


class ChannelNorm(nn.Module):
    """As the VAEs of Wan and Qwen-Image have it: rounds three times in a half type."""

    def __init__(self, size: int, *ones: int) -> None:
        super().__init__()
        self.scale, self.gamma, self.norm_bias = size**0.5, nn.Parameter(gains(size, dtype=torch.float32)), 0.0
        self.gamma.data = self.gamma.data.reshape(size, *ones)

    def forward(self, x):
        return F.normalize(x.float(), dim=1).to(x.dtype) * self.scale * self.gamma + self.norm_bias


class HeadNorm(nn.Module):
    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.scale, self.gamma_norm = size**0.5, nn.Parameter(gains(heads, 1, size, dtype=torch.float32))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * self.gamma_norm


def twins(norm: nn.Module, meaning: str | None = None) -> tuple[nn.Module, nn.Module]:
    """As it was, and patched."""
    before = copy.deepcopy(norm)
    model = nn.ModuleDict({"a_norm": norm})
    report = rmsnorm.patch(model)
    if meaning is not None:
        assert [entry.meaning for entry in report.patched] == [meaning], report
    return before, norm


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "call",
    [
        lambda norm, x: norm(x),
        lambda norm, x: norm(x=x),
        lambda norm, x: norm(x, x),
        lambda norm, x: norm(x, rows(*x.shape, seed=1)),
        lambda norm, x: norm(x, residual=None, prenorm=False),
        lambda norm, x: norm(x, None, True),
        lambda norm, x: norm(x, prenorm=True),
        lambda norm, x: norm(x, prenorm=0),
        lambda norm, x: norm(x.double()),
        lambda norm, x: norm(x[..., :1]),
    ],
)
def test_arguments(call) -> None:
    before, after = twins(Own(), "weight, then round")
    x = rows(2, 5, 96)
    same(call(after, x), call(before, x))


def test_settings_that_change() -> None:
    before, after = twins(Switched(), "weight, then round")
    assert dict(binding_of(after).fixed) == {"on": True, "times": 1.0, "shift": (0.0, 0.0), "power": 1}
    x = rows(5, 96)
    for name, value in (("on", False), ("times", 3.0), ("shift", (0.0, 1.0)), ("power", 2)):
        for norm in (before, after):
            setattr(norm, name, value)
        same(after(x), before(x))


class LoneGainNorm(nn.Module):
    """x-transformers' ScaleNorm: 1 + g is rounded to the type of g. Of lone numbers, half are exact there by chance."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.g_norm = size**0.5, nn.Parameter(torch.full((1,), 0.37))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.scale * (self.g_norm + 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lone_gain_in_another_type(dtype: torch.dtype) -> None:
    before, after = (norm.to(dtype) for norm in twins(LoneGainNorm(96), "normalize, 1 + weight"))
    same(after(rows(7, 96)), before(rows(7, 96)))


def test_what_the_collector_calls_is_not_the_norms() -> None:
    """Python may collect garbage at any instruction; its callbacks (hypothesis has one) run within what is watched."""
    spent = 0.0

    def callback(phase: str, info: dict[str, int]) -> None:
        nonlocal spent
        spent += time.perf_counter()

    before = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1)
    try:
        twins(Own(), "weight, then round")
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)
    assert spent
    assert gc.isenabled()


def test_globals_that_change(monkeypatch) -> None:
    before, after = twins(ByGlobal(), "weight, then round")
    x = rows(5, 96)
    same(after(x), before(x))
    monkeypatch.setattr(f"{__name__}.FAST", False)
    same(after(x), before(x))


@pytest.mark.parametrize("size", [32, 96, 128, 384])
def test_widths(size: int) -> None:
    before, after = twins(WeightlessNorm(size), "normalize")
    for width in (size, size + 1, 7):
        same(after(rows(5, width)), before(rows(5, width)))
    before, after = twins(OneNumber())
    for width in (size, 1, 7):
        same(after(rows(5, width)), before(rows(5, width)))


@pytest.mark.parametrize("ones", [(), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("size", [32, 96])
def test_channels_first(size: int, ones: tuple[int, ...]) -> None:
    before, after = twins(ChannelNorm(size, *ones), "normalize, round, weight" if ones else None)
    for dims, dtype in itertools.product((2, 3, 4, 5), (torch.float32, torch.bfloat16)):
        x = rows(2, size, *(3, 4, 5)[: dims - 2]).to(dtype)
        x[:1] = 0  # a row of zeros is one of zeros
        try:
            wanted = before(x)
        except RuntimeError:
            continue  # a weight that doesn't fit
        got = after(x)
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        same(got, wanted)


@pytest.mark.parametrize("strided", [False, True])
def test_heads(strided: bool) -> None:
    before, after = twins(HeadNorm(3, 32), "normalize")
    x = rows(2, 7, 3, 32).transpose(1, 2) if strided else rows(2, 3, 7, 32)
    same(after(x), before(x))
    assert after(x).stride() == before(x).stride()
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for norm, leaf in zip((before, after), leaves, strict=True):
        norm(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-5, atol=1e-5)  # terms of 10 cancel
    torch.testing.assert_close(after.gamma_norm.grad, before.gamma_norm.grad, rtol=1e-5, atol=1e-5)


def test_rows_around_the_floor() -> None:
    """F.normalize divides by at least 1e-12; a row of zeros stays one, and has a gradient."""
    before, after = twins(WeightlessNorm(96), "normalize")
    x = rows(9, 96) * torch.tensor([0, 1e-30, 1e-14, 1e-13, 1e-12, 1e-11, 1e-9, 1.0, 1e4])[:, None]
    results = []
    for norm in (before, after):
        leaf = x.clone().requires_grad_()
        y = norm(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    same(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-4)
