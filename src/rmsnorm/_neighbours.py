"""The only file that rewrites graphs of Inductor's: a norm and what stands beside it become one operator of ours.

Imported when ``torch.compile`` first meets a norm (``_graphs.py``). Inductor calls the pass once for each graph, those
of forward and those of backward, before it looks for what it can fuse itself. Only nodes beside our operators change.
What is joined has the bits of the steps one after the other:

    s = a + b;  y = norm(s)             add_rms_norm: a sum is written and normalised in one pass
    s = r + norm(x)                     rms_norm_add
    s = r + norm(x);  y = norm(s)       sandwich_rms_norm
    y = norm(a + b).to(half)            add_rms_norm with that type, from float32 and without gradients
    dx = backward(grad);  dx + g        backward(grad, g), in float32 and float64: in half types a rounding would go
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

from . import _called, _nodes, _turned
from ._nodes import aten, filled, follow, is_own_type, is_written, known_equal, only_user, precede, producer, results

_ours = torch.ops.rmsnorm
_WIDE, _HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
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

    def uuid(self) -> bytes:
        written = [str(Path(__file__).with_name(f"{name}.py")) for name in ("_called", "_direct", "_template")]
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
    elif add and (residual := _other(add, output[0])) and is_own_type(norm) and follow(add, rstd):
        arguments = input, residual, weight, *options
        _become(graph, add, _operator("rms_norm_add", end), arguments, ([add], rstd), norm)


def _join_gradient(graph: Graph, backward: Node, _: str) -> None:
    grad, grad_sum, *others, need_input, need_weight = backward.args
    dx, dw = results(backward, 0), results(backward, 1)
    add = only_user(dx)
    if grad_sum is not None or not need_input or add is None or not follow(add, dw):
        return
    if (more := _other(add, dx[0])) and add.meta["val"].dtype in _WIDE:
        arguments = grad, more, *others, need_input, need_weight
        _become(graph, add, backward.target, arguments, ([add], dw), backward)


def _join_cast(graph: Graph, norm: Node) -> None:
    """float32 to a half type: the kernel, which has the output in float32, rounds once more as it stores it."""
    input, residual, weight, dims, eps, offset, round_first = norm.args
    output, sum = results(norm, 0), results(norm, 1)
    cast = only_user(output)
    if cast is None or cast.target not in _CASTS or not set(cast.kwargs) <= {"dtype"} or not follow(cast, sum):
        return
    dtypes = norm.meta["val"][0].dtype, cast.meta["val"].dtype
    value: Any = None if weight is None else weight.meta["val"]  # type: ignore[union-attr]
    fits = value is None or (value.dtype is dtypes[0] and value.dim() == dims)
    if dtypes[0] is torch.float32 and dtypes[1] in _HALF and fits and eps >= 0:  # type: ignore[operator]
        options = dims, eps, offset, round_first, -1, True, dtypes[1]
        arguments = input, residual, weight, None, *options
        _become(graph, cast, _ours.general_add_rms_norm.default, arguments, ([cast], sum), norm)


def _operator(name: str, end: str) -> Any:
    return getattr(_ours, name + end).default


_JOINS: dict[Any, tuple[Callable[[Graph, Node, str], None], str]] = {
    _operator("rms_norm", ""): (_join_norm, ""),
    _operator("rms_norm", "_forward"): (_join_norm, "_forward"),
    _operator("rms_norm", "_backward"): (_join_gradient, ""),
}


def _summands(node: Any) -> tuple[Node, Node] | None:
    """Of a sum of two tensors of one shape and type on the CPU, which is contiguous."""
    if not isinstance(node, Node) or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
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


def _other(add: Node, one: Node) -> Node | None:
    """What is added to it, if that is another tensor, and lies in memory."""
    if not (summands := _summands(add)) or summands[0] is summands[1]:
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
