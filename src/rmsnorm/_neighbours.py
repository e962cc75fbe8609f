"""The only file that rewrites graphs of Inductor's: a norm and what stands beside it become one operator of ours.

Imported when ``torch.compile`` first meets a norm (``_graphs.py``). Inductor calls the pass once for each graph, those
of forward and those of backward, before it looks for what it can fuse itself. Only nodes beside our operators change.
What is joined has the bits of the steps one after the other:

    s = a + b;  y = norm(s)             add_rms_norm: a sum is written and normalised in one pass
    s = r + norm(x)                     rms_norm_add
    s = r + norm(x);  y = norm(s)       sandwich_rms_norm
    dx = backward(grad);  dx + g        backward(grad, g), in float32 and float64: in half types a rounding would go
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

_aten, _ours = torch.ops.aten, torch.ops.rmsnorm
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIDE = (torch.float32, torch.float64)
_VIEWS = frozenset(
    {
        getattr(_aten, name).default
        for name in ("view", "_unsafe_view", "reshape", "permute", "t", "unsqueeze", "expand")
    }
    | {_aten.squeeze.dim, _aten.squeeze.dims, _aten.transpose.int}
)
_WRITTEN = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default})
"""Operators of aten's whose results Inductor writes to memory; most others it computes where they are read."""


class Neighbours(CustomGraphPass):
    """The pass."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target in _JOINS and not node.kwargs:
                join, end = _JOINS[node.target]
                join(graph, node, end)

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def _join_norm(graph: Graph, norm: Node, end: str) -> None:
    """``end`` is that of the operators' names: what backward reads is returned, too, or not."""
    input, weight, *options = _filled(norm)
    output, rstd = _results(norm, 0), _results(norm, 1)
    add = _only_user(output)
    if (first := _producer(input)) is not None and first.target is _operator("rms_norm_add", end):
        x, residual, first_weight, *first_options = first.args
        (dims, eps, *more), (first_dims, _, *first_more) = options, first_options
        if dims == first_dims and more == first_more and _precede(first, weight) and _is_own_type(norm):
            arguments = x, residual, first_weight, weight, *first_options, eps
            taken = output, _results(first, 0), _results(first, 1), rstd
            _become(graph, first, _operator("sandwich_rms_norm", end), arguments, taken, norm)
    elif (summands := _summands(input)) and all(map(_is_written, summands)) and _precede(input, weight):
        arguments = *summands, weight, *options
        _become(graph, input, _operator("add_rms_norm", end), arguments, (output, [input], rstd), norm)
    elif add and (residual := _other(add, output[0])) and _is_own_type(norm) and _follow(add, rstd):
        arguments = input, residual, weight, *options
        _become(graph, add, _operator("rms_norm_add", end), arguments, ([add], rstd), norm)


def _join_gradient(graph: Graph, backward: Node, _: str) -> None:
    grad, grad_sum, *others, need_input, need_weight = backward.args
    dx, dw = _results(backward, 0), _results(backward, 1)
    add = _only_user(dx)
    if grad_sum is not None or not need_input or add is None or not _follow(add, dw):
        return
    if (more := _other(add, dx[0])) and add.meta["val"].dtype in _WIDE:
        arguments = grad, more, *others, need_input, need_weight
        _become(graph, add, backward.target, arguments, ([add], dw), backward)


def _operator(name: str, end: str) -> Any:
    return getattr(_ours, name + end).default


_JOINS: dict[Any, tuple[Callable[[Graph, Node, str], None], str]] = {
    _operator("rms_norm", ""): (_join_norm, ""),
    _operator("rms_norm", "_forward"): (_join_norm, "_forward"),
    _operator("rms_norm", "_backward"): (_join_gradient, ""),
}


def _filled(node: Node) -> list[Any]:
    """Its arguments, and the defaults of those that weren't given."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return [*node.args, *(argument.default_value for argument in schema.arguments[len(node.args) :])]


def _results(node: Node, place: int) -> list[Node]:
    """Where a result of an operator is taken from the tuple; the node itself, if there is only one."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node] if place == 0 else []
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == place]


def _producer(node: Any) -> Node | None:
    """The operator whose first result it is."""
    if isinstance(node, Node) and node.target is operator.getitem:
        return node.args[0] if node.args[1] == 0 else None  # type: ignore[return-value]
    return node if isinstance(node, Node) else None


def _only_user(nodes: Sequence[Node]) -> Node | None:
    users = [user for node in nodes for user in node.users]
    return users[0] if len(nodes) == 1 and len(users) == 1 else None


def _precede(node: Node, *others: Any) -> bool:
    return all(not isinstance(one, Node) or one < node for one in others)


def _follow(node: Node, results: Sequence[Node]) -> bool:
    """Whether nothing before it uses these."""
    return all(node < user for one in results for user in one.users)


def _is_own_type(norm: Node) -> bool:
    """Whether the output has the input's type."""
    first: Any = norm.args[0]
    value = norm.meta["val"]
    return (value if isinstance(value, Tensor) else value[0]).dtype is first.meta["val"].dtype


def _known_equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and statically_known_true(sym_eq(tuple(a), tuple(b)))


def _summands(node: Any) -> tuple[Node, Node] | None:
    """Of a sum of two tensors of one shape and type on the CPU, which is contiguous."""
    if not isinstance(node, Node) or node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    values = [one.meta.get("val") if isinstance(one, Node) else None for one in (node, *node.args)]
    sum: Any = values[0]
    for value in values:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype not in _TYPES:
            return None
        if value.dtype is not sum.dtype or not _known_equal(value.shape, sum.shape):
            return None
    contiguous = _known_equal(sum.stride(), make_contiguous_strides_for(sum.shape))
    return node.args if contiguous else None  # type: ignore[return-value]


def _other(add: Node, one: Node) -> Node | None:
    """What is added to it, if that is another tensor, and lies in memory."""
    if not (summands := _summands(add)) or summands[0] is summands[1]:
        return None
    other = summands[summands[0] is one]
    return other if _is_written(other) else None


def _is_written(node: Node) -> bool:
    """Whether it lies in memory anyway: to write what Inductor would compute where it is read costs the pass over
    memory that joining saves."""
    while node.op == "call_function" and node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "call_function" or node.target is operator.getitem or node.target in _WRITTEN:
        return True
    return getattr(node.target, "namespace", "aten") not in ("aten", "prims")


def _become(
    graph: Graph, at: Node, target: Any, arguments: Sequence[Any], taken: Sequence[list[Node]], last: Node
) -> None:
    """An operator before ``at``: its results take the place of these nodes; ``last``, whose work it does, goes."""
    with graph.inserting_before(at):
        joined = graph.call_function(target, tuple(arguments))
        joined.meta["val"] = target(*map_arg(tuple(arguments), lambda node: node.meta["val"]))
        for place, old in enumerate(taken):
            if not old:
                continue
            new = joined
            if not isinstance(joined.meta["val"], Tensor):
                new = graph.call_function(operator.getitem, (joined, place))
                new.meta["val"] = joined.meta["val"][place]
            for node in old:
                node.replace_all_uses_with(new)
    gone = {node for old in taken for node in old}
    gone |= {last, *last.users, *(node.args[0] for node in gone if node.target is operator.getitem)}  # type: ignore[arg-type]
    for node in sorted(gone, reverse=True):
        if not node.users:
            graph.erase_node(node)
