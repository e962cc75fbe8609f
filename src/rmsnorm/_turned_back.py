"""The only file that finds rotary embedding in front of the gradient of a norm, in graphs of Inductor's.

    backward(grad·cos + rotate(grad·sin))         turned_rms_norm_backward: turned back a few rows at a time

as the derivative of what ``_turned.py`` finds forward. ``rotate`` is the second half of the columns, and the first,
negated. Both products are rounded, as in eager mode, where Inductor rounds what it happens to write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from . import _followed
from ._nodes import aten, become, erase, is_served, is_written, only_user, results
from ._turned import is_angle, is_slice, moves


@dataclass(frozen=True)
class _Turn:
    """What a gradient is turned back by."""

    grad: Node
    cos: Node
    sin: Node
    between: tuple[Node, ...]


def join(graph: Graph, backward: Node) -> None:
    """One gradient."""
    given: Any = backward.args
    arrives, grad_sum, input, rstd, weight, dims, eps, *_ = given
    value = input.meta["val"]
    if grad_sum is not None or dims != 1 or value.dim() != 4 or value.dtype is torch.float64:
        return
    if not all(isinstance(size, int) for size in value.shape) or not is_served([input], weight, dims, eps):
        return
    if only_user([arrives]) is not backward or not moves(arrives):
        return
    sum: Any = arrives.args[0]
    if (turn := _before(sum)) and [*sum.users] == [arrives] and is_written(turn.grad):
        arguments = turn.grad, turn.cos, turn.sin, input, rstd, *given[4:]
        taken = results(backward, 0), results(backward, 1)
        become(graph, backward, _followed.turned_rms_norm_backward, arguments, taken, backward)
        erase(graph, (arrives, sum, *turn.between))


def _before(sum: Any) -> _Turn | None:
    """What makes the gradient that arrives, from the one of what was turned."""
    if sum.target is not aten.add.Tensor or sum.kwargs or not all(isinstance(one, Node) for one in sum.args):
        return None
    for by_cos, moved in (sum.args, sum.args[::-1]):
        if [*by_cos.users] == [*moved.users] == [sum] and (found := _by_sin(moved)):
            by_sin, between = found
            for grad, cos in _factors(by_cos):
                sin = next((angle for one, angle in _factors(by_sin) if one is grad), None)
                if sin is not None and is_angle(cos, sum) and is_angle(sin, sum):
                    return _Turn(grad, cos, sin, (by_cos, moved, *between, by_sin))
    return None


def _by_sin(moved: Any) -> tuple[Node, tuple[Node, ...]] | None:
    """Of (b, -a) the node whose halves of the columns are a and b, and the nodes between."""
    if moved.target is not aten.cat.default or moved.args[1:] not in ((3,), (-1,)) or len(moved.args[0]) != 2:
        return None
    second, negated = moved.args[0]
    if negated.target is not aten.neg.default or second.target is not aten.slice.Tensor:
        return None
    first, by_sin = negated.args[0], second.args[0]
    columns = moved.meta["val"].shape[-1]
    half = columns // 2
    halves = is_slice(first, by_sin, 0, half, columns) and is_slice(second, by_sin, half, columns, columns)
    between = negated, first, second
    alone = {*by_sin.users} == {first, second} and all(only_user([one]) is not None for one in between)
    return (by_sin, between) if halves and alone and columns % 2 == 0 else None


def _factors(node: Any) -> list[tuple[Node, Node]]:
    """Of a product of two tensors, in both orders."""
    if node.target is not aten.mul.Tensor or not all(isinstance(one, Node) for one in node.args):
        return []
    one, other = node.args
    return [(one, other), (other, one)]
