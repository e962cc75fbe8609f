"""The model with each norm that has a weight, and its training: the same on each rank, and on one."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import rmsnorm

WIDTH, HIDDEN, ROWS, STEPS = 24, 56, 8, 3


class Block(nn.Module):
    """A norm, a residual, and two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = rmsnorm.RMSNorm(WIDTH, eps=1e-5)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual=residual)
        return self.down(nn.functional.silu(self.up(y))), residual


class Model(nn.Module):
    """Two blocks, and each kind of norm that has a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.layer_norm = rmsnorm.LayerNorm(WIDTH)
        self.gated = rmsnorm.GatedRMSNorm(WIDTH)
        self.last = rmsnorm.RMSNorm(WIDTH, offset=1.0)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.last(self.gated(self.layer_norm(x + residual), gate=residual))


def model() -> Model:
    """The same on each rank."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of ``[ROWS, 5, WIDTH]``."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn((2, ROWS, 5, WIDTH), generator=generator)
    return x, y


def train(trained: nn.Module, part: slice, pieces: int, synchronise: Any = lambda last: None) -> None:
    """Some steps of AdamW on ``part`` of each batch, in that many pieces."""
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for step in range(STEPS):
        for i, (x, y) in enumerate(zip(*(t[part].chunk(pieces) for t in batch(step)), strict=True)):
            synchronise(i == pieces - 1)
            (nn.functional.mse_loss(trained(x), y) / pieces).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The parameters, gathered."""
    found = {n.removeprefix("module."): p.detach() for n, p in module.named_parameters()}
    return {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found.items()}


@cache
def trained_alone() -> dict[str, Tensor]:
    """The parameters after training on whole batches, in one process."""
    trained = model()
    train(trained, slice(None), 1)
    return whole(trained)
