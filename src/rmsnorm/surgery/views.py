"""The only file that knows which parameter a tensor is a view, a copy or rows of, and along which axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .graph import Graph, Node, Value

MOVES = frozenset(
    """view unsafe_view reshape reshape_alias flatten unflatten t transpose permute movedim expand unsqueeze squeeze
    slice select narrow split split_with_sizes unsafe_split unbind chunk unsafe_chunk clone contiguous detach alias
    to_copy lift_fresh index index_select gather repeat cat stack""".split()  # noqa: SIM905
)
"""Operators that move elements and change none but by rounding."""


SHAPES = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())  # noqa: SIM905
"""Operators that ask a tensor for nothing but its shape."""


class Untraceable(Exception):
    """Why a value can't be followed, in words that complete a sentence about it."""


def origin(value: Value) -> Value:
    """What a value is a view or a copy of."""
    while not value.weight and value.producer and value.producer.name in MOVES - {"cat", "stack", "index", "gather"}:
        value = value.producer.inputs()[0]
    return value


def located(model: nn.Module, value: Value, dim: int) -> tuple[str, int]:
    """The parameter that a value is a view of, or rows of, and which of its axes the value's dimension ``dim`` is: the
    one along which one step is as long in memory.

    Raises:
        Untraceable: it is none.
    """
    dim %= value.tensor.dim()
    size = value.tensor.shape[dim]
    while not value.weight:
        node = value.producer
        if node is None or node.name not in MOVES - {"cat", "stack", "gather"}:
            raise Untraceable("is multiplied with what is computed, not with a weight")
        before = node.inputs()[0]
        dim = back(node, before.tensor, value.tensor, dim)
        value = before
    weight = value.tensor
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise Untraceable(
            f"is read by {value.weight}, which is quantised ({type(weight.data).__name__}, {weight.dtype})"
        )
    if weight.shape[dim] != size:
        raise Untraceable(f"is read by a part of {value.weight}")
    return value.weight, dim


def back(node: Node, before: Tensor, after: Tensor, dim: int) -> int:
    """Which dimension of an operator's input the dimension of its output was."""
    if node.name in ("index", "index_select"):
        own = dim - after.dim() + before.dim()
        if node.name == "index":
            last = max(i for i, one in enumerate(node.args[1]) if one is not None)
        else:
            last = node.args[1] % before.dim()
        if own > last:  # what is chosen lies before it
            return own
    elif before.shape == after.shape and node.name not in ("t", "transpose", "permute"):
        return dim
    sizes = [i + 2 for i in range(before.dim())]  # a small tensor of which each dimension has another size
    if node.name in ("t", "transpose", "permute"):
        moved = node.function(torch.empty(sizes, device="meta"), *node.args[1:], **node.kwargs)
        return moved.shape[dim] - 2
    if node.name in ("select", "squeeze", "unsqueeze", "slice", "split", "expand", "view", "unsafe_view", "chunk"):
        step, size = after.stride(dim), after.shape[dim]
        matches = [i for i in range(before.dim()) if before.stride(i) == step and before.shape[i] >= size]
        if len(matches) == 1:
            return matches[0]
    raise Untraceable(f"meets what {node.name} has rearranged in {node.module}")


def terminals(graph: Graph, weight: str) -> list[Node]:
    """The operators that compute with a weight, or with a view or with rows of it."""
    found: dict[Node, None] = {}
    seen: set[Value] = set()
    ahead = [value for node in graph.nodes for value in node.inputs() if value.weight == weight]
    while ahead:
        value = ahead.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in value.readers:
            if node.name in MOVES - {"cat", "stack"}:
                ahead += node.outputs
            else:
                found[node] = None
    return list(found)
