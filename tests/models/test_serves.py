"""Proves that a patched norm is its own where one alone was asked: a weight of other dimensions, autocast, norms of one
class whose attributes can't be compared. Each would be silently wrong without a line of binding.py or patching.py.
"""

from __future__ import annotations

import copy

import torch
from oracle import gains
from test_conditions import Own, rows, same, twins
from torch import nn

import rmsnorm
from rmsnorm.models.binding import binding_of
from rmsnorm.models.conditions import signature


def test_a_weight_of_other_dimensions() -> None:
    """The normalised sizes are the weight's: two dimensions, where theirs is a gain for each row."""
    before, after = twins(Own(), "weight, then round")
    x = rows(2, 5, 96)
    for norm in (before, after):
        norm.weight = nn.Parameter(gains(5, 96, dtype=torch.float32))
    same(after(x), before(x))


class ByProductNorm(Own):
    """Its mean is a product of matrices, which autocast rounds."""

    def core(self, x):
        f = x.float()
        mean = f.pow(2) @ f.new_full((f.shape[-1], 1), 1 / f.shape[-1])
        return (f * torch.rsqrt(mean + self.eps) * self.weight.float()).to(x.dtype)

    def forward(self, x):
        return self.core(x)


def test_autocast_changes_what_it_computes() -> None:
    before, after = twins(ByProductNorm(), "weight, then round")
    assert not binding_of(after).autocast
    x = rows(7, 96)
    same(after(x), before(x))
    with torch.autocast("cpu", torch.bfloat16):
        expected = before(x)
        assert torch.equal(after(x), expected)
    assert (expected - before(x)).abs().max() > 1e-4


class MarkedNorm(Own):
    """It has an attribute that nobody can compare, and doesn't read it."""

    def __init__(self) -> None:
        super().__init__()
        self.mark: list[int] = []

    def forward(self, x):
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class OneMoreNorm(MarkedNorm):
    def forward(self, x):
        f = x.float()
        return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight.float())).to(x.dtype)


def test_norms_that_cannot_be_compared_are_each_asked() -> None:
    before = nn.ModuleList([MarkedNorm(), OneMoreNorm(), MarkedNorm()])
    after = copy.deepcopy(before)
    assert [signature(norm) for norm in after] == [None] * 3
    assert len(rmsnorm.patch(after).patched) == 3
    x = rows(7, 96)
    for one, other in zip(after, before, strict=True):
        same(one(x), other(x))


class StrictNorm(Own):
    """It tells True from 1, which are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True

    def forward(self, x):
        return self.core(x) if self.on is True else -self.core(x)


def test_a_setting_of_another_type_that_is_equal() -> None:
    before, after = twins(StrictNorm(), "weight, then round")
    x = rows(7, 96)
    same(after(x), before(x))
    before.on = after.on = 1
    same(after(x), before(x))
