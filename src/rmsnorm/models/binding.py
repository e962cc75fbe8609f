"""The only file that runs inside a patched model: the forward of its norms.

It serves what was proven (``probe.py``) and nothing else. Every other call, whatever is unusual about it, is the
module's own forward: other types, other numbers of dimensions, more arguments, a changed switch, a tracer that wants to
see the module's operators.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function_variadic

from .. import _foreign
from ..functional import rms_norm
from . import classes
from .forwards import forward_like
from .numbers import apply, eps_of, fits, shape_of, under_autocast, weight_of
from .recipes import RECIPES, Recipe

TYPES = (torch.float32, torch.bfloat16, torch.float16)
Types = tuple[torch.dtype | None, ...]
"""Of the weight, the input and, if there is one, the gate."""


LAYOUTS = {
    "last": "the weight has the sizes of the last dimensions, the normalised ones",
    "flat": "the last dimension; the weight has sizes of 1 before it",
    "channels": "dimension 1; the weight has its size, and may have sizes of 1 behind it",
    "heads": "the last dimension; the weight is [heads, 1, size] for inputs [..., heads, rows, size]",
    "number": "the last dimension; the weight is one number, [1]",
}


@dataclass(frozen=True)
class Binding:
    """How a module does what a recipe says: the names of its attributes, whose values are read at each call."""

    recipe: Recipe
    weight: str | None
    bias: str | None
    eps: str | float | None
    """A number where no attribute holds it; None where the recipe has one of its own."""
    group: str | None = None
    """Holds the size of a group of the last dimension, or the number of groups."""
    group_counts: bool = False
    layout: str = "last"
    """Which dimension is normalised, and how the weight lies: one of ``LAYOUTS``."""
    proven: frozenset[Types] = frozenset()
    """What the recipe was seen to reproduce. Everything else runs on the module's own forward."""
    dims: frozenset[int] = frozenset()
    """The numbers of dimensions of an input that this includes,"""
    single: bool = True
    """whether it includes inputs ``[batch, 1, size]``, which one class squeezes,"""
    autocast: bool = True
    """and calls under autocast."""
    fixed: tuple[tuple[str, Any], ...] = ()
    """Attributes that the forward reads, beside those above, and the values that they had;"""
    outside: tuple[tuple[str, str, Any], ...] = ()
    """globals that it reads: the module, the name, the value;"""
    absent: tuple[str, ...] = ()
    """those that it looks for and doesn't find;"""
    methods: tuple[str, ...] = ()
    """the functions among them, which are the class's;"""
    attributes: tuple[str, ...] | None = None
    """and the names of all of the instance's, where it reads some whose names aren't in its code."""
    rank: int = 1
    """The number of dimensions of the weight."""
    columns: int | None = None
    """The only size of the last dimension that this includes, where no weight has it."""
    memory: str | None = None
    """``"lean"`` keeps the output for backward."""

    plainly: bool = field(init=False, compare=False, repr=False)
    """Whether it is :func:`rmsnorm.rms_norm`, with these"""
    options: dict[str, Any] = field(init=False, compare=False, repr=False)
    """and"""
    norm_options: dict[str, Any] = field(init=False, compare=False, repr=False)
    """what it and :func:`rmsnorm.add_rms_norm` know beside."""

    kind = "norm"

    def __post_init__(self) -> None:
        plainly = self.recipe.adds() and not (self.bias or self.group) and self.layout == "last"
        options = self.recipe.options()
        more = options | {"memory": self.memory} if self.memory else options
        for name, value in {"plainly": plainly, "options": options, "norm_options": more}.items():
            object.__setattr__(self, name, value)  # once: asked at each call

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
        return self.plainly

    def forward_for(self, cls: type[nn.Module]) -> Callable[..., Any]:
        return forward_like(cls, 1 + bool(self.recipe.gate), self.methods, _bound)

    def plain(self) -> tuple[Any, ...]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        values["recipe"] = self.recipe.meaning
        values["proven"] = tuple(sorted((tuple(t and str(t)[6:] for t in types) for types in self.proven), key=str))
        values["dims"] = tuple(sorted(self.dims))
        return tuple(values.values())


def _read(_: type[nn.Module], meaning: str, *values: Any) -> Binding:
    """What ``Binding.plain`` wrote. A file takes the row of the table that the version which reads it has."""
    names = [field.name for field in fields(Binding) if field.init][1:]
    plain = dict(zip(names, values, strict=len(values) > len(names)))  # a file of an older version has fewer
    plain["proven"] = frozenset(tuple(t and getattr(torch, t) for t in types) for types in plain["proven"])
    plain["dims"] = frozenset(plain["dims"])
    return Binding(RECIPES[meaning], **plain)


classes.READERS["norm"] = _read


def binding_of(module: nn.Module) -> Binding | None:
    """What the module is bound with now."""
    change = classes.change_of(module)
    return change if isinstance(change, Binding) else None


def _bound(module: Any, x: Any, gate: Any = None) -> Tensor | None:
    binding: Binding | None = getattr(type(module), classes.CHANGE, None)
    if binding is None or module._rmsnorm_off:  # unpatched, and somebody kept its forward, or put a class around ours
        return None
    return attempt(module, binding, x, gate)


def attempt(module: Any, binding: Binding, x: Any, gate: Any = None) -> Tensor | None:
    """The recipe's result, or None if such a call was not proven."""
    weight = weight_of(module, binding)
    if not serves(module, binding, weight, x, gate):
        return None
    try:
        if binding.plainly:
            return rms_norm(x, shape_of(module, weight, x), weight, eps_of(module, binding), **binding.norm_options)
        return apply(module, binding, weight, x, gate)
    except RuntimeError:
        if weight is None or fits(binding, weight, x):
            raise
        return None  # theirs broadcasts, or says what is wrong


def is_foreign(x: Tensor) -> bool:
    """Whether it is of a subclass, which sees what its module calls."""
    return type(x) not in _foreign.COMPILERS and (has_torch_function_variadic(x) or _foreign.wanted_by(x))


def serves(module: Any, binding: Binding, weight: Tensor | None, x: Any, gate: Any = None) -> bool:
    """Whether such a call was proven; 1 µs of each."""
    if not isinstance(x, Tensor):
        return False
    if is_foreign(x):
        return False
    if torch.compiler._is_exporting_flag and not torch.onnx.is_in_onnx_export():  # ONNX has an operator for it
        return False
    types: Types = None if weight is None else weight.dtype, x.dtype
    if binding.recipe.gate:
        if not isinstance(gate, Tensor) or gate.shape != x.shape:
            return False
        types = *types, gate.dtype
    return (
        types in binding.proven
        and x.dim() in binding.dims
        and (binding.single or 1 not in x.shape[:-1])
        and (weight is None or weight.dim() == binding.rank)
        and (binding.columns is None or x.shape[1 if binding.layout == "channels" else -1] == binding.columns)
        and x.numel() != 0
        and (binding.autocast or not under_autocast(x))
        and _unchanged(module, binding)
    )


def _unchanged(module: Any, binding: Binding) -> bool:
    """Whether all else that its forward reads is what it was."""
    if isinstance(binding.eps, str):
        kind = type(getattr(module, binding.eps))
        if kind is not float and kind is not int and (binding.eps, None) not in binding.fixed:
            return False  # where it is None, that is compared below
    for name, value in binding.fixed:
        now = getattr(module, name, binding)
        if type(now) is not type(value) or now != value:
            return False
    if binding.absent and any(hasattr(module, name) for name in binding.absent):
        return False
    if binding.attributes is not None and binding.attributes != tuple(sorted(vars(module))):
        return False
    return not binding.outside or _same_outside(binding.outside)


def _same_outside(outside: tuple[tuple[str, str, Any], ...]) -> bool:
    return all(vars(sys.modules[home]).get(name) == value for home, name, value in outside)
