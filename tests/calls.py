"""The only file that calls ``rms_norm`` and differentiates it as tests do that compare both with the truth; and what
lets no gradient arrive."""

from __future__ import annotations

import torch
from oracle import EPS
from torch import Tensor

from rmsnorm import rms_norm


def forward(x: Tensor, weight: Tensor | None, **options: object) -> tuple[Tensor, list[Tensor]]:
    """The output, and the leaves to differentiate by; the leaves keep their strides."""
    leaves = [t.detach().requires_grad_() for t in (x, weight) if t is not None]
    return rms_norm(leaves[0], x.shape[-1], *leaves[1:] or [None], options.pop("eps", EPS), **options), leaves


def gradients(x: Tensor, weight: Tensor | None, grad: Tensor, **options: object) -> list[Tensor]:
    """[y, dx, dw]"""
    y, leaves = forward(x, weight, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def asked_for(x: Tensor, weight: Tensor, grad: Tensor, ask: tuple[bool, bool]) -> list[Tensor | None]:
    """[dx, dw] as ``backward()`` leaves them, None for what isn't asked for."""
    leaves = [t.clone().requires_grad_(one) for t, one in zip((x, weight), ask, strict=True)]
    rms_norm(leaves[0], x.shape[-1], leaves[1], EPS).backward(grad)
    return [leaf.grad for leaf in leaves]


class Silent(torch.autograd.Function):
    """Its gradient is none at all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None
