"""The only file with the layer of the lesson: ten lines, as they stand in the page and in nobody's model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TenLines(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = wide.pow(2).mean(-1, keepdim=True)
        normalised = wide * torch.rsqrt(mean_square + self.eps)
        return (normalised * self.weight).type_as(x)
