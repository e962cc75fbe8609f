"""The only file that finds who reads a norm's output: it follows each element from operator to operator.

Beside the output runs a shadow, a tensor of the same shape that holds of each element the index of its gain. What only
moves elements (views, slices, gathers, concatenations) moves the shadow. Where it arrives at a matrix product with a
weight, each column of the weight meets one index, or this isn't a linear layer behind a norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .graph import NORM, Graph, Node, Value, mapped
from .norms import Norm, channels
from .views import MOVES, SHAPES, Untraceable, located, origin

PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "linear": 0, "grouped_mm": 0, "grouped_mm_fallback": 0}
"""Matrix products, and which argument is the rows; the next is the weight."""
SCALES = frozenset({"mul", "div"})
WHAT = {
    "add": "an addition",
    "mul": "a multiplication",
    NORM: "another norm",
    "native_layer_norm": "another norm",
    "scaled_dot_product_attention": "attention itself",
    "convolution": "a convolution",
    **dict.fromkeys(PRODUCTS, "a linear layer"),
}


@dataclass(frozen=True)
class Read:
    """A weight that multiplies a norm's output."""

    weight: str
    """The parameter's name."""
    axis: int
    """Its axis that the output runs along."""
    columns: tuple[int, ...]
    """Of each index of that axis the channel of the norm; -1 where something else comes in."""
    bias: str | None
    """The parameter that is added to the product, if one was seen."""
    module: str
    """The module that ran."""


@dataclass
class Followed:
    """Where a norm's output goes."""

    reads: list[Read] = field(default_factory=list)
    products: set[Node] = field(default_factory=set)
    """The operators that do."""
    scaled: bool = False
    """Whether it is multiplied by a number on the way: a bias is no longer what it was."""


def follow(model: nn.Module, graph: Graph, norm: Norm) -> Followed:
    """Every linear layer that reads the norm.

    Raises:
        Untraceable: something else reads it, too.
    """
    shadows: dict[Value, Tensor] = {}
    found: dict[Read, None] = {}
    products: set[Node] = set()
    scaled = False
    results = {value: name for name, value in graph.results.items()}
    for node in graph.nodes:
        if node.op == NORM and node.module == norm.name:
            output = node.outputs[0]
            shadows[output] = channels(norm, model, output.tensor, output.device)
            continue
        shadowed = [value for value in node.inputs() if value in shadows]
        if not shadowed or node.name in SHAPES:
            continue
        if node.name in MOVES or (node.name == "mean" and len(shadowed) == 1):
            for value, shadow in zip(node.outputs, _moved(node, shadows), strict=True):
                shadows[value] = shadow
        elif node.name in SCALES and (same := _scaled(node, shadows)) is not None:
            shadows[node.outputs[0]], scaled = same, True
        elif node.name in PRODUCTS:
            found[_product(model, node, shadows)] = None
            products.add(node)
        else:
            where = f" in {node.module}" if node.module else ""
            raise Untraceable(f"goes into {WHAT.get(node.name, node.name)}{where}, not only into linear layers")
    if returned := [name for value, name in results.items() if value in shadows]:
        raise Untraceable(f"is what the model returns as {returned[0]}")
    if not found:
        raise Untraceable("goes into no linear layer on these inputs")
    return Followed(list(found), products, scaled)


def _moved(node: Node, shadows: dict[Value, Tensor]) -> Iterable[Tensor]:
    """The shadows of what an operator that moves elements returns."""
    if node.name == "mean":
        return [_averaged(node, shadows)]

    def shadow(value: Value) -> Tensor:
        found = shadows.get(value)
        if found is not None:
            return found
        if node.name in ("cat", "stack"):
            return torch.full(value.tensor.shape, -1, device=value.device)
        return value.tensor

    if node.name in ("to_copy", "clone", "contiguous"):
        return [shadows[node.inputs()[0]]]
    if node.name in ("view", "unsafe_view", "reshape_alias"):
        return [shadows[node.inputs()[0]].reshape(node.outputs[0].tensor.shape)]
    with torch.no_grad():
        moved = node.function(*mapped(node.args, Value, shadow), **mapped(node.kwargs, Value, shadow))
    return [moved] if isinstance(moved, Tensor) else moved


def _averaged(node: Node, shadows: dict[Value, Tensor]) -> Tensor:
    """A mean over rows keeps channels apart: it is a linear layer of its own."""
    (value,) = node.inputs()
    shadow, dims = shadows[value], node.args[1] if len(node.args) > 1 and node.args[1] else None
    keep = node.outputs[0].tensor.dim() == value.tensor.dim()
    dims = list(range(shadow.dim())) if dims is None else list(dims)
    least, most = shadow.amin(dims, keepdim=keep), shadow.amax(dims, keepdim=keep)
    if not torch.equal(least, most):
        raise Untraceable(f"is averaged over its channels in {node.module}")
    return least


def _scaled(node: Node, shadows: dict[Value, Tensor]) -> Tensor | None:
    """The shadow of a product with what is the same for all channels; None if it isn't."""
    values = node.inputs()
    shadowed = [value for value in values if value in shadows]
    if len(shadowed) != 1 or (node.name == "div" and node.args[0] is not shadowed[0]):
        return None
    shadow = shadows[shadowed[0]]
    for other in values:
        if other is shadowed[0]:
            continue
        factor = other.tensor
        size = factor.shape[-1] if factor.dim() else 1
        if size != 1 or factor.dim() > shadow.dim() or not _along_last(shadow):
            return None
    return shadow


def _along_last(shadow: Tensor) -> bool:
    """Whether channels run along the last dimension alone."""
    return shadow.numel() == 0 or torch.equal(shadow, shadow.reshape(-1, shadow.shape[-1])[0].expand(shadow.shape))


def _refuse_quantised(model: nn.Module, module: str) -> None:
    """Where the weights of the module that multiplies are no plain tensors, what is multiplied was made of them."""
    for name, one in model.get_submodule(module)._parameters.items():
        if one is not None and type(one.data) is not Tensor:
            raise Untraceable(f"is read by {module}.{name}, which is quantised ({type(one.data).__name__})")


def _added(node: Node) -> str:
    """The parameter that a sum adds to a product: a linear layer of rows that aren't contiguous is both."""
    (value,) = node.outputs
    while len(value.readers) == 1:
        (reader,) = value.readers
        if reader.name == "add":
            others = [one for one in reader.inputs() if one is not value]
            return origin(others[0]).weight if len(others) == 1 and others[0].tensor.dim() == 1 else ""
        if reader.name not in MOVES - {"cat", "stack"} or len(reader.outputs) != 1:
            break
        value = reader.outputs[0]
    return ""


def _product(model: nn.Module, node: Node, shadows: dict[Value, Tensor]) -> Read:
    at = PRODUCTS[node.name]
    rows, weight = node.args[at], node.args[at + 1]
    where = f"in {node.module}"
    if rows not in shadows or weight in shadows:
        raise Untraceable(f"is multiplied with something else than a weight {where}")
    shadow = shadows[rows]
    if not shadow.numel() or not _along_last(shadow):
        raise Untraceable(f"is not one row of channels for each row of a product {where}")
    _refuse_quantised(model, node.module)
    name, axis = located(model, weight, -1 if node.name == "linear" else -2)
    columns = tuple(shadow.reshape(-1, shadow.shape[-1])[0].tolist())
    bias: Value | None = node.args[0] if at else node.args[2] if node.name == "linear" and len(node.args) > 2 else None
    added = origin(bias).weight if bias else _added(node)
    return Read(name, axis, columns, added or None, node.module)
