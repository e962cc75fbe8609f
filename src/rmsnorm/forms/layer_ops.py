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
    mean = torch.empty_like(rstd, dtype=torch.float64)  # not rstd.double(), which of fp64 is rstd
    return _form.like(input), mean, rstd


def composed(input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float) -> Tensor:
    """The formula in torch's simplest operators, for whoever takes derivatives of derivatives: those of torch's own
    LayerNorm (2.13) are wrong in forward mode within forward mode, and of the weight's gradient under vmap
    (findings/layer-norm-twice.sh)."""
    last = tuple(range(-dims, 0))
    wide = reference.cast(input, reference.accumulation_dtype(input.dtype))
    centred = wide - wide.mean(last, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(last, keepdim=True) + eps)
    output = output if weight is None else output * weight
    return reference.cast(output if bias is None else output + bias, input.dtype).contiguous()


def _gradients(grads: Any, saved: Any, weights: Any, options: tuple[int, float]) -> tuple[Tensor | None, ...]:
    """By operators that have derivatives."""
    with torch.enable_grad():
        # Aliases: what needs no gradient gets one, too, and nobody asks; and a tensor may be given twice.
        given: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in (saved[0], *weights)
        ]
        output = composed(given[0], given[1], given[2], *options)
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
