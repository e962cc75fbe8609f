"""The only file that rewrites graphs of Inductor's: a norm and what stands beside it become one operator of ours.

Imported when ``torch.compile`` first meets a norm (``_graphs.py``). Inductor calls the pass once for each graph, those
of forward and those of backward, before it looks for what it can fuse itself. Only nodes beside our operators change.
What is joined has the bits of the steps one after the other:

    s = a + b;  y = norm(s)             add_rms_norm: a sum is written and normalised in one pass
    s = r + norm(x)                     rms_norm_add
    s = r + norm(x);  y = norm(s)       sandwich_rms_norm
    y = norm(a + b).to(other)           add_rms_norm_cast, between float32 and half types, without gradients
    y = norm(x) * r                     rms_norm_times, without gradients
    s = x * 24;  y = norm(s)            scale_rms_norm, without gradients
    dx = backward(grad);  dx + g        backward(grad, g), which rounds in between
    ds = backward(grad);  backward(ds)  sandwich_rms_norm_backward
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Graph, Node

from . import _called, _followed, _nodes, _turned
from ._nodes import (
    aten,
    filled,
    follow,
    is_own_type,
    is_written,
    known_equal,
    only_user,
    precede,
    producer,
    reads_memory,
    results,
)

_ours = torch.ops.rmsnorm
_HALF = torch.bfloat16, torch.float16
_CASTS = frozenset({aten._to_copy.default, torch.ops.prims.convert_element_type.default})


class Neighbours(CustomGraphPass):
    """The pass."""

    def __call__(self, graph: Graph) -> None:
        _turned.join(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _JOINS and not node.kwargs:
                join, end = _JOINS[node.target]
                join(graph, node, end)
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is _operator("add_rms_norm", ""):
                _join_cast(graph, node)
            elif node.op == "call_function" and node.target is _BACKWARD:
                _join_gradients(graph, node)

    def uuid(self) -> bytes:
        written = [
            str(Path(__file__).with_name(f"{name}.py")) for name in ("_called", "_direct", "_followed", "_template")
        ]
        return get_hash_for_files((__file__, _nodes.__file__, _turned.__file__, *written), str(_called.ready()))


def _join_norm(graph: Graph, norm: Node, end: str) -> None:
    """``end`` is that of the operators' names: what backward reads is returned, too, or not."""
    input, weight, *options = filled(norm)
    output, rstd = results(norm, 0), results(norm, 1)
    add = only_user(output)
    if (first := producer(input)) is not None and first.target is _operator("rms_norm_add", end):
        x, residual, first_weight, *first_options = first.args
        (dims, eps, *more), (first_dims, _, *first_more) = options, first_options
        if dims == first_dims and more == first_more and precede(first, weight) and is_own_type(norm):
            arguments = x, residual, first_weight, weight, *first_options, eps
            taken = output, results(first, 0), results(first, 1), rstd
            _become(graph, first, _operator("sandwich_rms_norm", end), arguments, taken, norm)
    elif (summands := _summands(input)) and all(map(is_written, summands)) and precede(input, weight):
        arguments = *summands, weight, *options
        _become(graph, input, _operator("add_rms_norm", end), arguments, (output, [input], rstd), norm)
    elif (
        not end
        and (scaled := _scaled(input))
        and precede(input, weight)
        and _is_served(scaled[:1], weight, *options[:2])
    ):
        _become(graph, input, _followed.scale_rms_norm, (*scaled, weight, *options), (output, [input]), norm)
    elif add and (residual := _other(add, output[0])) and is_own_type(norm) and follow(add, rstd):
        arguments = input, residual, weight, *options
        _become(graph, add, _operator("rms_norm_add", end), arguments, ([add], rstd), norm)
    elif (
        add
        and not end
        and all(map(reads_memory, add.users))
        and (factor := _other(add, output[0], aten.mul.Tensor))
        and is_own_type(norm)
        and _is_served((input, factor), weight, *options[:2])
    ):
        _become(graph, add, _followed.rms_norm_times, (input, factor, weight, *options), ([add],), norm)


def _join_gradient(graph: Graph, backward: Node, _: str) -> None:
    grad, grad_sum, input, rstd, weight, dims, eps, *others, need_input, need_weight = backward.args
    dx, dw = results(backward, 0), results(backward, 1)
    add = only_user(dx)
    if grad_sum is not None or not need_input or add is None or not follow(add, dw):
        return
    if (more := _other(add, dx[0])) and _is_served((grad, more, input), weight, dims, eps):  # type: ignore[arg-type]
        arguments = grad, more, input, rstd, weight, dims, eps, *others, need_input, need_weight
        _become(graph, add, _followed.rounded_rms_norm_backward, arguments, ([add], dw), backward)


def _join_gradients(graph: Graph, first: Node) -> None:
    """Those of a norm, and of the norm of its sum, which came before."""
    grad, grad_sum, input, rstd, weight, dims, eps, offset, *needs = first.args
    second: Any = producer(grad)
    if second is None or second.target not in _GRADIENTS or grad_sum is not None or not second.args[-2]:
        return
    *grads, sum, next_rstd, next_weight, next_dims, next_eps, next_offset, _, need_next = second.args
    rows = [one for one in (*grads, input, sum) if one is not None]
    served = all(_is_served(rows, one, dims, eps) for one in (weight, next_weight))
    taken = [results(one, place) for place in (0, 1) for one in (first, second)]
    if (dims, offset) == (next_dims, next_offset) and served and precede(second, input, rstd, weight):
        options = dims, eps, offset, next_eps, needs[0], True, needs[1], need_next
        arguments = *grads, input, sum, rstd, next_rstd, weight, next_weight, *options
        _become(graph, second, _followed.rounded_sandwich_rms_norm_backward, arguments, taken, first)


def _join_cast(graph: Graph, norm: Node) -> None:
    """The kernel, which has the output in float32, rounds it once more as it stores it."""
    input, residual, weight, dims, eps, *_ = norm.args
    output, sum = results(norm, 0), results(norm, 1)
    cast = only_user(output)
    if cast is None or cast.target not in _CASTS or not set(cast.kwargs) <= {"dtype"} or not follow(cast, sum):
        return
    dtypes = norm.meta["val"][0].dtype, cast.meta["val"].dtype
    known = torch.float32 in dtypes and any(dtype in _HALF for dtype in dtypes)
    if known and is_own_type(norm) and _is_served((input, residual), weight, dims, eps):  # type: ignore[arg-type]
        _become(graph, cast, _followed.add_rms_norm_cast, (*norm.args, dtypes[1]), ([cast], sum), norm)


def _is_served(rows: Sequence[Node], weight: Any, dims: Any, eps: Any) -> bool:
    """Whether _direct.py calls a kernel: contiguous rows, and a weight of one row, all of one type."""
    values = [one.meta["val"] for one in rows]
    same = all(known_equal(value.stride(), make_contiguous_strides_for(value.shape)) for value in values)
    gain: Any = None if weight is None else weight.meta["val"]
    dtypes = {value.dtype for value in values} | ({gain.dtype} if gain is not None else set())
    fits = gain is None or gain.dim() == dims
    return same and fits and len(dtypes) == 1 and values[0].dtype in _nodes.TYPES and eps >= 0


def _operator(name: str, end: str) -> Any:
    return getattr(_ours, name + end).default


_BACKWARD = _operator("rms_norm", "_backward")
_GRADIENTS = frozenset({_BACKWARD, _followed.rounded_rms_norm_backward})
_JOINS: dict[Any, tuple[Callable[[Graph, Node, str], None], str]] = {
    _operator("rms_norm", ""): (_join_norm, ""),
    _operator("rms_norm", "_forward"): (_join_norm, "_forward"),
    _BACKWARD: (_join_gradient, ""),
}


def _summands(node: Any, target: Any = aten.add.Tensor) -> tuple[Node, Node] | None:
    """Of a sum, or a product, of two tensors of one shape and type on the CPU, which is contiguous."""
    if not isinstance(node, Node) or node.target is not target or node.kwargs or len(node.args) != 2:
        return None
    values = [one.meta.get("val") if isinstance(one, Node) else None for one in (node, *node.args)]
    sum: Any = values[0]
    for value in values:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype not in _nodes.TYPES:
            return None
        if value.dtype is not sum.dtype or not known_equal(value.shape, sum.shape):
            return None
    contiguous = known_equal(sum.stride(), make_contiguous_strides_for(sum.shape))
    return node.args if contiguous else None  # type: ignore[return-value]


def _scaled(node: Any) -> tuple[Node, float] | None:
    """Of a product with a number what is multiplied, if that lies in memory, and the number."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor or node.kwargs:
        return None
    one, number = node.args
    if not isinstance(one, Node) or not isinstance(number, int | float) or not is_written(one):
        return None
    value, product = one.meta["val"], node.meta["val"]
    same = value.device.type == "cpu" and value.dtype is product.dtype
    return (one, float(number)) if same else None


def _other(node: Node, one: Node, target: Any = aten.add.Tensor) -> Node | None:
    """What is added to it, or multiplied with it, if that is another tensor, and lies in memory."""
    if not (summands := _summands(node, target)) or summands[0] is summands[1]:
        return None
    other = summands[summands[0] is one]
    return other if is_written(other) else None


def _become(
    graph: Graph, at: Node, target: Any, arguments: Sequence[Any], taken: Sequence[list[Node]], last: Node
) -> None:
    """An operator before ``at``: its results take the place of these nodes; ``last``, whose work it does, goes."""
    with graph.inserting_before(at):
        _nodes.replace(graph, _nodes.call(graph, target, *arguments), taken)
    gone = {node for old in taken for node in old}
    takers: set[Any] = {node.args[0] for node in gone if node.target is operator.getitem}
    _nodes.erase(graph, gone | takers | {last, *last.users})
