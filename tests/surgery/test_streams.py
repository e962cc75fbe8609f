"""Proves which residual streams can be centred, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn

import rmsnorm

STREAMS = {
    "a residual scaled": (lambda m, s: s + m.gain * m.write(m.norm(s)).relu(), "a residual scaled channel by channel"),
    "an activation": (lambda m, s: s + m.write(m.norm(s)).relu(), "what relu makes"),
    "the model's input": (lambda m, s: m.x + m.write(m.norm(s)), "channels side by side, joined in"),
    "a number": (lambda m, s: s + 1.0 + m.write(m.norm(s)), "the number 1.0, added in"),
    "a reader without a norm": (lambda m, s: s + m.write(s), "a linear layer in write reads it"),
    "tokens that are mixed": (lambda m, s: s + m.write(m.norm(s).mT).mT, "the other axis of a product in write"),
    "a view that is written into": (
        lambda m, s: (s.view(-1).mul_(2), s + m.write(m.norm(s)))[1],
        "a write into a part",
    ),
    "another reader": (lambda m, s: s + m.write(m.norm(s) + s.relu()), "relu in the model reads it"),
}


class Residual(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.read, self.norm, self.write = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(8))
        self.step = step
        small.randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["x"] = torch.cat([x, x], -1)
        return self.head(self.last(self.step(self, self.read(x))))


@pytest.mark.parametrize("case", STREAMS)
def test_streams_that_cannot_be_centred(case: str) -> None:
    step, reason = STREAMS[case]
    model = Residual(step)
    report = rmsnorm.to_rms(model, inputs=torch.randn(8, 4))
    assert reason in next(fate.reason for fate in report.left if fate.name == "last"), report


def test_layer_scale_goes_into_the_writer() -> None:
    """λ ⊙ (W x + c) = (diag(λ) W) x + λ ⊙ c, so what was scaled can be centred; λ is 1 then."""
    model = Residual(lambda m, s: s + m.write(m.norm(s)) * m.gain)
    report = rmsnorm.to_rms(model, inputs=torch.randn(3, 4))
    assert len(report.done) == 2
    assert torch.equal(model.gain, torch.ones(8))
