"""The only file that decides which norms of a model keep their output for backward: ``patch(model, memory="lean")``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..forms import lean
from .binding import Binding

OUTPUT = "output"
"""What a report says of a norm that keeps it; of others it is the input, with the reason."""


def chosen(module: Any, binding: Binding) -> tuple[Binding, str]:
    """The binding that keeps as little as it can with the weight that the module has now, and what that is."""
    if reason := _refused(module, binding):
        return binding, f"input: {reason}"
    return replace(binding, memory="lean"), OUTPUT


def _refused(module: Any, binding: Binding) -> str:
    recipe = binding.recipe
    if not recipe.adds() or binding.group:
        return "no norm of its meaning can do without it"
    if binding.weight is None:
        return ""
    weight = getattr(module, binding.weight)
    columns = weight.numel() if binding.layout in ("last", "flat", "channels") else weight.shape[-1]
    return lean.why(weight, recipe.offset, weight.dtype, columns)
