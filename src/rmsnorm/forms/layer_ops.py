"""The only file that names LayerNorm's operators, and their shapes without data.

They exist on the CPU alone: for all else torch has its own, and nothing but ``layer_norm.py`` calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ops, reference

_ops.library.define("layer_norm(Tensor input, Tensor? weight, Tensor? bias, int dims, float eps) -> Tensor")
_ops.library.define(
    "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, int dims, float eps)"
    " -> (Tensor output, Tensor mean, Tensor rstd)"
)
_ops.library.define(
    "layer_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, int dims, "
    "float eps, bool need_input, bool need_weight, bool need_bias)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
)


def _fake_layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float) -> Tensor:
    return _ops._like(input)


def _fake_layer_norm_forward(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = reference.empty_rstd(input, dims)
    return _ops._like(input), rstd.double(), rstd


def _fake_layer_norm_backward(
    grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(  # an empty one each: no two outputs of an operator are one tensor
        _ops._like(t) if need and t is not None else input.new_empty(0)
        for t, need in zip((input, weight, bias), options[-3:], strict=True)
    )


for _name in ("layer_norm", "layer_norm_forward", "layer_norm_backward"):
    torch.library.register_fake(f"rmsnorm::{_name}", globals()[f"_fake_{_name}"], lib=_ops.library)


layer_norm = torch.ops.rmsnorm.layer_norm.default
layer_norm_forward = torch.ops.rmsnorm.layer_norm_forward.default
layer_norm_backward = torch.ops.rmsnorm.layer_norm_backward.default
