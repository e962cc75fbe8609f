"""The only file that runs inside a patched model: the forward of its norms.

``functools.partial`` of a module-level function is the one binding of an instance's forward that deepcopy, pickle and
``torch.compile`` all follow. A bound method is pickled by its name and comes back as the class's own forward; another
``__class__`` would break ``type(module) is ...`` and get in the way of FSDP, which swaps classes itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import subclass
from .recipes import Recipe

TYPES = (torch.float32, torch.bfloat16, torch.float16)
Types = tuple[torch.dtype | None, ...]
"""Of the weight, the input and, if there is one, the gate."""


@dataclass(frozen=True)
class Binding:
    """How a module does what a recipe says: the names of its attributes, whose values are read at each call."""

    recipe: Recipe
    weight: str | None
    bias: str | None
    eps: str
    group: str | None = None
    """Holds the size of a group of the last dimension, or the number of groups."""
    group_counts: bool = False
    proven: frozenset[Types] = frozenset()
    """What the recipe was seen to reproduce. Everything else runs on the module's own forward."""
    single: bool = True
    """Whether that includes inputs ``[batch, 1, size]``, which one class squeezes."""

    def complete(self) -> bool:
        """Whether each type was proven together with weights and gates of the same type."""
        gates = 1 + bool(self.recipe.gate)
        return all((x if self.weight else None, *[x] * gates) in self.proven for x in TYPES)

    def types(self) -> tuple[str, ...]:
        """The proven input types in words; ``bfloat16 × float32`` with a weight (and gate) of another type."""
        words = (
            " × ".join(dict.fromkeys(str(t).removeprefix("torch.") for t in (x, weight, *gate) if t))
            for weight, x, *gate in self.proven
        )
        return tuple(sorted(set(words)))

    def adds(self) -> bool:
        """Whether :func:`rmsnorm.add_rms_norm` computes the same of a sum."""
        recipe = self.recipe
        odd = recipe.own_gain or recipe.scaled_input or recipe.gate or recipe.centred
        return not (odd or self.bias or self.group)


def bind(module: nn.Module, binding: Binding) -> None:
    """Gives this instance our forward. The class, the parameters and the hooks stay."""
    module.forward = functools.partial(forward, module, binding)


def unbind(module: nn.Module) -> None:
    """Takes our forward away, if there is one. Wrappers that were put around it later stay, around the class's own."""
    for name in [name for name, value in vars(module).items() if _is_ours(value)]:
        if name == "forward":
            del module.forward
        else:  # accelerate keeps what it wraps as an attribute of its own
            setattr(module, name, type(module).forward.__get__(module))
    subclass.restore(module)


def switch(model: nn.Module) -> Callable[[bool], None]:
    """Turns all that is bound in the model off (False) and on again, in microseconds: for timing both in turns."""
    ours = [(module, vars(module)["forward"]) for module in model.modules() if _is_ours(vars(module).get("forward"))]
    layers = [(m, cls) for m in model.modules() if (cls := type(m)) is not subclass.original(cls)]

    def turn(on: bool) -> None:
        for layer, cls in layers:
            layer.__class__ = cls if on else subclass.original(cls)
        for module, forward in ours:
            vars(module).pop("forward", None)
            if on:
                module.forward = forward

    return turn


def binding_of(module: nn.Module) -> Binding | None:
    """What the module is bound with now."""
    ours = vars(module).get("forward")
    return ours.args[1] if isinstance(ours, functools.partial) and ours.func is forward else None


def forward(module: Any, binding: Binding, *args: Any, **kwargs: Any) -> Any:
    """What a patched norm does when it is called."""
    if not kwargs and args[-1] is not None:
        weight = getattr(module, binding.weight) if binding.weight else None
        x, gate = args[0], args[-1]
        types: Types = None if weight is None else weight.dtype, x.dtype
        if gate is not x:
            types = *types, gate.dtype
        if types in binding.proven and x.shape == gate.shape and (binding.single or x.shape[-2:-1] != (1,)):
            return apply(module, binding, weight, *args)
    return type(module).forward(module, *args, **kwargs)


def apply(module: Any, binding: Binding, weight: Tensor | None, x: Tensor, gate: Tensor | None = None) -> Tensor:
    """The recipe on the module's own numbers."""
    bias = getattr(module, binding.bias) if binding.bias else None
    shape = shape_of(module, weight, x)
    group: int | None = getattr(module, binding.group) if binding.group else None
    if binding.group_counts and group:
        group = shape[-1] // group
    return binding.recipe(x, gate, weight, bias, getattr(module, binding.eps), shape, group)


def shape_of(module: Any, weight: Tensor | None, x: Tensor) -> torch.Size:
    """The sizes of the normalised dimensions."""
    return weight.shape if weight is not None else getattr(module, "normalized_shape", x.shape[-1:])


def _is_ours(value: object) -> bool:
    return isinstance(value, functools.partial) and value.func is forward
