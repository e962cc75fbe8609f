"""The only file that runs inside a patched model: the forward of its norms.

``functools.partial`` of a module-level function is the one binding of an instance's forward that deepcopy, pickle and
``torch.compile`` all follow. A bound method is pickled by its name and comes back as the class's own forward; another
``__class__`` would break ``type(module) is ...`` and hide from FSDP, which swaps classes itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recipes import Recipe

TYPES = (torch.float32, torch.bfloat16, torch.float16)
Types = tuple[torch.dtype, torch.dtype | None]
"""Of the input and of the weight."""


@dataclass(frozen=True)
class Binding:
    """How a module does what a recipe says: the names of its attributes, whose values are read at each call."""

    recipe: Recipe
    weight: str | None
    bias: str | None
    eps: str
    proven: frozenset[Types] = frozenset()
    """What the recipe was seen to reproduce. Everything else runs on the module's own forward."""

    def complete(self) -> bool:
        """Whether each type was proven together with a weight of the same type."""
        return all((x, x if self.weight else None) in self.proven for x in TYPES)

    def types(self) -> tuple[str, ...]:
        """The proven types in words: ``bfloat16``, or ``bfloat16 × float32`` with a weight of another type."""
        names = ((str(x).removeprefix("torch."), str(w or x).removeprefix("torch.")) for x, w in self.proven)
        return tuple(sorted(x if x == w else f"{x} × {w}" for x, w in names))


def bind(module: nn.Module, binding: Binding) -> None:
    """Gives this instance our forward. The class, the parameters and the hooks stay."""
    module.forward = functools.partial(forward, module, binding)


def unbind(module: nn.Module) -> bool:
    """Takes our forward away; True if there was one. Wrappers that were put around it later stay, without it."""
    found = [name for name, value in vars(module).items() if _is_ours(value)]
    for name in found:
        if name == "forward":
            del module.forward
        else:  # accelerate keeps what it wraps as an attribute of its own
            setattr(module, name, type(module).forward.__get__(module))
    return bool(found)


def binding_of(module: nn.Module) -> Binding | None:
    """What the module is bound with now."""
    ours = vars(module).get("forward")
    return ours.args[1] if _is_ours(ours) else None


def forward(module: Any, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    """What a patched norm does when it is called."""
    if len(args) == 1 and not kwargs:
        weight = getattr(module, binding.weight) if binding.weight else None
        if (args[0].dtype, None if weight is None else weight.dtype) in binding.proven:
            return apply(module, binding, args[0], weight)
    return type(module).forward(module, *args, **kwargs)


def apply(module: Any, binding: Binding, x: Tensor, weight: Tensor | None) -> Tensor:
    """The recipe on the module's own numbers."""
    shape = weight.shape if weight is not None else getattr(module, "normalized_shape", x.shape[-1:])
    bias = getattr(module, binding.bias) if binding.bias else None
    return binding.recipe(x, weight, bias, getattr(module, binding.eps), shape)


def _is_ours(value: object) -> bool:
    return isinstance(value, functools.partial) and value.func is forward
