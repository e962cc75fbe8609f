"""The only file that reads a patched module's own numbers, at each call, and computes what its binding says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fits(binding: Any, weight: Tensor, x: Tensor) -> bool:
    """Whether the sizes are those of a norm."""
    layout = binding.layout
    if layout == "last" and binding.rank != 1:
        return weight.shape == x.shape[x.dim() - binding.rank :]
    if layout == "channels":
        return weight.numel() == x.shape[1]
    if layout == "heads":
        return weight.shape[0] == x.shape[-3] and weight.shape[-1] == x.shape[-1]
    return layout == "number" or weight.shape[-1] == x.shape[-1]


def apply(module: Any, binding: Any, weight: Tensor | None, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """The recipe on the module's own numbers."""
    bias = getattr(module, binding.bias) if binding.bias else None
    layout, given = binding.layout, x
    if layout == "channels":
        x = x.movedim(1, -1)
    elif layout == "heads":
        x = x.transpose(-3, -2)
    if weight is not None:
        if layout == "number":
            weight = weight.expand(x.shape[-1])
        elif layout != "last":
            weight = weight.squeeze(-2) if layout == "heads" else weight.flatten()
    if bias is not None and layout in ("flat", "channels"):
        bias = bias.flatten()
    shape = x.shape[-1:] if layout == "heads" else shape_of(module, weight, x)
    group: int | None = getattr(module, binding.group) if binding.group else None
    if binding.group_counts and group:
        group = shape[-1] // group
    output = binding.recipe(x, gate, weight, bias, eps_of(module, binding), shape, group, binding.memory)
    if layout == "channels":
        return output.movedim(-1, 1).contiguous()
    if layout == "heads":  # as it came: a view of [..., rows, heads, size], or [..., heads, rows, size]
        output = output.transpose(-3, -2)
        return output.contiguous() if given.is_contiguous() else output
    return output


def weight_of(module: Any, binding: Any) -> Tensor | None:
    """What the module has now. Parameters lie in a dictionary, through which nn.Module looks in Python, 0.6 µs."""
    name = binding.weight
    if name is None:
        return None
    weight: Tensor | None = module.__dict__["_parameters"].get(name)
    return getattr(module, name) if weight is None else weight


def eps_of(module: Any, binding: Any) -> Any:
    """What the module has now."""
    return getattr(module, binding.eps) if isinstance(binding.eps, str) else binding.eps


def shape_of(module: Any, weight: Tensor | None, x: Tensor) -> torch.Size:
    """The sizes of the normalised dimensions."""
    return weight.shape if weight is not None else getattr(module, "normalized_shape", x.shape[-1:])


def under_autocast(x: Tensor) -> bool:
    """Whether autocast is on for its device; torch raises for those that have none, such as meta."""
    if x.is_cpu:  # in a third of the time
        return torch.is_autocast_enabled("cpu")
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
