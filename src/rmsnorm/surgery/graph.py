"""The only file that knows what a trace is: values, the operators between them, calls of modules, results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

NORM, STALE = "norm", "a write into a part of it"


@dataclass(eq=False)
class Value:
    """A tensor at one time: what is written in place is a new value."""

    tensor: Tensor
    """A weight, or indices. Of what was computed in floating point only sizes and strides, on the device ``meta``: a
    trace that kept its numbers would be as large as all that a forward makes."""
    device: torch.device
    """Where its numbers were."""
    producer: Node | None = None
    weight: str = ""
    """The name of the parameter or buffer that it is."""
    readers: list[Node] = field(default_factory=list)


@dataclass(eq=False)
class Node:
    """One operator, or one call of a norm."""

    op: str
    module: str
    """The path of the innermost module that runs."""
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    """The arguments with a ``Value`` for each tensor."""
    outputs: list[Value] = field(default_factory=list)

    def inputs(self) -> list[Value]:
        return [one for one in tree_leaves((self.args, self.kwargs)) if isinstance(one, Value)]

    @property
    def name(self) -> str:
        """The operator without its overload and its underscores."""
        return self.op.partition(".")[0].strip("_")


@dataclass(eq=False)
class Call:
    """A module was called with a value."""

    module: str
    key: int | str
    """The place or the name of the argument."""
    value: Value


@dataclass(eq=False)
class Graph:
    """What happened in all runs."""

    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    results: dict[str, Value] = field(default_factory=dict)
    """What the model returns, by name."""
    least: dict[str, float] = field(default_factory=dict)
    """Of each norm, the smallest mean square of a row that it got."""
    largest: dict[str, float] = field(default_factory=dict)
    """Of each norm, the largest number that it got."""
    used: set[str] = field(default_factory=set)
    """The weights that were read."""


def outline(tensor: Tensor) -> Tensor:
    """Its sizes and strides, without its numbers; a tensor of whole numbers or of a kind of its own stays itself."""
    if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.layout is not torch.strided:
        return tensor
    with _disable_current_modes():  # nobody computed it
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def mapped(given: Any, kind: type, change: Any) -> Any:
    """Nested arguments with each of one kind changed."""
    if isinstance(given, kind):
        return change(given)
    if isinstance(given, tuple | list):
        return type(given)(mapped(one, kind, change) for one in given)
    if isinstance(given, dict):
        return {name: mapped(one, kind, change) for name, one in given.items()}
    return given
