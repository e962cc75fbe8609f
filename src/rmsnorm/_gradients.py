"""The only file that rewrites graphs of Inductor's where the gradients of a norm are: what stands beside them.

What is joined has the bits of the steps one after the other:

    dx = backward(grad);  dx + g        backward(grad, g), which rounds in between
    ds = backward(grad);  backward(ds)  sandwich_rms_norm_backward
    backward(grad.to(other))            around_rms_norm_backward, as the next two: each is done with a few rows, while
    g * r;  g * y;  backward(g * r)     they are in a cache
    dx = backward(grad);  dx * 24
    backward(grad·cos + rotate(grad·sin))   turned_rms_norm_backward (``_turned_back.py``)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from . import _followed, _nodes, _turned_back
from ._nodes import aten, become, follow, is_served, is_written, only_user, operands, precede, results

_BACKWARD = frozenset({torch.ops.rmsnorm.rms_norm_backward.default, _followed.few_rms_norm_backward})
_GRADIENTS = _BACKWARD | {_followed.rounded_rms_norm_backward}


def join(graph: Graph) -> None:
    for targets, join in (
        (_BACKWARD, _turned_back.join),
        (_BACKWARD, _add),
        (_BACKWARD, _sandwich),
        (_GRADIENTS, _around),
    ):
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in targets and not node.kwargs:
                join(graph, node)


def _add(graph: Graph, backward: Node) -> None:
    grad, grad_sum, input, rstd, weight, dims, eps, *others, need_input, need_weight = backward.args
    dx, dw = results(backward, 0), results(backward, 1)
    add = only_user(dx)
    if grad_sum is not None or not need_input or add is None or not follow(add, dw):
        return
    if (more := _nodes.partner(add, dx[0])) and is_served((grad, more, input), weight, dims, eps):  # type: ignore[arg-type]
        arguments = grad, more, input, rstd, weight, dims, eps, *others, need_input, need_weight
        become(graph, add, _followed.rounded_rms_norm_backward, arguments, ([add], dw), backward)


def _sandwich(graph: Graph, first: Node) -> None:
    """Those of a norm, and of the norm of its sum, which came before."""
    grad, grad_sum, input, rstd, weight, dims, eps, offset, *needs = first.args
    second: Any = _nodes.producer(grad)
    if second is None or second.target not in _GRADIENTS or grad_sum is not None or not second.args[-2]:
        return
    *grads, sum, next_rstd, next_weight, next_dims, next_eps, next_offset, _, need_next = second.args
    rows = [one for one in (*grads, input, sum) if one is not None]
    served = all(is_served(rows, one, dims, eps) for one in (weight, next_weight))
    taken = [results(one, place) for place in (0, 1) for one in (first, second)]
    if (dims, offset) == (next_dims, next_offset) and served and precede(second, input, rstd, weight):
        options = dims, eps, offset, next_eps, needs[0], True, needs[1], need_next
        arguments = *grads, input, sum, rstd, next_rstd, weight, next_weight, *options
        become(graph, second, _followed.rounded_sandwich_rms_norm_backward, arguments, taken, first)


def _around(graph: Graph, backward: Node) -> None:
    """A cast or a product in front of it, with the product's other gradient, and a product with a number behind it."""
    given: Any = backward.args
    made, grad_sum, input, rstd, weight, dims, eps, *others = given
    dx, dw = results(backward, 0), results(backward, 1)
    grad, other, output, gone = made, None, None, list[Node]()
    if only_user([made]) is backward and made is not grad_sum and made.op == "call_function":
        if _nodes.is_cast(made) and is_written(made.args[0]):
            grad = made.args[0]
        elif (factors := operands(made, aten.mul.Tensor)) and all(map(is_written, factors)):
            grad, other, output, gone = _product(backward, made, factors)
    scale, scaled = None, only_user(dx)
    if scaled and (product := _nodes.scaled(scaled)):
        scale, dx = product[1], [scaled]
    rows = [one for one in (made, grad_sum, input, other, output) if one is not None]
    if (grad is made and scale is None) or input.meta["val"].dtype is torch.float64:
        return
    if not _nodes.is_contiguous(grad.meta["val"]) or not is_served(rows, weight, dims, eps):
        return
    arguments = grad, other, output, scale, grad_sum, input, rstd, weight, dims, eps, *others
    become(graph, backward, _followed.around_rms_norm_backward, arguments, (dx, dw, gone), backward)
    _nodes.erase(graph, [made])


def _product(backward: Node, made: Node, factors: Sequence[Node]) -> tuple[Node, Node, Node | None, list[Node]]:
    """What arrives, what it is multiplied with, and where one is found in memory, what else it is multiplied with, and
    that product."""
    for grad, other in (factors, factors[::-1]):
        for user in grad.users:
            output = _nodes.partner(user, grad, aten.mul.Tensor)
            if user is made or output is None or not all(map(_nodes.reads_memory, user.users)):
                continue
            if precede(backward, output) and follow(backward, [user]):
                return grad, other, output, [user]
    return factors[0], factors[1], None, []
