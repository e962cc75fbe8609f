"""The only file that knows what can be done to one weight: linear changes along an axis, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Step(Protocol):
    """A linear change of one parameter."""

    @property
    def weight(self) -> str:
        """Its name."""

    def __call__(self, value: Tensor) -> Tensor:
        """The parameter after it, in fp64."""


@dataclass(frozen=True)
class Scale:
    """Multiplies by one number for each index of an axis."""

    weight: str
    axis: int
    factors: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return value * self.factors.view(-1, *(1,) * (value.dim() - 1 - self.axis))


@dataclass(frozen=True)
class Centre:
    """Subtracts the mean along an axis."""

    weight: str
    axis: int

    def __call__(self, value: Tensor) -> Tensor:
        return value - value.mean(self.axis, keepdim=True)


@dataclass(frozen=True)
class Rotate:
    """Multiplies an axis by an orthogonal matrix, ``v ↦ v · Q``, block by block where it has several of its width."""

    weight: str
    axis: int
    matrix: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        width = len(self.matrix)
        rows = value.movedim(self.axis, -1)
        turned = rows.reshape(*rows.shape[:-1], -1, width) @ self.matrix.to(value.device)
        return turned.reshape(rows.shape).movedim(-1, self.axis)


@dataclass(frozen=True)
class Fill:
    """Sets every element."""

    weight: str
    number: float

    def __call__(self, value: Tensor) -> Tensor:
        return torch.full_like(value, self.number)


@dataclass(frozen=True)
class Add:
    """Adds the product of another weight with a vector, ``b ↦ b + W · v``, W as it was before the operation."""

    weight: str
    other: str
    axis: int
    vector: Tensor

    def product(self, other: Tensor) -> Tensor:
        return torch.tensordot(other.detach().double(), self.vector, dims=([self.axis], [0]))


@dataclass(frozen=True)
class Shift:
    """Adds a vector: what is known of an ``Add`` when the other weight has been read."""

    weight: str
    vector: Tensor
    axis: int = 0

    def __call__(self, value: Tensor) -> Tensor:
        return value + self.vector
