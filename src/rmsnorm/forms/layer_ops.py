"""The only file with LayerNorm's row.

Its operators exist on the CPU alone: for all else torch has its own, and nothing but ``layer_norm.py`` calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _form, reference


def _like(input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float) -> tuple[Tensor, ...]:
    rstd = reference.empty_rstd(input, dims)
    return _form.like(input), rstd.double(), rstd


def _gradients(grads: Any, saved: Any, weights: Any, options: tuple[int, float]) -> tuple[Tensor | None, ...]:
    """By torch's own operators, which have derivatives."""
    input, dims, eps = saved[0], *options
    shape = input.shape[input.dim() - dims :]
    with torch.enable_grad():
        # Aliases: what needs no gradient gets one, too, and nobody asks.
        given = [t if t is None or t.requires_grad else t.detach().requires_grad_() for t in (input, *weights)]
        output = torch.nn.functional.layer_norm(given[0], shape, given[1], given[2], eps)
        wanted = [t for t in given if t is not None]
        found = iter(torch.autograd.grad(output, wanted, grads[0], create_graph=True))
    return tuple(None if t is None else next(found) for t in given)


LAYER_NORM = _form.register(
    _form.Form(
        name="layer_norm",
        rows=("input",),
        weights=("weight", "bias"),
        options="int dims, float eps",
        outputs=("output",),
        kept=("mean", "rstd"),
        define=None,
        like=_like,
        silent=(),
        gradients=_gradients,
    )
)
layer_norm, layer_norm_forward, layer_norm_backward = LAYER_NORM.plain, LAYER_NORM.forward, LAYER_NORM.backward
